"""A linear head over 16-bit weights whose logits are not rounded to 16 bits: the sums of its product, as fp32.

    logits_TV = h_TD W^T + bias,   fp32

bf16 has 8 bits: a logit of 20 is rounded by up to 0.06. Where the *difference* of two log-probabilities counts (a thought's
reward, pi against pi_old) that noise is the signal's size; in a mean loss it averages out, and the head as it stands is
cheaper. Tensor cores sum in fp32 anyway: on CUDA torch.mm(out_dtype=torch.float32) only leaves the last rounding out
(torch >= 2.8; up to 2.13 it has neither a CPU kernel nor a gradient). Elsewhere both factors are widened, a slice of the
vocabulary at a time.

fp32 hidden states over 16-bit weights (mixed ones) enter as two 16-bit parts, h = high + low: exact to 2^-17.
Backward: the logits' gradient is rounded to the weights' dtype, sums are fp32. Callers: thoughts/ through
thoughts/branch.py `language_head`; train/thought_arms.py, for the arms that think nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NARROW = (torch.bfloat16, torch.float16)
WIDENED_AT_ONCE = 2**24
"""Elements of W that are widened at a time where there is no kernel: 64 MB."""


class WideHead:
    """`module`'s logits in fp32; h [..., D] in the weights' dtype, or fp32 (over fp32 and fp64 weights: `module` itself).

    A head that is no plain nn.Linear, has hooks or whose weight is not whole (ZeRO-3) is called as it is, and what it rounded
    stays rounded.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V]; at least fp32 where the head is plain."""
        module, weight = self.module, getattr(self.module, "weight", None)
        if weight is None or not self._plain:
            return module(hidden if weight is None else hidden.to(weight.dtype))
        if weight.dtype not in NARROW:
            return module(hidden.to(weight.dtype))
        return _product(module, hidden)  # type: ignore[arg-type]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the module."""
        return self.module.parameters()

    @property
    def out_features(self) -> int:
        """V."""
        return self.module.out_features  # type: ignore[return-value]

    @property
    def _plain(self) -> bool:
        module = self.module
        hooked = module._forward_hooks or module._forward_pre_hooks
        return type(module) is nn.Linear and not hooked and tuple(module.weight.shape) == (
            module.out_features, module.in_features,
        )  # fmt: skip


@contextmanager
def unrounded(head: nn.Module) -> Iterator[None]:
    """Within it a plain 16-bit head hands out fp32 logits to whoever calls it, the model's own forward too; hooks stay. Without
    gradients of its weight; other heads are left alone."""
    if type(head) is not nn.Linear or head.weight.dtype not in NARROW:
        yield
        return
    head.forward = lambda hidden: _product(head, hidden)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


def _product(head: nn.Linear, hidden: Tensor) -> Tensor:
    logits_TV = _WideProduct.apply(hidden.flatten(0, -2), head.weight, head.bias)
    return logits_TV.view(*hidden.shape[:-1], head.out_features)


class _WideProduct(torch.autograd.Function):
    """h W^T + bias. The gradient of h has h's dtype; those of W and bias, where wanted, theirs."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(hidden_TD, weight_VD)
        logits_TV = _logits(hidden_TD, weight_VD)
        return logits_TV if bias_V is None else logits_TV.add_(bias_V)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TV: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_TD, weight_VD = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad
        narrow_TV = grad_TV.to(weight_VD.dtype)
        hidden = _back(narrow_TV, weight_VD, hidden_TD.dtype) if wants_hidden else None
        weight = narrow_TV.t() @ hidden_TD.to(weight_VD.dtype) if wants_weight else None
        return hidden, weight, grad_TV.sum(0).to(weight_VD.dtype) if wants_bias else None


def _logits(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    """fp32 [T, V]."""
    if not hidden_TD.is_cuda:
        logits_TV, first = hidden_TD.new_empty(hidden_TD.shape[0], weight_VD.shape[0], dtype=torch.float32), 0
        for part_VD in _slices(weight_VD):
            logits_TV[:, first : first + part_VD.shape[0]] = hidden_TD.float() @ part_VD.float().t()
            first += part_VD.shape[0]
        return logits_TV
    high_TD = hidden_TD.to(weight_VD.dtype)
    logits_TV = torch.mm(high_TD, weight_VD.t(), out_dtype=torch.float32)
    if hidden_TD.dtype != weight_VD.dtype:  # the low part's product is 2^-8 of the whole: 16 bits are enough for it
        logits_TV += (hidden_TD - high_TD).to(weight_VD.dtype) @ weight_VD.t()
    return logits_TV


def _back(grad_TV: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """grad W in `dtype`, summed in fp32; [T, D]."""
    if grad_TV.is_cuda:
        return torch.mm(grad_TV, weight_VD, out_dtype=dtype) if dtype != grad_TV.dtype else torch.mm(grad_TV, weight_VD)
    total_TD = grad_TV.new_zeros(grad_TV.shape[0], weight_VD.shape[1], dtype=torch.float32)
    first = 0
    for part_VD in _slices(weight_VD):
        total_TD.addmm_(grad_TV[:, first : first + part_VD.shape[0]].float(), part_VD.float())
        first += part_VD.shape[0]
    return total_TD.to(dtype)


def _slices(weight_VD: Tensor) -> tuple[Tensor, ...]:
    """Rows of W, few enough to widen."""
    return weight_VD.split(max(1, WIDENED_AT_ONCE // weight_VD.shape[1]))
