"""The linears of a decode step: bound by reading their weights, hence joined and streamed.

`join_projections` lays the weights of q, k, v (and of gate, up) of a layer end to end in one storage; the modules and
their parameters stay the model's own (views), so prefill, state_dict and adapters see no difference. Only a traced step
multiplies once and hands out slices. `stream_linears` lets a step read weights [N,K] by a kernel made for 1 to 16 rows:
libraries reach their bandwidth on the largest shapes only. It is an opaque operator; the compiler fuses around it.
`restore_linears` undoes both.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base.modules import hooked
from .decode_step import in_step

MAX_ROWS = 16
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@torch.library.custom_op("quietgoose::stream_linear", mutates_args=())
def stream_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [M,K] with M <= 16, weight [N,K], bias [N] -> [M,N], accumulated in fp32."""
    if not x.is_cuda:
        return nn.functional.linear(x, weight, bias)
    from .decode_triton import stream_linear as launch

    return launch(x.contiguous(), weight, bias)


@stream_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] -> [..., N] by the streaming kernel where it applies, otherwise by the library."""
    rows = x.numel() // x.shape[-1]
    sixteen_bit = x.dtype in (torch.float16, torch.bfloat16) and x.dtype == weight.dtype
    if rows > MAX_ROWS or not sixteen_bit or weight.stride(1) != 1:
        return nn.functional.linear(x, weight, bias)
    out = torch.ops.quietgoose.stream_linear(x.reshape(rows, x.shape[-1]), weight, bias)
    return out.reshape(*x.shape[:-1], weight.shape[0])


class _Joined:
    """The weight several linears share, and its product while a trace hands it out."""

    def __init__(self, weight: Tensor, bias: Tensor | None, parts: int) -> None:
        self.weight, self.bias, self.parts = weight, bias, parts
        self.streamed = False
        self.product: Tensor | None = None
        self.taken = 0


class JoinedLinear(nn.Linear):
    """A linear whose rows are part of a joined weight; the class of a model's own module while joined."""

    joined: _Joined
    first: int

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        joined = self.joined
        if joined.product is None:
            multiply = few_rows_linear if joined.streamed else nn.functional.linear
            joined.product = multiply(x, joined.weight, joined.bias)
        part = joined.product[..., self.first : self.first + self.out_features]
        joined.taken += 1
        if joined.taken == joined.parts:
            joined.product, joined.taken = None, 0
        return part


class StreamedLinear(nn.Linear):
    """A linear that a decode step computes by the streaming kernel; the class of a model's own module meanwhile."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or in_step():
            return few_rows_linear(x, self.weight, self.bias)
        return super().forward(x)


def stream_linears(model: nn.Module) -> list[nn.Linear]:
    """Let every plain or joined linear use the streaming kernel in a step; returns the plain ones, whose class changed."""
    changed: list[nn.Linear] = []
    for module in model.modules():
        if isinstance(module, JoinedLinear):
            module.joined.streamed = True
        elif type(module) is nn.Linear and not hooked(module):
            module.__class__ = StreamedLinear
            changed.append(module)
    return changed


def join_projections(model: nn.Module) -> list[nn.Linear]:
    """Join every group of plain linears; returns the modules changed. A group with adapters on it is left alone."""
    changed: list[nn.Linear] = []
    with torch.no_grad():
        for parent in model.modules():
            for names in GROUPS:
                group = [getattr(parent, name, None) for name in names]
                if all(type(linear) is nn.Linear for linear in group) and _alike(group):
                    changed += _join(group)
    return changed


def _alike(group: list[Any]) -> bool:
    kinds = {(g.in_features, g.weight.dtype, g.weight.device, g.bias is None) for g in group}
    return len(kinds) == 1 and not any(hooked(g) for g in group)


def _join(group: list[Any]) -> list[nn.Linear]:
    weight = torch.cat([g.weight.data for g in group])
    bias = None if group[0].bias is None else torch.cat([g.bias.data for g in group])
    joined, first = _Joined(weight, bias, len(group)), 0
    for linear in group:
        rows = slice(first, first + linear.out_features)
        linear.weight.data = weight[rows]
        if bias is not None:
            linear.bias.data = bias[rows]
        linear.__class__ = JoinedLinear
        linear.joined, linear.first = joined, first
        first = rows.stop
    return group


def came_apart(changed: list[nn.Linear]) -> bool:
    """Whether a joined linear was given another weight since (assigned, cast, moved), which the joined one does not have."""
    for linear in changed:
        if isinstance(linear, JoinedLinear):
            row = linear.in_features * linear.weight.element_size()
            if linear.weight.data_ptr() != linear.joined.weight.data_ptr() + linear.first * row:
                return True
    return False


def restore_linears(changed: list[nn.Linear]) -> None:
    """Undo join_projections and stream_linears: plain linears, each with its own storage again."""
    with torch.no_grad():
        for linear in changed:
            if isinstance(linear, JoinedLinear):
                linear.weight.data = linear.weight.data.clone()
                if linear.bias is not None:
                    linear.bias.data = linear.bias.data.clone()
                del linear.joined, linear.first
            cast(Any, linear).__class__ = nn.Linear
