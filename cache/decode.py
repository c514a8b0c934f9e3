"""compile_decode: the whole decode step of a Hugging Face causal LM as one CUDA graph.

    cache = quietgoose.ZipCache(model.config, capacity=8192)     # or StaticKV(model.config, capacity=8192), plain 16 bit
    decode = quietgoose.compile_decode(model, cache)
    tokens = decode.generate(input_ids, attention_mask, max_new_tokens=256)

The model's code is not touched: its pointwise launches are fused by torch.compile (`fuse`), its attention goes to the
cache through one operator (decode_step.py), and the step is captured once and replayed. Prefill runs through the
model's own forward. Between replays the host only counts; a full tail is flushed there. On a CPU the same object runs
the step uncaptured.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..base.errors import RecipeError
from .decode_fuse import Fuse, fused_forward
from .decode_linear import join_projections, restore_linears, stream_linears
from .decode_sampling import Sampling, choose
from .decode_static import StaticKV
from .decode_step import Decodable, check_model, decoding

WARM_STEPS = 2  # real steps before the capture: compilation, library handles, autotuning


class CompiledDecode:
    """One model, one cache, one captured step. Build it with compile_decode.

    `prefill` and `step` are the parts, `generate` the loop. Tensors returned by `step` are overwritten by the next.
    """

    def __init__(self, model: nn.Module, cache: Any, *, fuse: Fuse, join: bool, stream: bool, tune: bool) -> None:
        self.model, self.cache = model.eval(), cache
        self.device = next(model.parameters()).device
        self._forward = fused_forward(model, fuse, tune)
        self._changed = join_projections(model) if join and fuse != "none" else []
        self._changed += stream_linears(model) if stream else []
        self._target: Decodable | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._signature: Hashable = None
        self._warm = 0
        self._mask: Tensor | None = None  # bool [B, columns] while a column is padding
        self._token = self._position = self._logits = torch.empty(0, device=self.device)

    # the parts -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Store the columns input_ids [B,n]; logits [B,V] of the last column.

        attention_mask [B,n] (1 = token) belongs to these columns; columns of earlier calls keep theirs.
        """
        rows, count = input_ids.shape
        columns = self.cache.get_seq_length()
        if self._mask is None and attention_mask is not None:
            self._mask = torch.ones(rows, columns, dtype=torch.bool, device=self.device)
        if self._mask is not None:
            fresh = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            self._mask = torch.cat([self._columns_mask(columns), fresh.to(self.device, torch.bool)], 1)
            places = self._mask.long().cumsum(1) - 1
        else:
            places = torch.arange(columns + count, device=self.device).expand(rows, -1)
        if isinstance(self.cache, StaticKV):
            fresh_valid = None if self._mask is None else self._mask[:, columns:]
            self.cache.begin(rows, count, fresh_valid, self.device)
        out = self.model(
            input_ids=input_ids.to(self.device), attention_mask=None if self._mask is None else self._mask.long(),
            position_ids=places[:, columns:].clamp_min(0), past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.resume(rows, places[:, -1] + 1)
        return out.logits[:, -1]

    def resume(self, rows: int, position: Tensor | int) -> None:
        """Go on from a cache that was filled elsewhere (restored, forked): tokens each row has, int64 [rows] or int."""
        self._make_buffers(rows)
        self._position.copy_(torch.as_tensor(position, device=self.device).reshape(-1, 1))
        self._check_capture()

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Decode tokens int64 [B] or [B,1]: they enter the cache; logits [B,V] of what follows (a static buffer)."""
        if self._target is None:
            raise RecipeError("compile_decode: call prefill (or resume) before step", code="CFG-047")
        self._token.copy_(tokens.reshape(-1, 1))
        if self._target.before_step():
            self._check_capture()
        self._run()
        self._target.after_step()
        return self._logits

    __call__ = step

    def reset(self) -> None:
        """Forget the sequence; storage, compiled code and the captured step stay."""
        self.cache.reset()
        self._mask = None

    def close(self) -> None:
        """Drop the graph and give the model's linears their own class and storage back."""
        self._graph = None
        restore_linears(self._changed)
        self._changed = []

    # the loop --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        eos_token_id: int | Sequence[int] | Literal["model"] | None = "model",  # noqa: S107
        pad_token_id: int | None = None,
        stop_every: int = 16,
        generator: torch.Generator | None = None,
        keep_cache: bool = False,
    ) -> Tensor:
        """input_ids [B,n] and up to max_new_tokens more: int64 [B, n + new]; a row after its end holds pad.

        `keep_cache=True` continues: input_ids is the whole conversation, its first columns being those in the cache.
        The host looks at the device every `stop_every` tokens only (and never when eos_token_id is None).
        """
        if max_new_tokens < 1 or stop_every < 1:
            raise RecipeError(
                f"generate: max_new_tokens is {max_new_tokens}, stop_every {stop_every}; both must be at least 1",
                code="CFG-047",
            )
        if not keep_cache:
            self.reset()
        start = self.cache.get_seq_length()
        if input_ids.shape[1] <= start:
            raise RecipeError(
                f"generate: input_ids has {input_ids.shape[1]} columns, {start} are in the cache already; pass the "
                "whole conversation with at least one new column, or keep_cache=False",
                code="CFG-047",
            )
        fresh = None if attention_mask is None else attention_mask[:, start:]
        if start and attention_mask is not None:
            self._mask = attention_mask[:, :start].to(self.device, torch.bool)
        ends = self._ends(eos_token_id)
        pad = self._pad(pad_token_id, ends)
        logits = self.prefill(input_ids[:, start:], fresh)
        sampling = sampling or Sampling()
        made = torch.full((input_ids.shape[0], max_new_tokens), pad, dtype=torch.long, device=self.device)
        finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=self.device)
        for index in range(max_new_tokens):
            token = choose(logits, sampling, generator)
            if ends is not None:
                token = torch.where(finished, pad, token)
                finished |= (token[:, None] == ends).any(1)
            made[:, index] = token
            last = index + 1 == max_new_tokens
            if last or (ends is not None and (index + 1) % stop_every == 0 and bool(finished.all())):
                break
            logits = self.step(token)
        return torch.cat([input_ids.to(self.device), _without_tail(made[:, : index + 1], ends)], 1)

    # inside ----------------------------------------------------------------------------------------------------

    def _columns_mask(self, columns: int) -> Tensor:
        """The mask widened to the columns that steps have added since."""
        assert self._mask is not None
        return nn.functional.pad(self._mask, (0, columns - self._mask.shape[1]), value=True)

    def _make_buffers(self, rows: int) -> None:
        if self._token.shape != (rows, 1):
            self._token = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
            self._position = torch.zeros_like(self._token)
            self._graph, self._warm = None, 0
        self._target = as_decodable(self.cache)

    def _check_capture(self) -> None:
        """Drop the captured step if it no longer fits the cache (storage moved, another path)."""
        assert self._target is not None
        found = self._target.signature()
        if found != self._signature:
            self._signature, self._graph, self._warm = found, None, 0

    def _run(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self.device.type != "cuda" or self._warm < WARM_STEPS:
            self._warm += 1
            self._logits = self._step()
        else:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize(self.device)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._step()
            self._graph = graph
            graph.replay()

    def _step(self) -> Tensor:
        """What is captured: lengths grow, the model runs, positions grow."""
        assert self._target is not None
        self._target.enter_step()
        with decoding(self.model, self._target):
            logits = self._forward(self._token, self._position)
        self._position.add_(1)
        return logits

    def _ends(self, asked: int | Sequence[int] | str | None) -> Tensor | None:
        if asked == "model":
            asked = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        if asked is None:
            return None
        return torch.tensor([asked] if isinstance(asked, int) else list(asked), device=self.device)

    def _pad(self, asked: int | None, ends: Tensor | None) -> int:
        settings = getattr(self.model, "generation_config", None)
        if asked is None:
            asked = getattr(settings, "pad_token_id", None)
        if asked is None:
            asked = 0 if ends is None else int(ends[0])
        return asked


def _without_tail(made: Tensor, ends: Tensor | None) -> Tensor:
    """Cut the columns after the one in which the last row ended."""
    if ends is None:
        return made
    ended = (made[:, :, None] == ends).any(-1).cumsum(1).bool().all(0)
    return made[:, : int((~ended).sum()) + 1]


def as_decodable(cache: Any) -> Decodable:
    """The cache itself when it is one of ours with static tensors, or ZipCache's adapter."""
    if isinstance(cache, StaticKV):
        return cache
    from .decode_zip import ZipDecodable

    return ZipDecodable(cache)


def compile_decode(
    model: nn.Module,
    cache: Any = None,
    *,
    capacity: int | None = None,
    fuse: Fuse | bool = "model",
    join: bool = True,
    stream: bool = False,
    tune: bool = False,
) -> CompiledDecode:
    """The captured decode step of `model` with `cache` (a ZipCache or a StaticKV; None: ZipCache of `capacity`).

    fuse   "model" (one compiled graph), "layer" (one compiled layer, seconds instead of a minute), "none" or False
           (the model's own launches, captured: for whatever the compiler refuses)
    join   multiply q, k, v and gate, up at once in the compiled step (weights become views of one storage)
    stream read weights by our kernel for up to 16 rows instead of the library's GEMM (16-bit weights on a GPU)
    tune   let the compiler measure GEMM variants: slower to start, faster matrix-vector products
    Raises RecipeError for sliding windows shorter than the capacity and attention the step does not know.
    """
    if cache is None:
        if capacity is None:
            raise RecipeError("compile_decode: pass a cache, or capacity (tokens) for a ZipCache", code="CFG-047")
        from .hf import ZipCache

        cache = ZipCache(model.config, capacity=capacity)
    held = capacity or getattr(cache, "capacity", None)
    check_model(model, held or 0)
    if isinstance(fuse, bool):
        fuse = "model" if fuse else "none"
    return CompiledDecode(model, cache, fuse=fuse, join=join, stream=stream, tune=tune)
