"""Room in arenas: how many slots and blocks a policy needs, growing, and the row operations of a PackedArena.

A block never holds more than BLOCK slots, a flush never reopens one, so a flush of h tokens takes ceil(h / BLOCK) blocks.
The host knows upper bounds only (rows with padding hold less), which is what room is kept for. Caller: cache/store.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.quantize import BLOCK, PackedArena, empty_arena
from .policy import Policy

GROWTH = 1.5
SLOT_STEP = 16  # capacities are multiples of this
SLOT_AXIS = {"key_codes": 2, "value_codes": 2, "value_scale": 2, "value_min": 2}
BLOCK_AXIS = {"key_scale": 2, "key_min": 2}


@dataclass(frozen=True)
class Room:
    """Slots and blocks of one arena."""

    slots: int = 0
    blocks: int = 0

    def __add__(self, other: Room) -> Room:
        return Room(self.slots + other.slots, self.blocks + other.blocks)

    def fits(self, arena: PackedArena) -> bool:
        return self.slots <= arena.capacity and self.blocks <= arena.block_capacity


def share_of(ratio: float, count: int) -> int:
    """ceil(ratio * count) as kernels/saliency counts it: ratio in millionths."""
    return -(-count * round(ratio * 1_000_000) // 1_000_000)


def flush_room(policy: Policy, tokens: int) -> tuple[Room, Room]:
    """The most that one flush of `tokens` columns can take of the high and of the low arena."""
    high = share_of(policy.salient_ratio, tokens)
    low = tokens - high
    return Room(high, -(-high // BLOCK)), Room(low, -(-low // BLOCK))


def static_room(policy: Policy, tokens: int) -> tuple[Room, Room]:
    """Room for `tokens` columns that arrive in any number of flushes of `flush_every` and a few chunks."""
    flushes = -(-tokens // policy.flush_every) + 8
    high = share_of(policy.salient_ratio, tokens) + (flushes if policy.splits else 0)
    low = tokens - share_of(policy.salient_ratio, tokens)
    return (
        Room(rounded(high), -(-high // BLOCK) + flushes),
        Room(rounded(low), -(-low // BLOCK) + (flushes if low else 1)),
    )


def grown(arena: PackedArena, needed: Room, dtype: torch.dtype, *, is_empty: bool = False) -> PackedArena:
    """The same content in an arena at least GROWTH times as large as before, and large enough."""
    slots, blocks = arena.capacity, arena.block_capacity
    if needed.slots > slots:
        slots = rounded(max(needed.slots, int(slots * GROWTH)))
    if needed.blocks > blocks:
        blocks = max(needed.blocks, int(blocks * GROWTH) + 1)
    made = make_arena(arena, arena.num_blocks.shape[0], Room(slots, blocks), dtype)
    return made if is_empty else copy_into(made, arena)


def make_arena(like: PackedArena, batch: int, room: Room, dtype: torch.dtype) -> PackedArena:
    """An empty arena with the bits, heads and device of another."""
    heads, device = like.key_codes.shape[1], like.key_codes.device
    return empty_arena(like.bits, batch, heads, like.head_dim, room.slots, room.blocks, dtype, device)


def copy_into(target: PackedArena, source: PackedArena, room: Room | None = None) -> PackedArena:
    """Copy slots and blocks (all, or the first `room`) to an arena that is at least as large. Returns the target."""
    slots = source.capacity if room is None else min(room.slots, source.capacity)
    blocks = source.block_capacity if room is None else min(room.blocks, source.block_capacity)
    for name, tensor in source.tensors().items():
        count = slots if name in SLOT_AXIS else blocks
        if name in SLOT_AXIS or name in BLOCK_AXIS:
            count = min(count, tensor.shape[2])  # parameters of a 16-bit arena have size 0
            getattr(target, name)[:, :, :count] = tensor[:, :, :count]
    length = source.lengths().unsqueeze(1)
    target.block_start.copy_(length.expand_as(target.block_start))
    target.block_start[:, : blocks + 1] = source.block_start[:, : blocks + 1]
    target.num_blocks.copy_(source.num_blocks)
    target.value_channel.copy_(source.value_channel)
    return target


def empty(held: Sequence[PackedArena]) -> None:
    """No tokens; storage stays. One launch for all arenas."""
    torch._foreach_zero_([table for arena in held for table in (arena.block_start, arena.num_blocks)])


def trimmed(arena: PackedArena, room: Room) -> dict[str, Tensor]:
    """Contiguous tensors of the first `room` slots and blocks, by name: what a saved arena consists of."""
    found = {}
    for name, tensor in arena.tensors().items():
        if name in SLOT_AXIS:
            tensor = tensor[:, :, : room.slots]
        elif name in BLOCK_AXIS:
            tensor = tensor[:, :, : room.blocks]
        elif name == "block_start":
            tensor = tensor[:, : room.blocks + 1]
        found[name] = tensor.contiguous()
    return found


def select_rows(arena: PackedArena, index: Tensor) -> PackedArena:
    """A new arena whose row i is row index[i]."""
    return replace(arena, **{name: tensor.index_select(0, index) for name, tensor in arena.tensors().items()})


def truncate(arena: PackedArena, lengths: Tensor) -> None:
    """Forget slots at and after lengths [B], in place: the block that contains the end becomes shorter."""
    starts = arena.block_start
    lengths = torch.minimum(lengths.to(torch.int32), arena.lengths()).unsqueeze(1)
    arena.num_blocks.copy_((starts[:, :-1] < lengths).sum(1))
    starts.copy_(torch.minimum(starts, lengths))


def truncated(arena: PackedArena, lengths: Tensor) -> PackedArena:
    """The same codes and parameters under block tables of its own, truncated."""
    view = replace(arena, block_start=arena.block_start.clone(), num_blocks=arena.num_blocks.clone())
    truncate(view, lengths)
    return view


def move(arena: PackedArena, device: torch.device) -> PackedArena:
    return replace(arena, **{name: tensor.to(device) for name, tensor in arena.tensors().items()})


def rounded(slots: int) -> int:
    """A capacity for so many slots."""
    return max(SLOT_STEP, -(-slots // SLOT_STEP) * SLOT_STEP)
