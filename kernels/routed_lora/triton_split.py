"""Routing from products that the library has made: statistics, scores, top-k softmax; with few experts the weighted shrink, too.

    products [T, P] = x [A; leading parts of the gates; rests of the gates; zeros]^T, fp32, all sites side by side
    z = (x . V' - mean(x) c) / sigma_x + absent;  hm[t, slot] = w[t, owner(slot)] (A x_t)[slot]     (as in triton_route.py)

With few tokens and a wide input `route_shrink` is a handful of programs with a long loop (512 tokens of width 14,336: 16 programs
of 448 steps in two passes, on 132 multiprocessors). The library's product splits the width where tokens and columns do not fill a
GPU, and `weigh_products` has a program for every token and site, so that reading x for its statistics fills it too.

With many experts (`choose_products`) the products are the gates' alone. Their scores do not fit into registers beside a product of
many tokens, which is what a kernel of both would be; written and read they are 8 bytes a token and expert, in the L2 while tokens
are few (tiles.py: what PRODUCT_BYTES says).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .triton_route import choose_best, pick, row_sums, scores, slot_shares, store_choice


@triton.jit
def _product_scores(
    p_rows, p_product, p_shift, p_absent, row_0, o_n, m_t, width, num_experts, to_high, to_low, ARROW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_T, NP] of a site, whose gates begin at row row_0; to_high, to_low: columns of the products where the gates'
    leading parts and their rests begin."""
    m_n = o_n < num_experts
    p_high, p_low, m_gate = p_product + (to_high + row_0), p_product + (to_low + row_0), m_t[:, None] & m_n[None, :]
    b_dot = tl.load(p_high + o_n[None, :], mask=m_gate, other=0.0) + tl.load(
        p_low + o_n[None, :], mask=m_gate, other=0.0
    )
    b_sum = tl.zeros([BLOCK_T], dtype=tl.float32)
    b_squares = tl.zeros([BLOCK_T], dtype=tl.float32)
    if not ARROW:
        b_sum, b_squares = row_sums(p_rows, m_t, width, BLOCK_T, BLOCK_I)
    b_shift = tl.load(p_shift + row_0 + o_n, mask=m_n, other=0.0)
    b_absent = tl.load(p_absent + row_0 + o_n, mask=m_n, other=float("-inf"))
    return scores(b_dot, b_sum, b_squares, b_shift, b_absent, width, ARROW)


@triton.jit
def weigh_products(
    p_x, p_product, p_shift, p_absent, p_owner, p_h,
    num_tokens, width, s_x, s_product, s_h, num_experts, slots_0, slots_1, slots_2, to_high, to_low, sites,
    K: tl.constexpr, NP: tl.constexpr, ARROW: tl.constexpr, BEGINS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """h [T, R] in x's dtype; grid (sites x token blocks): those that read the same tokens run side by side.

    to_high, to_low as in `_product_scores`. BEGINS as in `route_shrink`.
    """
    if BEGINS:
        gdc_launch_dependents()
    i_s, i_t = tl.program_id(0) % sites, tl.program_id(0) // sites
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n, m_t = tl.arange(0, NP), o_t < num_tokens
    p_row = p_product + o_t.to(tl.int64)[:, None] * s_product
    b_z = _product_scores(
        p_x + o_t.to(tl.int64)[:, None] * s_x, p_row, p_shift, p_absent, i_s * num_experts, o_n, m_t, width, num_experts, to_high,
        to_low, ARROW, BLOCK_T, BLOCK_I,
    )  # fmt: skip
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


@triton.jit
def choose_products(
    p_x, p_product, p_shift, p_absent, p_weight, p_index,
    first_token, num_here, num_tokens, width, s_x, s_product, num_experts, to_low, sites,
    K: tl.constexpr, NP: tl.constexpr, ARROW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """weight fp32 and index int32 [S, T, K] of the num_here tokens from first_token on, whose x and products these are (of the
    gates: leading parts, then rests). Grid (sites x token blocks here).

    A warp a token: its scores take eight registers a lane of 256 experts, and many warps hide what each waits for.
    """
    i_s, i_t = tl.program_id(0) % sites, tl.program_id(0) // sites
    o_t, o_n = i_t * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, NP)
    m_t, o_row = o_t < num_here, o_t.to(tl.int64)[:, None]
    b_z = _product_scores(
        p_x + o_row * s_x, p_product + o_row * s_product, p_shift, p_absent, i_s * num_experts, o_n, m_t, width, num_experts, 0,
        to_low, ARROW, BLOCK_T, BLOCK_I,
    )  # fmt: skip
    weights, indices, b_scale = choose_best(b_z, o_n, num_experts, K, BLOCK_T)
    store_choice(p_weight, p_index, i_s, first_token + o_t, m_t, num_tokens, weights, indices, b_scale, K)
