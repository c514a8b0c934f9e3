"""Second Triton launch of `cached_attention`: log-sum-exp merge of the parts, and the saliency of tail slots.

    out = sum_p 2^(lse_p - top) out_p / sum_p 2^(lse_p - top)          log-sum-exps are in base 2 until the end

Programs that found nothing left lse = -inf and no output: their memory is read but never let in.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
CHUNK = tl.constexpr(64)  # parts that are taken at a time
OUT_CHANNELS = tl.constexpr(32)  # channels of one program
SLOT_TILE = tl.constexpr(128)  # tail slots of one saliency program
SIZES = ["tail_width", "kv_heads", "query_length", "rows", "parts", "slot_tiles"]


@triton.jit
def _load_lses(p_lses, row, rows, parts, m_row, chunk: tl.constexpr):
    """Log-sum-exps [rows, CHUNK] of chunk number `chunk` of the parts; -inf where there is none."""
    i_part = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = m_row[:, None] & (i_part < parts)[None, :]
    return tl.load(p_lses + i_part[None, :] * rows + row[:, None], mask=mask, other=float("-inf"))


@triton.jit
def _saliency_tile(
    p_lses, p_scores, p_valid, p_length, width, p_pending, line, tail_row, slot, first_row, query_length, rows, parts,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """What each query of one thought gives to a tile of tail slots, summed over the group's heads."""
    length = tl.load(p_length)
    i_head = tl.arange(0, GROUP_PADDED)
    m_head = i_head < GROUP
    for i in range(query_length):
        row = first_row + i_head * query_length + i
        top = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
        for c in tl.static_range(CHUNKS):
            top = tl.maximum(top, tl.max(_load_lses(p_lses, row, rows, parts, m_head, c), 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        total = tl.zeros([GROUP_PADDED], tl.float32)
        for c in tl.static_range(CHUNKS):
            total += tl.sum(tl.exp2(_load_lses(p_lses, row, rows, parts, m_head, c) - safe[:, None]), 1)
        lse = safe + tl.log2(tl.maximum(total, 1e-30))
        # a query at a padding position counts for nothing
        present = tl.load(p_valid + tail_row * width + tl.maximum(length - query_length + i, 0)) != 0
        m_score = m_head[:, None] & (slot < tl.minimum(length, width))[None, :] & present
        p_row = p_scores + (line * rows + row)[:, None] * width + slot[None, :]
        score = tl.load(p_row, mask=m_score, other=float("-inf"))
        gained = tl.sum(tl.exp2(score - lse[:, None]), 0)
        tl.store(p_pending + i * width + slot, gained, mask=slot < width)


@triton.jit(do_not_specialize=SIZES)
def reduce_kernel(
    p_part_out, p_part_lse, p_out, stride_ob, stride_oh, stride_oi, p_lse,
    p_scores, p_tail_valid, p_tail_length, tail_width, p_pending, p_accepted,
    kv_heads, query_length, rows, parts, slot_tiles,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, CHUNKS: tl.constexpr,
    SALIENCY: tl.constexpr, PENDING: tl.constexpr,
):  # fmt: skip
    """grid (B * Hk, rows * D / 32 + thoughts * slot_tiles): outputs, then the saliency of tiles of tail slots."""
    SPLITS: tl.constexpr = HEAD_DIM // OUT_CHANNELS
    line = tl.program_id(0).to(tl.int64)
    job = tl.program_id(1)
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % kv_heads
    per_thought = GROUP * query_length
    thoughts = rows // per_thought
    p_lses = p_part_lse + line * parts * rows
    if job < rows * SPLITS:
        row = job // SPLITS
        split = job % SPLITS
        i_channel = split * OUT_CHANNELS + tl.arange(0, OUT_CHANNELS)
        i_one = row + tl.zeros([1], tl.int32)
        lses, outs = (), ()
        top = tl.full([1], float("-inf"), tl.float32)
        for c in tl.static_range(CHUNKS):  # all loads are in flight together
            part = c * CHUNK + tl.arange(0, CHUNK)
            lses = lses + (_load_lses(p_lses, i_one, rows, parts, i_one >= 0, c),)
            p_rows = p_part_out + ((line * parts + part) * rows + row)[:, None] * HEAD_DIM + i_channel[None, :]
            outs = outs + (tl.load(p_rows, mask=(part < parts)[:, None], other=0.0),)
            top = tl.maximum(top, tl.max(lses[c], 1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        total = tl.zeros([1], tl.float32)
        acc = tl.zeros([OUT_CHANNELS], tl.float32)
        for c in tl.static_range(CHUNKS):
            weight = tl.exp2(lses[c] - safe[:, None])
            total += tl.sum(weight, 1)
            weight = tl.reshape(weight, [CHUNK, 1])
            # parts without weight wrote nothing: whatever is there must not get in
            acc += tl.sum(tl.where(weight > 0, outs[c] * weight, 0.0), 0)
        acc = acc / tl.where(total == 0.0, 1.0, total)
        query_row = batch * thoughts + row // per_thought
        head = kv_head * GROUP + (row % per_thought) // query_length
        position = row % query_length
        p_row = p_out + query_row * stride_ob + head * stride_oh + position * stride_oi
        tl.store(p_row + i_channel, acc.to(p_out.dtype.element_ty))
        lse = tl.where(total == 0.0, float("-inf"), (safe + tl.log2(total)) / LOG2E)
        o_lse = (query_row * kv_heads * GROUP + head) * query_length + position
        tl.store(p_lse + o_lse + tl.arange(0, 1), lse, mask=tl.arange(0, 1) == split)
    elif SALIENCY:
        tile = job - rows * SPLITS
        tail_row = batch * thoughts + tile // slot_tiles
        slot = (tile % slot_tiles) * SLOT_TILE + tl.arange(0, SLOT_TILE)
        _saliency_tile(
            p_lses, p_scores, p_tail_valid, p_tail_length, tail_width,
            p_pending + (tail_row * kv_heads + kv_head) * PENDING * tail_width,
            line, tail_row, slot, (tile // slot_tiles) * per_thought, query_length, rows, parts,
            GROUP, GROUP_PADDED, CHUNKS,
        )  # fmt: skip
        if (line == 0) & (tile == 0):
            tl.store(p_accepted, query_length)
