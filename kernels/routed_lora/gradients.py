"""Gradients of routing and of grouped experts: what is frozen costs neither a product nor memory.

Grouped experts, over pairs (token, slot) sorted by expert; q is the gradient of the weighted h = A x:

    q = B dy; dw = q . (A x); dx = sum w A^T q; dA = sum (w q) x^T; dB = sum (w A x) dy^T

Routing, for the kernels' operator and for plain PyTorch:

    dz_j = w_j (dw_j - (1 + 1e-6) sum_i dw_i w_i) at the chosen experts; dx by layer norm's backward; dv = dz^T x_hat

What 1e-6 times the softmax's denominator passes to unchosen experts is left out (relative 1e-6). Callers: operators.py,
routing/shared.py (`route_sparingly`).
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# (what is None is what no wanted gradient reads: the checker does not follow that)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .layout import GroupShape, GroupTables
from .reference import EPSILON_NORM, EPSILON_SUM, route_group


def keep_routing(ctx: Any, x: Tensor, vectors: Tensor, weight: Tensor, index: Tensor) -> None:
    """Save what `routing_gradients` will read, by ctx.arrow and by which of x and vectors (inputs 0 and 1) takes a gradient."""
    ctx.set_materialize_grads(False)  # indices have none, and zeros in its place would be a launch
    reads_vectors = ctx.needs_input_grad[0] or ctx.arrow
    ctx.save_for_backward(x, vectors if reads_vectors else None, weight, index)
    ctx.kind_of_vectors = vectors.dtype


def routing_gradients(ctx: Any, grad_STK: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(dx [T, I] in x's dtype, dv [Z, I] in the vectors'), None for what takes none; accumulated in fp32 (fp64 stays)."""
    x, vectors, weight, index = ctx.saved_tensors
    for_x, for_vectors = ctx.needs_input_grad[:2]
    dz_TZ = _score_gradients(grad_STK, weight, index, ctx.num_experts)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if vectors is not None:
        vectors = vectors.to(wide.dtype)
    if ctx.arrow:
        dz_TZ = dz_TZ * torch.sign(functional.linear(wide, vectors))
        dv = dz_TZ.t() @ wide if for_vectors else None
        dx = dz_TZ @ vectors if for_x else None
    else:
        width = [x.shape[1]]
        normal, mean, scale = torch.native_layer_norm(wide, width, None, None, EPSILON_NORM)
        dv = dz_TZ.t() @ normal if for_vectors else None
        dx = None
        if for_x:
            dx, _, _ = torch.ops.aten.native_layer_norm_backward(
                dz_TZ @ vectors, wide, width, mean, scale, None, None, [True, False, False]
            )
    return None if dx is None else dx.to(x.dtype), None if dv is None else dv.to(ctx.kind_of_vectors)


def _score_gradients(grad_STK: Tensor, weight: Tensor, index: Tensor, num_experts: int) -> Tensor:
    """dz of all scores [T, Z], 0 at unchosen experts."""
    sites, num_tokens, _ = weight.shape
    grad_STK = grad_STK.to(weight.dtype)
    inner = (grad_STK * weight).sum(2, keepdim=True)
    dz_STK = weight * torch.sub(grad_STK, inner, alpha=1 + EPSILON_SUM)
    dz_TSN = dz_STK.new_zeros(num_tokens, sites, num_experts)
    return dz_TSN.scatter_(2, index.long().transpose(0, 1), dz_STK.transpose(0, 1)).flatten(1)


class _RouteGroup(torch.autograd.Function):
    """`route_group` that keeps x in its own dtype, weights and indices, where autograd keeps an fp32 copy of x and scores."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_TI: Tensor, vectors_ZI: Tensor, absent_Z: Tensor, num_experts: int, k: int, arrow: bool
    ) -> tuple[Tensor, Tensor]:
        weight, index = route_group(x_TI, vectors_ZI, absent_Z, num_experts, k, arrow)
        ctx.num_experts, ctx.arrow = num_experts, arrow
        ctx.mark_non_differentiable(index)
        keep_routing(ctx, x_TI, vectors_ZI, weight, index)
        return weight, index

    @staticmethod
    def backward(ctx: Any, grad_STK: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *routing_gradients(ctx, grad_STK), None, None, None, None


def route_sparingly(
    x_TI: Tensor, vectors_ZI: Tensor, absent_Z: Tensor, num_experts: int, k: int, arrow: bool = False
) -> tuple[Tensor, Tensor]:
    """What `route_group` gives; the gradient (differentiable once) as in the head of this file, from x as it is.

    fp64 numbers get autograd's own gradient, which leaves nothing out.
    """
    if x_TI.dtype == torch.float64 or not torch.is_grad_enabled():
        return route_group(x_TI, vectors_ZI, absent_Z, num_experts, k, arrow)
    return _RouteGroup.apply(x_TI, vectors_ZI, absent_Z, num_experts, k, arrow)  # type: ignore[no-any-return]


def shrink_gradients(
    grad_SKTR: Tensor, x: Any, weight: Any, order: Tensor, plan: Tensor, a: Any, shape: GroupShape, tables: GroupTables,
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The wanted gradients among those of x, weight and a, in this order; h = A x is made again from x.

    grad is q of all sites. x, weight and a are tensors, or None where nothing that is wanted reads them.
    """
    from . import grouped

    for_x, for_weight, for_a = wanted
    sites, k, num_tokens = order.shape
    pairs, order_SKT, found = grouped.Pairs(order.flatten(0, 1), plan.flatten(0, 1)), order.long(), []
    if for_x or for_a:
        share_SKT = weight.transpose(1, 2).gather(2, order_SKT)
        q_LTR = (grad_SKTR * share_SKT[..., None]).to(grad_SKTR.dtype).flatten(0, 1)
    if for_x:
        dx = grad_SKTR.new_zeros(num_tokens, a.shape[1], dtype=torch.float32)
        for site in range(sites):
            grouped.expand_pairs_(dx, q_LTR, a, tables, shape, pairs, k, site, 0)
        found.append(dx.to(grad_SKTR.dtype))
    if for_weight:
        hidden_LTR = grouped.shrink_pairs(x, a, tables, shape, pairs, k)
        dw = grad_SKTR.new_empty(sites, num_tokens, k, dtype=torch.float32)
        products_SKT = (grad_SKTR.float() * hidden_LTR.view_as(grad_SKTR)).sum(3)
        dw.transpose(1, 2).scatter_(2, order_SKT, products_SKT)
        found.append(dw)
    if for_a:
        first = [sum(shape.slots[:site]) for site in range(sites)]
        parts = [grouped.outer_pairs(q_LTR, x, tables, shape, pairs, k, site, first[site]) for site in range(sites)]
        found.append(torch.cat(parts).to(grad_SKTR.dtype))
    return found


def expand_gradients(
    grad: Tensor, hidden: Any, order: Tensor, plan: Tensor, b: Any, shape: GroupShape, tables: GroupTables,
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The wanted gradients among those of hidden (that is q) and b of one site, in this order."""
    from . import grouped

    for_hidden, for_b = wanted
    pairs, k, found = grouped.Pairs(order, plan), order.shape[0], []
    if for_hidden:
        found.append(grouped.shrink_pairs(grad, b, tables, shape, pairs, k))
    if for_b:
        found.append(grouped.outer_pairs(hidden, grad, tables, shape, pairs, k, 0, 0).to(grad.dtype))
    return found
