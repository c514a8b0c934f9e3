"""Attention that reads a quantised KV cache in place: two packed arenas, a 16-bit tail, one log-sum-exp reduce.

Decode and short queries (at most 16 tokens) run as two launches of Triton kernels on a GPU; everything else takes the
plain PyTorch twin. Mathematics, work distribution and instruction counts are in README.md. Callers: cache/.

    python benchmarks/cached_attention.py --out result.json
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Implementation, takes_triton
from ..quantize import PackedArena, UnsupportedShape
from . import reference
from .layout import MAX_QUERY, SaliencyBuffers, Tail
from .reference import merge as _merge

__all__ = ["MAX_QUERY", "SaliencyBuffers", "Tail", "cached_attention", "merge"]


def cached_attention(
    query: Tensor,
    high: PackedArena,
    low: PackedArena,
    tail: Tail | None,
    *,
    scaling: float,
    saliency: SaliencyBuffers | None = None,
    limits: tuple[Tensor, Tensor] | None = None,
    share: int = 1,
    return_lse: bool = False,
    implementation: Implementation = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scaling * Q K'^T) V' over both arenas and the tail; K', V' are the dequantised keys and values.

    query     [B * share, H, q, D] after RoPE; row b * share + s reads arena row b
    tail      its rows are the query's rows; query i sees valid slots below length - (q - 1 - i)
    scaling   factor of the scores, usually D ** -0.5
    saliency  updated in place with the attention that tail slots receive; a query at a padding position adds nothing
    limits    int32 [B, Hk, q] or [B * share, Hk, q] each: slots of `high` and of `low` that a query sees (None: all)

    Returns out [B * share, H, q, D] in the query's dtype, with return_lse also fp32 [B * share, H, q]. A query that sees
    nothing gets zeros and -inf. A query at a padding position gets something finite. No synchronisation with the host.
    Raises UnsupportedShape for tensors that do not fit, or for a shape that implementation="triton" does not take.
    """
    _check(query, high, low, tail, saliency, limits, share)
    options = {"scaling": scaling, "saliency": saliency, "limits": limits, "share": share}
    if takes_triton(implementation, query, _not_for_triton(query, high, low)):
        from .launch import cached_attention as with_triton

        out, lse = with_triton(query, high, low, tail, **options)
    else:
        out, lse = reference.cached_attention(query, high, low, tail, **options)
    return (out, lse) if return_lse else out


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys: lse = logaddexp, out = sum of out_x * exp(lse_x - lse).

    out [..., q, D] in any dtype, lse fp32 [..., q]; an empty part has lse = -inf. Differentiable.
    """
    return _merge(out1, lse1, out2, lse2)


def _not_for_triton(query: Tensor, high: PackedArena, low: PackedArena) -> str | None:
    """Why the kernels do not take this call, or None."""
    if query.shape[3] not in (64, 128):
        return f"head_dim = {query.shape[3]}: the kernel takes 64 and 128"
    if query.shape[2] > MAX_QUERY:
        return f"query length = {query.shape[2]}: the kernel takes 1 to {MAX_QUERY}"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype = {query.dtype}: the kernel takes fp16 and bf16"
    if query.requires_grad and torch.is_grad_enabled():
        return "a query that requires a gradient: the kernel has no backward pass"
    for arena in (high, low):
        if arena.bits == 16 and arena.key_codes.dtype != query.dtype:
            return f"16-bit arena of {arena.key_codes.dtype} with queries of {query.dtype}: dtypes must be equal"
    return None


def _check(
    query: Tensor,
    high: PackedArena,
    low: PackedArena,
    tail: Tail | None,
    saliency: SaliencyBuffers | None,
    limits: tuple[Tensor, Tensor] | None,
    share: int,
) -> None:
    rows, num_heads, length, width = query.shape
    batch, kv_heads = high.key_codes.shape[:2]
    for arena in (high, low):
        found = (*arena.key_codes.shape[:2], arena.head_dim)
        if found != (batch, kv_heads, width):
            raise UnsupportedShape(
                f"arena for (rows, heads, head_dim) = {found}; needed is {(batch, kv_heads, width)} beside the other "
                f"arena and query {tuple(query.shape)}"
            )
    if share < 1 or rows != batch * share or num_heads % kv_heads:
        raise UnsupportedShape(
            f"query {tuple(query.shape)} with share = {share} does not fit arenas of {batch} rows and {kv_heads} KV "
            f"heads: rows must be {batch} * share, query heads a multiple of {kv_heads}"
        )
    if tail is not None and (tail.key.shape[:2] != (rows, kv_heads) or tail.valid.shape != (rows, tail.key.shape[2])):
        raise UnsupportedShape(
            f"tail keys {tuple(tail.key.shape)} and valid {tuple(tail.valid.shape)} do not fit {rows} rows of queries "
            f"and {kv_heads} KV heads"
        )
    if saliency is not None and length > saliency.pending.shape[2]:
        raise UnsupportedShape(
            f"query length = {length} with saliency buffers: they hold {saliency.pending.shape[2]} queries"
        )
    for limit in limits or ():
        if limit.shape[0] not in (batch, rows) or tuple(limit.shape[1:]) != (kv_heads, length):
            raise UnsupportedShape(f"limits {tuple(limit.shape)}: needed is {(rows, kv_heads, length)}")
