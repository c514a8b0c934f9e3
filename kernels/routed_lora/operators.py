"""The kernels as operators that torch.compile keeps whole, with their gradients.

    quietgoose::route_experts    weights and experts of every token at every site of a group; differentiable
    quietgoose::grouped_experts  y + the chosen experts, by pairs sorted by expert; differentiable
    quietgoose::routed_linears   base linears, routing and experts of a group at once; inference

A group's index tables travel as one list [owner_R, start_Z, rank_Z, absent_Z], its gates as [vectors, high, low, shift].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .layout import GroupShape, GroupTables, PreparedGates
from .reference import EPSILON_NORM, EPSILON_SUM, masked_hidden, route_group
from .tiles import MOST_FUSED


@torch.library.custom_op("quietgoose::route_experts", mutates_args=())
def route_experts(
    x: Tensor, vectors: Tensor, gates: Sequence[Tensor], tables: Sequence[Tensor], num_experts: int, k: int, arrow: bool
) -> tuple[Tensor, Tensor]:
    """(weight fp32 [S, T, K], index int32 [S, T, K]); `gates` are [high, low, shift] of `vectors`."""
    from . import launch

    shape = GroupShape(num_experts, (16,) * (vectors.shape[0] // num_experts), 1)
    prepared = PreparedGates(vectors, *gates)
    return launch.route(x, prepared, GroupTables(*tables), shape, k, arrow)[:2]


@route_experts.register_fake
def _(x: Tensor, vectors: Tensor, gates: Any, tables: Any, num_experts: int, k: int, arrow: bool):
    kept = (vectors.shape[0] // num_experts, x.shape[0], k)
    return x.new_empty(kept, dtype=torch.float32), x.new_empty(kept, dtype=torch.int32)


def _route_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, vectors, gates, tables, ctx.num_experts, _, ctx.arrow = inputs
    ctx.without = ([None] * len(gates), [None] * len(tables), None, None, None)
    ctx.save_for_backward(x, vectors, *output)


def _route_backward(ctx: Any, grad_STK: Tensor, _: Any) -> tuple[Any, ...]:
    """dz_j = w_j (dw_j - (1 + 1e-6) sum_i dw_i w_i) at the chosen; layer norm's backward for x, x_hat dz for v.

    What 1e-6 times the softmax's denominator passes to unchosen experts is left out (relative 1e-6).
    """
    x, vectors, weight, index = ctx.saved_tensors
    grad_STK = grad_STK.to(weight.dtype)
    inner = (grad_STK * weight).sum(2, keepdim=True)
    dz_STK = weight * (grad_STK - (1 + EPSILON_SUM) * inner)
    sites, num_tokens, _ = weight.shape
    dz_STN = dz_STK.new_zeros(sites, num_tokens, ctx.num_experts).scatter_add_(2, index.long(), dz_STK)
    dz_TZ = dz_STN.transpose(0, 1).flatten(1)
    wide = x.float()
    if ctx.arrow:
        dz_TZ = dz_TZ * torch.sign(functional.linear(wide, vectors.float()))
        return (dz_TZ @ vectors.float()).to(x.dtype), (dz_TZ.t() @ wide).to(vectors.dtype), *ctx.without
    variance, mean = torch.var_mean(wide, 1, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + EPSILON_NORM)
    normal = (wide - mean) * scale
    dv = dz_TZ.t() @ normal
    u = dz_TZ @ vectors.float()
    dx = (u - u.mean(1, keepdim=True) - normal * (u * normal).mean(1, keepdim=True)) * scale
    return dx.to(x.dtype), dv.to(vectors.dtype), *ctx.without


route_experts.register_autograd(_route_backward, setup_context=_route_context)


@torch.library.custom_op("quietgoose::grouped_experts", mutates_args=())
def grouped_experts(
    y: Tensor, x: Tensor, weight: Tensor, index: Tensor, a: Tensor, b: Tensor, start: Tensor, rank: Tensor, widest: int
) -> Tensor:
    """y [T, O] + sum_j w_j B_j (A_j x) of one site, a new tensor; weight [T, K], index int32 [T, K], a [R, I], b [R, O],
    start and rank int32 [N] of the experts' slots."""
    from . import launch

    shape, tables, k = _one_site(a, start, rank, widest), _tables(start, rank), weight.shape[1]
    pairs = launch.sort_pairs(index[None], shape.num_experts)
    hidden = launch.shrink_pairs(x, a, tables, shape, pairs, k, weight.contiguous())
    return launch.expand_pairs_(y.clone(), hidden, b, tables, shape, pairs, k, 0, 0)


@grouped_experts.register_fake
def _(y: Tensor, x: Tensor, weight: Tensor, index: Tensor, a: Tensor, b: Tensor, start: Any, rank: Any, widest: int):
    return torch.empty_like(y)


def _one_site(a: Tensor, start: Tensor, rank: Tensor, widest: int) -> GroupShape:
    return GroupShape(start.shape[0], (a.shape[0],), widest)


def _tables(start: Tensor, rank: Tensor) -> GroupTables:
    return GroupTables(start, start, rank, start)  # owners and absence are not read by the grouped kernels


def _grouped_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *kept, ctx.widest = inputs
    ctx.save_for_backward(*kept)


def _grouped_backward(ctx: Any, grad_TO: Tensor) -> tuple[Any, ...]:
    """q = B dy; dw = q . (A x); dx = sum w A^T q; dA = sum (w q) x^T; dB = sum (w A x) dy^T."""
    x, weight, index, a, b, start, rank = ctx.saved_tensors
    dx, dw, da, db = torch.ops.quietgoose.grouped_experts_backward(
        grad_TO.contiguous(), x, weight, index, a, b, start, rank, ctx.widest
    )
    return grad_TO, dx, dw, None, da, db, None, None, None


@torch.library.custom_op("quietgoose::grouped_experts_backward", mutates_args=())
def grouped_experts_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    a: Tensor,
    b: Tensor,
    start: Tensor,
    rank: Tensor,
    widest: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, a and b; h is made again from x."""
    from . import launch

    shape, tables, k = _one_site(a, start, rank, widest), _tables(start, rank), weight.shape[1]
    pairs = launch.sort_pairs(index[None], shape.num_experts)
    order_KT = pairs.order_LT.long()
    share_KT1 = weight.t().gather(1, order_KT)[:, :, None]
    hidden = launch.shrink_pairs(x, a, tables, shape, pairs, k)
    q = launch.shrink_pairs(grad, b, tables, shape, pairs, k)
    dw_KT = (q.float() * hidden.float()).sum(2).to(weight.dtype)
    dw = torch.empty_like(dw_KT).scatter_(1, order_KT, dw_KT).t().contiguous()
    weighted_q, weighted_h = (q * share_KT1).to(x.dtype), (hidden * share_KT1).to(x.dtype)
    dx = x.new_zeros(x.shape, dtype=torch.float32)
    launch.expand_pairs_(dx, weighted_q, a, tables, shape, pairs, k, 0, 0)
    da = launch.outer_pairs(weighted_q, x, tables, shape, pairs, k, 0, 0)
    db = launch.outer_pairs(weighted_h, grad, tables, shape, pairs, k, 0, 0)
    return dx.to(x.dtype), dw, da.to(a.dtype), db.to(b.dtype)


@grouped_experts_backward.register_fake
def _(grad: Any, x: Any, weight: Any, index: Any, a: Any, b: Any, start: Any, rank: Any, widest: int):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(a), torch.empty_like(b)


grouped_experts.register_autograd(_grouped_backward, setup_context=_grouped_context)


def _hidden(
    x: Tensor, gates: PreparedGates, tables: GroupTables, shape: GroupShape, k: int, arrow: bool, a_RI: Tensor
) -> Tensor:
    """hm [T, R]: one pass over x, or, with more experts than fit beside it, routing, product and weighting apart."""
    from . import launch

    if shape.num_experts <= MOST_FUSED:
        return launch.route(x, gates, tables, shape, k, arrow, a_RI, store=False)[2]
    weight, index, _ = launch.route(x, gates, tables, shape, k, arrow)
    return masked_hidden(x, a_RI, tables.owner_R, shape.slots, weight, index, shape.num_experts)


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], a: Tensor, b: Sequence[Tensor],
    gates: Sequence[Tensor], tables: Sequence[Tensor], num_experts: int, widest: int, k: int, arrow: bool, method: str,
) -> list[Tensor]:  # fmt: skip
    """Per site y [T, O] = x W^T (+ bias) + the chosen experts; no gradients. `gates` [vectors, high, low, shift].

    Eager code calls this function (an operator's dispatch takes longer than a small launch), compiled code the operator
    `routed_linears`.

    method  decode: few tokens, two launches. fused: expand inside our base product. stock: the library's base product,
            expand added piece by piece. grouped: pairs sorted by expert; grouped_reference: weights by plain PyTorch
    """
    from . import launch

    shape = GroupShape(num_experts, tuple(t.shape[0] for t in b), widest)
    prepared, found = PreparedGates(*gates), GroupTables(*tables)
    sites = launch.Sites(list(weights), list(biases), list(b))
    if method == "decode":
        return launch.decode(x, prepared, found, shape, k, arrow, a, sites)
    if method == "fused":
        return launch.linear(x, _hidden(x, prepared, found, shape, k, arrow, a), sites, shape)
    if method == "stock":
        return launch.linear_in_pieces(x, _hidden(x, prepared, found, shape, k, arrow, a), sites, shape)
    ys = [functional.linear(x, w, biases[i] if biases else None) for i, w in enumerate(weights)]
    if method == "grouped_reference":
        weight, chosen = route_group(x, prepared.vectors_ZI, found.absent_Z, num_experts, k, arrow)
        weight, index = weight.contiguous(), chosen.int().contiguous()
    else:
        weight, index, _ = launch.route(x, prepared, found, shape, k, arrow)
    pairs = launch.sort_pairs(index, num_experts)
    hidden, first = launch.shrink_pairs(x, a, found, shape, pairs, k, weight), 0
    for site, (y, b_RO) in enumerate(zip(ys, b)):
        launch.expand_pairs_(y, hidden, b_RO, found, shape, pairs, k, site, first)
        first += shape.slots[site]
    return ys


routed_linears = torch.library.custom_op("quietgoose::routed_linears", linears, mutates_args=())


@routed_linears.register_fake
def _(
    x: Tensor, weights: Any, biases: Any, a: Any, b: Any, gates: Any, tables: Any,
    num_experts: int, widest: int, k: int, arrow: bool, method: str,
):  # fmt: skip
    return [x.new_empty(x.shape[0], w.shape[0]) for w in weights]
