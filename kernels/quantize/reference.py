"""Quantise, pack and unpack in plain PyTorch: the specification of the Triton kernels (mathematics in README.md).

    u = floor((x - z) / s + 1/2)      ZipCache, Algorithm 1 and eq. 6; parameters rounded to fp16 before the codes

The order of the fp32 operations is part of the specification, because codes are compared bit for bit: a subtraction, an
IEEE division, an addition, a truncation. No product is followed by a sum, so no compiler can fuse one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import BLOCK, PackedArena, check_bits
from .rounding import KeyRounding, round_with_queries

FP16_MAX = 65504.0
SCALE_FLOOR = 2.0**-24  # the smallest positive fp16
LIMIT = 127.0  # cached_attention holds 2^8 value_scale in fp16, so a scale must stay below 255
HEADROOM = 4.0  # later values may be larger than those that c was computed from
KNOWN, UNKNOWN = 64, 4  # the largest k of `channel_scales`; the second where a channel has only zeros


def round_down(x: Tensor) -> Tensor:
    """fp32 -> the largest fp16 not above it, as fp32; saturates at the fp16 range."""
    return _directed(x, up=False)


def round_up(x: Tensor) -> Tensor:
    """fp32 -> the smallest fp16 not below it, as fp32; saturates at the fp16 range."""
    return _directed(x, up=True)


def _directed(x: Tensor, *, up: bool) -> Tensor:
    x = x.clamp(-FP16_MAX, FP16_MAX)
    nearest = x.to(torch.float16)
    bits = nearest.view(torch.int16)
    if up:
        step = torch.where(nearest.float() < x, torch.where(bits < 0, -1, 1), 0)
    else:
        step = torch.where(nearest.float() > x, torch.where(bits < 0, 1, -1), 0)
    return (bits + step.to(torch.int16)).view(torch.float16).float()


def quantize_keys(key: Tensor, bits: int, rounding: KeyRounding | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of keys [Hk, blocks, T, D] fp32 -> (codes uint8 alike, scale [Hk, blocks, D], minimum alike) fp32.

    rounding: of this row (order [Hk, D], step [Hk, D, D]); None rounds to nearest.
    """
    minimum = round_down(key.amin(-2))
    scale = _scale(key.amax(-2), minimum, bits)
    if rounding is None:
        return _codes(key, minimum.unsqueeze(-2), scale.unsqueeze(-2), bits), scale, minimum
    wide_minimum, wide_scale = (t.unsqueeze(-2).expand_as(key) for t in (minimum, scale))
    return round_with_queries(key, wide_minimum, wide_scale, bits, rounding), scale, minimum


def channel_scales(value: Tensor) -> Tensor:
    """c [..., D] from values [..., T, D] fp32: all tokens of one arena in a row's first flush. Positive, exact in fp16.

        c_j = 4 sqrt(A max(a_j, A / k))      a_j = max_t |V_tj|      A = max_j a_j      k = min(2T, 64)

    sqrt(a_j) is ZipCache's (eq. 6). Ours, because tokens yet to come are divided by this c too:
    4 sqrt(A), the same for all channels, cancels in c_j s_t; it makes |V / c| <= 1/4 whatever the unit of V.
    A / k is the least that a channel counts as, so that no c is so small that one later value spoils its token's
    scale. Few tokens say little about a channel; one with only zeros says nothing, and k is at most 4 there. A head
    with only zeros has c = 1.
    """
    peak_D = value.abs().amax(-2)
    largest = peak_D.amax(-1, keepdim=True)
    tokens = 2 * value.shape[-2]
    # a tensor divided by a tensor: by a number it may become a product with the inverse
    least, least_of_zeros = (largest / torch.full_like(largest, min(tokens, k)) for k in (KNOWN, UNKNOWN))
    peak_D = torch.maximum(peak_D, torch.where(peak_D > 0, least, least_of_zeros))
    root_D = (largest * peak_D).double().sqrt().float()  # PyTorch's fp32 root is not the nearest on every CPU
    channel = round_up(HEADROOM * root_D)
    return torch.where(channel > 0, channel, 1.0)


def quantize_values(value: Tensor, channel: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values [..., T, D] fp32 with any positive c [..., D] -> (codes uint8 [..., T, D], scale, minimum [..., T]).

    The error is at most c_j s_t / 2, whatever tokens c came from: m_t <= V_tj / c_j <= m_t + (2^bits - 1) s_t holds for
    this token by its own minimum and maximum. |V / c| saturates at LIMIT (2^bits - 1).
    """
    bound = LIMIT * (2**bits - 1)
    y = (value / channel.unsqueeze(-2)).clamp(-bound, bound)
    minimum = round_down(y.amin(-1))
    scale = _scale(y.amax(-1), minimum, bits)
    return _codes(y, minimum.unsqueeze(-1), scale.unsqueeze(-1), bits), scale, minimum


def _scale(maximum: Tensor, minimum: Tensor, bits: int) -> Tensor:
    return round_up((maximum - minimum) * (1.0 / (2**bits - 1))).clamp_min(SCALE_FLOOR)


def _codes(x: Tensor, minimum: Tensor, scale: Tensor, bits: int) -> Tensor:
    # x >= minimum, so truncation is floor; the bounds only act on values beyond fp16 and on NaN
    steps = (x - minimum) / scale + 0.5
    return steps.clamp(0.0, 2**bits - 1).nan_to_num(0.0).to(torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., D] -> planar bytes [..., D * bits // 8] (layout.py says which bits hold which channel)."""
    check_bits(bits, codes.shape[-1])
    planes = codes.unflatten(-1, (8 // bits, -1)).unbind(-2)
    packed = planes[0].clone()
    for i, plane in enumerate(planes[1:], start=1):
        packed |= plane << (bits * i)
    return packed


def unpack_codes(packed: Tensor, bits: int, head_dim: int) -> Tensor:
    """Planar bytes [..., D * bits // 8] -> uint8 codes [..., D]."""
    check_bits(bits, head_dim)
    return torch.cat([(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], dim=-1)


def append_packed(
    high: PackedArena,
    low: PackedArena,
    key: Tensor,
    value: Tensor,
    salient: Tensor,
    valid: Tensor,
    rounding: KeyRounding | None = None,
) -> None:
    """See `quietgoose.kernels.quantize.append_packed`. Reads counts on the host: not for a hot path on a GPU."""
    for arena, member in ((high, salient & valid.unsqueeze(1)), (low, ~salient & valid.unsqueeze(1))):
        for row in range(key.shape[0]):
            own = None if rounding is None else rounding.of_row(row)
            _append_row(arena, row, key[row], value[row], member[row], own)


def _append_row(
    arena: PackedArena, row: int, key: Tensor, value: Tensor, member: Tensor, rounding: KeyRounding | None
) -> None:
    """Tokens [Hk, n, D] where member [Hk, n] into new blocks of one row."""
    counts = member.sum(-1)
    count, blocks = int(counts[0]), int(arena.num_blocks[row])
    if not bool((counts == count).all()):
        raise ValueError(f"row {row}: heads select different numbers of tokens {counts.tolist()}; they must be equal")
    start = int(arena.block_start[row, blocks])
    new_blocks = -(-count // BLOCK)
    if start + count > arena.capacity or blocks + new_blocks > arena.block_capacity:
        raise ValueError(
            f"row {row}: {count} tokens in {new_blocks} blocks do not fit behind {start} slots and {blocks} blocks of "
            f"a {arena.bits}-bit arena with {arena.capacity} slots and {arena.block_capacity} blocks: grow it first"
        )
    # stable: members first, in position order
    index = (~member).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :count, None].expand(-1, -1, key.shape[-1])
    key, value = key.gather(1, index), value.gather(1, index)
    if arena.bits == 16:
        arena.key_codes[row, :, start : start + count] = key.to(arena.key_codes.dtype)
        arena.value_codes[row, :, start : start + count] = value.to(arena.value_codes.dtype)
    elif count:
        if blocks == 0:
            arena.value_channel[row] = channel_scales(value.float()).half()
        whole = count // BLOCK
        _write_blocks(arena, row, start, blocks, key[:, : whole * BLOCK], value[:, : whole * BLOCK], BLOCK, rounding)
        if count % BLOCK:
            tail = slice(whole * BLOCK, count)
            place = (start + tail.start, blocks + whole)
            _write_blocks(arena, row, *place, key[:, tail], value[:, tail], count % BLOCK, rounding)
    ends = start + (torch.arange(1, arena.block_capacity - blocks + 1, dtype=torch.int32) * BLOCK).clamp_max(count)
    arena.block_start[row, blocks + 1 :] = ends.to(arena.block_start.device)
    arena.num_blocks[row] = blocks + new_blocks


def _write_blocks(
    arena: PackedArena,
    row: int,
    start: int,
    block: int,
    key: Tensor,
    value: Tensor,
    size: int,
    rounding: KeyRounding | None,
) -> None:
    """Equal blocks of `size` slots: key, value [Hk, blocks * size, D] at slot `start`, block `block`."""
    if key.shape[1] == 0:
        return
    slots, blocks = slice(start, start + key.shape[1]), slice(block, block + key.shape[1] // size)
    codes, scale, minimum = quantize_keys(key.float().unflatten(1, (-1, size)), arena.bits, rounding)
    arena.key_codes[row, :, slots] = pack_codes(codes.flatten(1, 2), arena.bits)
    arena.key_scale[row, :, blocks], arena.key_min[row, :, blocks] = scale.half(), minimum.half()
    channel = arena.value_channel[row].float().unsqueeze(1)
    codes, scale, minimum = quantize_values(value.float().unflatten(1, (-1, size)), channel, arena.bits)
    arena.value_codes[row, :, slots] = pack_codes(codes.flatten(1, 2), arena.bits)
    arena.value_scale[row, :, slots] = scale.flatten(1).half()
    arena.value_min[row, :, slots] = minimum.flatten(1).half()


def dequantize(arena: PackedArena, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(key, value) [B, Hk, C, D]; slots not in use are zero, whatever their memory holds.

    dtype: of the result; default fp32 (at 16 bits: the codes' own). The arithmetic is fp32, or fp64 when asked for.
    No synchronisation.
    """
    slots = torch.arange(arena.capacity, dtype=torch.int32, device=arena.num_blocks.device)
    used_BHCD = (slots < arena.lengths().unsqueeze(1))[:, None, :, None]
    if arena.bits == 16:
        dtype = dtype or arena.key_codes.dtype
        zero = torch.zeros((), dtype=dtype, device=slots.device)
        return (
            torch.where(used_BHCD, arena.key_codes.to(dtype), zero),
            torch.where(used_BHCD, arena.value_codes.to(dtype), zero),
        )
    dtype = dtype or torch.float32
    if arena.block_capacity == 0:
        shape = (*arena.key_codes.shape[:3], arena.head_dim)
        nothing = torch.zeros(shape, dtype=dtype, device=slots.device)
        return nothing, nothing.clone()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    # block of each slot = number of block ends at or below it
    ends = arena.block_start[:, 1:].contiguous()
    block_BC = torch.searchsorted(ends, slots.expand(ends.shape[0], -1).contiguous(), right=True)
    block_BC = block_BC.clamp_max(arena.block_capacity - 1)
    heads, width = arena.key_codes.shape[1], arena.head_dim
    index = block_BC[:, None, :, None].expand(-1, heads, -1, width)

    def per_slot(parameter: Tensor) -> Tensor:
        return parameter.gather(2, index).to(compute)

    key_codes = unpack_codes(arena.key_codes, arena.bits, width).to(compute)
    value_codes = unpack_codes(arena.value_codes, arena.bits, width).to(compute)
    key = per_slot(arena.key_scale) * key_codes + per_slot(arena.key_min)
    value = arena.value_scale.to(compute).unsqueeze(-1) * value_codes + arena.value_min.to(compute).unsqueeze(-1)
    value = arena.value_channel.to(compute).unsqueeze(2) * value
    zero = torch.zeros((), dtype=compute, device=slots.device)
    return torch.where(used_BHCD, key, zero).to(dtype), torch.where(used_BHCD, value, zero).to(dtype)
