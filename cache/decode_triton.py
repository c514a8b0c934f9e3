"""Kernels of a decode step: append one token (decode_append.py), stream a weight once (decode_linear.py).

Imported only when a CUDA tensor meets them, or by tests under the interpreter.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportIndexIssue=false
# (launches of Triton kernels: the checker sees the Python function)

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _write_last(
    p_key, p_value, p_key_store, p_value_store, p_lengths,
    s_kb, s_kh, s_vb, s_vh, s_ksb, s_ksh, s_ksc, s_vsb, s_vsh, s_vsc,
    capacity, kv_heads, ONE_LENGTH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program copies one row's head: D channels of key and of value."""
    i_b = (tl.program_id(0) // kv_heads).to(tl.int64)
    i_h = (tl.program_id(0) % kv_heads).to(tl.int64)
    slot = tl.load(p_lengths + (0 if ONE_LENGTH else i_b)).to(tl.int64) - 1
    o_d = tl.arange(0, BLOCK)
    m_in = o_d < D
    m_out = m_in & (slot >= 0) & (slot < capacity)
    b_key = tl.load(p_key + i_b * s_kb + i_h * s_kh + o_d, mask=m_in)
    b_value = tl.load(p_value + i_b * s_vb + i_h * s_vh + o_d, mask=m_in)
    tl.store(p_key_store + i_b * s_ksb + i_h * s_ksh + slot * s_ksc + o_d, b_key, mask=m_out)
    tl.store(p_value_store + i_b * s_vsb + i_h * s_vsh + slot * s_vsc + o_d, b_value, mask=m_out)


def write_last(key: Tensor, value: Tensor, key_store: Tensor, value_store: Tensor, lengths: Tensor) -> None:
    """See decode_append.write_last."""
    rows, heads, _, width = key.shape
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    _write_last[(rows * heads,)](
        key, value, key_store, value_store, lengths,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        *key_store.stride()[:3], *value_store.stride()[:3],
        key_store.shape[2], heads, ONE_LENGTH=lengths.numel() == 1, D=width,
        BLOCK=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip


def _configs(shapes: list[tuple[int, int, int, int]]) -> list[triton.Config]:
    return [
        triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for n, k, warps, stages in shapes
    ]


@triton.jit
def _stream_one(p_x, p_weight, p_bias, p_out, num_out, width, s_w, BIAS: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """One row: out[n] = sum_k x[k] w[n,k]. Products stay apart per thread until the end: no reduction in the loop."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < num_out
    p_row = p_weight + o_n.to(tl.int64)[:, None] * s_w
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for k in range(0, width, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < width
        b_w = tl.load(p_row + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0, eviction_policy="evict_first")
        b_x = tl.load(p_x + o_k, mask=m_k, other=0.0, eviction_policy="evict_last")
        acc += b_w.to(tl.float32) * b_x.to(tl.float32)[None, :]
    out = tl.sum(acc, axis=1)
    if BIAS:
        out += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_out + o_n, out.to(p_out.dtype.element_ty), mask=m_n)


@triton.jit
def _stream_rows(p_x, p_weight, p_bias, p_out, num_rows, num_out, width, s_x, s_w, BIAS: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Up to ROWS rows: out[m,n] = sum_k x[m,k] w[n,k], the weight's tile read once for all of them."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.arange(0, ROWS)
    m_n, m_m = o_n < num_out, o_m < num_rows
    p_row = p_weight + o_n.to(tl.int64)[:, None] * s_w
    acc = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    for k in range(0, width, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < width
        b_x = tl.load(p_x + o_m[:, None] * s_x + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(p_row + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        acc = tl.dot(b_x, tl.trans(b_w), acc)
    if BIAS:
        acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_target = p_out + o_m[:, None] * num_out + o_n[None, :]
    tl.store(p_target, acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


_ONE = [(1, 2048, 4, 1), (2, 1024, 4, 1), (2, 2048, 4, 1), (4, 1024, 4, 1), (4, 2048, 8, 1), (8, 1024, 4, 1), (8, 1024, 8, 1),
        (16, 512, 4, 1)]  # fmt: skip
_MANY = [(16, 256, 4, 4), (16, 512, 4, 3), (32, 128, 4, 5), (32, 256, 4, 3), (32, 256, 4, 4), (64, 128, 4, 4),
         (64, 128, 4, 5), (128, 64, 4, 5)]  # fmt: skip


@cache
def _measured(one: bool) -> Any:
    """The kernel behind the autotuner, made on first use: a machine without a GPU has nothing to measure with."""
    kernel, shapes = (_stream_one, _ONE) if one else (_stream_rows, _MANY)
    return triton.autotune(_configs(shapes), key=["num_out", "width"])(kernel)


def stream_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, measure: bool = True) -> Tensor:
    """x [M,K] (M <= 16) times weight [N,K] -> [M,N]; `measure` tries the tile shapes on the first call of a shape."""
    num_rows, width = x.shape
    num_out = weight.shape[0]
    out = x.new_empty(num_rows, num_out)
    given = {"BIAS": bias is not None}
    tiles = {} if measure else {"BLOCK_N": 4 if num_rows == 1 else 32, "BLOCK_K": 128}
    handed = out if bias is None else bias

    def grid(meta: dict) -> tuple[int]:
        return (triton.cdiv(num_out, meta["BLOCK_N"]),)

    if num_rows == 1:
        kernel = _measured(True) if measure else _stream_one
        kernel[grid](x, weight, handed, out, num_out, width, weight.stride(0), **given, **tiles)
    else:
        kernel = _measured(False) if measure else _stream_rows
        kernel[grid](
            x, weight, handed, out, num_rows, num_out, width, x.stride(0), weight.stride(0), ROWS=16, **given, **tiles
        )
    return out
