"""Triton: the choice of the salient tokens, without sorting.

    cutoff     the score of the k-th best token, by search over the bits of the scores, two a turn
    taken_at   which tokens of a chunk lie above it, or at it while there is room
    _select    one program per (row, KV head) writes the choice; kernels/quantize/triton_place.py goes on from it instead

A program reads all tokens of its row in chunks; `lead` shifts the chunks, so that they can begin at a byte of a table of
bits. reference.py is the specification; test: `pytest tests/kernels/test_saliency_kernels.py`.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# (a type checker can not follow Triton's language)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # tokens that a program handles at a time, whatever there are: one compiled kernel for all prompts


@triton.jit
def _order_keys(p_saliency, p_valid, p_forced, i_token, n, FORCED: tl.constexpr):
    """int64 keys in the order of reference.order_keys; what lies outside 0 .. n - 1 is below everything."""
    m_token = (i_token >= 0) & (i_token < n)
    x = tl.load(p_saliency + i_token, mask=m_token, other=0.0).to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)  # -0 and 0 are one score
    bits = x.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    keys = tl.where(x == x, keys, -2147483647)
    if FORCED:
        forced = tl.load(p_forced + i_token, mask=m_token, other=0) != 0
        keys = tl.where(forced, 2147483647, keys)
    valid = tl.load(p_valid + i_token, mask=m_token, other=0) != 0
    return tl.where(m_token, tl.where(valid, keys, -2147483648), -2147483649), valid


@triton.jit
def cutoff(p_saliency, p_valid, p_forced, millionths, n, lead, FORCED: tl.constexpr, CHUNK: tl.constexpr):
    """(threshold, left): the ceil(ratio * valid) largest keys are those above it and the first `left` at it, int64.

    Pointers at the row's token 0. The first chunk stays in registers; counts are summed once a turn.
    """
    i_chunk = tl.arange(0, CHUNK) - lead
    keys, valid = _order_keys(p_saliency, p_valid, p_forced, i_chunk, n, FORCED)
    counted = valid.to(tl.int32)
    for first in range(CHUNK, n + lead, CHUNK):
        _k, more_valid = _order_keys(p_saliency, p_valid, p_forced, first + i_chunk, n, FORCED)
        counted += more_valid.to(tl.int32)
    wanted = (tl.sum(counted, 0).to(tl.int64) * millionths + 999999) // 1000000
    # the largest threshold that at least `wanted` keys reach
    threshold = wanted * 0 - 2147483648
    step = wanted * 0 + 1073741824
    for _turn in range(16):
        reach1 = (keys >= threshold + step).to(tl.int32)
        reach2 = (keys >= threshold + step * 2).to(tl.int32)
        reach3 = (keys >= threshold + step * 3).to(tl.int32)
        for first in range(CHUNK, n + lead, CHUNK):
            more, _v = _order_keys(p_saliency, p_valid, p_forced, first + i_chunk, n, FORCED)
            reach1 += (more >= threshold + step).to(tl.int32)
            reach2 += (more >= threshold + step * 2).to(tl.int32)
            reach3 += (more >= threshold + step * 3).to(tl.int32)
        digit = (tl.sum(reach1, 0) >= wanted).to(tl.int64)
        digit += (tl.sum(reach2, 0) >= wanted).to(tl.int64)
        digit += (tl.sum(reach3, 0) >= wanted).to(tl.int64)
        threshold += digit * step
        step = step // 4
    above = (keys > threshold).to(tl.int32)
    for first in range(CHUNK, n + lead, CHUNK):
        more, _v = _order_keys(p_saliency, p_valid, p_forced, first + i_chunk, n, FORCED)
        above += (more > threshold).to(tl.int32)
    return threshold, wanted - tl.sum(above, 0)


@triton.jit
def taken_at(p_saliency, p_valid, p_forced, i_token, threshold, left, n, FORCED: tl.constexpr):
    """(which of these tokens are taken, how many at the threshold are left for those behind them)."""
    keys, _v = _order_keys(p_saliency, p_valid, p_forced, i_token, n, FORCED)
    tied = (keys == threshold).to(tl.int32)
    taken = (keys > threshold) | ((tied != 0) & (tl.cumsum(tied, 0) <= left))
    return taken, left - tl.sum(tied, 0)


@triton.jit(do_not_specialize=["n"])
def _select(
    p_saliency, p_valid, p_forced, p_out, millionths, n, heads, FORCED: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """out = 1 for the ceil(ratio * valid) largest keys, ties to the lower position."""
    program = tl.program_id(0).to(tl.int64)
    row = program // heads
    p_saliency += program * n
    p_valid += row * n
    p_forced += row * n
    threshold, left = cutoff(p_saliency, p_valid, p_forced, millionths, n, 0, FORCED, CHUNK)
    for first in range(0, n, CHUNK):
        i_token = first + tl.arange(0, CHUNK)
        taken, left = taken_at(p_saliency, p_valid, p_forced, i_token, threshold, left, n, FORCED)
        tl.store(p_out + program * n + i_token, taken.to(tl.uint8), mask=i_token < n)


def select_salient(saliency: Tensor, valid: Tensor, ratio: float, forced: Tensor | None) -> Tensor:
    """See `quietgoose.kernels.saliency.select_salient`; arguments are checked there."""
    batch, heads, n = saliency.shape
    out = torch.empty(batch, heads, n, dtype=torch.uint8, device=saliency.device)
    if out.numel():
        mask = valid.contiguous().view(torch.uint8)
        _select[(batch * heads,)](
            saliency.contiguous(), mask, mask if forced is None else forced.contiguous().view(torch.uint8), out,
            round(ratio * 1_000_000), n, heads, FORCED=forced is not None, CHUNK=CHUNK, num_warps=8,
        )  # fmt: skip
    return out.view(torch.bool)
