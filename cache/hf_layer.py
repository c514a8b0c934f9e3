"""One layer of a ZipCache as transformers sees it: a cache layer whose attention reads the packed state in place.

`update` sees keys and values, but neither queries nor mask, so it only announces them and returns the *new* keys with
itself attached; the attention function (`hf_attention.py`) finds the layer there and calls `attend`, which computes the
output and stores the tokens. Which way a call goes:

    4-D mask, softcap, sinks                    stock attention over the dequantised history and the new tokens
    nothing stored, more than max_query tokens  stock attention of the new tokens, then pack
    at most 4 * max_query tokens                into the 16-bit tail, fused attention over arenas and tail
    more                                        history and new tokens apart, merged by log-sum-exp, then pack
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from ..base.errors import RecipeError
from ..kernels.cached_attention import merge
from .columns import SharedTables, shared_validity
from .hf_attention import HANDLE, NAME, HandledLength, columns_seen, stock_attention, stock_name
from .hf_causal import causal_attention
from .policy import Policy
from .state import LayerState

PIECES = 4  # queries up to this many times max_query still go through the tail, in pieces
FUSED_HEAD_DIMS = (64, 128)
FUSED_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DENSE_EXTRAS = {"softcap": "logit soft-capping", "s_aux": "attention sinks", "position_bias": "a position bias"}

_warned: set[str] = set()


def warn_once(topic: str, message: str) -> None:
    """One warning a process and topic."""
    if topic not in _warned:
        _warned.add(topic)
        warnings.warn(message, stacklevel=3)


class SharedConfig:
    """The model's config, held by reference also in copies of a cache."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedConfig:
        return self

    @property
    def is_switched(self) -> bool:
        return self.config._attn_implementation == NAME


class ZipLayer(CacheLayerMixin):
    """The quantised cache of one full-attention layer. `state` is None until the first `update`."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(
        self, policy: Policy, layer_index: int, shared: SharedConfig, capacity: int | None = None, offload: bool = False,
        tables: SharedTables | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tables = tables  # one for all layers of a cache
        self.policy = policy
        self.layer_index = layer_index
        self.shared = shared
        self.capacity = capacity
        self.offloads = offload
        self.state: LayerState | None = None
        self.waiting = False  # between update and attend
        self.blind = False  # tokens were stored without a padding mask, under a stock implementation
        self.hidden = False  # a later mask hid tokens that are stored as valid

    # ------------------------------------------------------------------ what transformers asks

    @property
    def batch_size(self) -> int:
        if self.state is None:
            raise AttributeError("batch_size is known after the first update")
        return self.state.batch

    def get_seq_length(self) -> int:
        return 0 if self.state is None else self.state.seq_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length = self.get_seq_length() + query_length
        return (HandledLength(length, self) if self.shared.is_switched else length), 0

    def get_max_length(self) -> int:
        return -1 if self.capacity is None else self.capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._check_shape(key_states, value_states)
        batch, kv_heads, length, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.state = LayerState(
            self.policy, batch=batch, kv_heads=kv_heads, head_dim=head_dim, dtype=self.dtype, device=self.device,
            capacity=self.capacity, layer_index=self.layer_index,
            expected=length if length > self.policy.max_query else 0,
        )  # fmt: skip
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Announce new keys and values [B,Hk,n,D] (after RoPE); returns them, or everything under stock attention."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RecipeError(
                "a ZipCache keeps no gradients: run the forward under torch.no_grad() or torch.inference_mode() (as "
                "generate does), or without past_key_values",
                code="CFG-065",
            )
        if self.waiting:
            raise RecipeError(
                f"layer {self.layer_index}: the keys of the last forward never reached the attention. Either that "
                "forward was interrupted (call cache.reset()), or the model does not use this config: make the cache "
                "as ZipCache(model.config), with the very config of the model, and an attention that takes the "
                "registered implementation",
                code="CFG-066",
            )
        if self.state is None:
            self.lazy_initialization(key_states, value_states)
        state = self._ready(key_states)
        if not self.shared.is_switched:
            return self._update_under_stock(state, key_states, value_states)
        self.waiting = True
        setattr(key_states, HANDLE, self)
        return key_states, value_states

    # ------------------------------------------------------------------ masks and attention

    def takes_chunk(self, query_length: int) -> bool:
        """Whether so many new tokens are packed at once instead of going through the tail."""
        pieces = 1 if self.get_seq_length() == 0 else PIECES
        return query_length > pieces * self.policy.max_query

    def takes_stock_mask(self, query_length: int) -> bool:
        return self.get_seq_length() == 0 and self.takes_chunk(query_length)

    def is_hidden_by(self, attention_mask: Tensor, query_length: int) -> bool:
        """Whether the mask [B,n] hides columns that are stored as valid, for example padding after an earlier answer.

        Looked at when more than one token comes (a new turn); from then on this cache takes the dense way.
        """
        state = self.state
        if self.hidden or state is None or query_length == 1 or state.seq_length == 0:
            return self.hidden
        stored = state.valid_columns().to(attention_mask.device)
        self.hidden = bool((stored & ~attention_mask[:, : state.seq_length].bool()).any())
        if self.hidden:
            warn_once(
                "hidden",
                "attention_mask hides tokens that a ZipCache stored as valid: it dequantises the whole history in every "
                "step from now on (correct, but slow); start a new cache to be fast again",
            )
        return self.hidden

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        extras: dict[str, Any],
    ) -> Tensor:
        """Attention of the new tokens over everything stored and themselves -> [B,q,H,D]; then they are stored."""
        state = self.state
        if state is None or not self.waiting:
            raise RecipeError(f"layer {self.layer_index}: attention without an update before it", code="CFG-066")
        if self.blind:
            raise RecipeError(
                "this ZipCache was filled under a stock attention implementation and cannot go on under "
                f"{NAME}: call cache.reset() and start again",
                code="CFG-067",
            )
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        custom = mask is not None and mask.dim() == 4
        dense = [reason for name, reason in DENSE_EXTRAS.items() if name in extras]
        if state.seq_length == 0 and (custom or self.takes_chunk(query.shape[2])):
            stock, _ = stock_attention(module, query, key, value, mask, scaling=factor, **extras)
            out, valid = stock, self._validity(mask, key)
            self._store(state, query, key, value, valid, factor)
        elif custom or dense:
            out = self._dense(state, module, query, key, value, mask, factor, extras, dense)
        elif self.takes_chunk(query.shape[2]):
            out = self._chunk(state, query, key, value, self._validity(mask, key), factor)
        else:
            out = self._through_tail(state, query, key, value, self._validity(mask, key), factor)
        self.waiting = False
        if self.offloads:
            self.offload()
        return out

    def _through_tail(
        self, state: LayerState, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float
    ) -> Tensor:
        """Append and attend, at most max_query tokens at a time. Nothing here waits for the device."""
        step = self.policy.max_query
        outs = []
        for start in range(0, query.shape[2], step):
            part = slice(start, start + step)
            state.append(key[:, :, part], value[:, :, part], None if valid is None else valid[:, part])
            outs.append(state.attend(query[:, :, part], scaling=scaling, follows=start > 0))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
        return out.transpose(1, 2).contiguous()

    def _chunk(
        self, state: LayerState, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float
    ) -> Tensor:
        """A later chunk of a prompt: history and new tokens apart, merged."""
        new, new_lse = causal_attention(query, key, value, valid, scaling=scaling)
        old, old_lse = state.attend_history(query, scaling=scaling)
        out, _ = merge(old, old_lse, new, new_lse)
        state.prefill(query, key, value, valid, scaling=scaling, shared=self.tables)
        return out.to(query.dtype).transpose(1, 2).contiguous()

    def _dense(
        self,
        state: LayerState,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        extras: dict[str, Any],
        reasons: list[str],
    ) -> Tensor:
        """Stock attention over the dequantised history in logical order: custom masks, and terms the kernel lacks."""
        if reasons:
            warn_once(
                f"dense {reasons[0]}",
                f"the ZipCache kernel does not know {reasons[0]}: layers that use it dequantise the whole history in "
                "every step (correct, but slow)",
            )
        old_key, old_value, old_valid = state.logical(key.dtype)
        valid = self._validity(mask, key)
        fresh = torch.ones_like(old_valid[:, :1]).expand(-1, key.shape[2]) if valid is None else valid
        seen = torch.cat([old_valid, fresh], dim=1)[:, None, None, :]
        full = self._full_mask(mask, query.shape[2], seen)
        name = stock_name(module.config)
        if name.startswith("flash"):  # it takes no 4-D mask
            name = "eager" if extras else "sdpa"
        if name == "eager" and full.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            full = torch.zeros_like(full, dtype=query.dtype).masked_fill(~full, lowest)
        keys, values = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        out, _ = stock_attention(module, query, keys, values, full, name=name, scaling=scaling, **extras)
        self._store(state, query, key, value, valid, scaling)
        return out

    def _full_mask(self, mask: Tensor | None, count: int, seen: Tensor) -> Tensor:
        """A 4-D mask over all columns, without padding; `seen` is bool [B,1,1,n] of what is not padding."""
        total = seen.shape[-1]
        if mask is None or mask.dim() == 2:
            column = torch.arange(total, device=seen.device)
            return seen & (column[None, :] <= column[total - count :, None])
        if mask.shape[-1] != total or mask.shape[-2] != count:
            raise RecipeError(
                f"4-D attention mask of {mask.shape[-2]} x {mask.shape[-1]} (queries x columns): this forward has "
                f"{count} queries, {total - count} stored columns and {total} in all",
                code="CFG-061",
            )
        if mask.dtype == torch.bool:
            return mask & seen
        return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)

    def _store(
        self, state: LayerState, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float
    ) -> None:
        if query.shape[2] <= self.policy.max_query:
            state.append(key, value, valid)
        else:
            state.prefill(query, key, value, valid, scaling=scaling, shared=self.tables)

    def _validity(self, mask: Tensor | None, key: Tensor) -> Tensor | None:
        """bool [B,n]: which of the new tokens are not padding; None: all."""
        if mask is None:
            return None
        batch, _, length, _ = key.shape

        def make() -> Tensor:
            seen = columns_seen(mask, length) if mask.dim() == 4 else mask[:, -length:].bool()
            return seen.to(key.device).expand(batch, length)

        return shared_validity(self.tables, self.layer_index, mask, make, batch, length, key.device)

    def _update_under_stock(self, state: LayerState, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The config went back to a stock implementation: store by ourselves, return everything dequantised."""
        warn_once(
            "stock",
            f"a ZipCache under attn_implementation = {self.shared.config._attn_implementation!r}: every step "
            f"dequantises the whole history and no saliency is measured; make the cache after set_attn_implementation, "
            f"or set {NAME!r} again",
        )
        old_key, old_value, _ = state.logical(key.dtype)
        if key.shape[2] <= self.policy.max_query:
            state.append(key, value)
        else:
            state.prefill(None, key, value, None, scaling=key.shape[-1] ** -0.5)
        self.blind = True
        return torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)

    # ------------------------------------------------------------------ rows, length, device

    def reset(self) -> None:
        self.waiting = self.blind = self.hidden = False
        if self.state is not None:
            self.state.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -tokens_to_remove tokens; 0 does nothing."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative integer, or 0"
            )
        if tokens_to_remove and self.state is not None:
            self.state.crop(min(-tokens_to_remove, self.state.seq_length))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state.select(indices)

    def offload(self) -> None:
        """Everything stored goes to the CPU; the next update brings it back."""
        if self.state is not None:
            self.state.to("cpu")

    def prefetch(self) -> None:
        if self.state is not None:
            self.state.to(self.device)

    def fork(self, times: int, tables: SharedTables) -> ZipLayer:
        """A layer of another cache with `times` rows for each of ours, sharing what is packed."""
        made = ZipLayer(self.policy, self.layer_index, self.shared, self.capacity, self.offloads, tables)
        made.blind, made.hidden = self.blind, self.hidden
        if self.state is not None:
            made.adopt(self.state.fork(times), self.dtype, self.device)
        return made

    def adopt(self, state: LayerState, dtype: torch.dtype, device: torch.device) -> None:
        """Take a state that was made elsewhere: restored from a file, or forked."""
        self.state, self.dtype, self.device = state, dtype, device
        self.is_initialized = True

    # ------------------------------------------------------------------ checks

    def _ready(self, key: Tensor) -> LayerState:
        """The state on the device of the new keys, after checking that they fit it."""
        state = self.state
        assert state is not None
        if key.shape[0] != state.batch and state.seq_length == 0:
            self.lazy_initialization(key, key)  # after reset() any batch may come
            return self._ready(key)
        if key.shape[0] != state.batch:
            raise RecipeError(
                f"a forward of {key.shape[0]} rows with a ZipCache of {state.batch}: use one cache a batch, "
                "cache.batch_repeat_interleave(n) or cache.fork(n) for more continuations",
                code="CFG-068",
            )
        if key.dtype != self.dtype:
            raise RecipeError(f"keys of {key.dtype} for a ZipCache of {self.dtype}: one dtype a cache", code="CFG-068")
        if state.device != key.device:
            state.to(key.device)
            self.device = key.device
        return state

    def _check_shape(self, key: Tensor, value: Tensor) -> None:
        if key.shape != value.shape or key.dtype not in DTYPES:
            raise RecipeError(
                f"keys {tuple(key.shape)} {key.dtype}, values {tuple(value.shape)}: a ZipCache holds keys and values "
                f"of one shape [B,Hk,n,D] in {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}",
                code="CFG-069",
            )
        if key.device.type != "cuda":
            warn_once("device", f"ZipCache on {key.device.type}: the plain PyTorch path (correct, but slow)")
        elif key.shape[-1] not in FUSED_HEAD_DIMS or key.dtype not in FUSED_DTYPES:
            warn_once(
                "shape",
                f"ZipCache with head_dim {key.shape[-1]} and {key.dtype}: the kernels take head_dim 64 and 128 in "
                "float16 and bfloat16, so this model runs the plain PyTorch path (correct, but slow)",
            )
