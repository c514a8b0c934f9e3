"""Packed tokens of one layer: two arenas, the precision bitmap, the valid columns; where each logical column lies.

A *column* is a logical position of the batch, padding included, the same for all rows. Column c of row b and head h is
    stored    if it is valid and not among the row's first `skip[b]` valid columns of this store (those are sinks)
    in slot   rank among the stored columns with the same bit: of `high` where the bitmap has 1, of `low` where it has 0
so two tables of bits say everything, and padding takes no slot. Bounds of what is in use are kept on the host without
asking the device: they are what `flush_room` allows, exact for rows without padding.

A store can be *limited*: cropped inside a flush, where heads keep different numbers of salient tokens and one length a
row can not say so. Arenas then stay as they are, a limit per head and arena says how many slots still count, and no
token is ever added to it again (cache/state.py opens a new store).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import functional

from ..base.errors import RecipeError
from ..kernels.quantize import BitTables, KeyRounding, PackedArena, append_ranked, dequantize, empty_arena
from ..kernels.quantize.bits import pack_bits, unpack_bits
from ..kernels.quantize.layout import zeros_together
from . import arenas
from .arenas import Room
from .policy import Policy


@dataclass(frozen=True)
class Flush:
    """Columns start .. end - 1 were packed together; the most they can take of each arena."""

    start: int
    end: int
    high: Room
    low: Room


@dataclass(frozen=True)
class Shape:
    """What all stores of a layer have in common."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype


class PackedStore:
    """Arenas and bit tables of some consecutive columns of B rows."""

    def __init__(
        self, policy: Policy, shape: Shape, skip: Tensor, *, capacity: int | None = None, expected: int = 0
    ) -> None:
        """skip int32 [B]: leading valid columns that are kept elsewhere; its device is the store's.

        expected: columns of the first flush where storage grows, so that it need not grow at once
        """
        self.policy, self.shape, self.capacity = policy, shape, capacity
        self.skip = skip
        self.columns = 0
        self.flushes: list[Flush] = []
        self.limits: tuple[Tensor, Tensor] | None = None  # int32 [B, Hk] each
        self.readers: WeakSet = WeakSet()  # forks that read these arenas
        room = arenas.flush_room(policy, expected) if capacity is None else arenas.static_room(policy, capacity)
        batch, device = skip.shape[0], skip.device
        self.high, self.low = (
            empty_arena(
                bits, batch, shape.kv_heads, shape.head_dim, arenas.rounded(r.slots), max(r.blocks, 1), shape.dtype, device
            )
            for bits, r in zip((policy.high_bits, policy.low_bits), room)
        )  # fmt: skip
        width = -(-(capacity or max(expected, 8 * arenas.SLOT_STEP)) // 8)
        self.salient_bits, self.valid_bits = zeros_together(
            [((batch, shape.kv_heads, width), torch.uint8), ((batch, width), torch.uint8)], device
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedStore:
        """The same content, and nobody who reads it: forks of the original keep reading the original."""
        made = memo[id(self)] = copy.copy(self)
        made.readers = WeakSet()
        for name, held in vars(self).items():
            if name != "readers":
                setattr(made, name, copy.deepcopy(held, memo))
        return made

    @property
    def batch(self) -> int:
        return self.skip.shape[0]

    @property
    def used(self) -> tuple[Room, Room]:
        """Upper bounds of what the rows use of the high and of the low arena."""
        high, low = Room(), Room()
        for flush in self.flushes:
            high, low = high + flush.high, low + flush.low
        return high, low

    # growing ---------------------------------------------------------------------------------------------------

    def reserve(self, tokens: int) -> bool:
        """Make room for a flush of `tokens` columns; True if tensors moved. RecipeError where capacity is static."""
        moved = False
        pairs = zip(("high", "low"), self.used, arenas.flush_room(self.policy, tokens))
        for name, used, extra in pairs:
            arena, needed = getattr(self, name), used + extra
            if needed.fits(arena):
                continue
            if self.capacity is not None:
                raise RecipeError(
                    f"cache arenas for a capacity of {self.capacity} tokens: the {name} one has {arena.capacity} slots and "
                    f"{arena.block_capacity} blocks, needed are {needed.slots} and {needed.blocks}. Very short chunks "
                    "take a block each: give a larger capacity, or longer chunks",
                    code="CFG-052",
                )
            setattr(self, name, arenas.grown(arena, needed, self.shape.dtype, is_empty=self.columns == 0))
            moved = True
        self.reserve_columns(tokens)
        return moved

    def reserve_columns(self, tokens: int) -> None:
        """Make the tables of bits wide enough for `tokens` more columns."""
        width = self.valid_bits.shape[-1]
        needed = -(-(self.columns + tokens) // 8)
        if needed > width:
            extra = max(needed, int(width * arenas.GROWTH)) - width
            self.salient_bits = functional.pad(self.salient_bits, (0, extra))
            self.valid_bits = functional.pad(self.valid_bits, (0, extra))

    def pack(
        self,
        key: Tensor,
        value: Tensor,
        stored: Tensor,
        valid: Tensor,
        *,
        ratio: float,
        scores: Tensor | None = None,
        salient: Tensor | None = None,
        rounding: KeyRounding | None = None,
    ) -> bool:
        """Append n columns: key, value [B,Hk,n,D], stored, valid bool [B,n]; True if tensors moved.

        Salient are the `ratio` of the stored with the best scores [B,Hk,n]; without scores all or none (ratio 1 or 0), or
        `salient` bool [B,Hk,n]. Nothing that is packed already changes. No synchronisation.
        """
        tokens = key.shape[2]
        moved = self.reserve(tokens)
        append_ranked(
            self.high, self.low, BitTables(self.salient_bits, self.valid_bits, self.columns), key, value, stored, valid,
            ratio=ratio, scores=scores, salient=salient, rounding=rounding,
        )  # fmt: skip
        end = self.columns + tokens
        self.flushes.append(Flush(self.columns, end, *arenas.flush_room(self.policy, tokens)))
        self.columns = end
        return moved

    # finding ---------------------------------------------------------------------------------------------------

    def valid(self) -> Tensor:
        """bool [B, columns]."""
        return unpack_bits(self.valid_bits, self.columns)

    def stored(self) -> Tensor:
        """bool [B, columns]: valid and not a sink."""
        valid = self.valid()
        return valid & (valid.cumsum(1) > self.skip.unsqueeze(1))

    def salient(self) -> Tensor:
        """bool [B, Hk, columns]."""
        return unpack_bits(self.salient_bits, self.columns)

    def lengths_per_head(self) -> tuple[Tensor, Tensor]:
        """Slots of each arena that columns still refer to, int32 [B, Hk] each."""
        salient = self.salient()
        high = salient.sum(-1, dtype=torch.int32)
        return high, self.stored().sum(-1, dtype=torch.int32).unsqueeze(1) - high

    def slots(self) -> Tensor:
        """int64 [B, Hk, columns]: slot in cat([high, low]) of each stored column; others point anywhere legal."""
        salient, stored = self.salient(), self.stored().unsqueeze(1)
        high = salient.cumsum(-1) - 1
        low = (stored & ~salient).cumsum(-1) - 1 + self.high.capacity
        return torch.where(salient, high, low).clamp_(min=0)

    def gather(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Dequantised keys and values [B, Hk, columns, D] in column order; what is not stored is zero."""
        index = self.slots().unsqueeze(-1).expand(-1, -1, -1, self.shape.head_dim)
        stored = self.stored()[:, None, :, None]
        parts = zip(dequantize(self.high, dtype=dtype), dequantize(self.low, dtype=dtype))
        key, value = (torch.cat(part, dim=2).gather(2, index) for part in parts)
        return key.masked_fill_(~stored, 0), value.masked_fill_(~stored, 0)

    def limits_for(self, queries: int) -> tuple[Tensor, Tensor] | None:
        """`limits` of cached_attention for q queries: int32 [B, Hk, q] each, or None."""
        if self.limits is None:
            return None
        high, low = (limit.unsqueeze(-1).expand(-1, -1, queries).contiguous() for limit in self.limits)
        return high, low

    # cropping --------------------------------------------------------------------------------------------------

    def truncates(self, columns: int) -> bool:
        """Can columns after the first `columns` be dropped in place (all heads of a row keep equally many slots)?"""
        uniform = self.shape.kv_heads == 1 or not self.policy.splits
        boundary = columns == 0 or any(flush.end == columns for flush in self.flushes)
        return self.limits is None and (uniform or boundary)

    def truncate(self, columns: int) -> None:
        """Drop columns in place; requires `truncates(columns)`. Codes and parameters of the others stay."""
        self._shorten(columns)
        high, low = self.lengths_per_head()
        arenas.truncate(self.high, high[:, 0])
        arenas.truncate(self.low, low[:, 0])

    def view(self, columns: int) -> PackedStore:
        """The first `columns` columns over the same codes, limited; neither store may be appended to while both live."""
        view = copy.copy(self)
        view.flushes = list(self.flushes)
        if columns < self.columns:
            view._shorten(columns)
            view.limits = view.lengths_per_head()
            view.high, view.low = (
                arenas.truncated(arena, limit.amax(1)) for arena, limit in zip((view.high, view.low), view.limits)
            )
        return view

    def _shorten(self, columns: int) -> None:
        kept = []
        for flush in self.flushes:
            if flush.start >= columns:
                break
            size = min(flush.end, columns) - flush.start
            bounds = (Room(min(r.slots, size), min(r.blocks, size)) for r in (flush.high, flush.low))
            kept.append(Flush(flush.start, flush.start + size, *bounds))
        self.flushes, self.columns = kept, columns

    # rows ------------------------------------------------------------------------------------------------------

    def select(self, index: Tensor) -> None:
        """Row i becomes row index[i]; in place (the used part) if the number of rows stays."""
        rows = index.shape[0]
        for name, used in zip(("high", "low"), self.used):
            arena = getattr(self, name)
            chosen = arenas.select_rows(arena, index)
            setattr(self, name, arenas.copy_into(arena, chosen, used) if rows == self.batch else chosen)
        for name in ("salient_bits", "valid_bits", "skip"):
            old = getattr(self, name)
            chosen = old.index_select(0, index)
            setattr(self, name, old.copy_(chosen) if rows == self.batch else chosen)
        if self.limits is not None:
            self.limits = (self.limits[0].index_select(0, index), self.limits[1].index_select(0, index))

    def selected(self, index: Tensor) -> PackedStore:
        """A new store with rows index[i]; this one stays."""
        store = copy.copy(self)
        store.flushes, store.readers = list(self.flushes), WeakSet()
        for name in ("high", "low"):
            setattr(store, name, arenas.select_rows(getattr(self, name), index))
        for name in ("salient_bits", "valid_bits", "skip"):
            setattr(store, name, getattr(self, name).index_select(0, index))
        if self.limits is not None:
            store.limits = (self.limits[0].index_select(0, index), self.limits[1].index_select(0, index))
        return store

    def to(self, device: torch.device) -> PackedStore:
        """A copy whose every tensor is on `device`."""
        store = copy.copy(self)
        store.flushes, store.readers = list(self.flushes), WeakSet()
        store.high, store.low = arenas.move(self.high, device), arenas.move(self.low, device)
        for name in ("salient_bits", "valid_bits", "skip"):
            setattr(store, name, getattr(self, name).to(device))
        if self.limits is not None:
            store.limits = (self.limits[0].to(device), self.limits[1].to(device))
        return store

    def clear(self) -> None:
        """Forget all columns; storage stays."""
        arenas.empty([self.high, self.low])
        self.columns, self.flushes, self.limits = 0, [], None

    # all tensors -----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, at full capacity."""
        found = {f"{name}.{key}": t for name in ("high", "low") for key, t in getattr(self, name).tensors().items()}
        found |= {"salient_bits": self.salient_bits, "valid_bits": self.valid_bits, "skip": self.skip}
        if self.limits is not None:
            found |= {"limits.high": self.limits[0], "limits.low": self.limits[1]}
        return found

    def saved(self) -> dict[str, Tensor]:
        """Contiguous tensors of the part in use: what a saved store consists of."""
        found = self.tensors()
        for name, used in zip(("high", "low"), self.used):
            arena: PackedArena = getattr(self, name)
            found |= {f"{name}.{key}": t for key, t in arenas.trimmed(arena, used).items()}
        found["salient_bits"] = pack_bits(self.salient())
        found["valid_bits"] = pack_bits(self.valid())
        return found
