"""Row adapters as operators that torch.compile keeps whole: batched products that write where they stay.

    quietgoose::linear_rows   x W^T (+ bias) + s B_g h in two products, the second onto the first; differentiable
    quietgoose::shrink_rows   A_g x; differentiable

Why operators, where PyTorch has every product: a compiler makes the sum of a base's and an adapter's product in a kernel of its
own wherever the backward pass reads it (two more passes over the output), and where products read a computed tensor under
another shape ([B, T, O] in groups of rows) it copies that for each of them: a tenth of a step of training on an H100. Here
a change of shape is a view, and the sum is the second product's own (beta = 1).

A group is rows of one expert, one after another; x and y keep the model's shape, h is [G, L, R] with G * L tokens. Gradients:
dx = dy W, dh = s dy B, dB = s dy^T h; dx = dh A, dA = dh^T x. W and bias are frozen. Caller: routing/row_adapter.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def adapters_first(x_TI: Tensor, weight: Tensor, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """The adapters' product, bound by memory, written once; the base's, bound by arithmetic, reads it along the way and adds
    it up in fp32."""
    y_TO = x_TI.new_empty(x_TI.shape[0], weight.shape[0])
    y_TO.view(h.shape[0], -1, y_TO.shape[1]).baddbmm_(h, b.transpose(1, 2), beta=0, alpha=scale)
    return y_TO.addmm_(x_TI, weight.t())


def base_first(x_TI: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """The base's product, whose end takes a bias; the adapters' reads and writes it once more."""
    y_TO = functional.linear(x_TI, weight, bias)
    y_TO.view(h.shape[0], -1, y_TO.shape[1]).baddbmm_(h, b.transpose(1, 2), alpha=scale)
    return y_TO


@torch.library.custom_op("quietgoose::linear_rows", mutates_args=())
def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, scale: float) -> Tensor:
    """y [..., O] of x [..., I], weight [O, I], h [G, L, R], b [G, O, R]; no gradient of weight and bias."""
    x_TI = x.reshape(-1, x.shape[-1])
    y_TO = adapters_first(x_TI, weight, h, b, scale) if bias is None else base_first(x_TI, weight, bias, h, b, scale)
    return y_TO.view(*x.shape[:-1], -1)


@linear_rows.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, h: Any, b: Any, scale: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Saves what the wanted gradients of x, h and b read; y is none of it."""
    _, weight, _, h, b, ctx.scale = inputs
    for_x, for_h, for_b = ctx.wanted = [ctx.needs_input_grad[place] for place in (0, 3, 4)]
    ctx.groups = h.shape[0]
    ctx.save_for_backward(weight if for_x else None, h if for_b else None, b if for_h else None)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if not any(ctx.wanted):
        return (None,) * 6
    found = iter(
        torch.ops.quietgoose.linear_rows_backward(
            grad.contiguous(), *ctx.saved_tensors, ctx.groups, ctx.scale, ctx.wanted
        )
    )
    dx, dh, db = [next(found) if needed else None for needed in ctx.wanted]
    return dx, None, None, dh, db, None


@torch.library.custom_op("quietgoose::linear_rows_backward", mutates_args=())
def linear_rows_backward(
    grad: Tensor, weight: Tensor | None, h: Tensor | None, b: Tensor | None, groups: int, scale: float,
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The wanted gradients among those of x, h and b, in this order; grad [..., O]."""
    grad_GLO, found = grad.view(groups, -1, grad.shape[-1]), []
    for_x, for_h, for_b = wanted
    if for_x:
        assert weight is not None
        found.append((grad.view(-1, grad.shape[-1]) @ weight).view(*grad.shape[:-1], -1))
    if for_h:
        assert b is not None
        found.append(_scaled(torch.bmm(grad_GLO, b), scale))
    if for_b:
        assert h is not None
        found.append(_scaled(torch.bmm(grad_GLO.transpose(1, 2), h), scale))
    return found


@linear_rows_backward.register_fake
def _(grad: Tensor, weight: Any, h: Any, b: Any, groups: int, scale: Any, wanted: Sequence[bool]) -> list[Tensor]:
    length = grad.numel() // (groups * grad.shape[-1])
    shapes = (
        lambda: (*grad.shape[:-1], weight.shape[1]),
        lambda: (groups, length, b.shape[2]),
        lambda: (groups, grad.shape[-1], h.shape[2]),
    )
    return [grad.new_empty(shape()) for shape, needed in zip(shapes, wanted) if needed]


linear_rows.register_autograd(_linear_backward, setup_context=_linear_context)


@torch.library.custom_op("quietgoose::shrink_rows", mutates_args=())
def shrink_rows(x: Tensor, a: Tensor) -> Tensor:
    """h [G, L, R] = A_g x of x [..., I], a [G, R, I]."""
    return torch.bmm(x.reshape(a.shape[0], -1, x.shape[-1]), a.transpose(1, 2))


@shrink_rows.register_fake
def _(x: Tensor, a: Tensor) -> Tensor:
    groups, width, features = a.shape
    return x.new_empty(groups, x.numel() // (groups * features), width)


def _shrink_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, a = inputs
    for_x, for_a = ctx.wanted = [ctx.needs_input_grad[place] for place in (0, 1)]
    ctx.lead = list(x.shape[:-1])
    ctx.save_for_backward(x if for_a else None, a if for_x else None)


def _shrink_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if not any(ctx.wanted):
        return None, None
    made = torch.ops.quietgoose.shrink_rows_backward(grad.contiguous(), *ctx.saved_tensors, ctx.lead, ctx.wanted)
    found = iter(made)
    dx, da = [next(found) if needed else None for needed in ctx.wanted]
    return dx, da


@torch.library.custom_op("quietgoose::shrink_rows_backward", mutates_args=())
def shrink_rows_backward(
    grad: Tensor, x: Tensor | None, a: Tensor | None, lead: Sequence[int], wanted: Sequence[bool]
) -> list[Tensor]:
    """The wanted gradients among those of x [*lead, I] and a, in this order; grad [G, L, R]."""
    found = []
    for_x, for_a = wanted
    if for_x:
        assert a is not None
        found.append(torch.bmm(grad, a).view(*lead, -1))
    if for_a:
        assert x is not None
        found.append(torch.bmm(grad.transpose(1, 2), x.reshape(grad.shape[0], -1, x.shape[-1])))
    return found


@shrink_rows_backward.register_fake
def _(grad: Tensor, x: Any, a: Any, lead: Sequence[int], wanted: Sequence[bool]) -> list[Tensor]:
    shapes = (lambda: (*lead, a.shape[2]), lambda: (grad.shape[0], grad.shape[2], x.shape[-1]))
    return [grad.new_empty(shape()) for shape, needed in zip(shapes, wanted) if needed]


shrink_rows.register_autograd(_shrink_backward, setup_context=_shrink_context)


def _scaled(made: Tensor, scale: float) -> Tensor:
    return made if scale == 1.0 else made.mul_(scale)
