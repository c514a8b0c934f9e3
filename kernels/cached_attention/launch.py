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
from . import triton_reduce as reduction
from .layout import SaliencyBuffers, Tail

# relative time of one block of 128 slots by its bits; decides how programs are dealt to the two arenas
WEIGHTS = {2: 5, 4: 6, 16: 20}
MAX_PARTS = 256


@dataclass(frozen=True)
class Tuning:
    """Launch parameters; results do not depend on them beyond rounding."""

    num_warps: int = 1
    tile: int = 64  # slots of a packed tile, 32, 64 or 128
    stages: int = 5  # copies run one tile ahead: the block table, read first, takes up every other stage
    plain_tile: int = 32  # slots of a 16-bit tile
    plain_stages: int = 3
    programs_per_multiprocessor: int = 8  # as many as their registers let run beside each other, or a multiple


DEFAULT = Tuning()
LOSSLESS = Tuning(num_warps=4, plain_tile=64, programs_per_multiprocessor=6)  # both arenas at 16 bits


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _interpreted() -> bool:
    return type(kernels.attend_kernel).__name__ == "InterpretedFunction"


def _arena_arguments(arena: PackedArena) -> list[Tensor]:
    codes = [arena.key_codes, arena.value_codes]
    channels = [arena.key_scale, arena.key_min, arena.value_channel]
    if arena.bits != 16:  # two bytes of codes, and two channels of fp16 parameters, at a time
        codes, channels = [c.view(torch.int16) for c in codes], [c.view(torch.int32) for c in channels]
    return [*codes, arena.value_scale, arena.value_min, *channels, arena.block_start, arena.num_blocks]


def _require_contiguous(name: str, group: PackedArena | Tail | SaliencyBuffers | None) -> None:
    for field in fields(group) if group is not None else ():
        tensor = getattr(group, field.name)
        if isinstance(tensor, Tensor) and not tensor.is_contiguous():
            raise UnsupportedShape(f"{name}.{field.name} with strides {tensor.stride()}: it must be contiguous")


def _most_parts(lines: int, tails: int, tuning: Tuning, device: torch.device) -> int:
    """Programs of the arenas per (row, KV head), however much is stored: all run beside each other.

    One program too many would wait for a place and double the time: rounded down, and with room for `tails` programs
    of the tail (short ones, so they get a quarter of the places at most).
    """
    places = tuning.programs_per_multiprocessor * _multiprocessors(device) // lines
    return max(2, min(max(places - tails, places * 3 // 4), MAX_PARTS))


def _parts(high: PackedArena, low: PackedArena, most: int, tuning: Tuning) -> int:
    """No more programs than there can be tiles."""
    tiles = 0
    for arena in (high, low):
        tile = tuning.plain_tile if arena.bits == 16 else tuning.tile
        tiles += arena.block_capacity * (128 // tile)
    return max(2, min(most, tiles))


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
    tuning = tuning or (LOSSLESS if high.bits == low.bits == 16 else DEFAULT)
    plan = _plan(query, high, low, tail, share, tuning)
    part_out = torch.empty(plan.lines, plan.parts, plan.rows, query.shape[3], dtype=torch.float32, device=query.device)
    part_lse = torch.empty(plan.lines, plan.parts, plan.rows, dtype=torch.float32, device=query.device)
    if saliency is None or plan.width == 0:
        sums, scores, pending = (part_lse, part_lse, part_lse), part_lse, 0
    else:
        sums, pending = (saliency.total, saliency.pending, saliency.accepted), saliency.pending.shape[2]
        scores = torch.empty(plan.lines, plan.rows, plan.width, dtype=torch.float32, device=query.device)
    # what is not there is not read; the stand-ins have the right types
    tail_tensors = (query, query, high.num_blocks, high.num_blocks)
    if tail is not None:
        tail_tensors = (tail.key, tail.value, tail.valid, tail.length)
    limit_tensors, limit_share = _limits(limits, part_lse, query.shape[0])
    kernels.attend_kernel[(plan.lines, plan.parts, plan.row_tiles)](
        query, query.stride(0), query.stride(1), query.stride(2),
        *_arena_arguments(high), *_arena_arguments(low),
        high.capacity, high.block_capacity, low.capacity, low.block_capacity,
        *limit_tensors, limit_share,
        *tail_tensors, plan.width, max(plan.tail_parts, 1),
        *sums, scores, part_out, part_lse, plan.kv_heads, query.shape[2], plan.rows, plan.arena_parts, scaling,
        HEAD_DIM=query.shape[3], GROUP=plan.group, ROWS=plan.row_tile, HIGH_BITS=high.bits, LOW_BITS=low.bits,
        TILE=tuning.tile, STAGES=tuning.stages, WEIGHT_HIGH=WEIGHTS[high.bits], WEIGHT_LOW=WEIGHTS[low.bits],
        PLAIN_TILE=tuning.plain_tile, PLAIN_STAGES=tuning.plain_stages, LIMITS=limits is not None,
        SALIENCY=pending > 0, PENDING=max(pending, 1), ONE=share == query.shape[2] == 1, INTERPRET=_interpreted(),
        num_warps=tuning.num_warps,
    )  # fmt: skip
    return _reduce(plan, query, part_out, part_lse, scores, tail_tensors, sums, pending)


@dataclass(frozen=True)
class _Plan:
    """How one call is cut into programs."""

    kv_heads: int
    group: int
    share: int
    lines: int  # rows of the cache times KV heads
    rows: int  # rows of queries of a line: share * group * query length
    row_tile: int
    row_tiles: int
    width: int  # slots of the tail
    tail_parts: int
    arena_parts: int
    parts: int  # of both kinds
    chunks: int  # of the reduction; does not depend on what is stored: a longer cache needs no other kernel


def _plan(query: Tensor, high: PackedArena, low: PackedArena, tail: Tail | None, share: int, tuning: Tuning) -> _Plan:
    batch, kv_heads = high.key_codes.shape[:2]
    group = query.shape[1] // kv_heads
    lines, rows = batch * kv_heads, share * group * query.shape[2]
    row_tile = 8 if rows <= 8 else 16
    row_tiles = -(-rows // row_tile)
    width = 0 if tail is None else tail.key.shape[2]
    tail_parts = -(-width // kernels.TAIL_TILE.value)
    most = _most_parts(lines * row_tiles, share * tail_parts, tuning, query.device)
    arena_parts = _parts(high, low, most, tuning)
    parts = arena_parts + share * tail_parts
    chunks = -(-(most + share * tail_parts) // reduction.CHUNK.value)
    return _Plan(
        kv_heads, group, share, lines, rows, row_tile, row_tiles, width, tail_parts, arena_parts, parts, chunks
    )  # fmt: skip


def _limits(limits: tuple[Tensor, Tensor] | None, nothing: Tensor, rows: int) -> tuple[tuple[Tensor, Tensor], int]:
    """(tensors, rows of queries that share a row of limits)."""
    if limits is None:
        return (nothing, nothing), 1
    high, low = limits
    if high.shape[0] != low.shape[0]:
        raise UnsupportedShape(f"limits for {high.shape[0]} and {low.shape[0]} rows: they must be equal")
    return (high.contiguous(), low.contiguous()), rows // high.shape[0]


def _reduce(
    plan: _Plan,
    query: Tensor,
    part_out: Tensor,
    part_lse: Tensor,
    scores: Tensor,
    tail_tensors: tuple[Tensor, ...],
    sums: tuple[Tensor, ...],
    pending: int,
) -> tuple[Tensor, Tensor]:
    """Second launch: merge the parts, and write what each query gave to the tail's slots."""
    num_rows, num_heads, length, head_dim = query.shape
    # [rows, q, H, D] in memory: what follows attention in a model wants the heads side by side
    out = torch.empty(num_rows, length, num_heads, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    lse = torch.empty(num_rows, num_heads, length, dtype=torch.float32, device=query.device)
    slot_tiles = -(-plan.width // reduction.SLOT_TILE.value) if pending else 0
    jobs = plan.rows * (head_dim // reduction.OUT_CHANNELS.value) + plan.share * slot_tiles
    reduction.reduce_kernel[(plan.lines, jobs)](
        part_out, part_lse, out, out.stride(0), out.stride(1), out.stride(2), lse,
        scores, tail_tensors[2], tail_tensors[3], plan.width, sums[1], sums[2],
        plan.kv_heads, length, plan.rows, plan.parts, max(slot_tiles, 1),
        HEAD_DIM=head_dim, GROUP=plan.group, GROUP_PADDED=1 << (plan.group - 1).bit_length(),
        CHUNKS=plan.chunks, SALIENCY=pending > 0, PENDING=max(pending, 1),
        num_warps=4,
    )  # fmt: skip
    return out, lse
