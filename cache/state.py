"""LayerState: everything one attention layer remembers, packed where it is old and at 16 bits where it is recent.

    state.prefill(query, key, value, valid, scaling=s)      # a prompt or a chunk: saliency, pack, keep sinks and recents
    state.append(key, value, valid); out = state.attend(query, scaling=s)                          # decoded tokens
    state.crop(3); state.select(index); child = state.fork(8); state.tensors()

Logical columns (padding included) are the same for all rows; `seq_length` counts them. They lie, in this order, in the
history (cache/history.py: arenas) and in the tail window (cache/tail.py); a row's first `sink_tokens` valid tokens lie in
the tail's sink slots instead.

Appending, attending and flushing never wait for the device: the host knows what is equal for all rows (columns), all
else are device tensors. A captured step may consist of `write` and `attend`; `prepare` before and `advance` after it are
host work (`append` is all three). `layout_version` grows whenever tensors moved and a captured step must be captured anew.

Not differentiable: tensors that require a gradient while gradients are enabled are refused.
No transformers here; cache/hf.py is the plug.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..base.errors import RecipeError
from ..kernels.cached_attention import SaliencyBuffers, Tail
from ..kernels.quantize import PackedArena, key_rounding
from . import guards, packing, reading, serialise
from .columns import SharedTables, columns_of_chunk, columns_of_window
from .guards import stateful
from .history import History
from .memory import Bytes, state_bytes
from .policy import Policy
from .store import Shape
from .tail import TailWindow


class LayerState:
    """The quantised KV cache of one layer; see the module. B rows, Hk KV heads, D head size, one dtype and device."""

    @stateful
    def __init__(
        self,
        policy: Policy,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        capacity: int | None = None,
        layer_index: int = 0,
        sequence_id: Tensor | None = None,
        expected: int = 0,
    ) -> None:
        """capacity: tokens of a row for static arenas (CUDA graphs); None lets arenas grow by half.

        expected: columns of the first prefill, so that arenas that grow are made for it at once
        sequence_id int64 [B] tells the rows' random probes apart (default: row number). Raises RecipeError.
        """
        self.whole_policy, self.policy = policy, policy.for_layer(layer_index)
        guards.check_shape(self.policy, batch, kv_heads, head_dim, dtype, capacity)
        self.layer_index, self.capacity = layer_index, capacity
        self.shape = Shape(kv_heads, head_dim, dtype)
        device = torch.device(device)
        leaving = max(0, expected - self.policy.recent_tokens)
        self.history = History(self.policy, self.shape, batch, device, capacity, leaving)
        self.window = TailWindow(self.policy, self.shape, batch, device)
        if sequence_id is None:
            self.sequence_id = torch.arange(batch, device=device)
        else:
            self.sequence_id = sequence_id.to(device=device, dtype=torch.int64).clone()
        self.layout_version = 0

    # what there is ---------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return self.history.batch

    @property
    def device(self) -> torch.device:
        return self.window.tail.key.device

    @property
    def dtype(self) -> torch.dtype:
        return self.shape.dtype

    @property
    def packed_length(self) -> int:
        """Columns before the tail window."""
        return self.history.columns

    @property
    def seq_length(self) -> int:
        """Logical columns, padding included, equal for all rows."""
        return self.history.columns + self.window.columns

    @property
    def tail_used(self) -> int:
        """Host mirror of `tail.length`: slots in use, sink slots included."""
        return self.window.used

    @property
    def is_full(self) -> bool:
        """Whether the next `prepare` flushes."""
        return self.window.columns >= self.policy.recent_tokens + self.policy.flush_every

    @property
    def high(self) -> PackedArena:
        """The arena that flushes put salient tokens in (a fork's parent has its own)."""
        return self.history.store.high

    @property
    def low(self) -> PackedArena:
        return self.history.store.low

    @property
    def tail(self) -> Tail:
        return self.window.tail

    @property
    def saliency(self) -> SaliencyBuffers | None:
        """None where the policy needs no attention scores."""
        return self.window.buffers

    # storing ---------------------------------------------------------------------------------------------------

    @stateful
    def prefill(
        self, query: Tensor | None, key: Tensor, value: Tensor, valid: Tensor | None, *, scaling: float,
        shared: SharedTables | None = None,
    ) -> None:  # fmt: skip
        """Store n columns at once and pack all but the last `recent_tokens` columns.

        query [B,H,n,D] after RoPE, or None: the salient tokens are then evenly spaced, with one warning
        key, value [B,Hk,n,D]; valid bool [B,n] (None: no padding)
        shared: the same object for all layers of a forward, so that only the first one makes their common tables
        The attention output of these tokens is not computed here.
        """
        self._may_change("prefill")
        guards.check_new(key, value, (self.batch, self.shape.kv_heads, self.shape.head_dim), self.dtype)
        if key.shape[2] == 0:
            return
        guards.check_capacity(self.capacity, self.seq_length + key.shape[2])
        window, old = self.window, self.window.columns
        columns = columns_of_chunk(self, valid, key.shape[2], shared)
        if old:
            key = torch.cat([window.tail.key[:, :, window.window], key], dim=2)
            value = torch.cat([window.tail.value[:, :, window.window], value], dim=2)
        scores, evidence = packing.score_chunk(self, columns, key, query, scaling)
        leaving, rounding = columns.leaving, None
        if self.policy.rounds_with_queries and leaving:
            if query is None:
                guards.warn_without_queries()
            else:
                rounding = key_rounding(query, columns.valid[:, old:], key, columns.valid)
        packing.retire(self, columns, key, value, scores, rounding)
        window.refill(key[:, :, leaving:], value[:, :, leaving:], columns.valid[:, leaving:], evidence)

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None = None) -> None:
        """Put q <= max_query columns [B,Hk,q,D] into the tail, after a flush when it is full. valid bool [B,q]."""
        guards.check_new(key, value, (self.batch, self.shape.kv_heads, self.shape.head_dim), self.dtype)
        self.prepare(key.shape[2])
        self.write(key, value, valid)
        self.advance(key.shape[2], attended=False)

    def prepare(self, queries: int = 1) -> bool:
        """Host work before `queries` columns are written: refuse, or flush a full window. True if it flushed."""
        self._may_change("append")
        if queries > self.policy.max_query:
            raise RecipeError(
                f"append of {queries} tokens: max_query is {self.policy.max_query}; use prefill for longer chunks",
                code="CFG-051",
            )
        guards.check_capacity(self.capacity, self.seq_length + queries)
        full = self.is_full
        if full:
            self.flush()
        self.window.blank = False  # a step that dies between here and `advance` may have counted a column on the device
        return full

    @stateful
    def write(self, key: Tensor, value: Tensor, valid: Tensor | None = None) -> None:
        """Device work of an append: reads the length on the device, so that it can be captured and replayed."""
        self.window.write(key, value, None if valid is None else valid.to(self.device))

    def advance(self, queries: int = 1, *, attended: bool = True) -> None:
        """Host work after a write; `attended` says that the same (replayed) step called `attend`."""
        self.window.used += queries
        if attended:
            self.window.begin_call(queries, follows=False)
        else:
            self.window.unseen += queries
        self.window.blank = False  # a replayed step wrote to it
        self.window.evident |= attended

    @stateful
    def flush(self) -> None:
        """Pack all of the tail but sinks and the last `recent_tokens` columns; what is packed already never changes."""
        self._may_change("flush")
        window = self.window
        keep = min(self.policy.recent_tokens, window.columns)
        leaving = window.columns - keep
        if leaving == 0:
            return
        columns = columns_of_window(self, leaving)
        scores = packing.score_window(self, columns)
        packing.retire(
            self, columns, window.tail.key[:, :, window.window], window.tail.value[:, :, window.window], scores
        )
        window.keep_last(keep)

    # attending -------------------------------------------------------------------------------------------------

    @stateful
    def attend(self, query: Tensor, *, scaling: float, follows: bool = False) -> Tensor:
        """Attention of the last q appended columns over everything up to themselves: [B,H,q,D] -> [B,H,q,D].

        Query i sees columns up to its own. Updates the saliency of the tail; the contributions of this call are final
        only when the next one comes, so that a `crop` right after it can undo them. `follows`: this call and the one before
        are parts of one forward, which a crop can undo as a whole.
        """
        self.window.begin_call(query.shape[2], follows)
        self.window.evident, self.window.blank = True, False
        return reading.attend(self.history, self.window, query, scaling=scaling)

    @stateful
    def attend_history(self, query: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
        """(out [B,H,n,D], lse fp32 [B,H,n]): all queries over all that is stored; merge with the chunk's own part.

        For a prefill chunk or a long query, before the chunk is stored. Nothing stored: zeros and -inf.
        """
        return reading.attend_history(self.history, self.window, query, scaling=scaling)

    @stateful
    def logical(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(key, value [B,Hk,seq_length,D], valid bool [B,seq_length]) dequantised, in column order; padding is zero."""
        return reading.logical(self.history, self.window, dtype or self.dtype)

    @stateful
    def valid_columns(self) -> Tensor:
        """bool [B, seq_length]: which columns are tokens."""
        return reading.valid_columns(self.history, self.window)

    # shortening and rows ---------------------------------------------------------------------------------------

    @stateful
    def crop(self, count: int) -> None:
        """Drop the last `count` columns: from the tail, then from what is packed, by rank. Nothing is re-quantised.

        What dropped queries added to the saliency of columns that stay is undone for those of the last call of `attend`, and
        of the calls that it follows without a flush between. Queries of earlier forwards stay in the sums, which no longer
        tell them apart, and do not count as probes: after a crop of columns that came in several forwards, the mean
        attention of what stays in the window is too high until it is packed. To take back several forwards exactly, use
        `mark` and `roll_back` (cache/rollback.py).

        A crop inside a flush, where heads keep different numbers of salient tokens, leaves the arenas as they are and opens
        new ones behind them.
        """
        self._may_change("crop")
        if not 0 <= count <= self.seq_length:
            raise RecipeError(
                f"crop of {count} columns: allowed are 0 to {self.seq_length}, what is stored", code="CFG-053"
            )
        if count == 0:
            return
        from_window = min(count, self.window.columns)
        self.window.drop(from_window, count)
        if count > from_window:
            changed = self.history.crop(self.history.columns - (count - from_window))
            self.layout_version += int(changed)
            self.window.drop_sinks(self.history.valid_count())

    @stateful
    def select(self, index: Tensor) -> None:
        """Row i becomes row index[i] (int64 [n], any n): beams, finished rows. Rows of a fork become independent.

        A bool [B] keeps the rows where it is true, as it does with a tensor.
        """
        self._may_change("select")
        index = index.to(self.device)
        if index.dtype == torch.bool:
            if index.shape != (self.batch,):
                raise RecipeError(
                    f"rows kept by a mask of shape {tuple(index.shape)}: this layer has {self.batch} rows, needed is one "
                    "entry for each",
                    code="CFG-053",
                )
            index = index.nonzero().squeeze(1)
        index = index.to(torch.int64)
        moved = bool(self.history.segments) or index.shape[0] != self.batch
        self.history.select(index)
        self.window.select(index)
        self.sequence_id = self.sequence_id.index_select(0, index)
        self.layout_version += int(moved)

    reorder = select

    @stateful
    def repeat(self, times: int) -> None:
        """Every row `times` times, copies beside each other (repeat_interleave). What a fork shares stays shared."""
        self._may_change("repeat")
        index = self._repeated(times)
        self.history.repeat(times, index)
        self.window.select(index)
        self.sequence_id = self.sequence_id.index_select(0, index)
        self.layout_version += 1

    @stateful
    def fork(self, times: int) -> LayerState:
        """A state of B * times rows that reads this one's packed tokens and owns its tail; O(tail) memory.

        Row b * times + s continues row b. What a child flushes goes to arenas of its own, which grow. While children
        live, this state refuses to change. A child may crop below the fork; its `select` copies the shared rows it takes.
        """
        index = self._repeated(times)
        child = LayerState(
            self.whole_policy, batch=self.batch * times, kv_heads=self.shape.kv_heads, head_dim=self.shape.head_dim,
            dtype=self.dtype, device=self.device, layer_index=self.layer_index,
            sequence_id=self.sequence_id.index_select(0, index),
        )  # fmt: skip
        child.history.fork_from(self.history, times, reader=child)
        child.window.copy_from(self.window, index)
        return child

    @stateful
    def reset(self) -> None:
        """Forget all tokens; storage and rows stay."""
        self._may_change("reset")
        self.layout_version += int(bool(self.history.segments))
        self.history.clear()
        self.window.clear()

    @stateful
    def to(self, device: torch.device | str) -> LayerState:
        """Move every byte to another device, in place; returns itself. A fork takes a copy of what it shared."""
        device = torch.device(device)
        if device != self.device:
            self._may_change("to")
            self.history.to(device)
            self.window.to(device)
            self.sequence_id = self.sequence_id.to(device)
            self.layout_version += 1
        return self

    # bytes and files -------------------------------------------------------------------------------------------

    def static_tensors(self) -> list[Tensor]:
        """Every tensor that `write` and `attend` touch, at full capacity; another list means another sequence of launches."""
        parts = self.history.parts if self.history.store.columns or not self.history.segments else self.history.segments
        packed = [tensor for part in parts for tensor in part.store.tensors().values()]
        return [*packed, *self.window.tensors().values()]

    @stateful
    def tensors(self) -> dict[str, Tensor]:
        """All that is stored, contiguous, without unused capacity: with `meta()` enough to restore bit for bit."""
        return serialise.tensors(self)

    def meta(self) -> dict[str, Any]:
        """JSON-able: format version, policy, shape, lengths. Belongs to `tensors()`."""
        return serialise.meta(self)

    @classmethod
    def from_tensors(cls, policy: Policy | None, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> LayerState:
        """The state that `tensors()` and `meta()` came from, on the tensors' device; policy None takes the saved one.

        Raises ArtifactError for another format, missing or foreign tensors, another policy.
        """
        with torch.inference_mode(False), torch.no_grad():
            return serialise.restore(cls, policy, tensors, meta)

    @stateful
    def nbytes(self) -> Bytes:
        """Bytes by part (cache/memory.py); reads lengths from the device, so not for a hot path."""
        return state_bytes(self)

    # inside ----------------------------------------------------------------------------------------------------

    def _may_change(self, what: str) -> None:
        guards.check_not_frozen(what, len(self.history.store.readers))

    def _repeated(self, times: int) -> Tensor:
        if times < 1:
            raise RecipeError(f"fork or repeat {times} times: at least 1", code="CFG-053")
        return torch.arange(self.batch * times, device=self.device) // times
