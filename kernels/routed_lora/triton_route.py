"""Routing and shrink in one pass over x: statistics, gate products, top-k softmax, A x, weights times A x.

    z = (x . V' - mean(x) c) / sigma_x + absent;  e = exp(z - max z);  w_j = e_j / (sum of chosen e + 1e-6 sum of all e)
    hm[t, slot] = w[t, owner(slot)] * (A x_t)[slot]              (phatgoose.md 1.3, 1.4; arrow: z = |x . v|)

A program holds BLOCK_T tokens of one site and BLOCK_R of its slots; every slot block repeats the gate product, which is
two thin columns per expert. Ties go to the lower index. Accumulation fp32.

Statistics have a loop of their own, whose x the second loop finds in the L2. In one loop Triton (3.6 and 3.7, pull
request 7110 there) gives x, read by registers and by asynchronous tensor-core products, a buffer too few: from 64 tokens a
program on, Hopper's products then read a tile while the next one is copied over it.

TMA: x, gates and A come as descriptors instead, statistics within the loop (triton_descriptors.py says how that is safe).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .triton_descriptors import copied_shrink


@triton.jit
def pick(i_site, value_0, value_1, value_2):
    """The number that belongs to a site; groups have at most three."""
    return tl.where(i_site == 0, value_0, tl.where(i_site == 1, value_1, value_2))


@triton.jit
def site_tile(num_tokens, count_0, count_1, count_2, SITES: tl.constexpr, BLOCK_T: tl.constexpr, COLUMNS: tl.constexpr,
              SWEEP: tl.constexpr):  # fmt: skip
    """(token block, column block of its site, site) of a program, in a grid of token blocks times the column blocks of sites with
    so many columns each; SWEEP token blocks share a column block in the L2."""
    pid = tl.program_id(0)
    blocks_t = tl.cdiv(num_tokens, BLOCK_T)
    blocks_0, blocks_1, blocks_2 = tl.cdiv(count_0, COLUMNS), tl.cdiv(count_1, COLUMNS), tl.cdiv(count_2, COLUMNS)
    blocks = blocks_0 + blocks_1 + blocks_2
    band = pid // (SWEEP * blocks)
    rows = min(blocks_t - band * SWEEP, SWEEP)
    i_t = band * SWEEP + (pid % (SWEEP * blocks)) % rows
    i_c = (pid % (SWEEP * blocks)) // rows
    i_s = (i_c >= blocks_0).to(tl.int32) + (i_c >= blocks_0 + blocks_1).to(tl.int32)
    if SITES > 1:
        i_c = i_c - pick(i_s, 0, blocks_0, blocks_0 + blocks_1)
    return i_t, i_c, i_s


@triton.jit
def add_products(acc, p_rows, p_cols, o_i, width, EVEN: tl.constexpr, BLOCK_I: tl.constexpr):
    """acc + x W^T, step by step of BLOCK_I inputs, from the addresses of x's rows and of W's; EVEN: the last step is whole."""
    for i in range(0, width, BLOCK_I):
        if EVEN:
            b_x = tl.load(p_rows + i)
            b_w = tl.load(p_cols + i)
        else:
            b_x = tl.load(p_rows + i, mask=(o_i < width - i)[None, :], other=0.0)
            b_w = tl.load(p_cols + i, mask=(o_i < width - i)[:, None], other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision="ieee")
    return acc


@triton.jit
def scores(b_dot, b_sum, b_squares, b_shift, b_absent, width, ARROW: tl.constexpr):
    """Router scores [T, NP] from raw products, sums of x and of x^2 [T], shifts and absence [NP]."""
    if ARROW:
        return tl.abs(b_dot) + b_absent[None, :]
    b_mean = b_sum / width
    b_variance = tl.maximum(b_squares / width - b_mean * b_mean, 0.0)
    b_scale = 1.0 / tl.sqrt(b_variance + 1e-5)
    return (b_dot - b_mean[:, None] * b_shift[None, :]) * b_scale[:, None] + b_absent[None, :]


@triton.jit
def row_sums(p_rows, m_t, width, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr):
    """Sums of x and of x^2 [T], fp32; columns are added up before lanes are."""
    b_sum = tl.zeros([BLOCK_T, BLOCK_I], dtype=tl.float32)
    b_squares = tl.zeros([BLOCK_T, BLOCK_I], dtype=tl.float32)
    for i in tl.range(0, width, BLOCK_I, loop_unroll_factor=4):  # four loads under way: the loop waits for nothing else
        o_i = i + tl.arange(0, BLOCK_I)
        b_wide = tl.load(p_rows + o_i[None, :], mask=m_t[:, None] & (o_i < width)[None, :], other=0.0).to(tl.float32)
        b_sum += b_wide
        b_squares += b_wide * b_wide
    return tl.sum(b_sum, axis=1), tl.sum(b_squares, axis=1)


@triton.jit
def best(b_z, o_n, num_experts):
    """(largest score, its lowest index) per row of b_z [T, NP]; the last expert where no score is a number."""
    b_top = tl.max(b_z, axis=1)
    b_index = tl.min(tl.where(b_z == b_top[:, None], o_n[None, :], num_experts - 1), axis=1)
    return b_top, b_index


@triton.jit
def choose_best(b_z, o_n, num_experts, K: tl.constexpr, BLOCK_T: tl.constexpr):
    """(K weights, not yet scaled, the K experts they are of, what scales them), each [BLOCK_T]."""
    b_top = tl.max(b_z, axis=1)
    b_all = tl.sum(tl.exp(b_z - b_top[:, None]), axis=1)
    b_chosen = tl.zeros([BLOCK_T], dtype=tl.float32)
    weights, indices = (), ()
    for _ in tl.static_range(K):
        b_score, b_index = best(b_z, o_n, num_experts)
        b_weight = tl.exp(b_score - b_top)
        b_chosen += b_weight
        weights, indices = weights + (b_weight,), indices + (b_index,)
        b_z = tl.where(o_n[None, :] == b_index[:, None], float("-inf"), b_z)
    return weights, indices, 1.0 / (b_chosen + 1e-6 * b_all)


@triton.jit
def store_choice(p_weight, p_index, i_s, o_t, m_t, num_tokens, weights, indices, b_scale, K: tl.constexpr):
    """weight fp32 and index int32 [S, T, K] of tokens o_t at site i_s, from what `choose_best` gives."""
    for j in tl.static_range(K):
        o_out = (i_s.to(tl.int64) * num_tokens + o_t) * K + j
        tl.store(p_weight + o_out, weights[j] * b_scale, mask=m_t)
        tl.store(p_index + o_out, indices[j], mask=m_t)


@triton.jit
def slot_shares(
    p_owner, o_r, m_r, weights, indices, b_scale, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr
):
    """[BLOCK_T, BLOCK_R]: the weight of the expert that a rank slot is of, 0 where it is not chosen."""
    b_owner = tl.load(p_owner + o_r, mask=m_r, other=-1)
    b_share = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for j in tl.static_range(K):
        b_share += tl.where(b_owner[None, :] == indices[j][:, None], (weights[j] * b_scale)[:, None], 0.0)
    return b_share


@triton.jit
def route_shrink(
    p_x, p_gate, p_shift, p_absent, p_a, p_owner, p_h, p_weight, p_index,
    num_tokens, width, s_x, s_h, num_experts, slots_0, slots_1, slots_2, to_low,
    d_x, d_gate, d_a, sites,
    K: tl.constexpr, NP: tl.constexpr, ARROW: tl.constexpr, SPLIT: tl.constexpr, SHRINK: tl.constexpr,
    STORE: tl.constexpr, TMA: tl.constexpr, AHEAD: tl.constexpr, BEGINS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Grid (slot blocks x sites x token blocks): those that read the same tokens run side by side.

    STORE: write weight fp32 and index int32 [S, T, K] (slot block 0).
    SPLIT: gates come as two 16-bit parts, to_low elements apart, side by side in one product; else one fp32 matrix.
    SHRINK: also h [T, R], in x's dtype. TMA: only with SPLIT and SHRINK; AHEAD is its.
    BEGINS: the launch behind this one may begin as soon as programs have room, and waits for this one's end by itself.
    """
    if BEGINS:
        gdc_launch_dependents()
    pid, blocks_r = tl.program_id(0), 1
    if SHRINK:
        blocks_r = tl.cdiv(max(slots_0, max(slots_1, slots_2)), BLOCK_R)
    i_r, i_s, i_t = pid % blocks_r, (pid // blocks_r) % sites, pid // (blocks_r * sites)
    slots = pick(i_s, slots_0, slots_1, slots_2)
    if (i_r * BLOCK_R >= slots) & (i_r > 0):
        return
    first = pick(i_s, 0, slots_0, slots_0 + slots_1)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n = tl.arange(0, NP)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_t, m_n, m_r = o_t < num_tokens, o_n < num_experts, o_r < slots
    PARTS: tl.constexpr = 2 if SPLIT else 1
    b_sum = tl.zeros([BLOCK_T], dtype=tl.float32)
    b_squares = tl.zeros([BLOCK_T], dtype=tl.float32)
    if TMA:
        p_rows = p_x + tl.where(m_t, o_t, 0).to(tl.int64)[:, None] * s_x
        b_sum, b_squares, b_parts, b_h = copied_shrink(
            d_x, d_gate, d_a, p_rows, i_t, i_s * num_experts, first + i_r * BLOCK_R, width,
            NP, ARROW, AHEAD, BLOCK_T, BLOCK_R, BLOCK_I,
        )  # fmt: skip
    else:
        p_rows = p_x + o_t.to(tl.int64)[:, None] * s_x
        o_p = tl.arange(0, PARTS * NP)
        m_p = o_p % NP < num_experts
        o_gate = (i_s * num_experts + o_p % NP).to(tl.int64)[None, :] * width
        if SPLIT:
            o_gate += (o_p // NP)[None, :] * to_low
        o_a = (first + o_r).to(tl.int64)[None, :] * width
        if not ARROW:
            b_sum, b_squares = row_sums(p_rows, m_t, width, BLOCK_T, BLOCK_I)
        b_parts = tl.zeros([BLOCK_T, PARTS * NP], dtype=tl.float32)
        b_h = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
        for i in range(0, width, BLOCK_I):
            o_i = i + tl.arange(0, BLOCK_I)
            m_i = o_i < width
            b_x = tl.load(p_rows + o_i[None, :], mask=m_t[:, None] & m_i[None, :], other=0.0)
            b_gate = tl.load(p_gate + o_gate + o_i[:, None], mask=m_i[:, None] & m_p[None, :], other=0.0)
            if SPLIT:
                b_parts = tl.dot(b_x, b_gate, b_parts, input_precision="ieee")
            else:
                b_parts = tl.dot(b_x.to(tl.float32), b_gate.to(tl.float32), b_parts, input_precision="ieee")
            if SHRINK:
                b_a = tl.load(p_a + o_a + o_i[:, None], mask=m_i[:, None] & m_r[None, :], other=0.0)
                b_h = tl.dot(b_x, b_a, b_h, input_precision="ieee")
    b_dot = tl.sum(tl.reshape(b_parts, [BLOCK_T, PARTS, NP]), axis=1)
    b_shift = tl.load(p_shift + i_s * num_experts + o_n, mask=m_n, other=0.0)
    b_absent = tl.load(p_absent + i_s * num_experts + o_n, mask=m_n, other=float("-inf"))
    b_z = scores(b_dot, b_sum, b_squares, b_shift, b_absent, width, ARROW)
    weights, indices, b_scale = choose_best(b_z, o_n, num_experts, K, BLOCK_T)
    if STORE:
        store_choice(p_weight, p_index, i_s, o_t, m_t & (i_r == 0), num_tokens, weights, indices, b_scale, K)
    if SHRINK:
        # after the reductions: a share need not be held beside them
        b_share = slot_shares(p_owner + first, o_r, m_r, weights, indices, b_scale, K, BLOCK_T, BLOCK_R)
        p_out = p_h + o_t.to(tl.int64)[:, None] * s_h + (first + o_r)[None, :]
        tl.store(p_out, (b_h * b_share).to(p_h.dtype.element_ty), mask=m_t[:, None] & m_r[None, :])
