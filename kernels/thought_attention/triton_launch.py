"""Host side of the Triton kernels: strides, tile sizes, launches, and the autograd function. Never reads the device.

`forward` and `query_gradient` take the prefix part from stock kernels where a `Part` is given (fast.py does that), and
attend the prefix themselves where it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_backward as backward_kernels
from . import triton_kernels as kernels
from .layout import Shape, shape_of

MAX_WIDTH = 256  # channels of a head
MAX_SHARES = 16  # parts of the prefix gradient's sum over rows
_MODEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Tuning:
    """Launch parameters of one kernel; results depend on them by rounding only."""

    rows: int
    keys: int
    own_keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Problem:
    """One call: the tensors as the kernels take them (rows and own keys flattened), and its numbers."""

    q: Tensor  # [B, H, A * S * M, D]
    key: Tensor  # [B, K, L, D]
    value: Tensor
    own_key: Tensor  # [B, K, A * S * N, D]
    own_value: Tensor
    anchor: Tensor  # int64 [B, A]
    start: Tensor
    own_length: Tensor | int
    scale: float
    shape: Shape

    @property
    def length(self) -> tuple[Tensor, int, bool]:
        """(tensor, number, whether the tensor holds it)."""
        if isinstance(self.own_length, Tensor):
            return self.own_length, 0, True
        return self.anchor, self.own_length, False

    def constants(self) -> dict[str, Any]:
        s = self.shape
        return {"G": s.G, "S": s.S, "M": s.M, "D": s.D, "WIDTH": _width(s.D), "UPCAST": not self.q.is_cuda}


@dataclass(frozen=True)
class Part:
    """What stock kernels made of the prefix: rows [B, K, G, A * S * M, D] (out or dq), and for out its log-sum-exp."""

    rows: Tensor
    lse: Tensor | None = None  # fp32 [B, H, A * S * M], natural


def problem(tensors: Sequence[Tensor], own_length: Tensor | int | None, scale: float) -> Problem:
    """The call's tensors, q .. start in the public order, with unit stride over channels and one stride over rows.

    Only what has neither is copied.
    """
    q, key, value, own_key, own_value, anchor, start = tensors
    shape = shape_of(q, key, value, own_key, own_value, anchor, start)
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    return Problem(
        flat(q), key, value, flat(own_key), flat(own_value), anchor.contiguous(), start.contiguous(),
        shape.N if own_length is None else own_length, scale, shape,
    )  # fmt: skip


def flat(x: Tensor) -> Tensor:
    """[B, H, A, S, M, D] as [B, H, A * S * M, D] with unit stride over channels: a view wherever strides allow."""
    x = x.flatten(2, 4)
    return x if x.stride(3) == 1 else x.contiguous()


def takes(q: Tensor) -> str | None:
    """Why the kernels do not take this call, or None."""
    if q.shape[5] > MAX_WIDTH:
        return f"head_dim = {q.shape[5]}: the Triton kernels take up to {MAX_WIDTH}"
    if q.dtype not in _MODEL_DTYPES:
        return f"dtype = {q.dtype}: the Triton kernels take fp16, bf16 and fp32"
    if q.shape[0] * q.shape[1] > 65535:
        return f"B * H = {q.shape[0] * q.shape[1]}: the Triton kernels take up to 65535"
    return None


def _width(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def tuning(kind: str, dtype: torch.dtype, D: int, on_gpu: bool) -> Tuning:
    """Tile sizes of forward, query_gradient, own_gradient, prefix_gradient."""
    if not on_gpu:  # the interpreter: small tiles, so that small tests cross their edges
        return Tuning(16, 16, 16, 4, 1)
    width = _width(D)
    if dtype == torch.float32:
        return Tuning(32 if width <= 64 else 16, 32, 32, 4, 1)
    if width > 128:
        return Tuning(64, 32, 32, 8, 1)
    if kind == "forward":
        return Tuning(128, 64, 32, 8 if width > 64 else 4, 3)
    if kind == "query_gradient":
        return Tuning(128, 64 if width <= 64 else 32, 32, 8, 3 if width <= 64 else 2)
    if kind == "own_gradient":
        return Tuning(32, 64, 64, 4, 2)
    return Tuning(64, 128, 64, 8, 2)


def _row_tile(t: Tuning, num_rows: int) -> int:
    return min(t.rows, max(16, triton.next_power_of_2(num_rows)))


def _heads_last(like: Tensor, B: int, heads: int, rows: int, D: int) -> Tensor:
    """[B, heads, rows, D], in memory [B, rows, heads, D]: what projections before and after attention work with."""
    return torch.empty(B, rows, heads, D, dtype=like.dtype, device=like.device).transpose(1, 2)


def _part_arguments(part: Part | None, p: Problem) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    if part is None:
        return p.q, p.q, (0, 0, 0, 0)
    rows = part.rows if part.rows.stride(4) == 1 else part.rows.contiguous()
    return rows, rows if part.lse is None else part.lse, rows.stride()[:4]


def forward(p: Problem, part: Part | None = None) -> tuple[Tensor, Tensor]:
    """(out [B, H, A * S * M, D], lse fp32 [B, H, A * S * M] with +inf at padding anchors)."""
    s, R = p.shape, p.q.shape[2]
    out = _heads_last(p.q, s.B, s.H, R, s.D)
    lse = torch.empty(s.B, s.H, R, dtype=torch.float32, device=p.q.device)
    t = tuning("forward", p.q.dtype, s.D, p.q.is_cuda)
    rows = _row_tile(t, R)
    part_rows, part_lse, part_strides = _part_arguments(part, p)
    length, number, on_device = p.length
    kernels.attend_kernel[(triton.cdiv(R, rows), s.B * s.H)](
        p.q, p.key, p.value, p.own_key, p.own_value, p.anchor, p.start, length, out, lse, part_rows, part_lse,
        *p.q.stride()[:3], *p.key.stride()[:3], *p.value.stride()[:3], *p.own_key.stride()[:3],
        *p.own_value.stride()[:3], *out.stride()[:3], *part_strides, s.H, s.A, s.L, number,
        p.scale * kernels.LOG2E.value, **p.constants(), N=s.N, ROWS=rows, KEYS=t.keys, OWN_KEYS=t.own_keys,
        PREFIX=part is None, ON_DEVICE=on_device, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return out, lse


def query_gradient(
    p: Problem, out: Tensor, grad: Tensor, lse: Tensor, part: Part | None = None
) -> tuple[Tensor, Tensor]:
    """(dq [B, H, A * S * M, D], delta fp32 [B, H, A * S * M])."""
    s, R = p.shape, p.q.shape[2]
    dq = _heads_last(p.q, s.B, s.H, R, s.D)
    delta = torch.empty_like(lse)
    t = tuning("query_gradient", p.q.dtype, s.D, p.q.is_cuda)
    rows = _row_tile(t, R)
    part_rows, _, part_strides = _part_arguments(part, p)
    length, number, on_device = p.length
    backward_kernels.query_gradient_kernel[(triton.cdiv(R, rows), s.B * s.H)](
        p.q, p.key, p.value, p.own_key, p.own_value, p.anchor, p.start, length, out, grad, lse, delta, dq,
        part_rows, *p.q.stride()[:3], *p.key.stride()[:3], *p.value.stride()[:3], *p.own_key.stride()[:3],
        *p.own_value.stride()[:3], *out.stride()[:3], *grad.stride()[:3], *dq.stride()[:3], *part_strides,
        s.H, s.A, s.L, number, p.scale, p.scale * kernels.LOG2E.value, **p.constants(), N=s.N, ROWS=rows,
        KEYS=t.keys, OWN_KEYS=t.own_keys, PREFIX=part is None, ON_DEVICE=on_device,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return dq, delta


def own_gradient(p: Problem, grad: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(dk, dv) of the own keys and values, [B, K, A * S * N, D] each."""
    s, C = p.shape, p.own_key.shape[2]
    dk, dv = (_heads_last(p.q, s.B, s.K, C, s.D) for _ in range(2))
    t = tuning("own_gradient", p.q.dtype, s.D, p.q.is_cuda)
    length, number, on_device = p.length
    backward_kernels.own_gradient_kernel[(triton.cdiv(C, t.keys), s.B * s.K)](
        p.q, p.own_key, p.own_value, p.anchor, p.start, length, grad, lse, delta, dk, dv,
        *p.q.stride()[:3], *p.own_key.stride()[:3], *p.own_value.stride()[:3], *grad.stride()[:3], *dk.stride()[:3],
        s.K, s.A, number, p.scale, p.scale * kernels.LOG2E.value, **p.constants(), N=s.N, ROWS=t.rows, KEYS=t.keys,
        ON_DEVICE=on_device, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return dk, dv


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def prefix_gradient(p: Problem, grad: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(dk, dv) of the prefix, [B, K, L, D] each. Rows are cut into shares until the programs fill the device."""
    s = p.shape
    t = tuning("prefix_gradient", p.q.dtype, s.D, p.q.is_cuda)
    tiles = triton.cdiv(s.L, t.keys)
    most = max(1, s.G * triton.cdiv(s.A * s.S * s.M, t.rows))
    shares = max(1, min(MAX_SHARES, most, triton.cdiv(4 * _multiprocessors(p.q.device), tiles * s.B * s.K)))
    dk, dv = (
        torch.empty(shares, s.B, s.K, s.L, s.D, dtype=torch.float32, device=p.q.device) for _ in range(2)
    )  # fmt: skip
    backward_kernels.prefix_gradient_kernel[(tiles, shares, s.B * s.K)](
        p.q, p.key, p.value, p.anchor, p.start, grad, lse, delta, dk, dv,
        *p.q.stride()[:3], *p.key.stride()[:3], *p.value.stride()[:3], *grad.stride()[:3], s.K, s.A, s.L,
        p.scale, p.scale * kernels.LOG2E.value, **p.constants(), ROWS=t.rows, KEYS=t.keys,
        CHUNK=min(1024, max(16, triton.next_power_of_2(s.A))), num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return dk.sum(0).to(p.q.dtype), dv.sum(0).to(p.q.dtype)


class _Attention(torch.autograd.Function):
    """Both parts in Triton."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, own_length, scale = arguments
        p = problem(tensors, own_length, scale)
        out, lse = forward(p)
        out = out.unflatten(2, (p.shape.A, p.shape.S, p.shape.M))
        length = own_length if isinstance(own_length, Tensor) else None
        ctx.save_for_backward(*tensors, out, lse, length)
        ctx.own_length, ctx.scale = own_length if length is None else None, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse, length = ctx.saved_tensors
        p = problem(tensors, ctx.own_length if length is None else length, ctx.scale)
        s, grad = p.shape, flat(grad_out)
        dq, delta = query_gradient(p, flat(out), grad, lse)
        wants_prefix, wants_own = any(ctx.needs_input_grad[1:3]), any(ctx.needs_input_grad[3:5])
        dk, dv = prefix_gradient(p, grad, lse, delta) if wants_prefix else (None, None)
        own_dk, own_dv = (None, None)
        if wants_own:
            own_dk, own_dv = (x.unflatten(2, (s.A, s.S, s.N)) for x in own_gradient(p, grad, lse, delta))
        return dq.unflatten(2, (s.A, s.S, s.M)), dk, dv, own_dk, own_dv, None, None, None, None


def thought_attention(
    q: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, anchor: Tensor, start: Tensor,
    own_length: Tensor | int | None, scale: float,
) -> Tensor:  # fmt: skip
    """See `quietgoose.kernels.thought_attention.thought_attention`."""
    return _Attention.apply(q, key, value, own_key, own_value, anchor, start, own_length, scale)
