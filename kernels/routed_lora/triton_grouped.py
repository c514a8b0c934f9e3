"""Many experts: (token, slot) pairs sorted by expert on the device, then products over one expert's tokens at a time.

A list is one (site, slot j) pair: it holds every token exactly once, so that a pass over one list adds to y without
conflicts and without atomics. `order` [L, T] are the tokens of a list sorted by expert (stable), `count` [L, NP] how many
each expert has. Grids are upper bounds that depend on shapes only: T / BLOCK_T + N tiles a list.

    grouped_shrink   h[l, p] = (weight) rows_e x[order[l, p]]          also dy -> B dy in the backward pass
    grouped_expand   y[order[l, p]] += h[l, p] rows_e                  also q -> A^T q
    grouped_outer    out_e = sum over the expert's pairs of h^T x      gradients of A and B
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_experts(p_index, p_count, num_tokens, NP: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """index int32 [S, T, K] -> count int32 [L, blocks, NP]; grid (blocks, L), list = site * K + j."""
    i_b, i_l = tl.program_id(0), tl.program_id(1)
    o_t = i_b * BLOCK + tl.arange(0, BLOCK)
    o_in = ((i_l // K).to(tl.int64) * num_tokens + o_t) * K + i_l % K
    b_index = tl.load(p_index + o_in, mask=o_t < num_tokens, other=NP)
    o_n = tl.arange(0, NP)
    b_count = tl.sum((b_index[:, None] == o_n[None, :]).to(tl.int32), axis=0)
    tl.store(p_count + (i_l * tl.num_programs(0) + i_b) * NP + o_n, b_count)


@triton.jit
def place_tokens(p_index, p_count, p_order, p_total, num_tokens, NP: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
                 CHUNK: tl.constexpr):  # fmt: skip
    """Counting sort's second half: order int32 [L, T], total int32 [L, NP]; grid (blocks, L)."""
    i_b, i_l = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    o_n, o_c = tl.arange(0, NP), tl.arange(0, CHUNK)
    before = tl.zeros([NP], dtype=tl.int32)
    total = tl.zeros([NP], dtype=tl.int32)
    for i in range(0, blocks, CHUNK):
        o_b = i + o_c
        b_count = tl.load(
            p_count + (i_l * blocks + o_b)[:, None] * NP + o_n[None, :], mask=(o_b < blocks)[:, None], other=0
        )
        total += tl.sum(b_count, axis=0)
        before += tl.sum(tl.where((o_b < i_b)[:, None], b_count, 0), axis=0)
    first = tl.cumsum(total, axis=0) - total + before
    o_t = i_b * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < num_tokens
    o_in = ((i_l // K).to(tl.int64) * num_tokens + o_t) * K + i_l % K
    b_index = tl.load(p_index + o_in, mask=m_t, other=NP)
    b_hot = (b_index[:, None] == o_n[None, :]).to(tl.int32)
    b_rank = tl.cumsum(b_hot, axis=0) - 1 + first[None, :]
    b_place = tl.sum(b_rank * b_hot, axis=1)
    tl.store(p_order + i_l.to(tl.int64) * num_tokens + b_place, o_t, mask=m_t)
    if i_b == 0:
        tl.store(p_total + i_l * NP + o_n, total)


@triton.jit
def _tile(p_total, i_tile, i_l, NP: tl.constexpr, BLOCK_T: tl.constexpr):
    """(expert, first place, end) of tile i_tile of a list; an expert of NP means: no such tile."""
    o_n = tl.arange(0, NP)
    b_total = tl.load(p_total + i_l * NP + o_n)
    b_tiles = (b_total + BLOCK_T - 1) // BLOCK_T
    b_until = tl.cumsum(b_tiles, axis=0)
    expert = tl.sum((b_until <= i_tile).to(tl.int32), axis=0)
    b_ends = tl.cumsum(b_total, axis=0)
    mine = o_n == expert
    end = tl.sum(tl.where(mine, b_ends, 0), axis=0)
    begin = end - tl.sum(tl.where(mine, b_total, 0), axis=0)
    tile = i_tile - tl.sum(tl.where(mine, b_until - b_tiles, 0), axis=0)
    return expert, begin + tile * BLOCK_T, end


@triton.jit
def grouped_shrink(
    p_x, p_rows, p_start, p_rank, p_order, p_total, p_weight, p_h,
    num_tokens, width, s_x, num_experts,
    NP: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """h [L, T, RP] in sorted order, h's dtype; slots beyond an expert's rank get 0. Grid (tiles, L)."""
    i_l = tl.program_id(1)
    expert, begin, end = _tile(p_total, tl.program_id(0), i_l, NP, BLOCK_T)
    if expert >= num_experts:
        return
    i_s, i_j = i_l // K, i_l % K
    o_p = begin + tl.arange(0, BLOCK_T)
    m_p = o_p < end
    o_pair = (i_l * num_tokens + o_p).to(tl.int64)
    b_token = tl.load(p_order + o_pair, mask=m_p, other=0).to(tl.int64)
    start = tl.load(p_start + i_s * num_experts + expert)
    rank = tl.load(p_rank + i_s * num_experts + expert)
    o_r, o_i = tl.arange(0, RP), tl.arange(0, BLOCK_I)
    m_r = o_r < rank
    p_in = p_x + b_token[:, None] * s_x + o_i[None, :]
    p_row = p_rows + (start + o_r).to(tl.int64)[None, :] * width + o_i[:, None]
    acc = tl.zeros([BLOCK_T, RP], dtype=tl.float32)
    for i in range(0, width, BLOCK_I):
        m_i = o_i < width - i
        b_x = tl.load(p_in + i, mask=m_p[:, None] & m_i[None, :], other=0.0)
        b_row = tl.load(p_row + i, mask=m_i[:, None] & m_r[None, :], other=0.0)
        acc = tl.dot(b_x, b_row, acc, input_precision="ieee")
    if WEIGHTED:
        o_weight = (i_s.to(tl.int64) * num_tokens + b_token) * K + i_j
        acc = acc * tl.load(p_weight + o_weight, mask=m_p, other=0.0)[:, None]
    p_out = p_h + o_pair[:, None] * RP + o_r[None, :]
    tl.store(p_out, acc.to(p_h.dtype.element_ty), mask=m_p[:, None])


@triton.jit
def grouped_expand(
    p_h, p_rows, p_start, p_rank, p_order, p_total, p_y,
    i_l, i_site, base_slot, num_tokens, num_out, s_y, num_experts,
    NP: tl.constexpr, RP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y[token] += h rows_e for one list; rows [R_site, O], whose slot 0 is the group's slot base_slot."""
    expert, begin, end = _tile(p_total, tl.program_id(0), i_l, NP, BLOCK_T)
    if expert >= num_experts:
        return
    o_p = begin + tl.arange(0, BLOCK_T)
    m_p = o_p < end
    o_pair = (i_l * num_tokens + o_p).to(tl.int64)
    b_token = tl.load(p_order + o_pair, mask=m_p, other=0).to(tl.int64)
    start = tl.load(p_start + i_site * num_experts + expert) - base_slot
    rank = tl.load(p_rank + i_site * num_experts + expert)
    o_r = tl.arange(0, RP)
    o_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < num_out
    p_in = p_h + o_pair[:, None] * RP + o_r[None, :]
    b_h = tl.load(p_in, mask=m_p[:, None], other=0.0)
    p_row = p_rows + (start + o_r).to(tl.int64)[:, None] * num_out + o_o[None, :]
    b_row = tl.load(p_row, mask=(o_r < rank)[:, None] & m_o[None, :], other=0.0)
    m_out = m_p[:, None] & m_o[None, :]
    p_out = p_y + b_token[:, None] * s_y + o_o[None, :]
    b_y = tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    b_y = tl.dot(b_h.to(b_row.dtype), b_row, b_y, input_precision="ieee")
    tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=m_out)


@triton.jit
def grouped_outer(
    p_h, p_x, p_start, p_rank, p_order, p_total, p_out,
    first_list, i_site, base_slot, num_tokens, width, s_x, num_experts,
    NP: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """out [R_site, I] = per expert the sum over its pairs in the K lists from first_list of h^T x; 0 without pairs.

    Grid (experts, blocks of I).
    """
    expert = tl.program_id(0)
    rank = tl.load(p_rank + i_site * num_experts + expert)
    if rank == 0:
        return
    start = tl.load(p_start + i_site * num_experts + expert) - base_slot
    o_n, o_r = tl.arange(0, NP), tl.arange(0, RP)
    o_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_i = o_i < width
    acc = tl.zeros([RP, BLOCK_I], dtype=tl.float32)
    for j in range(K):
        i_l = first_list + j
        b_total = tl.load(p_total + i_l * NP + o_n)
        begin = tl.sum(tl.where(o_n < expert, b_total, 0), axis=0)
        end = begin + tl.sum(tl.where(o_n == expert, b_total, 0), axis=0)
        for p in range(begin, end, BLOCK_P):
            o_p = p + tl.arange(0, BLOCK_P)
            m_p = o_p < end
            o_pair = (i_l * num_tokens + o_p).to(tl.int64)
            b_token = tl.load(p_order + o_pair, mask=m_p, other=0).to(tl.int64)
            p_in = p_h + o_pair[None, :] * RP + o_r[:, None]
            b_h = tl.load(p_in, mask=m_p[None, :], other=0.0)
            b_x = tl.load(p_x + b_token[:, None] * s_x + o_i[None, :], mask=m_p[:, None] & m_i[None, :], other=0.0)
            acc = tl.dot(b_h.to(b_x.dtype), b_x, acc, input_precision="ieee")
    p_row = p_out + (start + o_r).to(tl.int64)[:, None] * width + o_i[None, :]
    tl.store(p_row, acc.to(p_out.dtype.element_ty), mask=(o_r < rank)[:, None] & m_i[None, :])
