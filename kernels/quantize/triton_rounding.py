"""Triton: one block of keys rounded with the queries in mind (rounding.py is the specification), then packed.

Channel after channel, in the order given: a code for every token of the block, then its error times a row of the factor
out of the channels still to come. The block stays in registers; 2 D^2 operations a token. Called by triton_kernels._pack.
"""

# pyright: reportCallIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded_codes(x, minimum, scale, p_order, p_step, BITS: tl.constexpr, D: tl.constexpr):
    """Codes 0 .. 2^BITS-1 as int32 [T, D] of keys x [T, D] fp32 under minimum, scale [D]."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    i_channel = tl.arange(0, D)
    w = x
    for j in range(D):
        here = i_channel == tl.load(p_order + j)
        z = tl.sum(tl.where(here, minimum, 0.0), 0)
        s = tl.sum(tl.where(here, scale, 0.0), 0)
        column = tl.sum(tl.where(here[None, :], w, 0.0), 1)
        u = tl.floor(tl.minimum(tl.maximum((column - z) / s + 0.5, 0.0), LEVELS * 1.0))
        u = tl.where(u == u, u, 0.0)
        error = column - (z + s * u)
        step = tl.load(p_step + j * D + i_channel)  # 0 for the channels that hold codes already
        w = tl.where(here[None, :], u[:, None], w - error[:, None] * step[None, :])
    return w.to(tl.int32)


@triton.jit
def packed_planes(codes, BITS: tl.constexpr, D: tl.constexpr):
    """int32 codes [T, D] -> planar bytes [T, D * BITS // 8] as int32 (layout.py)."""
    PLANES: tl.constexpr = 8 // BITS
    planes = tl.reshape(codes, (codes.shape[0], PLANES, D // PLANES))
    shift = tl.arange(0, PLANES) * BITS
    return tl.sum(planes << shift[None, :, None], 1)  # the planes' bits are disjoint
