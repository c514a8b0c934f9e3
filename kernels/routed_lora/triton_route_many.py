"""Routing over many experts, 16-bit tokens: both parts of the gates into one accumulator, as wide as the experts are many.

`route_shrink` holds the two parts' products side by side in a power of two of columns: 512 for 166 experts, of which 180 are
padding. Here a program holds FIRST columns and MORE further ones (166: 128 + 64), each the sum of x . high and x . low, so that
128 tokens of scores fit into registers and half of the products are of one tile of x. Scores are chosen from where they are.
Every program also counts its tokens by expert, for the counting sort that follows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_route import best, row_sums, scores


@triton.jit
def _columns(p_gate, o_n, o_i, m_i, row_0, width, num_experts, EVEN: tl.constexpr):
    """[I, N] of the gates from row row_0 on."""
    p_in = p_gate + (row_0 + tl.minimum(o_n, num_experts - 1)).to(tl.int64)[None, :] * width + o_i[:, None]
    if EVEN:
        return tl.load(p_in)
    return tl.load(p_in, mask=m_i[:, None], other=0.0)


@triton.jit
def _scored(b_dot, o_n, p_shift, p_absent, row_0, b_sum, b_squares, width, num_experts, ARROW: tl.constexpr):
    m_n = o_n < num_experts
    b_shift = tl.load(p_shift + row_0 + o_n, mask=m_n, other=0.0)
    b_absent = tl.load(p_absent + row_0 + o_n, mask=m_n, other=float("-inf"))
    return scores(b_dot, b_sum, b_squares, b_shift, b_absent, width, ARROW)


@triton.jit
def _counted(b_index, m_t, o_n):
    return tl.sum(((b_index[:, None] == o_n[None, :]) & m_t[:, None]).to(tl.int32), axis=0)


@triton.jit
def route_many(
    p_x, p_high, p_low, p_shift, p_absent, p_weight, p_index, p_count,
    num_tokens, width, s_x, num_experts, sites, NP: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr, MORE: tl.constexpr,
    ARROW: tl.constexpr, COUNT: tl.constexpr, EVEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """weight fp32 and index int32 [S, T, K]; COUNT: also count int32 [S * K, token blocks, NP], columns beyond N unwritten.

    Grid (sites x token blocks): those that read the same tokens run side by side. EVEN: the last step of the loop is whole.
    """
    pid = tl.program_id(0)
    i_s, i_t = pid % sites, pid // sites
    row_0 = i_s * num_experts
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n, o_i = tl.arange(0, FIRST), tl.arange(0, BLOCK_I)
    m_t = o_t < num_tokens
    p_rows = p_x + tl.minimum(o_t, num_tokens - 1).to(tl.int64)[:, None] * s_x
    b_sum = tl.zeros([BLOCK_T], dtype=tl.float32)
    b_squares = tl.zeros([BLOCK_T], dtype=tl.float32)
    if not ARROW:
        b_sum, b_squares = row_sums(p_rows, m_t, width, BLOCK_T, BLOCK_I)
    b_z = tl.zeros([BLOCK_T, FIRST], dtype=tl.float32)
    if MORE > 0:
        o_m = FIRST + tl.arange(0, MORE)
        b_zm = tl.zeros([BLOCK_T, MORE], dtype=tl.float32)
    for i in range(0, width, BLOCK_I):
        m_i = o_i < width - i
        if EVEN:
            b_x = tl.load(p_rows + i + o_i[None, :])
        else:
            b_x = tl.load(p_rows + i + o_i[None, :], mask=m_i[None, :], other=0.0)
        b_z = tl.dot(b_x, _columns(p_high, o_n, i + o_i, m_i, row_0, width, num_experts, EVEN), b_z)
        if MORE > 0:
            b_zm = tl.dot(b_x, _columns(p_high, o_m, i + o_i, m_i, row_0, width, num_experts, EVEN), b_zm)
        b_z = tl.dot(b_x, _columns(p_low, o_n, i + o_i, m_i, row_0, width, num_experts, EVEN), b_z)
        if MORE > 0:
            b_zm = tl.dot(b_x, _columns(p_low, o_m, i + o_i, m_i, row_0, width, num_experts, EVEN), b_zm)
    b_z = _scored(b_z, o_n, p_shift, p_absent, row_0, b_sum, b_squares, width, num_experts, ARROW)
    b_top = tl.max(b_z, axis=1)
    if MORE > 0:
        b_zm = _scored(b_zm, o_m, p_shift, p_absent, row_0, b_sum, b_squares, width, num_experts, ARROW)
        b_top = tl.maximum(b_top, tl.max(b_zm, axis=1))
    b_all = tl.sum(tl.exp(b_z - b_top[:, None]), axis=1)
    if MORE > 0:
        b_all += tl.sum(tl.exp(b_zm - b_top[:, None]), axis=1)
    b_chosen = tl.zeros([BLOCK_T], dtype=tl.float32)
    weights, indices = (), ()
    for _ in tl.static_range(K):
        b_score, b_index = best(b_z, o_n, num_experts)
        if MORE > 0:
            b_score_m, b_index_m = best(b_zm, o_m, num_experts)
            b_index = tl.where(b_score_m > b_score, b_index_m, b_index)  # ties go to the lower index
            b_score = tl.maximum(b_score, b_score_m)
            b_zm = tl.where(o_m[None, :] == b_index[:, None], float("-inf"), b_zm)
        b_weight = tl.exp(b_score - b_top)
        b_chosen += b_weight
        weights, indices = weights + (b_weight,), indices + (b_index,)
        b_z = tl.where(o_n[None, :] == b_index[:, None], float("-inf"), b_z)
    b_scale = 1.0 / (b_chosen + 1e-6 * b_all)
    for j in tl.static_range(K):
        o_out = (i_s.to(tl.int64) * num_tokens + o_t) * K + j
        tl.store(p_weight + o_out, weights[j] * b_scale, mask=m_t)
        tl.store(p_index + o_out, indices[j], mask=m_t)
        if COUNT:
            p_out = p_count + ((i_s * K + j) * (tl.num_programs(0) // sites) + i_t).to(tl.int64) * NP
            tl.store(p_out + o_n, _counted(indices[j], m_t, o_n), mask=o_n < num_experts)
            if MORE > 0:
                tl.store(p_out + o_m, _counted(indices[j], m_t, o_m), mask=o_m < num_experts)
