"""Quantise and pack keys and values into 4-bit and 2-bit arenas (mathematics in README.md).

Callers: cache/. CUDA tensors of a supported shape go to the Triton kernels, everything else to the plain PyTorch twin;
both give the same codes bit for bit.
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Implementation, UnsupportedShape, takes_triton
from . import reference
from .bits import write_bits
from .layout import BLOCK, MODEL_DTYPES, TRITON_HEAD_DIMS, BitTables, PackedArena, empty_arena
from .reference import dequantize, pack_codes, unpack_codes
from .rounding import KeyRounding, key_rounding

__all__ = [
    "BLOCK",
    "BitTables",
    "KeyRounding",
    "PackedArena",
    "UnsupportedShape",
    "append_packed",
    "append_ranked",
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
    emptied. Updates both arenas in place without synchronising with the host. Launches: as `append_ranked`.
    Room is the caller's duty: the reference raises ValueError where it lacks, the kernels drop what does not fit (they
    can not ask).
    """
    _check(high, low, key, value, salient, valid)
    if not takes_triton(implementation, key, _not_for_triton(key)):
        reference.append_packed(high, low, key, value, salient, valid, rounding)
        return
    from .triton_kernels import append_ranked as append_with_triton

    append_with_triton(high, low, key, value, valid, 1.0, salient=salient, rounding=rounding)


def append_ranked(
    high: PackedArena,
    low: PackedArena,
    tables: BitTables,
    key: Tensor,
    value: Tensor,
    stored: Tensor,
    valid: Tensor,
    *,
    ratio: float,
    scores: Tensor | None = None,
    salient: Tensor | None = None,
    rounding: KeyRounding | None = None,
    implementation: Implementation = "auto",
) -> None:
    """Choose the salient tokens, append them to `high` and the others to `low` as `append_packed` does, note it all.

    stored      bool [B, n]: tokens to append (the others count as `low` in the tables and take no slot)
    valid       bool [B, n]: what is noted in `tables.valid`
    ratio       of the stored tokens that are salient, chosen by `scores` as `select_salient` does; without scores: 0 or 1
    scores      fp32 [B, Hk, n]
    salient     bool [B, Hk, n]: the choice itself, in the place of ratio and scores

    The other arguments and the caller's duties are those of `append_packed`. No synchronisation; two launches, three for
    more than 1024 tokens, whatever B and Hk are. What `tables` holds before the column stays.
    """
    _check(high, low, key, value, _choice(key, stored, ratio, scores, salient), valid)
    if tuple(stored.shape) != tuple(valid.shape):
        raise UnsupportedShape(f"stored {tuple(stored.shape)} does not fit valid {tuple(valid.shape)}")
    if takes_triton(implementation, key, _not_for_triton(key)):
        from .triton_kernels import append_ranked as append_with_triton

        append_with_triton(
            high, low, key, value, stored, ratio, scores=scores, salient=salient, tables=tables, valid=valid,
            rounding=rounding,
        )  # fmt: skip
        return
    if salient is None and scores is not None:
        from ..saliency.reference import select_salient

        salient = select_salient(scores, stored, ratio, None)
    elif salient is None:
        salient = (stored & (ratio > 0)).unsqueeze(1).expand(-1, key.shape[1], -1)
    reference.append_packed(high, low, key, value, salient, stored, rounding)
    write_bits(tables.salient, tables.column, salient)
    write_bits(tables.valid, tables.column, valid)


def _choice(key: Tensor, stored: Tensor, ratio: float, scores: Tensor | None, salient: Tensor | None) -> Tensor:
    """What the choice is read from, to be checked for its shape."""
    if salient is not None:
        return salient
    if scores is not None:
        return scores
    if ratio not in (0.0, 1.0):
        raise UnsupportedShape(f"ratio = {ratio} without scores: give scores, or the choice itself as `salient`")
    return stored.unsqueeze(1).expand(-1, key.shape[1], -1)


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
