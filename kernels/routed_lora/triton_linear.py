"""Base product and expand in one kernel: y = x W^T + hm B (+ bias), for up to three sites at once.

The expand is a second loop over rank slots into the same accumulator, so y is written once and never read. Weights,
biases, B and outputs of the second and third site are given as distances (in elements) from the first one's.
TMA: x, hm and every site's W and B come as descriptors instead (triton_descriptors.py).
FOLLOWS: the launch may begin before the one that makes hm has ended, and waits for that one's end between both products:
before it reads hm, and before it writes y, where that one's readers may have been.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .triton_descriptors import copied_products
from .triton_route import add_products, pick, site_tile


@triton.jit
def loaded_products(
    p_x, p_h, p_w, p_b, i_t, i_o, first, num_tokens, width, num_out, slots, s_x, s_h,
    EVEN: tl.constexpr, FOLLOWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x W^T + hm B [BLOCK_T, BLOCK_O] fp32 of one tile of one site, by addresses."""
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_t, m_o = o_t < num_tokens, o_o < num_out
    o_tc = tl.where(m_t, o_t, 0).to(tl.int64)  # rows beyond the end read row 0: no mask in the loop
    o_oc = tl.where(m_o, o_o, 0).to(tl.int64)  # not for B and biases: their loads want neighbours side by side
    o_i = tl.arange(0, BLOCK_I)
    p_rows = p_x + o_tc[:, None] * s_x + o_i[None, :]
    p_cols = p_w + o_oc[None, :] * width + o_i[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    acc = add_products(acc, p_rows, p_cols, o_i, width, EVEN, BLOCK_I)
    if FOLLOWS:
        gdc_wait()
    o_r = tl.arange(0, BLOCK_R)
    p_hidden = p_h + o_tc[:, None] * s_h + first + o_r[None, :]
    p_up = p_b + o_r[:, None] * num_out + o_o[None, :]
    for r in range(0, slots, BLOCK_R):
        m_r = o_r < slots - r
        b_h = tl.load(p_hidden + r, mask=m_r[None, :], other=0.0)
        b_b = tl.load(p_up, mask=m_r[:, None] & m_o[None, :], other=0.0)
        acc = tl.dot(b_h, b_b, acc, input_precision="ieee")
        p_up += BLOCK_R * num_out
    return acc


@triton.jit
def store_tile(
    p_y, p_bias, acc, i_t, first_out, num_tokens, num_out,
    BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """y's tile from its fp32 sums, bias added."""
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_o = first_out + tl.arange(0, BLOCK_O)
    m_t, m_o = o_t < num_tokens, o_o < num_out
    if BIAS:
        acc += tl.load(p_bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    p_out = p_y + o_t.to(tl.int64)[:, None] * num_out + o_o[None, :]
    tl.store(p_out, acc.to(p_y.dtype.element_ty), mask=m_t[:, None] & m_o[None, :])


@triton.jit
def linear_expand(
    p_x, p_h, p_w, p_bias, p_b, p_y, num_tokens, width, s_x, s_h,
    out_0, out_1, out_2, slots_0, slots_1, slots_2,
    to_w1, to_w2, to_bias1, to_bias2, to_b1, to_b2, to_y1: tl.int64, to_y2: tl.int64,
    d_x, d_h, d_w0, d_w1, d_w2, d_b0, d_b1, d_b2, d_more_w0, d_more_w1, d_more_w2, d_more_b0, d_more_b1, d_more_b2,
    SITES: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr, JOINED: tl.constexpr,
    FOLLOWS: tl.constexpr, MORE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr, SWEEP: tl.constexpr,
):  # fmt: skip
    """One program, one tile [BLOCK_T, BLOCK_O + MORE] of one site; SWEEP token blocks share a column block in L2.

    MORE: 0, or with TMA columns beyond a power of two, in an accumulator of their own.
    """
    COLUMNS: tl.constexpr = BLOCK_O + MORE
    i_t, i_o, i_s = site_tile(num_tokens, out_0, out_1, out_2, SITES, BLOCK_T, COLUMNS, SWEEP)
    d_w, d_b, d_more_w, d_more_b = d_w0, d_b0, d_more_w0, d_more_b0
    if SITES == 1:
        num_out, slots, first = out_0, slots_0, 0
    else:
        num_out = pick(i_s, out_0, out_1, out_2)
        slots = pick(i_s, slots_0, slots_1, slots_2)
        first = pick(i_s, 0, slots_0, slots_0 + slots_1)
        zero = tl.zeros([], dtype=tl.int64)
        p_w = p_w + pick(i_s, zero, to_w1.to(tl.int64), to_w2.to(tl.int64))
        p_bias = p_bias + pick(i_s, zero, to_bias1.to(tl.int64), to_bias2.to(tl.int64))
        p_b = p_b + pick(i_s, zero, to_b1.to(tl.int64), to_b2.to(tl.int64))
        p_y = p_y + pick(i_s, zero, to_y1.to(tl.int64), to_y2.to(tl.int64))
        if TMA:  # a descriptor is an address: the compiler selects one of three
            if i_s == 1:
                d_w, d_b, d_more_w, d_more_b = d_w1, d_b1, d_more_w1, d_more_b1
            if SITES == 3:  # noqa: SIM102 - decided when compiled: with two sites there is no third descriptor
                if i_s == 2:
                    d_w, d_b, d_more_w, d_more_b = d_w2, d_b2, d_more_w2, d_more_b2
    if TMA:
        acc, more = copied_products(
            d_x, d_h, d_w, d_b, d_more_w, d_more_b, i_t, i_o, first, width, slots,
            JOINED, FOLLOWS, BLOCK_T, BLOCK_O, MORE, BLOCK_I, BLOCK_R,
        )  # fmt: skip
    else:
        acc = loaded_products(
            p_x, p_h, p_w, p_b, i_t, i_o, first, num_tokens, width, num_out, slots, s_x, s_h,
            EVEN, FOLLOWS, BLOCK_T, BLOCK_O, BLOCK_I, BLOCK_R,
        )  # fmt: skip
    o_o = i_o * COLUMNS
    store_tile(p_y, p_bias, acc, i_t, o_o, num_tokens, num_out, BIAS, BLOCK_T, BLOCK_O)
    if MORE:
        store_tile(p_y, p_bias, more, i_t, o_o + BLOCK_O, num_tokens, num_out, BIAS, BLOCK_T, MORE)
