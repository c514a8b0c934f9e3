"""Base product and expand in one kernel: y = x W^T + hm B (+ bias), for up to three sites at once.

The expand is a second loop over rank slots into the same accumulator, so y is written once and never read. Weights,
biases, B and outputs of the second and third site are given as distances (in elements) from the first one's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_route import pick


@triton.jit
def linear_expand(
    p_x, p_h, p_w, p_bias, p_b, p_y, num_tokens, width, s_x, s_h,
    out_0, out_1, out_2, slots_0, slots_1, slots_2,
    to_w1, to_w2, to_bias1, to_bias2, to_b1, to_b2, to_y1, to_y2,
    SITES: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """One program, one tile [BLOCK_T, BLOCK_O] of one site; SWEEP token blocks share a column block in L2."""
    pid = tl.program_id(0)
    blocks_t = tl.cdiv(num_tokens, BLOCK_T)
    blocks_0, blocks_1, blocks_2 = tl.cdiv(out_0, BLOCK_O), tl.cdiv(out_1, BLOCK_O), tl.cdiv(out_2, BLOCK_O)
    blocks_o = blocks_0 + blocks_1 + blocks_2
    band = pid // (SWEEP * blocks_o)
    rows = min(blocks_t - band * SWEEP, SWEEP)
    i_t = band * SWEEP + (pid % (SWEEP * blocks_o)) % rows
    i_o = (pid % (SWEEP * blocks_o)) // rows
    i_s = (i_o >= blocks_0).to(tl.int32) + (i_o >= blocks_0 + blocks_1).to(tl.int32)
    if SITES == 1:
        num_out, slots, first = out_0, slots_0, 0
    else:
        num_out = pick(i_s, out_0, out_1, out_2)
        slots = pick(i_s, slots_0, slots_1, slots_2)
        first = pick(i_s, 0, slots_0, slots_0 + slots_1)
        i_o = i_o - pick(i_s, 0, blocks_0, blocks_0 + blocks_1)
        zero = tl.zeros([], dtype=tl.int64)
        p_w = p_w + pick(i_s, zero, to_w1.to(tl.int64), to_w2.to(tl.int64))
        p_bias = p_bias + pick(i_s, zero, to_bias1.to(tl.int64), to_bias2.to(tl.int64))
        p_b = p_b + pick(i_s, zero, to_b1.to(tl.int64), to_b2.to(tl.int64))
        p_y = p_y + pick(i_s, zero, to_y1.to(tl.int64), to_y2.to(tl.int64))
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_t, m_o = o_t < num_tokens, o_o < num_out
    o_tc = tl.where(m_t, o_t, 0).to(tl.int64)  # rows beyond the end read row 0: no mask in the loop
    o_oc = tl.where(m_o, o_o, 0).to(tl.int64)  # not for B and biases: their loads want neighbours side by side
    o_i = tl.arange(0, BLOCK_I)
    p_rows = p_x + o_tc[:, None] * s_x + o_i[None, :]
    p_cols = p_w + o_oc[None, :] * width + o_i[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for i in range(0, width, BLOCK_I):
        if EVEN:
            b_x = tl.load(p_rows + i)
            b_w = tl.load(p_cols + i)
        else:
            b_x = tl.load(p_rows + i, mask=(o_i < width - i)[None, :], other=0.0)
            b_w = tl.load(p_cols + i, mask=(o_i < width - i)[:, None], other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision="ieee")
    o_r = tl.arange(0, BLOCK_R)
    p_hidden = p_h + o_tc[:, None] * s_h + first + o_r[None, :]
    p_up = p_b + o_r[:, None] * num_out + o_o[None, :]
    for r in range(0, slots, BLOCK_R):
        m_r = o_r < slots - r
        b_h = tl.load(p_hidden + r, mask=m_r[None, :], other=0.0)
        b_b = tl.load(p_up, mask=m_r[:, None] & m_o[None, :], other=0.0)
        acc = tl.dot(b_h, b_b, acc, input_precision="ieee")
        p_up += BLOCK_R * num_out
    if BIAS:
        acc += tl.load(p_bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    p_out = p_y + o_t.to(tl.int64)[:, None] * num_out + o_o[None, :]
    tl.store(p_out, acc.to(p_y.dtype.element_ty), mask=m_t[:, None] & m_o[None, :])
