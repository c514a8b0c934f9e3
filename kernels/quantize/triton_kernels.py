"""Triton: place every token, then gather, quantise, pack and store, without asking the host anything.

    _plan      one program per (row, head): which token goes to which slot of which arena; one a row updates the tables
    _channels  one program per (row, head, arena): channel scales of the values, where a row begins
    _pack      one program per (row, head, block, keys or values), once per arena

Four launches whatever B and Hk are. reference.py is the specification; the codes are equal bit for bit, so the fp32
operations stand in the same order and nothing here is a product followed by a sum (which a compiler may fuse).
Called by `append_packed` in this folder; test: `pytest tests/kernels/test_quantize_kernels.py`.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# (a type checker can not follow Triton's language)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .layout import BLOCK, PackedArena
from .rounding import KeyRounding
from .triton_rounding import packed_planes, rounded_codes

_PLAN = 3  # per row and arena: slots in use, blocks in use, tokens to add
_CHUNK = 1024  # tokens a plan program handles at a time
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
def _update_table(p_start, p_blocks, p_plan, used, blocks, count, num_entries, capacity, BLOCK: tl.constexpr):
    """Append blocks for `count` tokens to one row's table; what can not fit is left out. Writes the row's plan."""
    room = tl.minimum(capacity - used, (num_entries - 1 - blocks) * BLOCK)
    count = tl.minimum(count, tl.maximum(room, 0))
    tl.store(p_plan, used)
    tl.store(p_plan + 1, blocks)
    tl.store(p_plan + 2, count)
    for first in range(0, num_entries, 128):
        i_entry = first + tl.arange(0, 128)
        end = used + tl.minimum((i_entry - blocks) * BLOCK, count)
        tl.store(p_start + i_entry, end, mask=(i_entry > blocks) & (i_entry < num_entries))
    tl.store(p_blocks, blocks + tl.cdiv(count, BLOCK))


@triton.jit
def _plan(
    p_salient, p_valid, p_high_source, p_low_source, p_plan,
    p_high_start, p_high_blocks, p_low_start, p_low_blocks,
    n, heads, high_entries, low_entries, high_capacity, low_capacity,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """source[b, h, i] = token that is the i-th new one of the arena; plan[b, arena] = (used, blocks, count)."""
    program = tl.program_id(0).to(tl.int64)
    row = program // heads
    # the old state is read before anything is stored; the loop's scans stand between
    high_blocks = tl.load(p_high_blocks + row)
    low_blocks = tl.load(p_low_blocks + row)
    high_used = tl.load(p_high_start + row * high_entries + high_blocks)
    low_used = tl.load(p_low_start + row * low_entries + low_blocks)
    num_high = high_blocks * 0
    num_low = low_blocks * 0
    for first in range(0, n, CHUNK):
        i_token = first + tl.arange(0, CHUNK)
        valid = tl.load(p_valid + row * n + i_token, mask=i_token < n, other=0) != 0
        salient = tl.load(p_salient + program * n + i_token, mask=i_token < n, other=0) != 0
        high = (valid & salient).to(tl.int32)
        low = (valid & (salient == 0)).to(tl.int32)
        place = num_high + tl.cumsum(high, 0) - 1
        tl.store(p_high_source + program * n + place, i_token, mask=high != 0)
        place = num_low + tl.cumsum(low, 0) - 1
        tl.store(p_low_source + program * n + place, i_token, mask=low != 0)
        num_high += tl.sum(high, 0)
        num_low += tl.sum(low, 0)
    tl.debug_barrier()
    if program % heads == 0:
        p_row = p_plan + row * 6
        _update_table(
            p_high_start + row * high_entries, p_high_blocks + row, p_row,
            high_used, high_blocks, num_high, high_entries, high_capacity, BLOCK,
        )  # fmt: skip
        _update_table(
            p_low_start + row * low_entries, p_low_blocks + row, p_row + 3,
            low_used, low_blocks, num_low, low_entries, low_capacity, BLOCK,
        )  # fmt: skip


@triton.jit
def _channels(
    p_value, p_source, p_plan, p_high_channel, p_low_channel,
    n, heads, v_row, v_head, v_token,
    HIGH_BITS: tl.constexpr, LOW_BITS: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """c of one (row, head, arena), where the row has no block yet. p_source [2, rows, heads, n]: both arenas'."""
    program = tl.program_id(0).to(tl.int64)
    row = program // heads
    p_token = p_value + row * v_row + (program % heads) * v_head
    if tl.program_id(1) == 0:
        if HIGH_BITS != 16:
            _fill_channels(
                p_token, p_source + program * n, p_plan + row * 6, p_high_channel + program * D, v_token, D, CHUNK
            )
    else:
        if LOW_BITS != 16:
            p_low_source = p_source + (tl.num_programs(0) + program) * n
            _fill_channels(p_token, p_low_source, p_plan + row * 6 + 3, p_low_channel + program * D, v_token, D, CHUNK)


@triton.jit
def _fill_channels(p_token, p_source, p_plan, p_channel, v_token, D: tl.constexpr, CHUNK: tl.constexpr):
    """reference.channel_scales over all new tokens of one (row, head); nothing if there are none or c is there."""
    count = tl.load(p_plan + 2)
    if (tl.load(p_plan + 1) == 0) & (count > 0):
        i_channel = tl.arange(0, D)
        peak = tl.zeros([D], dtype=tl.float32)
        for first in range(0, count, CHUNK):
            i_new = first + tl.arange(0, CHUNK)
            m_new = i_new < count
            source = tl.load(p_source + i_new, mask=m_new, other=0).to(tl.int64)
            x = tl.load(p_token + source[:, None] * v_token + i_channel[None, :], mask=m_new[:, None], other=0.0)
            peak = tl.maximum(peak, tl.max(tl.abs(x.to(tl.float32)), 0))
        largest = tl.broadcast_to(tl.max(peak, 0), [D])
        counted = tl.where(peak > 0, tl.minimum(2 * count, KNOWN), tl.minimum(2 * count, UNKNOWN))
        peak = tl.maximum(peak, tl.div_rn(largest, counted.to(tl.float32)))
        channel = _round_to_half(tl.sqrt_rn(largest * peak) * HEADROOM, True)
        tl.store(p_channel + i_channel, tl.where(channel > 0, channel, 1.0).to(tl.float16))


@triton.jit
def _pack(
    p_key, p_value, p_source, p_plan,
    p_key_codes, p_value_codes, p_value_scale, p_value_min, p_key_scale, p_key_min, p_channel, p_order, p_step,
    n, heads, capacity, block_capacity,
    k_row, k_head, k_token, v_row, v_head, v_token,
    BITS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """One block of one (row, head): keys if program_id(2) is 0, values if 1. p_plan points at this arena's column."""
    program = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = program // heads
    head = program % heads
    count = tl.load(p_plan + row * 6 + 2)
    if block * BLOCK < count:
        i_new = block * BLOCK + tl.arange(0, BLOCK)
        m_new = i_new < count
        source = tl.load(p_source + program * n + i_new, mask=m_new, other=0).to(tl.int64)
        slot = program * capacity + tl.load(p_plan + row * 6) + i_new
        o_block = (program * block_capacity + tl.load(p_plan + row * 6 + 1) + block) * D
        if tl.program_id(2) == 0:
            p_token = p_key + row * k_row + head * k_head + source * k_token
            if BITS == 16:
                _copy(p_token, p_key_codes, slot, m_new, D)
            elif ROUNDED:
                _pack_keys_rounded(
                    p_token, p_key_codes, p_key_scale + o_block, p_key_min + o_block,
                    p_order + program * D, p_step + program * D * D, slot, m_new, BITS, D,
                )  # fmt: skip
            else:
                _pack_keys(p_token, p_key_codes, p_key_scale + o_block, p_key_min + o_block, slot, m_new, BITS, D)
        else:
            p_token = p_value + row * v_row + head * v_head + source * v_token
            if BITS == 16:
                _copy(p_token, p_value_codes, slot, m_new, D)
            else:
                _pack_values(
                    p_token, p_value_codes, p_value_scale, p_value_min, p_channel + program * D, slot, m_new, BITS, D
                )


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
def _normalised(p_token, p_channel, i_channel, m_new, BITS: tl.constexpr):
    """value / c of some channels, saturated where its scale would leave what cached_attention can hold."""
    BOUND: tl.constexpr = LIMIT * ((1 << BITS) - 1)
    x = tl.load(p_token[:, None] + i_channel[None, :], mask=m_new[:, None], other=0.0).to(tl.float32)
    channel = tl.load(p_channel + i_channel).to(tl.float32)
    y = tl.div_rn(x, tl.broadcast_to(channel[None, :], x.shape))
    return tl.minimum(tl.maximum(y, -BOUND), BOUND)


@triton.jit
def _pack_values(p_token, p_codes, p_scale, p_min, p_channel, slot, m_new, BITS: tl.constexpr, D: tl.constexpr):
    """Two passes over the block: the token's range over all channels, then codes plane by plane (from cache)."""
    PLANES: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = D // PLANES
    y = _normalised(p_token, p_channel, tl.arange(0, D), m_new, BITS)
    minimum = _round_to_half(tl.min(y, 1), False)
    scale = _scale(tl.max(y, 1), minimum, BITS)
    tl.store(p_scale + slot, scale.to(tl.float16), mask=m_new)
    tl.store(p_min + slot, minimum.to(tl.float16), mask=m_new)
    i_channel = tl.arange(0, WIDTH)
    packed = tl.zeros((m_new.shape[0], WIDTH), dtype=tl.int32)
    for plane in tl.static_range(PLANES):
        y = _normalised(p_token, p_channel, plane * WIDTH + i_channel, m_new, BITS)
        packed |= _codes(y, minimum[:, None], scale[:, None], BITS) << (plane * BITS)
    tl.store(p_codes + slot[:, None] * WIDTH + i_channel[None, :], packed.to(tl.uint8), mask=m_new[:, None])


def append_packed(
    high: PackedArena,
    low: PackedArena,
    key: Tensor,
    value: Tensor,
    salient: Tensor,
    valid: Tensor,
    rounding: KeyRounding | None = None,
) -> None:
    """See `quietgoose.kernels.quantize.append_packed`; arguments are checked there."""
    batch, heads, n, width = key.shape
    if n == 0 or batch * heads == 0:
        return
    key, value = _unit_stride(key), _unit_stride(value)
    source = torch.empty(2, batch, heads, n, dtype=torch.int32, device=key.device)
    plan = torch.empty(batch, 2, _PLAN, dtype=torch.int32, device=key.device)
    _plan[(batch * heads,)](
        salient.contiguous().view(torch.uint8), valid.contiguous().view(torch.uint8), source[0], source[1], plan,
        high.block_start, high.num_blocks, low.block_start, low.num_blocks,
        n, heads, high.block_start.shape[1], low.block_start.shape[1], high.capacity, low.capacity,
        BLOCK=BLOCK, CHUNK=min(_CHUNK, max(16, triton.next_power_of_2(n))), num_warps=4,
    )  # fmt: skip
    _channels[(batch * heads, 2)](
        value, source, plan, high.value_channel, low.value_channel,
        n, heads, *value.stride()[:3],
        HIGH_BITS=high.bits, LOW_BITS=low.bits, D=width, CHUNK=min(64, max(16, triton.next_power_of_2(n))), num_warps=8,
    )  # fmt: skip
    for i, arena in enumerate((high, low)):
        _pack[(batch * heads, triton.cdiv(n, BLOCK), 2)](
            key, value, source[i], plan[:, i],
            arena.key_codes, arena.value_codes, arena.value_scale, arena.value_min,
            arena.key_scale, arena.key_min, arena.value_channel,
            plan if rounding is None else rounding.order_BKD.contiguous(),
            arena.value_scale if rounding is None else rounding.step_BKDD.contiguous(),
            n, heads, arena.capacity, arena.block_capacity,
            *key.stride()[:3], *value.stride()[:3],
            BITS=arena.bits, D=width, BLOCK=BLOCK, ROUNDED=rounding is not None, num_warps=8,
        )  # fmt: skip


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
