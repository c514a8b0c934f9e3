"""Quantise and pack keys and values into 4-bit and 2-bit arenas (mathematics in README.md).

Callers: cache/. CUDA tensors of a supported shape go to the Triton kernels, everything else to the plain PyTorch twin;
both give the same codes bit for bit.
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Implementation, UnsupportedShape, takes_triton
from . import reference
from .layout import BLOCK, MODEL_DTYPES, TRITON_HEAD_DIMS, PackedArena, empty_arena
from .reference import dequantize, pack_codes, unpack_codes
from .rounding import KeyRounding, key_rounding

__all__ = [
    "BLOCK",
    "KeyRounding",
    "PackedArena",
    "UnsupportedShape",
    "append_packed",
    "dequantize",
    "empty_arena",
    "key_rounding",
    "pack_codes",
    "unpack_codes",
]


def append_packed(
    high: PackedArena,
    low: PackedArena,
    key: Tensor,
    value: Tensor,
    salient: Tensor,
    valid: Tensor,
    *,
    rounding: KeyRounding | None = None,
    implementation: Implementation = "auto",
) -> None:
    """Append salient tokens to `high` and the other valid ones to `low`, in position order, in new blocks.

    key, value  [B, Hk, n, D], fp16, bf16 or fp32; finite where valid, |key| within fp16
    salient     bool [B, Hk, n]; the same number in all heads of a row
    valid       bool [B, n]; False is padding, which is never stored
    rounding    of the keys, from `key_rounding`; None is to nearest

    A row's first tokens in an arena decide the channel scales of its values there, for all that follow until the row is
    emptied. Updates both arenas in place without synchronising with the host. Four launches whatever B and Hk are.
    Room is the caller's duty: the reference raises ValueError where it lacks, the kernels drop what does not fit (they
    can not ask).
    """
    _check(high, low, key, value, salient, valid)
    if not takes_triton(implementation, key, _not_for_triton(key)):
        reference.append_packed(high, low, key, value, salient, valid, rounding)
        return
    from .triton_kernels import append_packed as append_with_triton

    append_with_triton(high, low, key, value, salient, valid, rounding)


def _not_for_triton(key: Tensor) -> str | None:
    if key.shape[3] not in TRITON_HEAD_DIMS:
        return f"head_dim = {key.shape[3]}: the Triton kernels take {TRITON_HEAD_DIMS}"
    if key.dtype not in MODEL_DTYPES:
        return f"dtype = {key.dtype}: the Triton kernels take fp16, bf16 and fp32"
    return None


def _check(high: PackedArena, low: PackedArena, key: Tensor, value: Tensor, salient: Tensor, valid: Tensor) -> None:
    batch, heads, n, width = key.shape
    if value.shape != key.shape:
        raise UnsupportedShape(f"value has shape {tuple(value.shape)}, key {tuple(key.shape)}: they must be equal")
    if tuple(salient.shape) != (batch, heads, n) or tuple(valid.shape) != (batch, n):
        raise UnsupportedShape(
            f"salient {tuple(salient.shape)} and valid {tuple(valid.shape)} do not fit keys {tuple(key.shape)}: "
            f"needed are {(batch, heads, n)} and {(batch, n)}"
        )
    for arena in (high, low):
        found = (*arena.key_codes.shape[:2], arena.head_dim)
        if found != (batch, heads, width):
            raise UnsupportedShape(f"arena is for (rows, heads, head_dim) = {found}, keys have {(batch, heads, width)}")
