"""Attention of thoughts: every branch sees its anchor's prefix, stored once, and its own tokens (README.md).

    out = softmax(scale * q [K_prefix; K_own]^T) [V_prefix; V_own]     over start..anchor and the branch's own positions

Equal to attention under the authors' dense diagonal mask (Quiet-STaR, section 4.2 and figure 3), without the mask, the
concatenation or a copy of the prefix: the two parts merge by their log-sum-exp. Callers: thoughts/.

    python benchmarks/thought_attention.py --out result.json
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..dispatch import UnsupportedShape
from . import fast, reference
from .layout import shape_of

__all__ = ["ThoughtImplementation", "UnsupportedShape", "thought_attention"]

ThoughtImplementation = Literal["auto", "reference", "stock", "triton"]


def thought_attention(
    q_BHASMD: Tensor,
    prefix_k_BKLD: Tensor,
    prefix_v_BKLD: Tensor,
    own_k_BKASND: Tensor,
    own_v_BKASND: Tensor,
    anchor_BA: Tensor,
    start_BA: Tensor,
    own_length: Tensor | int | None = None,
    scale: float | None = None,
    *,
    consecutive_from: int | None = None,
    implementation: ThoughtImplementation = "auto",
) -> Tensor:
    """Attention of A * S branches with M queries each, out [B, H, A, S, M, D] in q's dtype; differentiable.

    q              [B, H, A, S, M, D] after RoPE; H is a multiple of the KV heads K
    prefix_k, v    [B, K, L, D] keys (after RoPE) and values of the row itself, one dtype with q
    own_k, own_v   [B, K, A, S, N, D] of the branches' own positions; N = M in a gradient pass, N >= M room in a rollout
    anchor         int64 [B, A], position of the anchor = the last prefix key that its branches see; below 0 is a padding
                   anchor: its output is 0 and nothing gets a gradient from it. Any order; ascending is fastest
    start          int64 [B, A], first key of the anchor's document, 0 <= start <= anchor (ignored at padding anchors)
    own_length     filled own slots with this call's M queries as the last of them: query m sees slots
                   n <= own_length - M + m. An int, or an int tensor of one element on the device (a captured graph
                   replays with its new value). None: N. Slots beyond may hold anything, NaN too
    scale          of the scores, None is D ** -0.5
    consecutive_from  a promise that the anchors of every row are consecutive_from, consecutive_from + 1, ..., all with
                   start 0 (one document a row, every position an anchor): stock causal kernels apply. Some may be
                   padding (-1 in the place of their position)
    implementation reference: dense mask, plain softmax, any dtype. stock: the framework's flash kernels for the prefix.
                   triton: own kernels, fp16, bf16, fp32. auto: triton on a GPU, stock elsewhere; README.md, "Which one
                   runs", has the figures and the one case where stock kernels are faster

    Statistics and sums are fp32 (fp64 inputs: fp64). No synchronisation with the host; every shape depends on shapes
    only. Gradients of q, the prefix's k and v (summed over all branches) and own k and v, first order only; a slot of
    own k, v that no query sees gets gradient 0. On a GPU `out` lies in memory as [B, A, S, M, H, D].
    Raises UnsupportedShape for tensors that do not fit each other or that the implementation asked for does not take.
    """
    shape = shape_of(q_BHASMD, prefix_k_BKLD, prefix_v_BKLD, own_k_BKASND, own_v_BKASND, anchor_BA, start_BA)
    if consecutive_from is not None and not 0 <= consecutive_from <= shape.L - shape.A:
        raise UnsupportedShape(
            f"consecutive_from = {consecutive_from} with A = {shape.A} anchors and L = {shape.L} positions: the last "
            f"anchor would be {consecutive_from + shape.A - 1}"
        )
    scaling = shape.D**-0.5 if scale is None else scale
    tensors = (q_BHASMD, prefix_k_BKLD, prefix_v_BKLD, own_k_BKASND, own_v_BKASND, anchor_BA, start_BA)
    if q_BHASMD.numel() == 0:
        return q_BHASMD.clone()
    takes = _choose(implementation, q_BHASMD)
    if takes == "reference":
        return reference.thought_attention(*tensors, own_length, scaling)
    if takes == "stock":
        return fast.thought_attention(*tensors, own_length, scaling, consecutive_from=consecutive_from)
    from . import triton_launch

    return triton_launch.thought_attention(*tensors, own_length, scaling)


def _choose(implementation: ThoughtImplementation, q: Tensor) -> ThoughtImplementation:
    """The implementation that takes this call; raises UnsupportedShape where the one asked for does not."""
    if implementation in ("reference", "stock") or (implementation == "auto" and not q.is_cuda):
        return "stock" if implementation == "auto" else implementation
    from . import triton_launch  # a machine without a GPU need not have Triton

    problem = triton_launch.takes(q)
    if problem is None:
        return "triton"
    if implementation == "triton":
        raise UnsupportedShape(problem)
    return "reference"
