"""Triton, forward: one program attends one tile of rows of one query head over its prefix range and its own positions.

Rows of a head are r = (a * S + s) * M + m and own keys c = (a * S + s) * N + n: the own part is a block diagonal, so a
tile of rows needs the few key tiles of its own branches only, and the prefix part a staircase whose steps are S * M rows
high. Both parts run through one online softmax. With PREFIX = 0 the softmax starts from an output and log-sum-exp
that stock kernels have left in memory: that is the merge. Backward: triton_backward.py. Host side: triton_launch.py.
reference.py is the specification; test: `pytest tests/kernels/test_thought_attention_kernels.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(1 << 30)  # beyond every key


@triton.jit
def load_tile(p, o_row, m_row, D: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    """[rows, WIDTH] of the rows at offsets o_row, 0 where masked. UPCAST: the interpreter multiplies bf16 as integers."""
    i_channel = tl.arange(0, WIDTH)
    mask = m_row[:, None]
    if WIDTH != D:
        mask = mask & (i_channel < D)[None, :]
    tile = tl.load(p + o_row[:, None] + i_channel[None, :], mask=mask, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_tile(p, o_row, m_row, tile, D: tl.constexpr, WIDTH: tl.constexpr):
    """Writes the rows of load_tile's shape."""
    i_channel = tl.arange(0, WIDTH)
    mask = m_row[:, None]
    if WIDTH != D:
        mask = mask & (i_channel < D)[None, :]
    tl.store(p + o_row[:, None] + i_channel[None, :], tile.to(p.dtype.element_ty), mask=mask)


@triton.jit
def row_ranges(p_anchor, p_start, row, num_rows, PER_ANCHOR: tl.constexpr):
    """(row counts, anchor, start) of each row; a row that does not count has anchor -1 and sees nothing."""
    i_anchor = row // PER_ANCHOR
    anchor = tl.load(p_anchor + i_anchor, mask=row < num_rows, other=-1).to(tl.int32)
    start = tl.load(p_start + i_anchor, mask=row < num_rows, other=0).to(tl.int32)
    return anchor >= 0, anchor, start


@triton.jit
def prefix_bounds(has, anchor, start, KEYS: tl.constexpr):
    """(begin, full_begin, full_end, end) in keys: what some row sees, and within it whole tiles that every row sees."""
    begin = tl.min(tl.where(has, start, FAR), 0) // KEYS * KEYS
    end = tl.max(tl.where(has, anchor, -1), 0) + 1
    begin = tl.minimum(begin, end)
    full_begin = (tl.max(tl.where(has, start, 0), 0) + KEYS - 1) // KEYS * KEYS
    full_end = (tl.min(tl.where(has, anchor, FAR), 0) + 1) // KEYS * KEYS
    # where there is no such tile all of it is masked: [begin, end) and two empty ranges
    some = (full_begin < full_end) & (full_end <= end)
    return begin, tl.where(some, full_begin, end), tl.where(some, full_end, end), end


@triton.jit
def own_keys(p_anchor, first, end, length, S: tl.constexpr, N: tl.constexpr, KEYS: tl.constexpr):
    """(key, its branch, its slot, whether it may be read) of a tile of own keys; unused slots may hold anything."""
    key = first + tl.arange(0, KEYS)
    branch = key // N
    slot = key % N
    anchor = tl.load(p_anchor + branch // S, mask=key < end, other=-1)
    return key, branch, slot, (key < end) & (slot < length) & (anchor >= 0)


@triton.jit
def own_length_of(p_length, length, ON_DEVICE: tl.constexpr):
    """Filled own slots: a number of the host or one on the device."""
    if ON_DEVICE:
        length = tl.load(p_length).to(tl.int32)
    return length


@triton.jit
def _absorb(acc, largest, total, score, b_value):
    """One step of the online softmax in base 2; rows that have seen nothing so far stay at largest = -inf."""
    grown = tl.maximum(largest, tl.max(score, 1))
    shift = tl.where(grown == float("-inf"), 0.0, grown)
    weight = tl.exp2(score - shift[:, None])
    shrink = tl.exp2(largest - shift)
    acc = acc * shrink[:, None]
    acc += tl.dot(weight.to(b_value.dtype), b_value, input_precision="ieee")
    return acc, grown, total * shrink + tl.sum(weight, 1)


@triton.jit
def _prefix(
    b_q, acc, largest, total, anchor, start, p_key, p_value, k_key, v_key, begin, end, L, scale2,
    D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Prefix keys begin .. end - 1, `begin` a multiple of KEYS."""
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        b_key = load_tile(p_key, key.to(tl.int64) * k_key, key < L, D, WIDTH, UPCAST)
        score = tl.dot(b_q, tl.trans(b_key), input_precision="ieee") * scale2
        if MASKED:
            seen = (key[None, :] <= anchor[:, None]) & (key[None, :] >= start[:, None])
            score = tl.where(seen, score, float("-inf"))
        b_value = load_tile(p_value, key.to(tl.int64) * v_key, key < L, D, WIDTH, UPCAST)
        acc, largest, total = _absorb(acc, largest, total, score, b_value)
    return acc, largest, total


@triton.jit
def _own_blocks(
    b_q, acc, largest, total, branch, last, p_anchor, p_key, p_value, k_key, v_key, begin, end, length, scale2,
    S: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Own keys of several queries a branch: tiles along the block diagonal."""
    for first in range(begin, end, KEYS):
        key, key_branch, slot, m_key = own_keys(p_anchor, first, end, length, S, N, KEYS)
        b_key = load_tile(p_key, key.to(tl.int64) * k_key, m_key, D, WIDTH, UPCAST)
        score = tl.dot(b_q, tl.trans(b_key), input_precision="ieee") * scale2
        seen = (key_branch[None, :] == branch[:, None]) & (slot[None, :] <= last[:, None])
        score = tl.where(seen, score, float("-inf"))
        b_value = load_tile(p_value, key.to(tl.int64) * v_key, m_key, D, WIDTH, UPCAST)
        acc, largest, total = _absorb(acc, largest, total, score, b_value)
    return acc, largest, total


@triton.jit
def _own_rows(
    b_q, acc, largest, total, has, branch, p_key, p_value, k_key, v_key, length, scale2,
    N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Own keys of one query a branch: slot after slot, each row with its own key, every key read once."""
    query = b_q.to(tl.float32)
    for slot in range(length):
        row = branch.to(tl.int64) * N + slot
        b_key = load_tile(p_key, row * k_key, has, D, WIDTH, UPCAST)
        b_value = load_tile(p_value, row * v_key, has, D, WIDTH, UPCAST)
        score = tl.sum(query * b_key.to(tl.float32), 1) * scale2
        grown = tl.maximum(largest, score)
        weight = tl.exp2(score - grown)
        shrink = tl.exp2(largest - grown)
        acc = acc * shrink[:, None] + weight[:, None] * b_value.to(tl.float32)
        largest, total = grown, total * shrink + weight
    return acc, largest, total


@triton.jit
def attend_kernel(
    p_q, p_key, p_value, p_own_key, p_own_value, p_anchor, p_start, p_length, p_out, p_lse, p_part, p_part_lse,
    q_b, q_h, q_r, k_b, k_h, k_key, v_b, v_h, v_key, ok_b, ok_h, ok_key, ov_b, ov_h, ov_key, o_b, o_h, o_r,
    pt_b, pt_k, pt_g, pt_r, H, A, L, length, scale2,
    G: tl.constexpr, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, OWN_KEYS: tl.constexpr,
    PREFIX: tl.constexpr, ON_DEVICE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out and natural log-sum-exp (+inf at padding anchors: a backward weight of 0) of ROWS rows of one query head.

    PREFIX 1: attends the prefix itself. 0: starts from p_part, p_part_lse [B, H, R], which stock kernels made of it.
    """
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    num_rows = A * (S * M)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late anchors see the most keys: they go first
    row = tile * ROWS + tl.arange(0, ROWS)
    branch = row // M
    p_anchor += batch * A
    has, anchor, start = row_ranges(p_anchor, p_start + batch * A, row, num_rows, S * M)
    b_q = load_tile(p_q + batch * q_b + head * q_h, row.to(tl.int64) * q_r, has, D, WIDTH, UPCAST)
    length = own_length_of(p_length, length, ON_DEVICE)
    if PREFIX:
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        begin, full_begin, full_end, end = prefix_bounds(has, anchor, start, KEYS)
        p_k, p_v = p_key + batch * k_b + (head // G) * k_h, p_value + batch * v_b + (head // G) * v_h
        acc, largest, total = _prefix(
            b_q, acc, largest, total, anchor, start, p_k, p_v, k_key, v_key, begin, full_begin, L, scale2,
            D, WIDTH, KEYS, True, UPCAST,
        )  # fmt: skip
        acc, largest, total = _prefix(
            b_q, acc, largest, total, anchor, start, p_k, p_v, k_key, v_key, full_begin, full_end, L, scale2,
            D, WIDTH, KEYS, False, UPCAST,
        )  # fmt: skip
        acc, largest, total = _prefix(
            b_q, acc, largest, total, anchor, start, p_k, p_v, k_key, v_key, full_end, end, L, scale2,
            D, WIDTH, KEYS, True, UPCAST,
        )  # fmt: skip
    else:
        p_part += batch * pt_b + (head // G) * pt_k + (head % G) * pt_g
        acc = load_tile(p_part, row.to(tl.int64) * pt_r, has, D, WIDTH, True)
        part_lse = tl.load(p_part_lse + tl.program_id(1).to(tl.int64) * num_rows + row, mask=has, other=0.0)
        largest = part_lse.to(tl.float32) * LOG2E
        total = tl.full([ROWS], 1.0, tl.float32)
    p_k, p_v = p_own_key + batch * ok_b + (head // G) * ok_h, p_own_value + batch * ov_b + (head // G) * ov_h
    if M == 1:
        acc, largest, total = _own_rows(
            b_q, acc, largest, total, has, branch, p_k, p_v, ok_key, ov_key, length, scale2, N, D, WIDTH, UPCAST
        )
    else:
        begin = tile * ROWS // M * N
        end = tl.minimum((tile * ROWS + ROWS - 1) // M + 1, A * S) * N
        acc, largest, total = _own_blocks(
            b_q, acc, largest, total, branch, length - M + row % M, p_anchor, p_k, p_v, ok_key, ov_key, begin, end,
            length, scale2, S, N, D, WIDTH, OWN_KEYS, UPCAST,
        )  # fmt: skip
    safe = tl.where(has, total, 1.0)
    out = tl.where(has[:, None], acc / safe[:, None], 0.0)
    store_tile(p_out + batch * o_b + head * o_h, row.to(tl.int64) * o_r, row < num_rows, out, D, WIDTH)
    lse = tl.where(has, (largest + tl.log2(safe)) * LN2, float("inf"))
    tl.store(p_lse + tl.program_id(1).to(tl.int64) * num_rows + row, lse, mask=row < num_rows)
