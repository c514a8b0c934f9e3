"""Host side of the Triton kernels: how many programs, scratch memory, and the two launches. Never reads the device.

The grid is sized by capacity, so a captured graph stays right while the cache fills; programs find their share of the
blocks in use from device tables.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

from ..quantize import PackedArena, UnsupportedShape
from . import triton_kernels as kernels
from .layout import SaliencyBuffers, Tail

# relative time of one block of 128 slots by its bits; decides how programs are dealt to the two arenas
WEIGHTS = {2: 5, 4: 6, 16: 20}
MAX_PARTS = 256


@dataclass(frozen=True)
class Tuning:
    """Launch parameters; results do not depend on them beyond rounding."""

    num_warps: int = 1
    tile: int = 64  # slots of a packed tile, 64 or 128
    stages: int = 1
    programs_per_multiprocessor: int = 8
    plain_tile: int = 32  # slots of a 16-bit tile
    registers: int | None = None  # at most so many per thread, for more programs beside each other
    overlap: bool = False  # launch of the reduce kernel overlaps the first one (programmatic dependent launch)


DEFAULT = Tuning()
LOSSLESS = Tuning(num_warps=4, stages=2, programs_per_multiprocessor=4, plain_tile=64)  # both arenas at 16 bits


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _interpreted() -> bool:
    return type(kernels.attend_kernel).__name__ == "InterpretedFunction"


def _arena_arguments(arena: PackedArena) -> list[Tensor]:
    codes = [arena.key_codes, arena.value_codes]
    if arena.bits != 16:
        codes = [c.view(torch.int16) for c in codes]
    others = [arena.value_scale, arena.value_min, arena.key_scale, arena.key_min, arena.value_channel]
    return [*codes, *others, arena.block_start, arena.num_blocks]


def _require_contiguous(name: str, group: PackedArena | Tail | SaliencyBuffers | None) -> None:
    for field in fields(group) if group is not None else ():
        tensor = getattr(group, field.name)
        if isinstance(tensor, Tensor) and not tensor.is_contiguous():
            raise UnsupportedShape(f"{name}.{field.name} with strides {tensor.stride()}: it must be contiguous")


def _parts(high: PackedArena, low: PackedArena, lines: int, tuning: Tuning, device: torch.device) -> int:
    """Programs of the arenas per (row, KV head): enough to fill the device, no more than there can be tiles."""
    wanted = -(-tuning.programs_per_multiprocessor * _multiprocessors(device) // lines)
    tiles = 0
    for arena in (high, low):
        tile = tuning.plain_tile if arena.bits == 16 else tuning.tile
        tiles += arena.block_capacity * (128 // tile)
    return max(2, min(wanted, tiles, MAX_PARTS))


def cached_attention(
    query: Tensor,
    high: PackedArena,
    low: PackedArena,
    tail: Tail | None,
    *,
    scaling: float,
    saliency: SaliencyBuffers | None,
    limits: tuple[Tensor, Tensor] | None,
    share: int,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp), see `quietgoose.kernels.cached_attention.cached_attention`."""
    for name, group in (("high", high), ("low", low), ("tail", tail), ("saliency", saliency)):
        _require_contiguous(name, group)
    if query.stride(3) != 1:
        query = query.contiguous()
    num_rows, num_heads, length, head_dim = query.shape
    batch, kv_heads = high.key_codes.shape[:2]
    tuning = tuning or (LOSSLESS if high.bits == low.bits == 16 else DEFAULT)
    group, device = num_heads // kv_heads, query.device
    lines, rows = batch * kv_heads, share * group * length
    row_tile = 8 if rows <= 8 else 16
    row_tiles = -(-rows // row_tile)
    arena_parts = _parts(high, low, lines * row_tiles, tuning, device)
    width = 0 if tail is None else tail.key.shape[2]
    tail_parts = -(-width // kernels.TAIL_TILE.value)
    parts = arena_parts + share * tail_parts
    with_saliency = saliency is not None and tail is not None and width > 0

    part_out = torch.empty(lines, parts, rows, head_dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(lines, parts, rows, dtype=torch.float32, device=device)
    # [rows, q, H, D] in memory: what follows attention in a model wants the heads side by side
    out = torch.empty(num_rows, length, num_heads, head_dim, dtype=query.dtype, device=device).transpose(1, 2)
    lse = torch.empty(num_rows, num_heads, length, dtype=torch.float32, device=device)
    scores = torch.empty(lines, rows, width, dtype=torch.float32, device=device) if with_saliency else part_lse
    tail_tensors = [query, query, query, query] if tail is None else [tail.key, tail.value, tail.valid, tail.length]
    sums = [saliency.total, saliency.pending, saliency.accepted] if with_saliency else [part_lse, part_lse, part_lse]
    pending = saliency.pending.shape[2] if with_saliency else 1
    limit_tensors = [part_lse, part_lse] if limits is None else [limit.contiguous() for limit in limits]
    limit_share = 1 if limits is None else num_rows // limits[0].shape[0]
    if limits is not None and limits[1].shape[0] != limits[0].shape[0]:
        raise UnsupportedShape(f"limits for {limits[0].shape[0]} and {limits[1].shape[0]} rows: they must be equal")

    kernels.attend_kernel[(lines, parts, row_tiles)](
        query, query.stride(0), query.stride(1), query.stride(2),
        *_arena_arguments(high), *_arena_arguments(low),
        high.capacity, high.block_capacity, low.capacity, low.block_capacity,
        *limit_tensors, limit_share,
        *tail_tensors, width, max(tail_parts, 1),
        *sums, scores, part_out, part_lse, kv_heads, length, rows, arena_parts, scaling,
        HEAD_DIM=head_dim, GROUP=group, ROWS=row_tile, HIGH_BITS=high.bits, LOW_BITS=low.bits,
        TILE=tuning.tile, STAGES=tuning.stages, WEIGHT_HIGH=WEIGHTS[high.bits],
        WEIGHT_LOW=WEIGHTS[low.bits], PLAIN_TILE=tuning.plain_tile, LIMITS=limits is not None,
        SALIENCY=with_saliency, PENDING=pending, INTERPRET=_interpreted(),
        OVERLAP=tuning.overlap, num_warps=tuning.num_warps,
        **({} if tuning.registers is None else {"maxnreg": tuning.registers}),
    )  # fmt: skip
    padded, slot_tile = max(16, 1 << (parts - 1).bit_length()), 128
    slot_tiles = -(-width // slot_tile) if with_saliency else 0
    kernels.reduce_kernel[(lines, rows + share * slot_tiles)](
        part_out, part_lse, out, out.stride(0), out.stride(1), out.stride(2), lse,
        scores, tail_tensors[2], tail_tensors[3], width, sums[1], sums[2],
        kv_heads, length, rows, parts, max(slot_tiles, 1),
        HEAD_DIM=head_dim, GROUP=group, PARTS_PADDED=padded, CHUNK=min(padded, 64),
        PENDING=pending, GROUP_PADDED=1 << (group - 1).bit_length(), SLOT_TILE=slot_tile, OVERLAP=tuning.overlap,
        num_warps=8, **({"launch_pdl": True} if tuning.overlap else {}),
    )  # fmt: skip
    return out, lse
