"""The loops of route_shrink, masked_shrink and linear_expand with tiles that a GPU's copy engine brings in (TMA, Hopper and newer).

A descriptor names a matrix and a tile's shape once, on the host; a load names a corner, costs one thread one instruction
and fills what lies beyond the matrix with zeros. Rows and slots beyond a site's own are another site's: they meet rows of
zeros (B) or are not stored. launch.py says what a descriptor wants of a tensor; everything else takes the loops beside these.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def copied_products(
    d_x, d_h, d_w, d_b, d_w_more, d_b_more, i_t, i_o, first, width, slots,
    JOINED: tl.constexpr, FOLLOWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, MORE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x W^T + hm B fp32 of one tile of one site: [BLOCK_T, BLOCK_O], and the MORE columns that follow (or again the first).

    JOINED: both products in one loop, which fills its pipeline once: a step takes BLOCK_I inputs and BLOCK_R slots, and
    BLOCK_R is such that the slots end before the inputs do.
    FOLLOWS: hm is there once the launch before this one has ended, which is waited for before hm's first tile.
    """
    o_t = i_t * BLOCK_T
    o_o = i_o * (BLOCK_O + MORE)
    acc = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    more = acc
    if MORE:
        more = tl.zeros([BLOCK_T, MORE], dtype=tl.float32)
    if FOLLOWS and JOINED:
        gdc_wait()
    for i in range(tl.cdiv(width, BLOCK_I)):
        b_x = d_x.load([o_t, i * BLOCK_I])
        b_w = d_w.load([o_o, i * BLOCK_I])
        acc = tl.dot(b_x, tl.trans(b_w), acc)
        if MORE:
            b_w_more = d_w_more.load([o_o + BLOCK_O, i * BLOCK_I])
            more = tl.dot(b_x, tl.trans(b_w_more), more)
        if JOINED:
            b_h = d_h.load([o_t, first + i * BLOCK_R])
            b_b = d_b.load([i * BLOCK_R, o_o])
            acc = tl.dot(b_h, b_b, acc)
            if MORE:
                b_b_more = d_b_more.load([i * BLOCK_R, o_o + BLOCK_O])
                more = tl.dot(b_h, b_b_more, more)
    if not JOINED:
        if FOLLOWS:
            gdc_wait()
        for r in range(0, slots, BLOCK_R):
            b_h = d_h.load([o_t, first + r])
            b_b = d_b.load([r, o_o])
            acc = tl.dot(b_h, b_b, acc)
            if MORE:
                b_b_more = d_b_more.load([r, o_o + BLOCK_O])
                more = tl.dot(b_h, b_b_more, more)
    return acc, more


@triton.jit
def copied_part(
    d_x, d_a, i_t, first_slot, width, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A x [BLOCK_T, BLOCK_R] fp32 of the slots from first_slot on."""
    acc = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    for i in range(tl.cdiv(width, BLOCK_I)):
        b_x = d_x.load([i_t * BLOCK_T, i * BLOCK_I])
        b_a = d_a.load([first_slot, i * BLOCK_I])
        acc = tl.dot(b_x, tl.trans(b_a), acc)
    return acc


@triton.jit
def eights(b_wide, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr):
    """Sums of eight neighbours, what a thread holds: few registers in the loop, no exchange between threads."""
    return tl.sum(tl.reshape(b_wide, [BLOCK_T, BLOCK_I // 8, 8]), axis=2)


@triton.jit
def copied_shrink(
    d_x, d_gate, d_a, p_rows, i_t, first_gate, first_slot, width,
    NP: tl.constexpr, ARROW: tl.constexpr, AHEAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """(sums of x and of x^2 [T], gate products of both parts [T, 2 NP], A x [T, BLOCK_R]), all fp32, in one loop.

    d_gate is [2, Z, I]: the two 16-bit parts, in the order of their addresses. Statistics read a tile of their own, straight
    into registers, while the products of this step run: the products' tile has no other reader. AHEAD: a step ahead. Else this
    step's, with fewer registers, so that another program beside this one can wait less.
    """
    o_i = tl.arange(0, BLOCK_I)
    b_parts = tl.zeros([BLOCK_T, 2 * NP], dtype=tl.float32)
    b_h = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_T, BLOCK_I // 8], dtype=tl.float32)
    b_squares = tl.zeros([BLOCK_T, BLOCK_I // 8], dtype=tl.float32)
    if not ARROW and AHEAD:
        b_next = tl.load(p_rows + o_i[None, :], mask=(o_i < width)[None, :], other=0.0)
    for i in range(0, width, BLOCK_I):
        if not ARROW:
            o_next = i + o_i
            if AHEAD:
                b_wide = b_next.to(tl.float32)
                o_next += BLOCK_I
            b_next = tl.load(p_rows + o_next[None, :], mask=(o_next < width)[None, :], other=0.0)
        b_x = d_x.load([i_t * BLOCK_T, i])
        b_gate = tl.reshape(d_gate.load([0, first_gate, i]), [2 * NP, BLOCK_I])
        b_parts = tl.dot(b_x, tl.trans(b_gate), b_parts)
        b_a = d_a.load([first_slot, i])
        b_h = tl.dot(b_x, tl.trans(b_a), b_h)
        if not ARROW:
            if not AHEAD:
                b_wide = b_next.to(tl.float32)
            b_sum += eights(b_wide, BLOCK_T, BLOCK_I)
            b_squares += eights(b_wide * b_wide, BLOCK_T, BLOCK_I)
    return tl.sum(b_sum, axis=1), tl.sum(b_squares, axis=1), b_parts, b_h
