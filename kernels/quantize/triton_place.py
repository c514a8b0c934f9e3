"""Triton: choose the salient tokens, give every token its slot, note both in the tables; without asking the host anything.

    _place     one program per (row, head): choice, slots of both arenas, bits of the tables
    _peaks     one program per (row, head, arena, share of its tokens): largest value of each channel, where a row begins

Few tokens: `_place` finds the peaks as well. Called by triton_kernels.py; test: `pytest tests/kernels/test_quantize_ranked.py`.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# (a type checker can not follow Triton's language)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..saliency.triton_select import CHUNK, cutoff, taken_at
from ..sizes import power_of_two
from .layout import BLOCK, BitTables, PackedArena

PLAN = 3  # per row and arena: slots in use, blocks in use, tokens to add
FEW = tl.constexpr(1024)  # tokens whose peaks `_place` finds itself
_SHARE = 512  # tokens of a `_peaks` program, about
_PEAK_CHUNK = 64  # tokens at a time
SHARES = 16  # at most: every program of `_pack` reads them all
ALL_OR_NONE, GIVEN, BY_SCORE = 0, 1, 2

# what differs from prompt to prompt and grows with the cache: one compiled kernel for all of it. Only addresses of single
# tokens, bytes and blocks follow from these numbers, so no load is wider for knowing that 16 divides them.
PLACE_SIZES = ["n", "column", "c_row", "c_head", "s_row", "m_row", "salient_bytes", "valid_bytes"]
PLACE_SIZES += ["high_entries", "low_entries", "high_capacity", "low_capacity"]


@dataclass(frozen=True)
class Placement:
    """What `_pack` needs to know of the new tokens."""

    source: Tensor  # int32 [2, B, Hk, n]: the token that is the i-th new one of the high, of the low arena
    plan: Tensor  # int32 [B, 2, PLAN]
    peak: Tensor  # fp32 [2, B, Hk, shares, D]; undefined where a row has a block already


@triton.jit
def _that_fit(count, used, blocks, num_entries, capacity, BLOCK: tl.constexpr):
    """How many of `count` tokens the arena has room for; the others are left out."""
    room = tl.minimum(capacity - used, (num_entries - 1 - blocks) * BLOCK)
    return tl.minimum(count, tl.maximum(room, 0))


@triton.jit
def _store_plan(p_plan, used, blocks, count):
    tl.store(p_plan, used)
    tl.store(p_plan + 1, blocks)
    tl.store(p_plan + 2, count)


@triton.jit
def _store_bits(p_bits, taken, i_byte, num_bytes, kept):
    """Eight tokens a byte; the lowest `kept` bits of the first byte stay as they are."""
    SIZE: tl.constexpr = taken.shape[0] // 8
    bits = tl.reshape(taken.to(tl.int32), (SIZE, 8)) << tl.arange(0, 8)[None, :]
    before = tl.load(p_bits + i_byte, mask=(i_byte == 0) & (kept > 0), other=0).to(tl.int32)
    packed = tl.sum(bits, 1) | (before & ((1 << kept) - 1))
    tl.store(p_bits + i_byte, packed.to(tl.uint8), mask=i_byte < num_bytes)


@triton.jit
def _store_peak(p_token, p_source, begin, end, p_peak, v_token, D: tl.constexpr, CHUNK: tl.constexpr):
    """Largest |value| of each channel over the new tokens begin .. end - 1 of one (row, head, arena); 0 if none."""
    i_channel = tl.arange(0, D)
    peak = tl.zeros([D], dtype=tl.float32)
    for first in range(begin, end, CHUNK):
        i_new = first + tl.arange(0, CHUNK)
        m_new = i_new < end
        source = tl.load(p_source + i_new, mask=m_new, other=0).to(tl.int64)
        x = tl.load(p_token + source[:, None] * v_token + i_channel[None, :], mask=m_new[:, None], other=0.0)
        peak = tl.maximum(peak, tl.max(tl.abs(x.to(tl.float32)), 0))
    tl.store(p_peak + i_channel, peak)


@triton.jit(do_not_specialize=PLACE_SIZES)
def _place(
    p_choice, p_stored, p_valid, p_value, p_source, p_plan, p_peak, p_salient_bits, p_valid_bits,
    p_high_start, p_high_blocks, p_low_start, p_low_blocks,
    n, heads, column, millionths, c_row, c_head, s_row, m_row, v_row, v_head, v_token, salient_bytes, valid_bytes,
    high_entries, low_entries, high_capacity, low_capacity,
    CHOICE: tl.constexpr, TABLES: tl.constexpr, HIGH_PEAKS: tl.constexpr, LOW_PEAKS: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PEAK_CHUNK: tl.constexpr,
):  # fmt: skip
    """source[b, h, i] = token that is the i-th new one of the arena; plan[b, arena] = (used, blocks, count)."""
    program = tl.program_id(0).to(tl.int64)
    row = program // heads
    head = program % heads
    p_choice += row * c_row + head * c_head
    p_stored += row * s_row
    p_low_source = p_source + (tl.num_programs(0) + program) * n
    p_high_source = p_source + program * n
    # the block tables stay as they are until `_pack`: programs of other heads read them too
    high_blocks = tl.load(p_high_blocks + row)
    low_blocks = tl.load(p_low_blocks + row)
    high_used = tl.load(p_high_start + row * high_entries + high_blocks)
    low_used = tl.load(p_low_start + row * low_entries + low_blocks)
    num_high = high_blocks * 0
    num_low = low_blocks * 0
    lead = column % 8 if TABLES else 0  # a chunk begins where a byte of the tables begins
    if CHOICE == 2:
        threshold, left = cutoff(p_choice, p_stored, p_stored, millionths, n, lead, False, CHUNK)
    for first in range(0, n + lead, CHUNK):
        i_token = first - lead + tl.arange(0, CHUNK)
        m_token = (i_token >= 0) & (i_token < n)
        stored = tl.load(p_stored + i_token, mask=m_token, other=0) != 0
        if CHOICE == 2:
            salient, left = taken_at(p_choice, p_stored, p_stored, i_token, threshold, left, n, False)
        elif CHOICE == 1:
            salient = tl.load(p_choice + i_token, mask=m_token, other=0) != 0
        else:
            salient = stored & (millionths > 0)
        high = stored & salient
        low = stored & (salient == 0)
        # both counts in one scan: a chunk has fewer than 2^15 tokens
        place = tl.cumsum(high.to(tl.int32) + (low.to(tl.int32) << 16), 0)
        tl.store(p_high_source + num_high + (place & 0xFFFF) - 1, i_token, mask=high)
        tl.store(p_low_source + num_low + (place >> 16) - 1, i_token, mask=low)
        num_high += tl.sum(high.to(tl.int32), 0)
        num_low += tl.sum(low.to(tl.int32), 0)
        if TABLES:
            i_byte = first // 8 + tl.arange(0, CHUNK // 8)
            num_bytes = (n + lead + 7) // 8
            _store_bits(p_salient_bits + program * salient_bytes + column // 8, salient, i_byte, num_bytes, lead)
            if head == 0:
                valid = tl.load(p_valid + row * m_row + i_token, mask=m_token, other=0) != 0
                _store_bits(p_valid_bits + row * valid_bytes + column // 8, valid, i_byte, num_bytes, lead)
    num_high = _that_fit(num_high, high_used, high_blocks, high_entries, high_capacity, BLOCK)
    num_low = _that_fit(num_low, low_used, low_blocks, low_entries, low_capacity, BLOCK)
    if head == 0:
        _store_plan(p_plan + row * 6, high_used, high_blocks, num_high)
        _store_plan(p_plan + row * 6 + 3, low_used, low_blocks, num_low)
    tl.debug_barrier()  # the peaks are read through the lists that other threads have written
    p_token = p_value + row * v_row + head * v_head
    if HIGH_PEAKS:  # noqa: SIM102 (known when compiled)
        if (high_blocks == 0) & (n <= FEW):
            _store_peak(p_token, p_high_source, 0, num_high, p_peak + program * D, v_token, D, PEAK_CHUNK)
    if LOW_PEAKS:  # noqa: SIM102
        if (low_blocks == 0) & (n <= FEW):
            p_low_peak = p_peak + (tl.num_programs(0) + program) * D
            _store_peak(p_token, p_low_source, 0, num_low, p_low_peak, v_token, D, PEAK_CHUNK)


@triton.jit(do_not_specialize=["n", "shares"])
def _peaks(
    p_value, p_source, p_plan, p_peak, n, heads, v_row, v_head, v_token, shares,
    HIGH: tl.constexpr, LOW: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One share of the tokens of one (row, head, arena); nothing where the arena has no scales or the row has blocks."""
    program = tl.program_id(0).to(tl.int64)
    arena = tl.program_id(1).to(tl.int64)
    share = tl.program_id(2)
    row = program // heads
    p_row = p_plan + row * 6 + arena * 3
    count = tl.load(p_row + 2)
    wanted = (HIGH & (arena == 0)) | (LOW & (arena == 1))
    if wanted & (tl.load(p_row + 1) == 0):
        list_of = arena * tl.num_programs(0) + program
        size = tl.cdiv(count, shares)
        begin = share * size
        _store_peak(
            p_value + row * v_row + (program % heads) * v_head, p_source + list_of * n, begin,
            tl.minimum(begin + size, count), p_peak + (list_of * shares + share) * D, v_token, D, CHUNK,
        )  # fmt: skip


def place(
    high: PackedArena, low: PackedArena, value: Tensor, stored: Tensor, ratio: float,
    scores: Tensor | None, salient: Tensor | None, tables: BitTables | None, valid: Tensor,
) -> Placement:  # fmt: skip
    """Choice, slots, tables and peaks of n new tokens. value [B,Hk,n,D] with stride 1; see append_ranked for the others."""
    batch, heads, n, width = value.shape
    device = value.device
    shares = 1 if n <= FEW.value else min(SHARES, power_of_two(-(-n // _SHARE)))
    made = Placement(
        torch.empty(2, batch, heads, n, dtype=torch.int32, device=device),
        torch.empty(batch, 2, PLAN, dtype=torch.int32, device=device),
        torch.empty(2, batch, heads, shares, width, dtype=torch.float32, device=device),
    )
    choice, how = _choice(scores, salient)
    stored = _bytes(stored)
    choice = stored if choice is None else choice
    noted = BitTables(stored, stored, 0) if tables is None else tables
    valid = stored if tables is None else _bytes(valid)
    peaks = (high.bits != 16, low.bits != 16)
    _place[(batch * heads,)](
        choice, stored, valid, value, made.source, made.plan, made.peak, noted.salient, noted.valid,
        high.block_start, high.num_blocks, low.block_start, low.num_blocks,
        n, heads, noted.column, round(ratio * 1_000_000), choice.stride(0), choice.stride(1) if choice.dim() == 3 else 0,
        stored.stride(0), valid.stride(0), *value.stride()[:3], noted.salient.shape[-1], noted.valid.shape[-1],
        high.block_start.shape[1], low.block_start.shape[1], high.capacity, low.capacity,
        CHOICE=how, TABLES=tables is not None, HIGH_PEAKS=peaks[0], LOW_PEAKS=peaks[1],
        D=width, BLOCK=BLOCK, CHUNK=CHUNK, PEAK_CHUNK=_PEAK_CHUNK, num_warps=8,
    )  # fmt: skip
    if n > FEW.value and any(peaks):
        _peaks[(batch * heads, 2, shares)](
            value, made.source, made.plan, made.peak, n, heads, *value.stride()[:3], shares,
            HIGH=peaks[0], LOW=peaks[1], D=width, CHUNK=_PEAK_CHUNK, num_warps=8,
        )  # fmt: skip
    return made


def _choice(scores: Tensor | None, salient: Tensor | None) -> tuple[Tensor | None, int]:
    """What the choice is read from, with stride 1 along the tokens, and how."""
    if salient is not None:
        return _bytes(salient), GIVEN
    if scores is None:
        return None, ALL_OR_NONE
    return (scores if scores.stride(2) == 1 else scores.contiguous()), BY_SCORE


def _bytes(mask: Tensor) -> Tensor:
    """The same memory (where tokens have stride 1) as uint8."""
    return (mask if mask.stride(-1) == 1 else mask.contiguous()).view(torch.uint8)
