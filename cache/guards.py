"""What a cache layer refuses, and the mode its methods run in. Caller: cache/state.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..base.errors import RecipeError
from ..kernels.quantize.layout import MODEL_DTYPES, UnsupportedShape, check_bits
from .policy import Policy

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = (*MODEL_DTYPES, torch.float64)  # fp64: lossless policies only, for exact comparisons


def stateful(method: F) -> F:
    """Run outside autograd and inference mode, so that buffers stay ordinary tensors whatever mode the caller is in.

    Refuses arguments that require a gradient while gradients are enabled.
    """

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        recording, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if not recording and not inference:  # as inside a model's forward: nothing to enter, every layer and step
            return method(self, *args, **kwargs)
        if recording:
            for tensor in (*args, *kwargs.values()):
                refuse_gradient(tensor)
        with torch.inference_mode(False), torch.no_grad():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


def refuse_gradient(tensor: Any) -> None:
    if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
        raise RecipeError(
            "a quantised cache was used with gradients enabled: it is not differentiable. Wrap the call in "
            "torch.no_grad(), or train without past_key_values (use_cache=False)",
            code="CFG-055",
        )


def check_shape(
    policy: Policy, batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype, capacity: int | None
) -> None:
    """RecipeError for a layer that this policy can not hold."""
    if batch < 0 or kv_heads < 1:
        raise RecipeError(f"cache layer for {batch} rows and {kv_heads} KV heads: at least 0 and 1", code="CFG-051")
    try:
        for bits in (policy.high_bits, policy.low_bits):
            check_bits(bits, head_dim)
    except UnsupportedShape as error:
        raise RecipeError(f"cache layer: {error}", code="CFG-051") from error
    lossless = policy.high_bits == policy.low_bits == 16
    if dtype not in DTYPES or (dtype == torch.float64 and not lossless):
        raise RecipeError(
            f"cache layer of {dtype}: supported are fp16, bf16 and fp32 (fp64 with 16 bits only)", code="CFG-051"
        )
    if capacity is not None and capacity < 1:
        raise RecipeError(f"cache capacity is {capacity} tokens; at least 1, or None to let it grow", code="CFG-052")


def check_new(key: Tensor, value: Tensor, expected: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Keys and values must be [B, Hk, n, D] of the layer's dtype; expected is (B, Hk, D)."""
    batch, heads, width = expected
    wanted = (batch, heads, key.shape[2], width)
    if tuple(key.shape) != wanted or tuple(value.shape) != wanted or key.dtype != dtype or value.dtype != dtype:
        raise RecipeError(
            f"keys {tuple(key.shape)} {key.dtype} and values {tuple(value.shape)} {value.dtype} do not fit this cache "
            f"layer: needed is {wanted} {dtype}",
            code="CFG-051",
        )


def check_capacity(capacity: int | None, needed: int) -> None:
    if capacity is not None and needed > capacity:
        raise RecipeError(
            f"cache capacity is {capacity} tokens, needed are {needed}; build the cache with capacity={needed} or more, "
            "or capacity=None to let it grow",
            code="CFG-052",
        )


def check_not_frozen(what: str, forks: int) -> None:
    if forks:
        raise RecipeError(
            f"{what}: this cache is frozen while {forks} fork(s) of it live, because they read its packed tokens; "
            "continue with the fork, or drop it first",
            code="CFG-054",
        )


def warn_without_queries() -> None:
    """Once a process: Python's default filter shows a warning of one place once."""
    warnings.warn(
        "ZipCache stores tokens without seeing their queries (another attention implementation is in use): salient "
        "tokens are evenly spaced instead of chosen by attention, and keys are rounded to nearest. Use "
        "attn_implementation='quietgoose_zip'",
        UserWarning,
        stacklevel=2,
    )
