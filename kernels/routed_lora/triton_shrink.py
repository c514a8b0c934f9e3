"""Shrink of all experts with a mask at the end: h = (A x) times the weight of each slot's expert, 0 where it is not chosen.

The second half of triton_route.py as a kernel of its own, for routing that is known: one product, nothing beside it in the
loop, so that more programs fit on a multiprocessor.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .triton_descriptors import copied_part
from .triton_route import add_products, pick, site_tile


@triton.jit
def masked_shrink(
    p_x, p_a, p_owner, p_weight, p_index, p_h, num_tokens, width, s_x, s_h, slots_0, slots_1, slots_2,
    d_x, d_a,
    SITES: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr, BEGINS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """h [T, R] in x's dtype from weight fp32 and index int32 [S, T, K]; one program: BLOCK_T tokens, BLOCK_R slots of a site.

    SWEEP token blocks share a block of A in the L2. TMA: x and A come as descriptors (triton_descriptors.py). BEGINS as in
    `route_shrink`.
    """
    if BEGINS:
        gdc_launch_dependents()
    i_t, i_r, i_s = site_tile(num_tokens, slots_0, slots_1, slots_2, SITES, BLOCK_T, BLOCK_R, SWEEP)
    slots = pick(i_s, slots_0, slots_1, slots_2)
    first = pick(i_s, 0, slots_0, slots_0 + slots_1)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_t, m_r = o_t < num_tokens, o_r < slots
    o_tc = tl.where(m_t, o_t, 0).to(tl.int64)  # what lies beyond the end reads the first row: no mask in the loop
    if TMA:
        acc = copied_part(d_x, d_a, i_t, first + i_r * BLOCK_R, width, BLOCK_T, BLOCK_R, BLOCK_I)
    else:
        o_rc = tl.where(m_r, first + o_r, first).to(tl.int64)
        o_i = tl.arange(0, BLOCK_I)
        p_rows = p_x + o_tc[:, None] * s_x + o_i[None, :]
        p_cols = p_a + o_rc[None, :] * width + o_i[:, None]
        acc = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
        acc = add_products(acc, p_rows, p_cols, o_i, width, EVEN, BLOCK_I)
    b_owner = tl.load(p_owner + first + o_r, mask=m_r, other=-1)
    o_pair = (i_s.to(tl.int64) * num_tokens + o_tc) * K
    b_share = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for j in tl.static_range(K):
        b_index = tl.load(p_index + o_pair + j)
        b_weight = tl.load(p_weight + o_pair + j)
        b_share += tl.where(b_owner[None, :] == b_index[:, None], b_weight[:, None], 0.0)
    p_out = p_h + o_t.to(tl.int64)[:, None] * s_h + (first + o_r)[None, :]
    tl.store(p_out, (acc * b_share).to(p_h.dtype.element_ty), mask=m_t[:, None] & m_r[None, :])
