"""Routing and weighted shrink from products that the library has made: statistics, scores, top-k softmax, weights times A x.

    products [T, P] = x [A; leading parts of the gates; rests of the gates; zeros]^T, fp32, all sites side by side
    z = (x . V' - mean(x) c) / sigma_x + absent;  hm[t, slot] = w[t, owner(slot)] (A x_t)[slot]     (as in triton_route.py)

With few tokens and a wide input `route_shrink` is a handful of programs with a long loop (512 tokens of width 14,336: 16 programs
of 448 steps in two passes, on 132 multiprocessors). The library's product splits the width where tokens and columns do not fill a
GPU, and this kernel has a program for every token and site, so that reading x for its statistics fills it too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .triton_route import choose_best, pick, row_sums, scores, slot_shares


@triton.jit
def weigh_products(
    p_x, p_product, p_shift, p_absent, p_owner, p_h,
    num_tokens, width, s_x, s_product, s_h, num_experts, slots_0, slots_1, slots_2, to_high, to_low, sites,
    K: tl.constexpr, NP: tl.constexpr, ARROW: tl.constexpr, BEGINS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """h [T, R] in x's dtype; grid (sites x token blocks): those that read the same tokens run side by side.

    to_high, to_low: columns of `products` where the gates' leading parts and their rests begin. BEGINS as in
    `route_shrink`.
    """
    if BEGINS:
        gdc_launch_dependents()
    i_s, i_t = tl.program_id(0) % sites, tl.program_id(0) // sites
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n = tl.arange(0, NP)
    m_t, m_n = o_t < num_tokens, o_n < num_experts
    p_row = p_product + o_t.to(tl.int64)[:, None] * s_product
    p_gate, m_gate = p_row + (i_s * num_experts + o_n)[None, :], m_t[:, None] & m_n[None, :]
    b_dot = tl.load(p_gate + to_high, mask=m_gate, other=0.0) + tl.load(p_gate + to_low, mask=m_gate, other=0.0)
    b_sum = tl.zeros([BLOCK_T], dtype=tl.float32)
    b_squares = tl.zeros([BLOCK_T], dtype=tl.float32)
    if not ARROW:
        b_sum, b_squares = row_sums(p_x + o_t.to(tl.int64)[:, None] * s_x, m_t, width, BLOCK_T, BLOCK_I)
    b_shift = tl.load(p_shift + i_s * num_experts + o_n, mask=m_n, other=0.0)
    b_absent = tl.load(p_absent + i_s * num_experts + o_n, mask=m_n, other=float("-inf"))
    b_z = scores(b_dot, b_sum, b_squares, b_shift, b_absent, width, ARROW)
    weights, indices, b_scale = choose_best(b_z, o_n, num_experts, K, BLOCK_T)
    slots, first = pick(i_s, slots_0, slots_1, slots_2), pick(i_s, 0, slots_0, slots_0 + slots_1)
    for r in range(0, slots, BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        m_r = o_r < slots
        b_share = slot_shares(p_owner + first, o_r, m_r, weights, indices, b_scale, K, BLOCK_T, BLOCK_R)
        m_out = m_t[:, None] & m_r[None, :]
        chosen = m_out & (b_share != 0.0)  # a share that is not a number is chosen too; what is not chosen is not read
        b_h = tl.load(p_row + (first + o_r)[None, :], mask=chosen, other=0.0) * b_share
        p_out = p_h + o_t.to(tl.int64)[:, None] * s_h + (first + o_r)[None, :]
        tl.store(p_out, b_h.to(p_h.dtype.element_ty), mask=m_out)
