"""How many bytes a cache really takes, part by part. Callers: cache/state.py, benchmarks.

Everything that exists is counted: codes, parameters with the block tables, the precision bitmap with the valid columns,
the tail, the saliency buffers. Memory that is allocated but holds no token yet is counted apart. Sizes need the rows'
lengths, so counting reads the device: not for a hot path.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch import Tensor

from .arenas import BLOCK_AXIS, SLOT_AXIS
from .store import PackedStore
from .tail import TailWindow

if TYPE_CHECKING:
    from .state import LayerState

CODES = ("key_codes", "value_codes")


@dataclass(frozen=True)
class Bytes:
    """Bytes of a cache by part; `total` is the sum of the first five. Instances add up over layers."""

    codes: int = 0
    parameters: int = 0  # scales, minima, channel scales, block tables and lengths
    bitmap: int = 0  # precision of each packed token and head, valid columns
    tail: int = 0  # 16-bit slots in use
    saliency: int = 0  # sums of the slots in use
    total: int = 0
    unused_capacity: int = 0  # allocated, not in use; not in total
    tokens: int = 0  # valid tokens over all rows (of one layer; adding layers keeps the largest)
    shared: int = 0  # part of total that belongs to the parent of a fork

    def __add__(self, other: Bytes) -> Bytes:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Bytes(**(sums | {"tokens": max(self.tokens, other.tokens)}))


def state_bytes(state: LayerState) -> Bytes:
    """Bytes of one layer. A fork's `shared` part belongs to its parent and is counted there too."""
    found = tail_bytes(state.window)
    for part in state.history.parts:
        held = store_bytes(part.store)
        found += held + Bytes(shared=held.total if part.share > 1 else 0)
    ids = _size(state.sequence_id)
    return found + Bytes(saliency=ids, total=ids, tokens=int(state.valid_columns().sum()))


def store_bytes(store: PackedStore) -> Bytes:
    """Bytes of packed tokens. Only the parts that rows use; the rest is unused capacity."""
    codes = parameters = 0
    for arena in (store.high, store.low):
        slots, blocks = int(arena.lengths().sum()), int(arena.num_blocks.sum())
        for name, tensor in arena.tensors().items():
            if name in SLOT_AXIS:
                part = slots * _bytes_per(tensor) if tensor.shape[2] else 0
            elif name in BLOCK_AXIS:
                part = blocks * _bytes_per(tensor) if tensor.shape[2] else 0
            elif name == "block_start":
                part = (blocks + store.batch) * tensor.element_size()
            elif name == "value_channel":  # rows without a block have none
                part = int((arena.num_blocks > 0).sum()) * _size(tensor) // max(store.batch, 1)
            else:
                part = _size(tensor)
            codes, parameters = (codes + part, parameters) if name in CODES else (codes, parameters + part)
    parameters += _size(store.skip)
    columns = -(-store.columns // 8)
    bitmap = store.batch * columns * (store.shape.kv_heads + 1)
    if store.limits is not None:
        bitmap += _size(store.limits[0]) + _size(store.limits[1])
    total = codes + parameters + bitmap
    allocated = _storage(store.tensors().values())
    return Bytes(codes, parameters, bitmap, total=total, unused_capacity=allocated - total)


def tail_bytes(window: TailWindow) -> Bytes:
    """Bytes of the 16-bit slots in use and of their saliency sums."""
    used, width = window.used, window.policy.tail_slots
    tail, saliency = window.tail, 0
    part = sum(_size(t) for t in (tail.key, tail.value, tail.valid)) * used // width + _size(tail.length)
    if window.buffers is not None and window.count is not None:
        sums = _size(window.buffers.total) + _size(window.buffers.pending) + _size(window.count)
        saliency = sums * used // width + _size(window.buffers.accepted)
    allocated = _storage(window.tensors().values())
    for call in window.calls:
        kept = vars(call.before).values()
        saliency, allocated = saliency + sum(map(_size, kept)), allocated + _storage(kept)
    total = part + saliency
    return Bytes(tail=part, saliency=saliency, total=total, unused_capacity=allocated - total)


def _bytes_per(tensor: Tensor) -> int:
    """Bytes of one slot or block: heads and channels of [B, Hk, C, ...]."""
    return tensor.shape[1] * tensor.shape[3:].numel() * tensor.element_size()


def _storage(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that these tensors lie in, what aligns them included."""
    held = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
