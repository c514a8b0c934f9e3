"""Many experts: (token, slot) pairs sorted by expert on the device, then products over one expert's tokens at a time.

A list is one (site, slot j) pair: it holds every token exactly once, so that a pass over one list adds to y without
conflicts and without atomics. `order` [L, T] are the tokens of a list sorted by expert (stable), `plan` [L, P] what each
list's programs do: NP counts of pairs by expert, then of `num_tiles` tiles each tile's expert (N: no such tile), its first
place and the end of its expert's places. Grids are upper bounds that depend on shapes only: T / BLOCK_T + N tiles a list.

    grouped_shrink   h[l, p] = (weight) rows_e x[order[l, p]]          also dy -> B dy in the backward pass
    grouped_expand   y[order[l, p]] += h[l, p] rows_e                  also q -> A^T q
    grouped_outer    out_e = sum over the expert's pairs of h^T x      gradients of A and B

Rows of a tile beyond its end repeat its last token and are not stored: no row of a product sees another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_route import pick


@triton.jit
def count_experts(p_index, p_count, num_tokens, NP: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """index int32 [S, T, K] -> count int32 [L, blocks, NP]; grid (blocks, L), list = site * K + j."""
    i_b, i_l = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = i_b * BLOCK + tl.arange(0, BLOCK)
    o_in = ((i_l // K) * num_tokens + o_t) * K + i_l % K
    m_t = o_t < num_tokens
    b_count = tl.histogram(tl.load(p_index + o_in, mask=m_t, other=0), NP, mask=m_t)
    tl.store(p_count + (i_l * tl.num_programs(0) + i_b) * NP + tl.arange(0, NP), b_count)


@triton.jit
def scan_counts(p_count, p_plan, blocks, s_plan, NP: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """count [L, blocks, NP] becomes what lies in the blocks before, its sums go into the plan; grid (NP / COLUMNS, L).

    For so many blocks that `place_tokens` had better not add them up in every program.
    """
    i_l = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    before = tl.zeros([COLUMNS], dtype=tl.int32)
    for i in range(0, blocks, CHUNK):
        o_b = i + tl.arange(0, CHUNK)
        p_in = p_count + (i_l * blocks + o_b)[:, None] * NP + o_n[None, :]
        b_count = tl.load(p_in, mask=(o_b < blocks)[:, None], other=0)
        tl.store(p_in, tl.cumsum(b_count, axis=0) - b_count + before[None, :], mask=(o_b < blocks)[:, None])
        before += tl.sum(b_count, axis=0)
    tl.store(p_plan + i_l * s_plan + o_n, before)


@triton.jit
def _plan_tiles(p_list, total, o_n, num_tiles, num_experts, NP: tl.constexpr, TILE: tl.constexpr):
    """The tiles of one list, and no expert for those that there could have been."""
    tiles = (total + TILE - 1) // TILE
    until, ends = tl.cumsum(tiles, axis=0), tl.cumsum(total, axis=0)
    p_tile = p_list + NP + until - tiles
    for i in range(tl.max(tiles, axis=0)):
        mine = i < tiles
        tl.store(p_tile + i, o_n, mask=mine)
        tl.store(p_tile + num_tiles + i, ends - total + i * TILE, mask=mine)
        tl.store(p_tile + 2 * num_tiles + i, ends, mask=mine)
    for i in range(tl.sum(tiles, axis=0), num_tiles, NP):
        none = i + o_n < num_tiles
        tl.store(p_list + NP + i + o_n, num_experts + 0 * o_n, mask=none)
        tl.store(p_list + NP + num_tiles + i + o_n, 0 * o_n, mask=none)
        tl.store(p_list + NP + 2 * num_tiles + i + o_n, 0 * o_n, mask=none)


@triton.jit
def place_tokens(p_index, p_count, p_order, p_plan, num_tokens, num_tiles, num_experts, s_plan, NP: tl.constexpr,
                 K: tl.constexpr, BLOCK: tl.constexpr, EARLIER: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
                 SCANNED: tl.constexpr):  # fmt: skip
    """Counting sort's second half: order int32 [L, T] and the plan; grid (blocks + 1, L), whose last program plans the tiles.

    A token's place is its expert's first one, plus those of the expert's tokens in blocks before, plus those of its block's
    earlier tokens of that expert. SCANNED: after `scan_counts`; else every program adds up the counts.
    """
    i_b, i_l = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(0) - 1
    o_n, o_c = tl.arange(0, NP), tl.arange(0, CHUNK)
    m_n = o_n < num_experts
    p_list = p_plan + i_l * s_plan
    before = tl.zeros([NP], dtype=tl.int32)
    total = tl.zeros([NP], dtype=tl.int32)
    if SCANNED:
        total = tl.load(p_list + o_n, mask=m_n, other=0)
        before = tl.load(p_count + (i_l * blocks + i_b) * NP + o_n, mask=m_n & (i_b < blocks), other=0)
    else:
        for i in range(0, blocks, CHUNK):
            o_b = i + o_c
            p_in = p_count + (i_l * blocks + o_b)[:, None] * NP + o_n[None, :]
            b_count = tl.load(p_in, mask=(o_b < blocks)[:, None] & m_n[None, :], other=0)
            total += tl.sum(b_count, axis=0)
            before += tl.sum(tl.where((o_b < i_b)[:, None], b_count, 0), axis=0)
    if i_b == blocks:
        if not SCANNED:
            tl.store(p_list + o_n, total)
        _plan_tiles(p_list, total, o_n, num_tiles, num_experts, NP, TILE)
        return
    first = tl.cumsum(total, axis=0) - total + before
    o_t, o_e = i_b * BLOCK + tl.arange(0, BLOCK), i_b * BLOCK + tl.arange(0, EARLIER)
    m_t = o_t < num_tokens
    p_in = p_index + (i_l // K) * num_tokens * K + i_l % K
    b_index = tl.load(p_in + o_t.to(tl.int64) * K, mask=m_t, other=0)
    b_place = tl.gather(first, b_index, 0)
    for i in range(0, BLOCK, EARLIER):
        b_other = tl.load(p_in + (i + o_e).to(tl.int64) * K, mask=i + o_e < num_tokens, other=NP)
        same = (b_index[:, None] == b_other[None, :]) & (o_t[:, None] > (i + o_e)[None, :])
        b_place += tl.sum(same.to(tl.int32), axis=1)
    tl.store(p_order + i_l * num_tokens + b_place, o_t, mask=m_t)


@triton.jit
def _tile(p_plan, s_plan, i_tile, i_l, num_tiles, NP: tl.constexpr, BLOCK_T: tl.constexpr):
    """(expert, places [BLOCK_T] with the last one repeated, which of them are the tile's) of tile i_tile of a list."""
    p_in = p_plan + i_l * s_plan + NP + i_tile
    expert, begin, end = tl.load(p_in), tl.load(p_in + num_tiles), tl.load(p_in + 2 * num_tiles)
    o_p = begin + tl.arange(0, BLOCK_T)
    return expert, tl.minimum(o_p, end - 1), o_p < end


@triton.jit
def grouped_shrink(
    p_x, p_rows, p_start, p_rank, p_order, p_plan, p_weight, p_h,
    num_tokens, num_tiles, width, s_x, s_plan, num_experts,
    NP: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, WEIGHTED: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """h [L, T, RP] in sorted order, h's dtype; slots beyond an expert's rank get 0. Grid (tiles, L). EVEN: BLOCK_I divides width."""
    i_l = tl.program_id(1).to(tl.int64)
    expert, o_p, m_p = _tile(p_plan, s_plan, tl.program_id(0), i_l, num_tiles, NP, BLOCK_T)
    if expert >= num_experts:
        return
    i_s, i_j = i_l // K, i_l % K
    o_pair = i_l * num_tokens + o_p
    b_token = tl.load(p_order + o_pair).to(tl.int64)
    start = tl.load(p_start + i_s * num_experts + expert)
    rank = tl.load(p_rank + i_s * num_experts + expert)
    o_r, o_i = tl.arange(0, RP), tl.arange(0, BLOCK_I)
    m_r = o_r < rank
    p_in = p_x + b_token[:, None] * s_x + o_i[None, :]
    p_row = p_rows + (start + o_r).to(tl.int64)[None, :] * width + o_i[:, None]
    acc = tl.zeros([BLOCK_T, RP], dtype=tl.float32)
    for i in range(0, width, BLOCK_I):
        m_i = o_i < width - i
        if EVEN:
            b_x = tl.load(p_in + i)
            b_row = tl.load(p_row + i, mask=m_r[None, :], other=0.0)
        else:
            b_x = tl.load(p_in + i, mask=m_i[None, :], other=0.0)
            b_row = tl.load(p_row + i, mask=m_i[:, None] & m_r[None, :], other=0.0)
        acc = tl.dot(b_x, b_row, acc, input_precision="ieee")
    if WEIGHTED:
        acc = acc * tl.load(p_weight + (i_s * num_tokens + b_token) * K + i_j)[:, None]
    p_out = p_h + o_pair[:, None] * RP + o_r[None, :]
    tl.store(p_out, acc.to(p_h.dtype.element_ty), mask=m_p[:, None])


@triton.jit
def grouped_expand(
    p_h, p_rows, p_start, p_rank, p_order, p_plan, p_y,
    slot, first_site, blocks, num_tokens, num_tiles, s_plan, num_experts, out_0, out_1, out_2,
    base_0, base_1, base_2, rows_1, rows_2, y_1: tl.int64, y_2: tl.int64,
    NP: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y[token] += h rows_e for slot `slot` of the sites from first_site on (out 0: no such site): no token twice.

    rows [R_site, O], whose slot 0 is the group's slot base; rows_1 and so on: how far, in elements, those of the other sites
    lie away. Grid (tiles x `blocks` column blocks, those of all sites): a tile's run side by side.
    """
    i_c = tl.program_id(0) % blocks
    blocks_0, blocks_1 = tl.cdiv(out_0, BLOCK_O), tl.cdiv(out_1, BLOCK_O)
    i_s = (i_c >= blocks_0).to(tl.int32) + (i_c >= blocks_0 + blocks_1).to(tl.int32)
    i_c = i_c - pick(i_s, 0, blocks_0, blocks_0 + blocks_1)
    i_l = ((first_site + i_s) * K + slot).to(tl.int64)
    expert, o_p, m_p = _tile(p_plan, s_plan, tl.program_id(0) // blocks, i_l, num_tiles, NP, BLOCK_T)
    if expert >= num_experts:
        return
    num_out = pick(i_s, out_0, out_1, out_2)
    o_pair = i_l * num_tokens + o_p
    b_token = tl.load(p_order + o_pair).to(tl.int64)
    i_z = (first_site + i_s) * num_experts + expert
    start, rank = tl.load(p_start + i_z) - pick(i_s, base_0, base_1, base_2), tl.load(p_rank + i_z)
    o_r, o_o = tl.arange(0, RP), i_c * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < num_out
    p_row = p_rows + pick(i_s, 0, rows_1, rows_2) + (start + o_r).to(tl.int64)[:, None] * num_out + o_o[None, :]
    p_out = p_y + pick(i_s, 0, y_1, y_2) + b_token[:, None] * num_out + o_o[None, :]
    b_h = tl.load(p_h + o_pair[:, None] * RP + o_r[None, :])
    b_row = tl.load(p_row, mask=(o_r < rank)[:, None] & m_o[None, :], other=0.0)
    b_y = tl.load(p_out, mask=m_p[:, None] & m_o[None, :], other=0.0)
    b_more = tl.dot(b_h.to(b_row.dtype), b_row, input_precision="ieee")
    tl.store(p_out, (b_y.to(tl.float32) + b_more).to(p_y.dtype.element_ty), mask=m_p[:, None] & m_o[None, :])


@triton.jit
def grouped_outer(
    p_h, p_x, p_start, p_rank, p_order, p_plan, p_out,
    first_list, i_site, base_slot, num_tokens, width, s_x, s_plan, num_experts,
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
        i_l = (first_list + j).to(tl.int64)
        b_total = tl.load(p_plan + i_l * s_plan + o_n)
        begin = tl.sum(tl.where(o_n < expert, b_total, 0), axis=0)
        end = begin + tl.sum(tl.where(o_n == expert, b_total, 0), axis=0)
        for p in range(begin, end, BLOCK_P):
            o_p = p + tl.arange(0, BLOCK_P)
            m_p = o_p < end
            o_pair = i_l * num_tokens + o_p
            b_token = tl.load(p_order + o_pair, mask=m_p, other=0).to(tl.int64)
            p_in = p_h + o_pair[None, :] * RP + o_r[:, None]
            b_h = tl.load(p_in, mask=m_p[None, :], other=0.0)
            b_x = tl.load(p_x + b_token[:, None] * s_x + o_i[None, :], mask=m_p[:, None] & m_i[None, :], other=0.0)
            acc = tl.dot(b_h.to(b_x.dtype), b_x, acc, input_precision="ieee")
    p_row = p_out + (start + o_r).to(tl.int64)[:, None] * width + o_i[None, :]
    tl.store(p_row, acc.to(p_out.dtype.element_ty), mask=(o_r < rank)[:, None] & m_i[None, :])
