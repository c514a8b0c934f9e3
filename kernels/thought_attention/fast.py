"""Thought attention over stock kernels: they attend the prefix and return their log-sum-exp; the own part is merged in.

    o = e^(l1 - l) o1 + e^(s2 - l) V2        l = logaddexp(l1, log sum e^s2)        (README.md, "Merge")

One autograd function holds both parts: stock kernels do not differentiate their log-sum-exp, so each part's backward
gets the merged out and lse. The prefix part folds S, M and the group's heads into the head axis: keys and values of a KV
head are read as they are, once for all branches. Own part and merge: Triton on a GPU, plain PyTorch elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import Shape, own_mask, prefix_mask, shape_of
from .stock import KERNELS, StockCall, bias_of, choose


def thought_attention(
    q: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, anchor: Tensor, start: Tensor,
    own_length: Tensor | int | None, scale: float, *, consecutive_from: int | None = None,
    own_in_triton: bool | None = None, prefix_kernel: str | None = None,
) -> Tensor:  # fmt: skip
    """See `quietgoose.kernels.thought_attention.thought_attention`.

    own_in_triton  own part and merge in Triton; None is on a GPU
    prefix_kernel  name in stock.KERNELS; None chooses
    """
    shape = shape_of(q, key, value, own_key, own_value, anchor, start)
    causal = consecutive_from is not None
    if consecutive_from is not None:
        end = consecutive_from + shape.A
        key, value = key[:, :, :end], value[:, :, :end]
    name, causal = choose(q, shape.A, key.shape[2], causal) if prefix_kernel is None else (prefix_kernel, causal)
    own_in_triton = q.is_cuda if own_in_triton is None else own_in_triton
    return _Attention.apply(
        q, key, value, own_key, own_value, anchor, start, own_length, scale, causal, name, own_in_triton
    )  # fmt: skip


def fold(x: Tensor, K: int) -> Tensor:
    """[B, H, A, S, M, ...] as [B * K, S * M * G, A, ...], in memory [B, K, A, S, M, G, ...]."""
    x = x.unflatten(1, (K, -1)).movedim(2, 5)
    return x.flatten(3, 5).flatten(0, 1).contiguous().transpose(1, 2)


def unfold(x: Tensor, s: Shape) -> Tensor:
    """`fold` back, as [B, K, G, A, S, M, ...]: a view of what has fold's memory layout."""
    x = x.transpose(1, 2).unflatten(0, (s.B, s.K)).unflatten(3, (s.S, s.M, s.G))
    return x.movedim(5, 2)


class _Call:
    """The tensors of one call as the parts take them; padding anchors look at some key with a query of zeros."""

    def __init__(self, tensors: list[Tensor], own_length: Tensor | int | None, scale: float, causal: bool) -> None:
        q, key, value, _own_key, _own_value, anchor, start = tensors
        self.shape = s = shape_of(q, key, value, _own_key, _own_value, anchor, start)
        self.own_length, self.scale = own_length, scale
        valid = anchor >= 0
        self.padding = ~valid[:, None, :, None, None, None]  # over [B, H or K, A, S, M or N, D]
        bias = None
        if not causal:
            first = torch.where(valid, start, 0)
            bias = bias_of(prefix_mask(anchor.clamp(min=0), first, s.L), s.K, q.dtype)
        key, value = (x.flatten(0, 1).unsqueeze(1) for x in (key, value))
        self.prefix = StockCall(fold(q.masked_fill(self.padding, 0.0), s.K), key, value, bias, scale)
        self.raw = tensors

    def rows(self, x: Tensor) -> Tensor:
        """[B, H, A, S, M, D] as [B, K, G, A, S, M, D] in the dtype of the arithmetic, zeros at padding anchors."""
        return self._wide(x.masked_fill(self.padding, 0.0)).unflatten(1, (self.shape.K, -1))

    def own(self) -> tuple[Tensor, Tensor, Tensor]:
        """(keys, values [B, K, A, S, N, D], visible [M, N]); what nobody may see is replaced by zeros."""
        visible = own_mask(self.own_length, self.shape.M, self.shape.N, self.raw[0].device)
        hidden = self.padding | ~visible.any(0)[:, None]
        own_key, own_value = (self._wide(x.masked_fill(hidden, 0.0)) for x in self.raw[3:5])
        return own_key, own_value, visible

    def _wide(self, x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.float()

    def own_scores(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(scores [B, K, G, A, S, M, N] with -inf where not seen, q, own keys, own values)."""
        own_key, own_value, visible = self.own()
        q = self.rows(self.raw[0])
        score = torch.einsum("bkgasmd,bkasnd->bkgasmn", q, own_key) * self.scale
        return score.masked_fill(~visible, -torch.inf), q, own_key, own_value


def _merge(call: _Call, prefix_out: Tensor, prefix_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Own part and merge in plain PyTorch: (out [B, H, A, S, M, D], lse [B, K, G, A, S, M])."""
    score, _, _, own_value = call.own_scores()
    lse1 = unfold(prefix_lse, call.shape)
    lse = torch.logaddexp(lse1, score.logsumexp(-1))
    out = unfold(prefix_out, call.shape) * torch.exp(lse1 - lse).unsqueeze(-1)
    out = out + torch.einsum("bkgasmn,bkasnd->bkgasmd", torch.exp(score - lse.unsqueeze(-1)), own_value)
    return out.flatten(1, 2).masked_fill(call.padding, 0.0).to(call.raw[0].dtype), lse


def _own_gradients(
    call: _Call, grad: Tensor, out: Tensor, lse: Tensor, prefix_dq: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq of both parts, own dk, own dv) in plain PyTorch."""
    score, q, own_key, own_value = call.own_scores()
    weight = torch.exp(score - lse.unsqueeze(-1))
    grad_rows = call.rows(grad)
    delta = (grad_rows * call.rows(out)).sum(-1, keepdim=True)
    score_gradient = weight * (torch.einsum("bkgasmd,bkasnd->bkgasmn", grad_rows, own_value) - delta) * call.scale
    dq = torch.einsum("bkgasmn,bkasnd->bkgasmd", score_gradient, own_key) + unfold(prefix_dq, call.shape)
    own_dk = torch.einsum("bkgasmn,bkgasmd->bkasnd", score_gradient, q)
    own_dv = torch.einsum("bkgasmn,bkgasmd->bkasnd", weight, grad_rows)
    return dq.flatten(1, 2).to(call.raw[0].dtype), own_dk.to(call.raw[0].dtype), own_dv.to(call.raw[0].dtype)


def _triton_parts(call: _Call) -> tuple[Any, Any]:
    """(triton_launch, its Problem of this call)."""
    from . import triton_launch

    return triton_launch, triton_launch.problem(call.raw, call.own_length, call.scale)


class _Attention(torch.autograd.Function):
    """Stock kernels for the prefix, own part and merge beside them."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, own_length, scale, causal, name, own_in_triton = arguments
        call = _Call(tensors, own_length, scale, causal)
        s = call.shape
        part_out, part_lse, kept = KERNELS[name].forward(call.prefix)
        if own_in_triton:
            launch, p = _triton_parts(call)
            rows_lse = unfold(part_lse, s).reshape(s.B, s.H, -1).contiguous()
            out, lse = launch.forward(p, launch.Part(unfold(part_out, s).flatten(3, 5), rows_lse))
            out = out.unflatten(2, (s.A, s.S, s.M))
            lse = lse.view(s.B, s.K, s.G, s.A, s.S, s.M)
        else:
            out, lse = _merge(call, part_out, part_lse)
        length = own_length if isinstance(own_length, Tensor) else None
        ctx.kept_types = [isinstance(x, Tensor) for x in kept]
        ctx.kept = [None if isinstance(x, Tensor) else x for x in kept]
        ctx.save_for_backward(*tensors, out, lse, length, *(x for x in kept if isinstance(x, Tensor)))
        ctx.own_length = own_length if length is None else None
        ctx.settings = (scale, causal, name, own_in_triton)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks each tensor a single time
        *tensors, out, lse, length = saved[:10]
        rest = iter(saved[10:])
        kept = tuple(next(rest) if is_tensor else x for is_tensor, x in zip(ctx.kept_types, ctx.kept))
        scale, causal, name, own_in_triton = ctx.settings
        call = _Call(list(tensors), ctx.own_length if length is None else length, scale, causal)
        s = call.shape
        grad = grad_out.masked_fill(call.padding, 0.0)
        # +inf, the Triton kernels' mark of a padding anchor, is no number for a stock kernel; its gradient is 0 anyhow
        fold_lse = fold(torch.nan_to_num(lse.flatten(1, 2), posinf=0.0), s.K).contiguous()
        dq, dk, dv = KERNELS[name].backward(call.prefix, fold(grad, s.K), fold(out, s.K), fold_lse, kept)
        if own_in_triton:
            launch, p = _triton_parts(call)
            flat_grad, flat_lse = launch.flat(grad), lse.view(s.B, s.H, -1)
            part = launch.Part(unfold(dq, s).flatten(3, 5))
            dq, delta = launch.query_gradient(p, launch.flat(out), flat_grad, flat_lse, part)
            own_dk, own_dv = launch.own_gradient(p, flat_grad, flat_lse, delta)
            dq = dq.unflatten(2, (s.A, s.S, s.M))
            own_dk, own_dv = (x.unflatten(2, (s.A, s.S, s.N)) for x in (own_dk, own_dv))
        else:
            dq, own_dk, own_dv = _own_gradients(call, grad, out, lse, dq)
        dk, dv = (x.squeeze(1).unflatten(0, (s.B, s.K)) for x in (dk, dv))
        return dq, dk, dv, own_dk, own_dv, *[None] * 7
