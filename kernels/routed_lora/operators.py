"""The kernels as operators that torch.compile keeps whole, with their gradients.

    quietgoose::route_experts    weights and experts of every token at every site of a group; differentiable
    quietgoose::sort_experts     (token, slot) pairs of a group, sorted by expert: once, for forward and backward
    quietgoose::shrink_experts   weighted A x of all sites of a group, in sorted order; differentiable
    quietgoose::expand_experts   y + the chosen experts of a site from its part of that; differentiable
    quietgoose::routed_linears   base linears, routing and experts of a group at once; inference

A group's index tables travel as one list [owner_R, start_Z, rank_Z, absent_Z], its gates as [vectors, high, low, shift].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import tiles
from .gradients import expand_gradients, keep_routing, routing_gradients, shrink_gradients
from .layout import GroupShape, GroupTables, PreparedGates, axis_length, grouped_layout
from .tiles import MOST_FUSED

SPLIT = ("split", "split_fused", "persistent")


@torch.library.custom_op("quietgoose::route_experts", mutates_args=())
def route_experts(
    x: Tensor, vectors: Tensor, gates: Sequence[Tensor], tables: Sequence[Tensor], num_experts: int, k: int, arrow: bool
) -> tuple[Tensor, Tensor]:
    """(weight fp32 [S, T, K], index int32 [S, T, K]); `gates` are [high, low, shift] of `vectors`."""
    from . import grouped

    shape = GroupShape(num_experts, (16,) * (vectors.shape[0] // num_experts), 1)
    prepared = PreparedGates(vectors, *gates)
    return grouped.route(x, prepared, GroupTables(*tables), shape, k, arrow)


@route_experts.register_fake
def _(x: Tensor, vectors: Tensor, gates: Any, tables: Any, num_experts: int, k: int, arrow: bool):
    kept = (vectors.shape[0] // num_experts, x.shape[0], k)
    return x.new_empty(kept, dtype=torch.float32), x.new_empty(kept, dtype=torch.int32)


def _route_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, vectors, gates, tables, ctx.num_experts, _, ctx.arrow = inputs
    ctx.without = ([None] * len(gates), [None] * len(tables), None, None, None)
    keep_routing(ctx, x, vectors, *output)


def _route_backward(ctx: Any, grad_STK: Tensor, _: Any) -> tuple[Any, ...]:
    return *routing_gradients(ctx, grad_STK), *ctx.without


route_experts.register_autograd(_route_backward, setup_context=_route_context)


@torch.library.custom_op("quietgoose::sort_experts", mutates_args=())
def sort_experts(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order int32 [S, K, T], plan int32 [S, K, P]) of index int32 [S, T, K]: the pairs of every site and slot, sorted by
    expert, and which programs take which of them (triton_grouped.py; the first numbers count each expert's pairs), for all that
    follows at the sites of a group, forward and backward."""
    from . import grouped

    sites, _, k = index.shape
    pairs = grouped.sort_pairs(index.contiguous(), num_experts)
    return pairs.order_LT.unflatten(0, (sites, k)), pairs.plan_LP.unflatten(0, (sites, k))


@sort_experts.register_fake
def _(index: Tensor, num_experts: int):
    sites, num_tokens, k = index.shape
    return index.new_empty(sites, k, num_tokens), index.new_empty(sites, k, tiles.plan_length(num_tokens, num_experts))


@torch.library.custom_op("quietgoose::shrink_experts", mutates_args=())
def shrink_experts(
    x: Tensor, weight: Tensor, order: Tensor, plan: Tensor, a: Tensor, start: Tensor, rank: Tensor, slots: Sequence[int],
    widest: int,
) -> Tensor:  # fmt: skip
    """hidden [S, K, T, RP] in x's dtype: w_j A_j x of all sites of a group, in sorted order.

    weight fp32 [S, T, K], order [S, K, T] and plan [S, K, P] as `sort_experts` gives them, a [R, I], start and rank int32
    [Z], slots of each site.
    """
    from . import grouped

    shape, tables = grouped_layout(start, rank, slots, widest)
    sites, _, k = weight.shape
    pairs = grouped.Pairs(order.flatten(0, 1), plan.flatten(0, 1))
    return grouped.shrink_pairs(x, a, tables, shape, pairs, k, weight.contiguous()).unflatten(0, (sites, k))


@shrink_experts.register_fake
def _(x: Tensor, weight: Tensor, order: Any, plan: Any, a: Any, start: Any, rank: Any, slots: Any, widest: int):
    sites, num_tokens, k = weight.shape
    return x.new_empty(sites, k, num_tokens, axis_length(widest))


def _shrink_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Saves what the wanted gradients of x, weight and a read: of a frozen bank nothing but the bank itself."""
    x, weight, order, plan, a, start, rank, ctx.slots, ctx.widest = inputs
    for_x, for_weight, for_a = ctx.wanted = [ctx.needs_input_grad[place] for place in (0, 1, 4)]
    ctx.save_for_backward(
        x if for_weight or for_a else None,
        weight if for_x or for_a else None,
        order,
        plan,
        a if for_x or for_weight else None,
        start,
        rank,
    )


def _shrink_backward(ctx: Any, grad_SKTR: Tensor) -> tuple[Any, ...]:
    found = torch.ops.quietgoose.shrink_experts_backward(
        grad_SKTR.contiguous(), *ctx.saved_tensors, ctx.slots, ctx.widest, ctx.wanted
    )
    dx, dw, da = _placed(found, ctx.wanted)
    return dx, dw, None, None, da, None, None, None, None


def _placed(found: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    made = iter(found)
    return [next(made) if needed else None for needed in wanted]


@torch.library.custom_op("quietgoose::shrink_experts_backward", mutates_args=())
def shrink_experts_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, order: Tensor, plan: Tensor, a: Tensor | None, start: Tensor,
    rank: Tensor, slots: Sequence[int], widest: int, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The wanted gradients among those of x, weight and a, in this order (gradients.py)."""
    shape, tables = grouped_layout(start, rank, slots, widest)
    return shrink_gradients(grad, x, weight, order, plan, a, shape, tables, wanted)


@shrink_experts_backward.register_fake
def _(
    grad: Tensor, x: Any, weight: Any, order: Tensor, plan: Any, a: Any, start: Any, rank: Any, slots: Sequence[int],
    widest: int, wanted: Sequence[bool],
):  # fmt: skip
    sites, k, num_tokens = order.shape
    shapes = (
        lambda: grad.new_empty(num_tokens, a.shape[1]),
        lambda: grad.new_empty(sites, num_tokens, k, dtype=torch.float32),
        lambda: grad.new_empty(sum(slots), x.shape[1]),
    )
    return [make() for make, needed in zip(shapes, wanted) if needed]


shrink_experts.register_autograd(_shrink_backward, setup_context=_shrink_context)


@torch.library.custom_op("quietgoose::expand_experts", mutates_args=())
def expand_experts(
    y: Tensor, hidden: Tensor, order: Tensor, plan: Tensor, b: Tensor, start: Tensor, rank: Tensor, widest: int
) -> Tensor:
    """y [T, O] + sum_j B_j hidden_j of one site, a new tensor; hidden [K, T, RP] from `shrink_experts`, order [K, T], plan
    [K, P], b [R, O], start and rank int32 [N] of the experts' slots within the site."""
    from . import grouped

    shape, tables = grouped_layout(start, rank, b.shape[:1], widest)
    y = y.clone(memory_format=torch.contiguous_format)
    return grouped.expand_pairs_(y, hidden, b, tables, shape, grouped.Pairs(order, plan), len(hidden), 0, 0)


@expand_experts.register_fake
def _(y: Tensor, hidden: Any, order: Any, plan: Any, b: Any, start: Any, rank: Any, widest: int):
    return y.new_empty(y.shape)


def _expand_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Saves what the wanted gradients of hidden and b read."""
    _, hidden, order, plan, b, start, rank, ctx.widest = inputs
    for_hidden, for_b = ctx.wanted = [ctx.needs_input_grad[place] for place in (1, 4)]
    ctx.slots = b.shape[0]
    if for_hidden or for_b:
        ctx.save_for_backward(hidden if for_b else None, order, plan, b if for_hidden else None, start, rank)


def _expand_backward(ctx: Any, grad_TO: Tensor) -> tuple[Any, ...]:
    dh = db = None
    if any(ctx.wanted):
        found = torch.ops.quietgoose.expand_experts_backward(
            grad_TO.contiguous(), *ctx.saved_tensors, ctx.slots, ctx.widest, ctx.wanted
        )
        dh, db = _placed(found, ctx.wanted)
    return grad_TO, dh, None, None, db, None, None, None


@torch.library.custom_op("quietgoose::expand_experts_backward", mutates_args=())
def expand_experts_backward(
    grad: Tensor, hidden: Tensor | None, order: Tensor, plan: Tensor, b: Tensor | None, start: Tensor, rank: Tensor,
    slots: int, widest: int, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The wanted gradients among those of hidden and b, in this order (gradients.py)."""
    shape, tables = grouped_layout(start, rank, (slots,), widest)
    return expand_gradients(grad, hidden, order, plan, b, shape, tables, wanted)


@expand_experts_backward.register_fake
def _(
    grad: Tensor, hidden: Any, order: Tensor, plan: Any, b: Any, start: Any, rank: Any, slots: int, widest: int,
    wanted: Sequence[bool],
):  # fmt: skip
    shapes = ((*order.shape, axis_length(widest)), (slots, grad.shape[1]))
    return [grad.new_empty(shape) for shape, needed in zip(shapes, wanted) if needed]


expand_experts.register_autograd(_expand_backward, setup_context=_expand_context)


def _hidden(
    x: Tensor, gates: PreparedGates, tables: GroupTables, shape: GroupShape, k: int, arrow: bool, a_RI: Tensor,
    begins: bool = False,
) -> Tensor:  # fmt: skip
    """hm [T, R]: one launch, or routing and shrink apart where there are more experts than one can hold; begins as in launch.py."""
    from . import grouped, launch

    if shape.num_experts > MOST_FUSED:
        weight, index = grouped.route(x, gates, tables, shape, k, arrow)
        return launch.shrink_masked(x, a_RI, tables, shape, weight, index, begins=begins)
    return launch.route(x, gates, tables, shape, k, arrow, a_RI, store=False, begins=begins)[2]


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], a: Tensor, b: Sequence[Tensor],
    gates: Sequence[Tensor], tables: Sequence[Tensor], num_experts: int, widest: int, k: int, arrow: bool, method: str,
) -> list[Tensor]:  # fmt: skip
    """Per site y [T, O] = x W^T (+ bias) + the chosen experts; no gradients. `gates` [vectors, high, low, shift], and for the
    methods of SPLIT the matrix that A, high and low are views of (layout.stack_factors).

    Eager code calls this function (an operator's dispatch takes longer than a small launch), compiled code the operator
    `routed_linears`.

    method  decode: few tokens, two launches. fused: expand inside our base product. stock: the library's base product,
            expand added piece by piece. split and split_fused: the same two, but routing and shrink from one product of the
            library (16-bit tokens). persistent: the same, and base product and expand in one kernel at the library's rate
            (Hopper; elsewhere and for odd sizes split). grouped: pairs sorted by expert

    Raises:
        ValueError: a method of SPLIT without its matrix.
    """
    from . import grouped, launch, persistent

    shape = GroupShape(num_experts, tuple(t.shape[0] for t in b), widest)
    prepared, found, stack = PreparedGates(*gates[:4]), GroupTables(*tables), gates[4:]
    if method in SPLIT and not (stack and stack[0].numel()):
        raise ValueError(
            f"{method} reads A and 16-bit gates as one matrix, the fifth of `gates`; there are {len(gates)}"
        )
    sites = launch.Sites(list(weights), list(biases), list(b))
    if method == "decode":
        return launch.decode(x, prepared, found, shape, k, arrow, a, sites)
    make = partial(_hidden, x, prepared, found, shape, k, arrow, a)
    if method in SPLIT:
        make = partial(launch.route_split, x, stack[0], prepared, found, shape, k, arrow)
    if method in ("fused", "split_fused"):
        begins = launch.overlap(x)
        return launch.linear(x, make(begins=begins), sites, shape, follows=begins)
    if method == "persistent" and persistent.takes(x, sites):
        hidden = make()
        return persistent.attempt(x, hidden, sites, shape) or launch.linear_in_pieces(x, hidden, sites, shape)
    if method in ("stock", "split", "persistent"):
        if x.is_cuda and tiles.choose(tiles.BESIDE, *x.shape) and torch.cuda.is_current_stream_capturing():
            return launch.linear_beside(x, make, sites, shape)
        return launch.linear_in_pieces(x, make(), sites, shape)
    return grouped.linear_grouped(x, prepared, found, shape, k, arrow, a, sites)


routed_linears = torch.library.custom_op("quietgoose::routed_linears", linears, mutates_args=())


@routed_linears.register_fake
def _(
    x: Tensor, weights: Any, biases: Any, a: Any, b: Any, gates: Any, tables: Any,
    num_experts: int, widest: int, k: int, arrow: bool, method: str,
):  # fmt: skip
    return [x.new_empty(x.shape[0], w.shape[0]) for w in weights]
