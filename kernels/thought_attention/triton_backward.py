"""Triton, backward. With p = exp(s - lse) of the merged log-sum-exp and delta = sum_d dO O of the merged output, both parts
obey the usual equations, each with its own keys:

    dV = p^T dO        dP = dO V^T        dS = p (dP - delta)        dQ = scale dS K        dK = scale dS^T Q

    query_gradient_kernel    a tile of rows of one query head, over prefix and own keys; leaves delta for the other two
    own_gradient_kernel      a tile of own keys, over the queries of its branches and the heads of the group: no atomics
    prefix_gradient_kernel   a tile of prefix keys, over a share of all the rows that see it; shares are summed by the host

Nothing is added atomically: the same inputs give the same bits. Host side: triton_launch.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import LOG2E, load_tile, own_keys, own_length_of, prefix_bounds, row_ranges, store_tile


@triton.jit
def _score_gradient(
    acc, b_q, b_grad, lse2, delta, seen, p_key, p_value, o_key, o_value, m_key, scale2,
    D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + dS K of one tile of keys (without the scale)."""
    b_key = load_tile(p_key, o_key, m_key, D, WIDTH, UPCAST)
    score = tl.dot(b_q, tl.trans(b_key), input_precision="ieee") * scale2 - lse2[:, None]
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    b_value = load_tile(p_value, o_value, m_key, D, WIDTH, UPCAST)
    weight_gradient = tl.dot(b_grad, tl.trans(b_value), input_precision="ieee")
    gradient = tl.exp2(score) * (weight_gradient - delta[:, None])
    return acc + tl.dot(gradient.to(b_key.dtype), b_key, input_precision="ieee")


@triton.jit
def _prefix(
    acc, b_q, b_grad, lse2, delta, anchor, start, p_key, p_value, k_key, v_key, begin, end, L, scale2,
    D: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        seen = (key[None, :] <= anchor[:, None]) & (key[None, :] >= start[:, None])
        acc = _score_gradient(
            acc, b_q, b_grad, lse2, delta, seen, p_key, p_value, key.to(tl.int64) * k_key, key.to(tl.int64) * v_key,
            key < L, scale2, D, WIDTH, MASKED, UPCAST,
        )  # fmt: skip
    return acc


@triton.jit
def query_gradient_kernel(
    p_q, p_key, p_value, p_own_key, p_own_value, p_anchor, p_start, p_length, p_out, p_grad, p_lse, p_delta, p_dq,
    p_part, q_b, q_h, q_r, k_b, k_h, k_key, v_b, v_h, v_key, ok_b, ok_h, ok_key, ov_b, ov_h, ov_key, o_b, o_h, o_r,
    g_b, g_h, g_r, dq_b, dq_h, dq_r, pt_b, pt_k, pt_g, pt_r, H, A, L, length, scale, scale2,
    G: tl.constexpr, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, OWN_KEYS: tl.constexpr,
    PREFIX: tl.constexpr, ON_DEVICE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq and delta of ROWS rows. PREFIX 1: of both parts; 0: the own part is added to p_part, the stock kernels' dq."""
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    num_rows = A * (S * M)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    o_line = tl.program_id(1).to(tl.int64) * num_rows
    p_anchor += batch * A
    has, anchor, start = row_ranges(p_anchor, p_start + batch * A, row, num_rows, S * M)
    b_q = load_tile(p_q + batch * q_b + head * q_h, row.to(tl.int64) * q_r, has, D, WIDTH, UPCAST)
    b_grad = load_tile(p_grad + batch * g_b + head * g_h, row.to(tl.int64) * g_r, has, D, WIDTH, UPCAST)
    b_out = load_tile(p_out + batch * o_b + head * o_h, row.to(tl.int64) * o_r, has, D, WIDTH, UPCAST)
    delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(p_delta + o_line + row, delta, mask=row < num_rows)
    lse2 = tl.load(p_lse + o_line + row, mask=has, other=float("inf")) * LOG2E
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    if PREFIX:
        begin, full_begin, full_end, end = prefix_bounds(has, anchor, start, KEYS)
        p_k, p_v = p_key + batch * k_b + (head // G) * k_h, p_value + batch * v_b + (head // G) * v_h
        acc = _prefix(
            acc, b_q, b_grad, lse2, delta, anchor, start, p_k, p_v, k_key, v_key, begin, full_begin, L, scale2,
            D, WIDTH, KEYS, True, UPCAST,
        )  # fmt: skip
        acc = _prefix(
            acc, b_q, b_grad, lse2, delta, anchor, start, p_k, p_v, k_key, v_key, full_begin, full_end, L, scale2,
            D, WIDTH, KEYS, False, UPCAST,
        )  # fmt: skip
        acc = _prefix(
            acc, b_q, b_grad, lse2, delta, anchor, start, p_k, p_v, k_key, v_key, full_end, end, L, scale2,
            D, WIDTH, KEYS, True, UPCAST,
        )  # fmt: skip
    length = own_length_of(p_length, length, ON_DEVICE)
    branch = row // M
    p_k, p_v = p_own_key + batch * ok_b + (head // G) * ok_h, p_own_value + batch * ov_b + (head // G) * ov_h
    begin = tile * ROWS // M * N
    end = tl.minimum((tile * ROWS + ROWS - 1) // M + 1, A * S) * N
    for first in range(begin, end, OWN_KEYS):
        key, key_branch, slot, m_key = own_keys(p_anchor, first, end, length, S, N, OWN_KEYS)
        seen = (key_branch[None, :] == branch[:, None]) & (slot[None, :] <= (length - M + row % M)[:, None])
        acc = _score_gradient(
            acc, b_q, b_grad, lse2, delta, seen, p_k, p_v, key.to(tl.int64) * ok_key, key.to(tl.int64) * ov_key,
            m_key, scale2, D, WIDTH, True, UPCAST,
        )  # fmt: skip
    acc = acc * scale
    if not PREFIX:
        p_part += batch * pt_b + (head // G) * pt_k + (head % G) * pt_g
        acc += load_tile(p_part, row.to(tl.int64) * pt_r, has, D, WIDTH, True)
    acc = tl.where(has[:, None], acc, 0.0)
    store_tile(p_dq + batch * dq_b + head * dq_h, row.to(tl.int64) * dq_r, row < num_rows, acc, D, WIDTH)


@triton.jit
def _key_gradients(
    dk, dv, b_key, b_value, p_q, p_grad, p_lse, p_delta, row, has, seen, q_r, g_r, scale2,
    D: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(dk, dv) of a tile of keys with what one tile of rows gives them; seen [keys, rows], dk without the scale."""
    b_q = load_tile(p_q, row.to(tl.int64) * q_r, has, D, WIDTH, UPCAST)
    b_grad = load_tile(p_grad, row.to(tl.int64) * g_r, has, D, WIDTH, UPCAST)
    lse2 = tl.load(p_lse + row, mask=has, other=float("inf")) * LOG2E
    delta = tl.load(p_delta + row, mask=has, other=0.0)
    score = tl.dot(b_key, tl.trans(b_q), input_precision="ieee") * scale2 - lse2[None, :]
    weight = tl.exp2(tl.where(seen, score, float("-inf")))
    dv += tl.dot(weight.to(b_grad.dtype), b_grad, input_precision="ieee")
    weight_gradient = tl.dot(b_value, tl.trans(b_grad), input_precision="ieee")
    gradient = weight * (weight_gradient - delta[None, :])
    dk += tl.dot(gradient.to(b_q.dtype), b_q, input_precision="ieee")
    return dk, dv


@triton.jit
def own_gradient_kernel(
    p_q, p_own_key, p_own_value, p_anchor, p_start, p_length, p_grad, p_lse, p_delta, p_dk, p_dv,
    q_b, q_h, q_r, ok_b, ok_h, ok_key, ov_b, ov_h, ov_key, g_b, g_h, g_r, dk_b, dk_h, dk_key, K, A, length,
    scale, scale2,
    G: tl.constexpr, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, ON_DEVICE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk, dv (one layout for both) of KEYS own keys of one KV head."""
    batch, kv_head = (tl.program_id(1) // K).to(tl.int64), (tl.program_id(1) % K).to(tl.int64)
    num_rows, num_keys = A * (S * M), A * (S * N)
    p_anchor += batch * A
    p_start += batch * A
    length = own_length_of(p_length, length, ON_DEVICE)
    first = tl.program_id(0) * KEYS
    key, key_branch, slot, m_key = own_keys(p_anchor, first, num_keys, length, S, N, KEYS)
    o_key, o_value = key.to(tl.int64) * ok_key, key.to(tl.int64) * ov_key
    b_key = load_tile(p_own_key + batch * ok_b + kv_head * ok_h, o_key, m_key, D, WIDTH, UPCAST)
    b_value = load_tile(p_own_value + batch * ov_b + kv_head * ov_h, o_value, m_key, D, WIDTH, UPCAST)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    begin = first // N * M
    end = tl.minimum((first + KEYS - 1) // N + 1, A * S) * M
    for member in range(G):
        head = kv_head * G + member
        o_line = (batch * K * G + head) * num_rows
        for first_row in range(begin, end, ROWS):
            row = first_row + tl.arange(0, ROWS)
            has, _anchor, _start = row_ranges(p_anchor, p_start, row, end, S * M)
            seen = (key_branch[:, None] == (row // M)[None, :]) & (slot[:, None] <= (length - M + row % M)[None, :])
            dk, dv = _key_gradients(
                dk, dv, b_key, b_value, p_q + batch * q_b + head * q_h, p_grad + batch * g_b + head * g_h,
                p_lse + o_line, p_delta + o_line, row, has, seen & has[None, :], q_r, g_r, scale2, D, WIDTH, UPCAST,
            )  # fmt: skip
    o_grad = batch * dk_b + kv_head * dk_h
    m_store = key < num_keys
    store_tile(p_dk + o_grad, key.to(tl.int64) * dk_key, m_store, dk * scale, D, WIDTH)
    store_tile(p_dv + o_grad, key.to(tl.int64) * dk_key, m_store, dv, D, WIDTH)


@triton.jit
def _anchors_that_see(p_anchor, p_start, A, begin, end, CHUNK: tl.constexpr):
    """[first, last + 1) of the anchors whose range meets keys begin .. end - 1; others may lie between them."""
    first, last = begin * 0 + A, begin * 0 - 1  # tensors, also where A is 1
    for o in range(0, A, CHUNK):
        i = o + tl.arange(0, CHUNK)
        anchor = tl.load(p_anchor + i, mask=i < A, other=-1)
        start = tl.load(p_start + i, mask=i < A, other=0)
        meets = (anchor >= begin) & (start < end)
        first = tl.minimum(first, tl.min(tl.where(meets, i, A), 0))
        last = tl.maximum(last, tl.max(tl.where(meets, i, -1), 0))
    return first, last + 1


@triton.jit
def prefix_gradient_kernel(
    p_q, p_key, p_value, p_anchor, p_start, p_grad, p_lse, p_delta, p_dk, p_dv,
    q_b, q_h, q_r, k_b, k_h, k_key, v_b, v_h, v_key, g_b, g_h, g_r, K, A, L, scale, scale2,
    G: tl.constexpr, S: tl.constexpr, M: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk, dv of KEYS prefix keys of one KV head from share program_id(1) of the rows; fp32 [shares, B, K, L, D]."""
    batch, kv_head = (tl.program_id(2) // K).to(tl.int64), (tl.program_id(2) % K).to(tl.int64)
    share, shares = tl.program_id(1), tl.num_programs(1)
    num_rows = A * (S * M)
    p_anchor += batch * A
    p_start += batch * A
    first = tl.program_id(0) * KEYS  # the first keys are seen by the most rows: they go first
    key = first + tl.arange(0, KEYS)
    m_key = key < L
    b_key = load_tile(p_key + batch * k_b + kv_head * k_h, key.to(tl.int64) * k_key, m_key, D, WIDTH, UPCAST)
    b_value = load_tile(p_value + batch * v_b + kv_head * v_h, key.to(tl.int64) * v_key, m_key, D, WIDTH, UPCAST)
    dk = tl.zeros([KEYS, WIDTH], tl.float32)
    dv = tl.zeros([KEYS, WIDTH], tl.float32)
    first_anchor, end_anchor = _anchors_that_see(p_anchor, p_start, A, first, first + KEYS, CHUNK)
    begin, end = first_anchor * (S * M), end_anchor * (S * M)
    tiles = tl.maximum(end - begin + ROWS - 1, 0) // ROWS
    # work item = (head of the group, tile of rows); this share's are [from, to)
    items = tiles * G
    i_from = (items.to(tl.int64) * share // shares).to(tl.int32)
    i_to = (items.to(tl.int64) * (share + 1) // shares).to(tl.int32)
    for item in range(i_from, i_to):
        head = kv_head * G + item // tiles
        o_line = (batch * K * G + head) * num_rows
        row = begin + (item % tiles) * ROWS + tl.arange(0, ROWS)
        has, anchor, start = row_ranges(p_anchor, p_start, row, end, S * M)
        seen = (key[:, None] <= anchor[None, :]) & (key[:, None] >= start[None, :])
        dk, dv = _key_gradients(
            dk, dv, b_key, b_value, p_q + batch * q_b + head * q_h, p_grad + batch * g_b + head * g_h,
            p_lse + o_line, p_delta + o_line, row, has, seen, q_r, g_r, scale2, D, WIDTH, UPCAST,
        )  # fmt: skip
    o_grad = ((share.to(tl.int64) * (tl.num_programs(2) // K) + batch) * K + kv_head) * L * D
    store_tile(p_dk + o_grad, key.to(tl.int64) * D, m_key, dk * scale, D, WIDTH)
    store_tile(p_dv + o_grad, key.to(tl.int64) * D, m_key, dv, D, WIDTH)
