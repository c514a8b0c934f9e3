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

from ..base.devices import addresses
from ..base.errors import RecipeError
from .decode_fuse import Fuse, fused_forward
from .decode_linear import came_apart, join_projections, restore_linears, stream_linears
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
        self._weights: tuple[int, ...] = ()  # where the captured step reads them
        self._mask: Tensor | None = None  # bool [B, columns] while a column is padding
        self._token = self._position = self._logits = torch.empty(0, device=self.device)

    # the parts -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Store the columns input_ids [B,n]; logits [B,V] of the last column.

        attention_mask [B,n] (1 = token) belongs to these columns; columns of earlier calls keep theirs.
        """
        _check_input(input_ids, attention_mask)
        rows, count = input_ids.shape
        columns = self.cache.get_seq_length()
        if self._mask is None and columns:
            self._mask = self._stored_padding()
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
        self._check_weights()
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

        `keep_cache=True` continues: input_ids is the whole conversation, its first columns being those in the cache;
        attention_mask may not hide a token among them (CFG-049): a step sees all that is stored.
        The host looks at the device every `stop_every` tokens and where the cache is full (never when eos_token_id is
        None): steps made beyond the last end are not packed, and not refused for want of room.
        """
        if max_new_tokens < 1 or stop_every < 1:
            raise RecipeError(
                f"generate: max_new_tokens is {max_new_tokens}, stop_every {stop_every}; both must be at least 1",
                code="CFG-047",
            )
        _check_input(input_ids, attention_mask)
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
            self._mask = self._kept_mask(attention_mask[:, :start].to(self.device, torch.bool))
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
            looks = ends is not None and ((index + 1) % stop_every == 0 or self._is_full())
            if last or (looks and bool(finished.all())):
                break
            logits = self.step(token)
            if ends is not None:
                self._uncount(finished)
        out = torch.cat([input_ids.to(self.device), _without_tail(made[:, : index + 1], ends)], 1)
        self._drop(self.cache.get_seq_length() - (out.shape[1] - 1))  # the last token of all is not stored either
        return out

    # inside ----------------------------------------------------------------------------------------------------

    def _is_full(self) -> bool:
        assert self._target is not None
        return self._target.is_full()

    def _uncount(self, finished: Tensor) -> None:
        """The step just made leaves no saliency evidence if all rows had ended before it, which the device knows."""
        assert self._target is not None
        self._target.uncount(finished)

    def _drop(self, columns: int) -> None:
        """Take back steps made before the host saw that all rows had ended: what is stored, and the evidence from which it
        will be packed, are those of the text that is returned."""
        assert self._target is not None
        if columns > 0:
            self._target.drop(columns)
            self._position.sub_(columns)
            self._check_capture()

    def _stored_padding(self) -> Tensor | None:
        """The mask of a cache that was filled elsewhere (by generate, restored), if any of its columns is padding."""
        stored = as_decodable(self.cache).valid_columns()
        return None if stored is None or bool(stored.all()) else stored

    def _kept_mask(self, mask: Tensor) -> Tensor:
        """The mask of the columns in the cache, if it hides none that a step would see."""
        stored = as_decodable(self.cache).valid_columns()
        hidden = ~mask if stored is None else stored & ~mask
        if bool(hidden.any()):
            raise RecipeError(
                f"generate(keep_cache=True): attention_mask hides {int(hidden.sum())} columns that are in the cache as "
                "tokens, for example the padding after an answer that ended early; a step sees all that is stored. Use "
                "model.generate with the cache, or keep_cache=False",
                code="CFG-049",
            )
        return mask if stored is None else stored  # what a column was when it was stored, it stays

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

    def _check_weights(self) -> None:
        """A step reads weights and buffers (routed experts are buffers) where they lay when it was captured: capture it anew
        when they lie elsewhere."""
        if came_apart(self._changed):
            raise RecipeError(
                "compile_decode: weights of the model were replaced, cast or moved since; call close() before such a change "
                "and compile_decode again after it",
                code="CFG-047",
            )
        found = addresses(self.model)
        if found != self._weights:
            self._weights, self._graph, self._warm = found, None, 0

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
        if isinstance(asked, str):
            raise RecipeError(
                f"generate: eos_token_id is {asked!r}; it must be 'model', a token's number, several, or None",
                code="CFG-047",
            )
        return torch.tensor([asked] if isinstance(asked, int) else list(asked), device=self.device)

    def _pad(self, asked: int | None, ends: Tensor | None) -> int:
        settings = getattr(self.model, "generation_config", None)
        if asked is None:
            asked = getattr(settings, "pad_token_id", None)
        if asked is None:
            asked = 0 if ends is None else int(ends[0])
        return asked


def _check_input(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    if input_ids.dim() != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        seen = "none" if attention_mask is None else str(tuple(attention_mask.shape))
        raise RecipeError(
            f"compile_decode: input_ids {tuple(input_ids.shape)}, attention_mask {seen}; needed are two of one shape "
            "(rows, columns), 1 for a token and 0 for padding, or no mask",
            code="CFG-047",
        )


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
    """The captured decode step of `model` with `cache` (a ZipCache or a StaticKV; None: a ZipCache of `capacity`).

    Without a capacity the ZipCache grows; each time it does (by half) the step is captured anew.
    fuse   "model" (one compiled graph), "layer" (one compiled layer, seconds instead of a minute), "none" or False
           (the model's own launches, captured: for whatever the compiler refuses)
    join   multiply q, k, v and gate, up at once in the compiled step (weights become views of one storage)
    stream read weights by our kernel for up to 16 rows instead of the library's GEMM (16-bit weights on a GPU)
    tune   let the compiler measure GEMM variants: slower to start, faster matrix-vector products
    A captured step keeps the router and k of a routed model: after `set_router` make another.
    Raises RecipeError for sliding windows shorter than the capacity and attention the step does not know.
    """
    if cache is None:
        from .hf import ZipCache

        cache = ZipCache(model.config, capacity=capacity)
    held = getattr(cache, "capacity", None)
    if capacity is not None and held is not None and capacity != held:
        raise RecipeError(
            f"compile_decode: capacity is {capacity}, the cache's own is {held}; give one", code="CFG-047"
        )
    check_model(model, held or capacity or 0)
    if isinstance(fuse, bool):
        fuse = "model" if fuse else "none"
    return CompiledDecode(model, cache, fuse=fuse, join=join, stream=stream, tune=tune)
