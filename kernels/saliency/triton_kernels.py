"""Triton: probe attention summed over columns without ever storing a score.

    _probe_lse      pass 1, one program per (row, KV head, tile of probe rows): log-sum-exp of each row over its keys
    _column_sums    pass 2, one program per (row, KV head, tile of tokens): sum over rows of exp(score - lse), divided

Probe rows of a group are one matrix, probe-major (row r is probe r // G of group member r % G), so that a tile holds
neighbouring positions and both passes skip what lies beyond the causal edge. Nothing is added atomically. Tiles of
tokens begin at a row's first valid one: a row has the same scores, bit for bit, alone and left-padded in a batch.
reference.py is the specification; test: `pytest tests/kernels/test_saliency_kernels.py`.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# (a type checker can not follow Triton's language)

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .probes import SaliencyMode

_LOG2_E = math.log2(math.e)
_BY_NOTHING, _BY_PROBES, _BY_GIVEN = 0, 1, 2
# differ from prompt to prompt: one compiled kernel for all. Keys and queries are read along channels, where nothing of
# the width of a load follows from them.
SIZES = ["n", "num_probes", "num_tiles"]


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one pass. Fixed by dtype and head size only: the order of a sum must not depend on the batch."""

    rows: int
    columns: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype, head_dim: int) -> tuple[Tiles, Tiles]:
    """Tiles of the two passes."""
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)
    if head_dim > 128:
        return Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)
    return Tiles(128, 128, 8, 2), Tiles(64, 128, 8, 3)


@triton.jit
def _probe_rows(
    p_query, p_probes, i_row, num_rows, q_head, q_probe, GROUP: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """(query tile, position of each row, -1 where there is none) of a tile of rows; pointers at (row, KV head).

    UPCAST is for the interpreter, which multiplies bf16 as if they were integers.
    """
    probe = i_row // GROUP
    m_row = i_row < num_rows
    position = tl.load(p_probes + probe, mask=m_row, other=-1).to(tl.int32)
    o_row = (i_row % GROUP).to(tl.int64) * q_head + probe.to(tl.int64) * q_probe
    b_query = tl.load(
        p_query + o_row[:, None] + tl.arange(0, D)[None, :], mask=m_row[:, None], other=0.0
    )  # a row without a probe may hold anything: its position hides it
    if UPCAST:
        b_query = b_query.to(tl.float32)
    return b_query, position


@triton.jit(do_not_specialize=SIZES)
def _probe_lse(
    p_query, p_key, p_probes, p_valid, p_first, p_length, p_lse,
    scale, n, num_probes, heads, num_tiles,
    q_row, q_head, q_probe, k_row, k_head, k_token,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp of each probe row over the valid keys up to it; +inf for a row without any.

    `scale` includes log2(e). WEIGHTED subtracts log2(length): the row then weighs as many times its length.
    """
    tile = tl.program_id(0) % num_tiles
    program = (tl.program_id(0) // num_tiles).to(tl.int64)
    row = program // heads
    head = program % heads
    num_rows = num_probes * GROUP
    i_row = tile * ROWS + tl.arange(0, ROWS)
    b_query, position = _probe_rows(
        p_query + row * q_row + head * GROUP * q_head, p_probes + row * num_probes, i_row, num_rows,
        q_head, q_probe, GROUP, D, UPCAST,
    )  # fmt: skip
    largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    p_keys = p_key + row * k_row + head * k_head
    for start in range(tl.load(p_first + row).to(tl.int32), tl.max(position, 0) + 1, COLUMNS):
        i_token = start + tl.arange(0, COLUMNS)
        m_token = i_token < n
        o_token = i_token.to(tl.int64) * k_token
        b_key = tl.load(p_keys + o_token[:, None] + tl.arange(0, D)[None, :], mask=m_token[:, None], other=0.0)
        valid = tl.load(p_valid + row * n + i_token, mask=m_token, other=0) != 0
        if UPCAST:
            b_key = b_key.to(tl.float32)
        score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale
        score = tl.where((i_token[None, :] <= position[:, None]) & valid[None, :], score, float("-inf"))
        grown = tl.maximum(largest, tl.max(score, 1))
        shift = tl.where(grown == float("-inf"), 0.0, grown)
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(score - shift[:, None]), 1)
        largest = grown
    some = total > 0
    lse = tl.where(some, largest + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    if WEIGHTED:
        length = tl.load(p_length + row * n + position, mask=some & (position >= 0), other=1)
        lse -= tl.log2(length.to(tl.float32))
    tl.store(p_lse + program * num_rows + i_row, lse, mask=i_row < num_rows)


@triton.jit(do_not_specialize=SIZES)
def _column_sums(
    p_query, p_key, p_probes, p_valid, p_first, p_divisor, p_lse, p_out,
    scale, n, num_probes, heads, num_tiles,
    q_row, q_head, q_probe, k_row, k_head, k_token,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIVIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """out[token] = sum over probe rows at or after it of exp2(score - lse), divided as DIVIDE says; -inf if padding."""
    tile = tl.program_id(0) % num_tiles
    program = (tl.program_id(0) // num_tiles).to(tl.int64)
    row = program // heads
    head = program % heads
    num_rows = num_probes * GROUP
    first = tl.load(p_first + row).to(tl.int32)
    i_plain = tile * COLUMNS + tl.arange(0, COLUMNS)
    # padding before the first valid token belongs to no tile below
    tl.store(p_out + program * n + i_plain, tl.full((COLUMNS,), float("-inf"), tl.float32), mask=i_plain < first)
    start = first + tile * COLUMNS
    if start < n:
        i_token = first + i_plain
        m_token = i_token < n
        p_keys = p_key + row * k_row + head * k_head + i_token.to(tl.int64) * k_token
        b_key = tl.load(p_keys[:, None] + tl.arange(0, D)[None, :], mask=m_token[:, None], other=0.0)
        if UPCAST:
            b_key = b_key.to(tl.float32)
        # probes at or after each token, and the first probe at or after the tile
        count = tl.zeros((COLUMNS,), dtype=tl.int32)
        begin = num_probes + start * 0  # a tensor, also where num_probes is 1
        for i in range(0, num_probes, ROWS):
            i_probe = i + tl.arange(0, ROWS)
            position = tl.load(p_probes + row * num_probes + i_probe, mask=i_probe < num_probes, other=-1).to(tl.int32)
            count += tl.sum((position[None, :] >= i_token[:, None]).to(tl.int32), 1)
            begin = tl.minimum(begin, tl.min(tl.where(position >= start, i_probe, num_probes), 0))
        total = tl.zeros((COLUMNS,), dtype=tl.float32)
        for i in range(begin * GROUP // ROWS * ROWS, num_rows, ROWS):
            i_row = i + tl.arange(0, ROWS)
            b_query, position = _probe_rows(
                p_query + row * q_row + head * GROUP * q_head, p_probes + row * num_probes, i_row, num_rows,
                q_head, q_probe, GROUP, D, UPCAST,
            )  # fmt: skip
            lse = tl.load(p_lse + program * num_rows + i_row, mask=i_row < num_rows, other=float("inf"))
            score = tl.dot(b_key, tl.trans(b_query), input_precision="ieee") * scale
            score = tl.where(i_token[:, None] <= position[None, :], score - lse[None, :], float("-inf"))
            total += tl.sum(tl.exp2(score), 1)
        if DIVIDE == 1:
            total = total / tl.maximum(count, 1).to(tl.float32)
        if DIVIDE == 2:
            total = total / tl.load(p_divisor + row * n + i_token, mask=m_token, other=1.0)
        valid = tl.load(p_valid + row * n + i_token, mask=m_token, other=0) != 0
        tl.store(p_out + program * n + i_token, tl.where(valid, total, float("-inf")), mask=m_token)


def probe_saliency(
    query: Tensor,
    key: Tensor,
    probes: Tensor,
    valid: Tensor,
    *,
    scaling: float,
    mode: SaliencyMode,
    lse: Tensor | None,
    first: Tensor | None,
) -> Tensor:
    """See `quietgoose.kernels.saliency.probe_saliency`; arguments are checked there."""
    batch, heads, num, width = query.shape
    kv_heads, n = key.shape[1], key.shape[2]
    out = torch.empty(batch, kv_heads, n, dtype=torch.float32, device=key.device)
    if out.numel() == 0:
        return out
    query = query if query.stride(3) == 1 else query.contiguous()
    key = key if key.stride(3) == 1 else key.contiguous()
    probes, mask = probes.contiguous(), valid.contiguous().view(torch.uint8)
    first = mask.argmax(1) if first is None else first
    group = heads // kv_heads
    weighted = mode is SaliencyMode.ROW_LENGTH
    length = valid.cumsum(1) if weighted or mode is SaliencyMode.AUTHORS_CODE else first  # int64 [B, n] where needed
    common = (query, key, probes, mask, first)
    shape = (scaling * _LOG2_E, n, num, kv_heads)
    strides = (*query.stride()[:3], *key.stride()[:3])
    rows, columns = tiles(key.dtype, width)
    upcast = not key.is_cuda
    if lse is None:
        lse2 = torch.empty(batch, kv_heads, num * group, dtype=torch.float32, device=key.device)
        if num:
            num_tiles = -(-num * group // rows.rows)
            _probe_lse[(num_tiles * batch * kv_heads,)](
                *common, length, lse2, *shape, num_tiles, *strides, GROUP=group, D=width, ROWS=rows.rows, COLUMNS=rows.columns,
                WEIGHTED=weighted, UPCAST=upcast, num_warps=rows.warps, num_stages=rows.stages,
            )  # fmt: skip
    else:
        lse2 = _given_lse(lse, probes, length if weighted else None, kv_heads)
    divisor, divide = first, _BY_PROBES
    if mode is SaliencyMode.ACCUMULATED:
        divide = _BY_NOTHING
    elif mode is SaliencyMode.AUTHORS_CODE:
        divisor, divide = (length[:, -1:] - length + 1).float(), _BY_GIVEN
    num_tiles = -(-n // columns.columns)
    _column_sums[(num_tiles * batch * kv_heads,)](
        *common, divisor, lse2, out, *shape, num_tiles, *strides, GROUP=group, D=width, ROWS=columns.rows, COLUMNS=columns.columns,
        DIVIDE=divide, UPCAST=upcast, num_warps=columns.warps, num_stages=columns.stages,
    )  # fmt: skip
    return out


def _given_lse(lse: Tensor, probes: Tensor, length: Tensor | None, kv_heads: int) -> Tensor:
    """Natural [B, H, P] -> base 2, probe-major [B, Hk, P * G], +inf where there is no probe or no key."""
    lse2 = lse.float() * _LOG2_E
    lse2 = torch.where((probes >= 0).unsqueeze(1) & (lse2 > float("-inf")), lse2, float("inf"))
    if length is not None:
        lse2 = lse2 - length.gather(1, probes.clamp(min=0)).float().log2().unsqueeze(1)
    return lse2.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2).contiguous()
