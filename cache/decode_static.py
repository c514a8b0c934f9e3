"""A plain 16-bit cache with static shapes: the baseline of compile_decode, through the same code path as ZipCache.

Per layer keys and values [B, C, Hk, D] in the model's dtype; row b's tokens lie in slots 0 .. lengths[b]-1 in order,
padding is never stored. Filled by the model's own attention during prefill (a transformers `Cache`), read in decode by
one split-KV launch: PyTorch's flash kernel with per-row lengths on the device, or masked SDPA (`kernel="sdpa"`; the
only one on a CPU).
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..base.errors import RecipeError
from .decode_append import write_last

StaticKernel = Literal["auto", "flash", "sdpa"]


class StaticKVLayer(CacheLayerMixin):
    """One layer: the prompt's tokens compacted into static tensors."""

    is_croppable = False
    is_sliding = False

    def __init__(self, owner: StaticKV) -> None:
        super().__init__()
        self.owner = owner
        self.columns = 0  # logical columns stored, padding included

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, width = key_states.shape
        shape = (rows, self.owner.capacity, heads, width)
        self.keys = torch.zeros(shape, dtype=key_states.dtype, device=key_states.device)
        self.values = torch.zeros_like(self.keys)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, C, Hk, D]."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store key and value [B,Hk,n,D]; returns all columns in logical order for the stock attention."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        self.owner.check_room(self.columns, count)
        store, first = self.owner.placement(self.columns, count), self.columns == 0
        for target, new in zip(self.stored, (key_states, value_states)):
            new = new.transpose(1, 2)
            if store is None:  # no padding anywhere: one slice
                target[:, self.columns : self.columns + count] = new
            else:
                order, slots = store
                index = order[..., None, None].expand_as(new)
                target.scatter_(1, slots[..., None, None].expand_as(new), new.gather(1, index))
        self.columns += count
        if first:
            return key_states, value_states
        keys, values = self.stored
        return self._logical(keys), self._logical(values)

    def _logical(self, stored: Tensor) -> Tensor:
        ranks = self.owner.ranks(self.columns)
        if ranks is None:
            return stored[:, : self.columns].transpose(1, 2)
        index = ranks[..., None, None].expand(-1, -1, *stored.shape[2:])
        return stored.gather(1, index).transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return self.owner.capacity

    def reset(self) -> None:
        self.columns = 0


class StaticKV(Cache):
    """`StaticKV(model.config, capacity=8192)`: use it with compile_decode, which tells it which columns are padding.

    A prompt goes through `model(...)` under the model's stock attention; `begin(valid)` must precede it when the
    batch is padded. One prefill or several; decode steps in between are counted by `after_step`.
    """

    def __init__(self, config: Any, *, capacity: int, kernel: StaticKernel = "auto") -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise RecipeError(f"StaticKV: capacity is {capacity!r}; it must be at least 1 token", code="CFG-043")
        text = config.get_text_config(decoder=True)
        self.capacity, self.kernel = capacity, kernel
        self.num_layers: int = text.num_hidden_layers
        self.valid: Tensor | None = None  # bool [B, columns]; None while no column is padding
        self.lengths: Tensor | None = None  # int32 [B], tokens stored, on the device
        self._starts: Tensor | None = None  # int32 [2, B+1]: query and key offsets of the rows for the flash kernel
        self.kv_layers = [StaticKVLayer(self) for _ in range(self.num_layers)]
        super().__init__(layers=[*self.kv_layers])

    # prefill ---------------------------------------------------------------------------------------------------

    def begin(self, batch: int, count: int, valid: Tensor | None, device: torch.device) -> None:
        """Announce `count` columns for `batch` rows; valid bool [B, count] or None (no padding)."""
        columns = self.get_seq_length()
        if self.lengths is None or self.lengths.shape[0] != batch:
            if columns:
                raise RecipeError(
                    f"StaticKV holds rows of another batch size; got {batch} rows, call reset() first", code="CFG-043"
                )
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
            rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
            self._starts = torch.stack([rows, rows * self.capacity])
            for layer in self.kv_layers:
                layer.is_initialized = False
        if valid is not None or self.valid is not None:
            past = self.valid
            if past is None:
                past = torch.ones(batch, columns, dtype=torch.bool, device=device)
            new = torch.ones(batch, count, dtype=torch.bool, device=device) if valid is None else valid.bool()
            self.valid = torch.cat([past, new], 1)
            self.lengths.copy_(self.valid.sum(1))
        else:
            self.lengths.fill_(columns + count)

    def placement(self, columns: int, count: int) -> tuple[Tensor, Tensor] | None:
        """(order, slots) int64 [B, count]: source column and target slot; garbage lands behind a row's last token."""
        if self.valid is None:
            return None
        fresh = self.valid[:, columns : columns + count]
        order = torch.argsort((~fresh).to(torch.int8), dim=1, stable=True)
        start = self.valid[:, :columns].sum(1, keepdim=True)
        return order, start + torch.arange(count, device=order.device)

    def ranks(self, columns: int) -> Tensor | None:
        """Slot of every logical column, int64 [B, columns]; padding columns point at slot 0."""
        if self.valid is None:
            return None
        return (self.valid[:, :columns].long().cumsum(1) - 1).clamp_min(0)

    def check_room(self, columns: int, count: int) -> None:
        if columns + count > self.capacity:
            raise RecipeError(
                f"StaticKV: {columns} columns + {count} exceed the capacity {self.capacity}; make the cache larger",
                code="CFG-043",
            )

    def reset(self) -> None:
        super().reset()
        self.valid = None
        if self.lengths is not None:
            self.lengths.zero_()

    # decode ----------------------------------------------------------------------------------------------------

    def before_step(self) -> bool:
        self.check_room(self.get_seq_length(), 1)
        return False

    def is_full(self) -> bool:
        return self.get_seq_length() >= self.capacity

    def enter_step(self) -> None:
        assert self.lengths is not None
        self.lengths.add_(1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        assert self.lengths is not None
        assert self._starts is not None
        keys, values = self.kv_layers[layer].stored
        write_last(key, value, keys.transpose(1, 2), values.transpose(1, 2), self.lengths)
        if self._use_flash(query):
            try:
                return flash_decode(query, keys, values, self._starts, self.lengths, scaling)
            except (RuntimeError, TypeError) as problem:  # a build without this kernel, or with another signature
                if self.kernel == "flash" or torch.cuda.is_current_stream_capturing():
                    raise
                warnings.warn(
                    f"StaticKV: PyTorch's flash kernel refused ({problem}); masked SDPA instead", stacklevel=2
                )
                self.kernel = "sdpa"
        return masked_decode(query, keys, values, self.lengths, scaling)

    def _use_flash(self, query: Tensor) -> bool:
        able = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
        if self.kernel == "flash" and not able:
            raise RecipeError(
                f"StaticKV: kernel 'flash' needs float16 or bfloat16 on a GPU, got {query.dtype} on {query.device}; "
                "use 'auto' or 'sdpa'",
                code="CFG-044",
            )
        return able and self.kernel != "sdpa"

    def after_step(self) -> None:
        for layer in self.kv_layers:
            layer.columns += 1
        if self.valid is not None:
            self.valid = torch.nn.functional.pad(self.valid, (0, 1), value=True)

    def uncount(self, finished: Tensor) -> None:
        """Keys and values only: no query leaves anything."""

    def drop(self, columns: int) -> None:
        assert self.lengths is not None
        self.lengths.sub_(columns)
        for layer in self.kv_layers:
            layer.columns -= columns
        if self.valid is not None:
            self.valid = self.valid[:, : self.get_seq_length()]

    def valid_columns(self) -> Tensor | None:
        return self.valid

    def signature(self) -> Hashable:
        held = [t for layer in self.kv_layers if layer.is_initialized for t in layer.stored]
        return tuple(t.data_ptr() for t in (self.lengths, self._starts, *held) if t is not None)

    def nbytes(self) -> int:
        """Bytes of keys and values in use: what a cache of exactly this length would hold."""
        used = self.get_seq_length()
        held = [tensor for layer in self.kv_layers if layer.is_initialized for tensor in layer.stored]
        return sum(tensor[:, :used].numel() * tensor.element_size() for tensor in held)


def flash_decode(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, lengths: Tensor, scaling: float) -> Tensor:
    """PyTorch's varlen flash kernel, split over KV; rows are C slots apart, `seqused_k` says how many count.

    query [B,H,1,D], key and value [B,C,Hk,D], starts int32 [2,B+1] (offsets of the rows among queries, among slots),
    lengths int32 [B] -> [B,1,H,D]. No host synchronisation.
    """
    capacity = key.shape[1]
    out = torch.ops.aten._flash_attention_forward(
        query.squeeze(2), key.flatten(0, 1), value.flatten(0, 1), starts[0], starts[1], 1, capacity,
        0.0, False, False, scale=scaling, seqused_k=lengths,
    )[0]  # fmt: skip
    return out.unsqueeze(1)


def masked_decode(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scaling: float) -> Tensor:
    """SDPA over the whole capacity under a length mask; a head group is laid out as query rows, KV is not repeated.

    query [B,H,1,D], key and value [B,C,Hk,D], lengths int32 [B] -> [B,1,H,D].
    """
    rows, heads, _, width = query.shape
    capacity, kv_heads = key.shape[1:3]
    group = query.reshape(rows, kv_heads, heads // kv_heads, width)
    seen = torch.arange(capacity, device=query.device) < lengths[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        group, key.transpose(1, 2), value.transpose(1, 2), attn_mask=seen[:, None, None], scale=scaling
    )
    return out.reshape(rows, 1, heads, width)
