"""Few tokens (decode): two launches for all sites that read one input.

`decode_base`    y = x W^T (+ bias) and the raw gate products x . V', every weight row read once
`decode_update`  per token, site and block of outputs: scores, top-k, A of the chosen experts times x, y += w B (A x)

Every block of outputs repeats the shrink (k r I numbers out of the L2). Where that is large it is a launch of its own
over splits of I (`PHASE` 1), whose partial sums the expand (`PHASE` 2) adds up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_route import pick


@triton.jit
def decode_base(
    p_x, p_w, p_bias, p_gate, p_gate_low, p_y, p_dot, num_tokens, width, s_x, num_gates,
    out_0, out_1, out_2, to_w1, to_w2, to_bias1, to_bias2, to_y1: tl.int64, to_y2: tl.int64,
    SITES: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Programs 0 .. cdiv(num_gates, BLOCK_O) - 1 make gate products [T, Z] fp32, the others y of one site each."""
    pid = tl.program_id(0)
    blocks_z = tl.cdiv(num_gates, BLOCK_O)
    o_t = tl.arange(0, ROWS)
    m_t = o_t < num_tokens
    lane = tl.arange(0, BLOCK_O)
    if pid < blocks_z:
        o_z = pid * BLOCK_O + lane
        m_z = o_z < num_gates
        p_high = p_gate + o_z.to(tl.int64)[:, None] * width
        b_dot = _rows_times(p_x, p_high, o_t, m_t, m_z, width, s_x, ROWS, BLOCK_O, BLOCK_I)
        if SPLIT:
            p_low = p_gate_low + o_z.to(tl.int64)[:, None] * width
            b_dot += _rows_times(p_x, p_low, o_t, m_t, m_z, width, s_x, ROWS, BLOCK_O, BLOCK_I)
        p_target = p_dot + o_t[:, None] * num_gates + o_z[None, :]
        tl.store(p_target, b_dot, mask=m_t[:, None] & m_z[None, :])
    else:
        i_o = pid - blocks_z
        num_out = out_0
        if SITES > 1:
            blocks_0, blocks_1 = tl.cdiv(out_0, BLOCK_O), tl.cdiv(out_1, BLOCK_O)
            i_s = (i_o >= blocks_0).to(tl.int32) + (i_o >= blocks_0 + blocks_1).to(tl.int32)
            num_out = pick(i_s, out_0, out_1, out_2)
            i_o = i_o - pick(i_s, 0, blocks_0, blocks_0 + blocks_1)
            zero = tl.zeros([], dtype=tl.int64)
            p_w = p_w + pick(i_s, zero, to_w1.to(tl.int64), to_w2.to(tl.int64))
            p_bias = p_bias + pick(i_s, zero, to_bias1.to(tl.int64), to_bias2.to(tl.int64))
            p_y = p_y + pick(i_s, zero, to_y1.to(tl.int64), to_y2.to(tl.int64))
        o_o = i_o * BLOCK_O + lane
        m_o = o_o < num_out
        p_rows = p_w + o_o.to(tl.int64)[:, None] * width
        acc = _rows_times(p_x, p_rows, o_t, m_t, m_o, width, s_x, ROWS, BLOCK_O, BLOCK_I)
        if BIAS:
            acc += tl.load(p_bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
        p_out = p_y + o_t.to(tl.int64)[:, None] * num_out + o_o[None, :]
        tl.store(p_out, acc.to(p_y.dtype.element_ty), mask=m_t[:, None] & m_o[None, :])


@triton.jit
def _rows_times(p_x, p_rows, o_t, m_t, m_o, width, s_x, ROWS: tl.constexpr, BLOCK_O: tl.constexpr,
                BLOCK_I: tl.constexpr):  # fmt: skip
    """x [ROWS, I] times rows [BLOCK_O, I] -> fp32 [ROWS, BLOCK_O]; one token without a dot, products kept apart."""
    if ROWS == 1:
        apart = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
        for i in range(0, width, BLOCK_I):
            o_i = i + tl.arange(0, BLOCK_I)
            m_i = o_i < width
            b_w = tl.load(p_rows + o_i[None, :], mask=m_o[:, None] & m_i[None, :], other=0.0)
            b_x = tl.load(p_x + o_i, mask=m_i, other=0.0)
            apart += b_w.to(tl.float32) * b_x.to(tl.float32)[None, :]
        acc = tl.sum(apart, axis=1)[None, :]
    else:
        acc = tl.zeros([ROWS, BLOCK_O], dtype=tl.float32)
        for i in range(0, width, BLOCK_I):
            o_i = i + tl.arange(0, BLOCK_I)
            m_i = o_i < width
            b_w = tl.load(p_rows + o_i[None, :], mask=m_o[:, None] & m_i[None, :], other=0.0)
            b_x = tl.load(
                p_x + o_t.to(tl.int64)[:, None] * s_x + o_i[None, :], mask=m_t[:, None] & m_i[None, :], other=0.0
            )
            acc = tl.dot(b_x.to(b_w.dtype), tl.trans(b_w), acc, input_precision="ieee")
    return acc


@triton.jit
def decode_update(
    p_x, p_dot, p_shift, p_absent, p_start, p_rank, p_a, p_b, p_y, p_part,
    width, s_x, num_experts, num_sites, out_0, out_1, out_2, slots_0, slots_1, to_b1, to_b2, to_y1: tl.int64, to_y2: tl.int64,
    splits,
    K: tl.constexpr, KP: tl.constexpr, NP: tl.constexpr, RP: tl.constexpr, ARROW: tl.constexpr, SITES: tl.constexpr,
    PHASE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, sites, output blocks or splits). PHASE 0 shrink and expand, 1 shrink into p_part, 2 expand."""
    i_t, i_s, i_o = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    o_n, o_c = tl.arange(0, NP), tl.arange(0, KP * RP)
    num_out = out_0
    first = 0
    if SITES > 1:
        num_out = pick(i_s, out_0, out_1, out_2)
        first = pick(i_s, 0, slots_0, slots_0 + slots_1)
        zero = tl.zeros([], dtype=tl.int64)
        p_b = p_b + pick(i_s, zero, to_b1.to(tl.int64), to_b2.to(tl.int64))
        p_y = p_y + pick(i_s, zero, to_y1.to(tl.int64), to_y2.to(tl.int64))
    if (i_o * BLOCK_O >= num_out) & (PHASE != 1):
        return
    p_row = p_x + i_t * s_x
    m_n = o_n < num_experts
    z = tl.load(p_dot + i_t * (num_sites * num_experts) + i_s * num_experts + o_n, mask=m_n, other=0.0)
    absent = tl.load(p_absent + i_s * num_experts + o_n, mask=m_n, other=float("-inf"))
    if ARROW:
        z = tl.abs(z) + absent
    else:
        total = tl.zeros([BLOCK_X], dtype=tl.float32)
        squares = tl.zeros([BLOCK_X], dtype=tl.float32)
        for i in range(0, width, BLOCK_X):
            o_x = i + tl.arange(0, BLOCK_X)
            b_wide = tl.load(p_row + o_x, mask=o_x < width, other=0.0).to(tl.float32)
            total += b_wide
            squares += b_wide * b_wide
        mean = tl.sum(total, axis=0) / width
        variance = tl.maximum(tl.sum(squares, axis=0) / width - mean * mean, 0.0)
        shift = tl.load(p_shift + i_s * num_experts + o_n, mask=m_n, other=0.0)
        z = (z - mean * shift) / tl.sqrt(variance + 1e-5) + absent
    top = tl.max(z, axis=0)
    chosen = 1e-6 * tl.sum(tl.exp(z - top), axis=0)
    slot = tl.zeros([KP * RP], dtype=tl.int32)
    rank = tl.zeros([KP * RP], dtype=tl.int32)
    weight = tl.zeros([KP * RP], dtype=tl.float32)
    for j in tl.static_range(K):
        score = tl.max(z, axis=0)
        index = tl.min(tl.where(z == score, o_n, num_experts - 1), axis=0)  # an expert there is, whatever z holds
        chosen += tl.exp(score - top)
        mine = o_c // RP == j
        slot = tl.where(mine, tl.load(p_start + i_s * num_experts + index) + o_c % RP, slot)
        rank = tl.where(mine, tl.load(p_rank + i_s * num_experts + index), rank)
        weight = tl.where(mine, tl.exp(score - top), weight)
        z = tl.where(o_n == index, float("-inf"), z)
    weight = weight / chosen
    m_c = o_c % RP < rank
    if PHASE != 1:  # B is asked for before the shrink, whose time its way takes
        o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
        m_o = o_o < num_out
        o_b = (slot - first).to(tl.int64)[:, None] * num_out + o_o[None, :]
        b_b = tl.load(p_b + o_b, mask=m_c[:, None] & m_o[None, :], other=0.0)
    o_part = (i_t * num_sites + i_s) * splits * (KP * RP) + o_c
    if PHASE == 2:
        hidden = tl.zeros([KP * RP], dtype=tl.float32)
        for i in range(splits):
            hidden += tl.load(p_part + o_part + i * (KP * RP))
    else:
        apart = tl.zeros([KP * RP, BLOCK_I], dtype=tl.float32)
        p_rows = p_a + slot.to(tl.int64)[:, None] * width
        begin = 0
        step = BLOCK_I
        if PHASE == 1:
            begin = i_o * BLOCK_I
            step = splits * BLOCK_I
        for i in range(begin, width, step):
            o_i = i + tl.arange(0, BLOCK_I)
            m_i = o_i < width
            b_a = tl.load(p_rows + o_i[None, :], mask=m_c[:, None] & m_i[None, :], other=0.0)
            b_x = tl.load(p_row + o_i, mask=m_i, other=0.0)
            apart += b_a.to(tl.float32) * b_x.to(tl.float32)[None, :]
        hidden = tl.sum(apart, axis=1) * weight
    if PHASE == 1:
        tl.store(p_part + o_part + i_o * (KP * RP), hidden)
    else:
        p_out = p_y + i_t * num_out + o_o
        b_y = tl.load(p_out, mask=m_o, other=0.0).to(tl.float32)
        b_y += tl.sum(b_b.to(tl.float32) * hidden[:, None], axis=0)
        tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=m_o)
