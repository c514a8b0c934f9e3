"""The framework's attention kernels that return their log-sum-exp, under one calling convention. Used by fast.py.

    queries [X, F, A, D] against keys and values [X, 1, L, D]; F heads share one KV head, A is the sequence axis

`bias` None is causal, aligned at the end: query i sees keys up to L - A + i. Otherwise it is [X, 1, A, L], 0 where a query
sees a key and -inf where not, and takes A * L numbers a row of X whatever F is. None of these kernels differentiates its
log-sum-exp: `backward` takes out and lse of the merged attention instead (fast.py), so probabilities and
delta = sum dO O are those of all keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import UnsupportedShape

_aten = torch.ops.aten
Kept = tuple[Any, ...]
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class StockCall:
    """One call's inputs, see above."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    scale: float

    def heads(self) -> tuple[Tensor, Tensor]:
        """The one KV head's keys and values for each of q's heads, without a copy."""
        return self.k.expand(-1, self.q.shape[1], -1, -1), self.v.expand(-1, self.q.shape[1], -1, -1)

    def biases(self) -> Tensor | None:
        """The bias for each of q's heads, without a copy."""
        return None if self.bias is None else self.bias.expand(-1, self.q.shape[1], -1, -1)


class StockKernel(NamedTuple):
    """forward(call) -> (out, lse [X, F, A], kept); backward(call, grad, out, lse, kept) -> (dq, dk, dv [X, 1, L, D])."""

    forward: Callable[[StockCall], tuple[Tensor, Tensor, Kept]]
    backward: Callable[[StockCall, Tensor, Tensor, Tensor, Kept], Gradients]


def _one_head(x: Tensor) -> Tensor:
    return x if x.shape[1] == 1 else x.sum(1, keepdim=True)


def _flash_forward(c: StockCall) -> tuple[Tensor, Tensor, Kept]:
    out, lse, *kept = _aten._scaled_dot_product_flash_attention(c.q, c.k, c.v, 0.0, True, False, scale=c.scale)
    return out, lse, tuple(kept[:6])


def _flash_backward(c: StockCall, grad: Tensor, out: Tensor, lse: Tensor, kept: Kept) -> Gradients:
    cum_q, cum_k, max_q, max_k, seed, offset = kept
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
        grad, c.q, c.k, c.v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset, scale=c.scale
    )
    return dq, _one_head(dk), _one_head(dv)


def _cudnn_forward(c: StockCall) -> tuple[Tensor, Tensor, Kept]:
    out, lse, *kept = _aten._scaled_dot_product_cudnn_attention(
        c.q, c.k, c.v, None, True, 0.0, True, False, scale=c.scale
    )
    return out, lse.reshape(c.q.shape[:3]), (*kept[:6], lse.shape)


def _cudnn_backward(c: StockCall, grad: Tensor, out: Tensor, lse: Tensor, kept: Kept) -> Gradients:
    cum_q, cum_k, max_q, max_k, seed, offset, shape = kept
    dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
        grad, c.q, c.k, c.v, out, lse.reshape(shape), seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, True,
        scale=c.scale,
    )  # fmt: skip
    return dq, _one_head(dk), _one_head(dv)


def _efficient_forward(c: StockCall) -> tuple[Tensor, Tensor, Kept]:
    out, lse, seed, offset = _aten._scaled_dot_product_efficient_attention(
        c.q, *c.heads(), c.biases(), True, 0.0, c.bias is None, scale=c.scale
    )
    A = c.q.shape[2]  # this kernel's log-sum-exp has rows up to a multiple of 32
    return out, lse[..., :A], (lse[..., A:], seed, offset)


def _efficient_backward(c: StockCall, grad: Tensor, out: Tensor, lse: Tensor, kept: Kept) -> Gradients:
    padding, seed, offset = kept
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad, c.q, *c.heads(), c.biases(), out, torch.cat([lse, padding], -1), seed, offset, 0.0,
        [True, True, True, False], c.bias is None, scale=c.scale,
    )  # fmt: skip
    return dq, _one_head(dk), _one_head(dv)


def _cpu_forward(c: StockCall) -> tuple[Tensor, Tensor, Kept]:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        c.q, *c.heads(), 0.0, c.bias is None, attn_mask=c.bias, scale=c.scale
    )
    return out, lse, ()


def _cpu_backward(c: StockCall, grad: Tensor, out: Tensor, lse: Tensor, kept: Kept) -> Gradients:
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, c.q, *c.heads(), out, lse, 0.0, c.bias is None, attn_mask=c.bias, scale=c.scale
    )
    return dq, _one_head(dk), _one_head(dv)


KERNELS = {
    "flash": StockKernel(_flash_forward, _flash_backward),  # causal only
    "cudnn": StockKernel(_cudnn_forward, _cudnn_backward),  # causal with A = L only
    "efficient": StockKernel(_efficient_forward, _efficient_backward),  # causal with A = L, or a bias
    "cpu": StockKernel(_cpu_forward, _cpu_backward),  # causal with A = L, or a bias
}


def choose(q: Tensor, A: int, L: int, causal: bool) -> tuple[str, bool]:
    """(name in KERNELS, whether it is called as causal) for a call that would be causal if it may."""
    D, half = q.shape[-1], q.dtype in (torch.float16, torch.bfloat16)
    if not q.is_cuda:
        return "cpu", causal and A == L
    if causal and half and D % 8 == 0 and D <= 256:
        return "flash", True
    if q.dtype == torch.float64 or D % (8 if half else 4):
        raise UnsupportedShape(
            f"head_dim = {D}, dtype = {q.dtype}: the framework's CUDA kernels take fp16 and bf16 with head_dim a multiple "
            "of 8, fp32 with a multiple of 4"
        )
    return "efficient", causal and A == L


def bias_of(visible: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """bool [B, A, L] as a bias [B * K, 1, A, L]; its rows begin at multiples of 16 numbers, as CUDA kernels need."""
    B, A, L = visible.shape
    shape = (B, 1 if B == 1 else K, A, -(-L // 16) * 16)
    bias = torch.zeros(shape, dtype=dtype, device=visible.device)[..., :L]
    bias = bias.masked_fill_(~visible.unsqueeze(1), -torch.inf).expand(B, K, A, L)
    return bias.flatten(0, 1).unsqueeze(1)
