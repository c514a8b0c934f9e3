"""Triton: gather, quantise, pack and store tokens that triton_place.py has given their slots.

    _pack      one program per (row, head, block, arena, keys or values)

Two launches with the placing, three for many tokens, whatever B and Hk are. reference.py is the specification; the codes
are equal bit for bit, so the fp32 operations stand in the same order and nothing here is a product followed by a sum
(which a compiler may fuse).
Called by `append_ranked` and `append_packed` in this folder; test: `pytest tests/kernels/test_quantize_kernels.py`.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# (a type checker can not follow Triton's language)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .layout import BLOCK, BitTables, PackedArena
from .rounding import KeyRounding
from .triton_place import SHARES, place
from .triton_rounding import packed_planes, rounded_codes

LIMIT, HEADROOM = tl.constexpr(reference.LIMIT), tl.constexpr(reference.HEADROOM)
KNOWN, UNKNOWN = tl.constexpr(reference.KNOWN), tl.constexpr(reference.UNKNOWN)


@triton.jit
def _round_to_half(x, UP: tl.constexpr):
    """fp32 -> fp16 bits rounded up or down (not to nearest), saturating, back in fp32."""
    x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    nearest = x.to(tl.float16)
    bits = nearest.to(tl.int16, bitcast=True)
    back = nearest.to(tl.float32)
    if UP:
        step = tl.where(back < x, tl.where(bits < 0, -1, 1), 0)
    else:
        step = tl.where(back > x, tl.where(bits < 0, 1, -1), 0)
    bits = (bits.to(tl.int32) + step).to(tl.int16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scale(maximum, minimum, BITS: tl.constexpr):
    LEVELS: tl.constexpr = (1 << BITS) - 1
    step = (maximum - minimum) * (1.0 / LEVELS)
    return tl.maximum(_round_to_half(step, True), 5.9604644775390625e-08)


@triton.jit
def _codes(x, minimum, scale, BITS: tl.constexpr):
    """Codes 0 .. 2^BITS-1 as int32; x >= minimum, so truncation is floor."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    steps = tl.div_rn(x - minimum, scale) + 0.5
    steps = tl.where(steps == steps, steps, 0.0)
    return tl.minimum(tl.maximum(steps, 0.0), LEVELS * 1.0).to(tl.int32)


@triton.jit
def _update_table(p_start, p_blocks, p_plan, num_entries, BLOCK: tl.constexpr):
    """Append the planned tokens' blocks to one row's table."""
    used = tl.load(p_plan)
    blocks = tl.load(p_plan + 1)
    count = tl.load(p_plan + 2)
    for first in range(0, num_entries, 128):
        i_entry = first + tl.arange(0, 128)
        end = used + tl.minimum((i_entry - blocks) * BLOCK, count)
        tl.store(p_start + i_entry, end, mask=(i_entry > blocks) & (i_entry < num_entries))
    tl.store(p_blocks, blocks + tl.cdiv(count, BLOCK))


@triton.jit
def _load_peaks(p_peak, shares, i_channel, SHARES: tl.constexpr, D: tl.constexpr):
    """Largest |value| of some channels over the shares of the new tokens."""
    i_share = tl.arange(0, SHARES)[:, None]
    return tl.max(tl.load(p_peak + i_share * D + i_channel[None, :], mask=i_share < shares, other=0.0), 0)


@triton.jit
def _channel(p_channel, p_peak, shares, largest, begins, count, i_channel, SHARES: tl.constexpr, D: tl.constexpr):
    """c of some channels: reference.channel_scales of the new tokens where the row begins, else as it is stored."""
    if begins:
        peak = _load_peaks(p_peak, shares, i_channel, SHARES, D)
        counted = tl.where(peak > 0, tl.minimum(2 * count, KNOWN), tl.minimum(2 * count, UNKNOWN))
        wide = tl.broadcast_to(largest, peak.shape)
        peak = tl.maximum(peak, tl.div_rn(wide, counted.to(tl.float32)))
        channel = _round_to_half(tl.sqrt_rn(wide * peak) * HEADROOM, True)
        channel = tl.where(channel > 0, channel, 1.0)
    else:
        channel = tl.load(p_channel + i_channel).to(tl.float32)
    return channel


# as PLACE_SIZES; the slots of a cache are multiples of 16 anyway
PACK_SIZES = ["n", "shares", "high_capacity", "high_block_capacity", "low_capacity", "low_block_capacity"]


@triton.jit(do_not_specialize=PACK_SIZES)
def _pack(
    p_key, p_value, p_source, p_plan, p_peak, p_order, p_step,
    p_high_key, p_high_value, p_high_scale, p_high_min, p_high_key_scale, p_high_key_min, p_high_channel,
    p_high_start, p_high_blocks,
    p_low_key, p_low_value, p_low_scale, p_low_min, p_low_key_scale, p_low_key_min, p_low_channel,
    p_low_start, p_low_blocks,
    n, heads, shares, high_capacity, high_block_capacity, low_capacity, low_block_capacity,
    k_row, k_head, k_token, v_row, v_head, v_token,
    HIGH_BITS: tl.constexpr, LOW_BITS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SHARES: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """One block of one (row, head): keys and values of the high arena, of the low one. The first of a row updates its tables."""
    program = tl.program_id(0).to(tl.int64)
    row = program // heads
    head = program % heads
    p_keys = p_key + row * k_row + head * k_head
    p_values = p_value + row * v_row + head * v_head
    values = tl.program_id(2) % 2 == 1
    o_order = program * D
    if (head == 0) & (tl.program_id(1) == 0):
        if tl.program_id(2) == 0:
            high_entries = high_block_capacity + 1
            _update_table(p_high_start + row * high_entries, p_high_blocks + row, p_plan + row * 6, high_entries, BLOCK)
        if tl.program_id(2) == 2:
            low_entries = low_block_capacity + 1
            _update_table(p_low_start + row * low_entries, p_low_blocks + row, p_plan + row * 6 + 3, low_entries, BLOCK)
    if tl.program_id(2) < 2:
        _pack_block(
            p_keys, p_values, p_source + program * n, p_plan + row * 6, p_peak + program * shares * D, shares,
            p_order + o_order, p_step + o_order * D,
            p_high_key, p_high_value, p_high_scale, p_high_min, p_high_key_scale, p_high_key_min,
            p_high_channel + program * D,
            program * high_capacity, program * high_block_capacity, k_token, v_token, values,
            HIGH_BITS, D, BLOCK, SHARES, ROUNDED,
        )  # fmt: skip
    else:
        low = tl.num_programs(0) + program
        _pack_block(
            p_keys, p_values, p_source + low * n, p_plan + row * 6 + 3, p_peak + low * shares * D, shares,
            p_order + o_order, p_step + o_order * D,
            p_low_key, p_low_value, p_low_scale, p_low_min, p_low_key_scale, p_low_key_min,
            p_low_channel + program * D,
            program * low_capacity, program * low_block_capacity, k_token, v_token, values,
            LOW_BITS, D, BLOCK, SHARES, ROUNDED,
        )  # fmt: skip


@triton.jit
def _pack_block(
    p_keys, p_values, p_source, p_plan, p_peak, shares, p_order, p_step,
    p_key_codes, p_value_codes, p_value_scale, p_value_min, p_key_scale, p_key_min, p_channel,
    o_slot, o_block, k_token, v_token, values,
    BITS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SHARES: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Keys, or `values`, of block program_id(1) of the new tokens; pointers at this (row, head) and arena."""
    block = tl.program_id(1)
    count = tl.load(p_plan + 2)
    if block * BLOCK < count:
        i_new = block * BLOCK + tl.arange(0, BLOCK)
        m_new = i_new < count
        source = tl.load(p_source + i_new, mask=m_new, other=0).to(tl.int64)
        slot = o_slot + tl.load(p_plan) + i_new
        blocks = tl.load(p_plan + 1)
        if values:
            p_token = p_values + source * v_token
            if BITS == 16:
                _copy(p_token, p_value_codes, slot, m_new, D)
            else:
                _pack_values(
                    p_token, p_value_codes, p_value_scale, p_value_min, p_channel, p_peak, shares, slot, m_new,
                    blocks == 0, block == 0, count, BITS, D, SHARES,
                )  # fmt: skip
        else:
            p_token = p_keys + source * k_token
            o_channel = (o_block + blocks + block) * D
            if BITS == 16:
                _copy(p_token, p_key_codes, slot, m_new, D)
            elif ROUNDED:
                _pack_keys_rounded(
                    p_token, p_key_codes, p_key_scale + o_channel, p_key_min + o_channel, p_order, p_step,
                    slot, m_new, BITS, D,
                )  # fmt: skip
            else:
                _pack_keys(p_token, p_key_codes, p_key_scale + o_channel, p_key_min + o_channel, slot, m_new, BITS, D)


@triton.jit
def _copy(p_token, p_codes, slot, m_new, D: tl.constexpr):
    i_channel = tl.arange(0, D)
    x = tl.load(p_token[:, None] + i_channel[None, :], mask=m_new[:, None], other=0.0)
    tl.store(p_codes + slot[:, None] * D + i_channel[None, :], x.to(p_codes.dtype.element_ty), mask=m_new[:, None])


@triton.jit
def _pack_keys(p_token, p_codes, p_scale, p_min, slot, m_new, BITS: tl.constexpr, D: tl.constexpr):
    """Plane by plane: minimum and scale per channel over the block's tokens, then codes into their bits."""
    PLANES: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = D // PLANES
    i_channel = tl.arange(0, WIDTH)
    packed = tl.zeros((m_new.shape[0], WIDTH), dtype=tl.int32)
    for plane in tl.static_range(PLANES):
        i_plane = plane * WIDTH + i_channel
        x = tl.load(p_token[:, None] + i_plane[None, :], mask=m_new[:, None], other=0.0).to(tl.float32)
        minimum = _round_to_half(tl.min(tl.where(m_new[:, None], x, float("inf")), 0), False)
        maximum = tl.max(tl.where(m_new[:, None], x, float("-inf")), 0)
        scale = _scale(maximum, minimum, BITS)
        packed |= _codes(x, minimum[None, :], scale[None, :], BITS) << (plane * BITS)
        tl.store(p_scale + i_plane, scale.to(tl.float16))
        tl.store(p_min + i_plane, minimum.to(tl.float16))
    tl.store(p_codes + slot[:, None] * WIDTH + i_channel[None, :], packed.to(tl.uint8), mask=m_new[:, None])


@triton.jit
def _pack_keys_rounded(
    p_token, p_codes, p_scale, p_min, p_order, p_step, slot, m_new, BITS: tl.constexpr, D: tl.constexpr
):
    """All channels at once: parameters as in `_pack_keys`, codes from triton_rounding.py."""
    WIDTH: tl.constexpr = D * BITS // 8
    i_channel = tl.arange(0, D)
    x = tl.load(p_token[:, None] + i_channel[None, :], mask=m_new[:, None], other=0.0).to(tl.float32)
    minimum = _round_to_half(tl.min(tl.where(m_new[:, None], x, float("inf")), 0), False)
    scale = _scale(tl.max(tl.where(m_new[:, None], x, float("-inf")), 0), minimum, BITS)
    tl.store(p_scale + i_channel, scale.to(tl.float16))
    tl.store(p_min + i_channel, minimum.to(tl.float16))
    packed = packed_planes(rounded_codes(x, minimum, scale, p_order, p_step, BITS, D), BITS, D)
    i_byte = tl.arange(0, WIDTH)
    tl.store(p_codes + slot[:, None] * WIDTH + i_byte[None, :], packed.to(tl.uint8), mask=m_new[:, None])


@triton.jit
def _normalised(p_token, channel, i_channel, m_new, BITS: tl.constexpr):
    """value / c of some channels, saturated where its scale would leave what cached_attention can hold."""
    BOUND: tl.constexpr = LIMIT * ((1 << BITS) - 1)
    x = tl.load(p_token[:, None] + i_channel[None, :], mask=m_new[:, None], other=0.0).to(tl.float32)
    y = tl.div_rn(x, tl.broadcast_to(channel[None, :], x.shape))
    return tl.minimum(tl.maximum(y, -BOUND), BOUND)


@triton.jit
def _pack_values(
    p_token, p_codes, p_scale, p_min, p_channel, p_peak, shares, slot, m_new, begins, keeps, count,
    BITS: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Two passes over the block: the token's range over all channels, then codes plane by plane (from cache).

    Where the row `begins`, c comes from the peaks, in every program by itself; the one that `keeps` it stores it.
    """
    PLANES: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = D // PLANES
    i_all = tl.arange(0, D)
    largest = 0.0
    if begins:
        largest = tl.max(_load_peaks(p_peak, shares, i_all, SHARES, D), 0)
    channel = _channel(p_channel, p_peak, shares, largest, begins, count, i_all, SHARES, D)
    if begins & keeps:
        tl.store(p_channel + i_all, channel.to(tl.float16))
    y = _normalised(p_token, channel, i_all, m_new, BITS)
    minimum = _round_to_half(tl.min(y, 1), False)
    scale = _scale(tl.max(y, 1), minimum, BITS)
    tl.store(p_scale + slot, scale.to(tl.float16), mask=m_new)
    tl.store(p_min + slot, minimum.to(tl.float16), mask=m_new)
    i_channel = tl.arange(0, WIDTH)
    packed = tl.zeros((m_new.shape[0], WIDTH), dtype=tl.int32)
    for plane in tl.static_range(PLANES):
        i_plane = plane * WIDTH + i_channel
        channel = _channel(p_channel, p_peak, shares, largest, begins, count, i_plane, SHARES, D)
        y = _normalised(p_token, channel, i_plane, m_new, BITS)
        packed |= _codes(y, minimum[:, None], scale[:, None], BITS) << (plane * BITS)
    tl.store(p_codes + slot[:, None] * WIDTH + i_channel[None, :], packed.to(tl.uint8), mask=m_new[:, None])


def append_ranked(
    high: PackedArena,
    low: PackedArena,
    key: Tensor,
    value: Tensor,
    stored: Tensor,
    ratio: float,
    *,
    scores: Tensor | None = None,
    salient: Tensor | None = None,
    tables: BitTables | None = None,
    valid: Tensor | None = None,
    rounding: KeyRounding | None = None,
) -> None:
    """See `quietgoose.kernels.quantize.append_ranked`; arguments are checked there. No tables: nothing is noted."""
    batch, heads, n, width = key.shape
    if n == 0 or batch * heads == 0:
        return
    key, value = _unit_stride(key), _unit_stride(value)
    placed = place(high, low, value, stored, ratio, scores, salient, tables, stored if valid is None else valid)
    _pack[(batch * heads, -(-n // BLOCK), 4)](
        key, value, placed.source, placed.plan, placed.peak,
        placed.plan if rounding is None else rounding.order_BKD.contiguous(),
        placed.peak if rounding is None else rounding.step_BKDD.contiguous(),
        *_of(high), *_of(low),
        n, heads, placed.peak.shape[3], high.capacity, high.block_capacity, low.capacity, low.block_capacity,
        *key.stride()[:3], *value.stride()[:3],
        HIGH_BITS=high.bits, LOW_BITS=low.bits, D=width, BLOCK=BLOCK, SHARES=SHARES,
        ROUNDED=rounding is not None, num_warps=8,
    )  # fmt: skip


def _of(arena: PackedArena) -> tuple[Tensor, ...]:
    """What `_pack` writes, in its order."""
    return (
        arena.key_codes, arena.value_codes, arena.value_scale, arena.value_min, arena.key_scale, arena.key_min,
        arena.value_channel, arena.block_start, arena.num_blocks,
    )  # fmt: skip


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
