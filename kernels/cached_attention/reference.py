"""Attention over packed arenas and a 16-bit tail in plain PyTorch: dequantise, one softmax. The kernels' specification.

Arithmetic is fp32, or fp64 when the query is fp64. Every step is a tensor operation: no synchronisation with the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize import PackedArena, dequantize
from .layout import SaliencyBuffers, Tail


def cached_attention(
    query: Tensor,
    high: PackedArena,
    low: PackedArena,
    tail: Tail | None,
    *,
    scaling: float,
    saliency: SaliencyBuffers | None,
    limits: tuple[Tensor, Tensor] | None,
    share: int,
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp), see `quietgoose.kernels.cached_attention.cached_attention`."""
    rows, num_heads, length, _ = query.shape
    kv_heads = high.key_codes.shape[1]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    # [R, Hk, G, q, D]: the group's heads beside each other
    q_RKGQD = query.to(compute).unflatten(1, (kv_heads, num_heads // kv_heads)) * scaling
    scores, values = [], []
    for i, arena in enumerate((high, low)):
        key, value = dequantize(arena, dtype=compute)
        visible = _arena_mask(arena, None if limits is None else limits[i], rows, share)
        score = torch.einsum("rkgqd,rkcd->rkgqc", q_RKGQD, key.repeat_interleave(share, 0))
        scores.append(score.masked_fill(~visible, -torch.inf))
        values.append(value.repeat_interleave(share, 0))
    if tail is not None:
        visible = tail_mask(tail, length)[:, None, None]
        slots_used = visible.any(-2).squeeze(2)[..., None]  # [R, 1, W, 1]
        key = torch.where(slots_used, tail.key.to(compute), 0.0)
        score = torch.einsum("rkgqd,rkcd->rkgqc", q_RKGQD, key)
        scores.append(score.masked_fill(~visible, -torch.inf))
        values.append(torch.where(slots_used, tail.value.to(compute), 0.0))
    score_RKGQC = torch.cat(scores, dim=-1)
    lse_RKGQ = torch.logsumexp(score_RKGQC, dim=-1)
    safe = torch.where(torch.isinf(lse_RKGQ), 0.0, lse_RKGQ)
    weight_RKGQC = torch.exp(score_RKGQC - safe.unsqueeze(-1))
    out = torch.einsum("rkgqc,rkcd->rkgqd", weight_RKGQC, torch.cat(values, dim=2))
    if saliency is not None and tail is not None:
        _add_saliency(saliency, tail, weight_RKGQC[..., -tail.key.shape[2] :])
    return out.flatten(1, 2).to(query.dtype), lse_RKGQ.flatten(1, 2).float()


def tail_mask(tail: Tail, query_length: int) -> Tensor:
    """bool [B, q, W]: query i sees valid slots below length - (q - 1 - i)."""
    slots = torch.arange(tail.key.shape[2], device=tail.key.device)
    end_Q = tail.length.long() - torch.arange(query_length - 1, -1, -1, device=tail.key.device)
    return (slots < end_Q.unsqueeze(1)) & tail.valid.bool().unsqueeze(1)


def _arena_mask(arena: PackedArena, limit: Tensor | None, rows: int, share: int) -> Tensor:
    """bool [R, Hk or 1, 1, q or 1, C]: slots in use and, with limits, below the query's limit."""
    slots = torch.arange(arena.capacity, device=arena.num_blocks.device)
    mask = (slots < arena.lengths().unsqueeze(1)).repeat_interleave(share, 0)[:, None, None, None]
    if limit is None:
        return mask
    if limit.shape[0] != rows:
        limit = limit.repeat_interleave(share, 0)
    return mask & (slots < limit[:, :, None, :, None])


def _add_saliency(saliency: SaliencyBuffers, tail: Tail, weight_RKGQW: Tensor) -> None:
    """Fold the last call's accepted contributions, then store this call's; a padding query contributes nothing."""
    length, width = weight_RKGQW.shape[3:]
    queries = torch.arange(saliency.pending.shape[2], device=weight_RKGQW.device)
    counted = (queries < saliency.accepted)[:, None]
    saliency.total.add_(torch.where(counted, saliency.pending, 0.0).sum(2))
    own_Q = (tail.length.long() - length + queries[:length]).clamp(0, width - 1)
    present_RQ = tail.valid.index_select(1, own_Q).bool()
    contribution = torch.where(present_RQ[:, None, :, None], weight_RKGQW.sum(2), 0.0)
    saliency.pending[:, :, :length] = contribution.to(saliency.pending.dtype)
    saliency.accepted.fill_(length)


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """See `quietgoose.kernels.cached_attention.merge`."""
    lse = torch.logaddexp(lse1, lse2)
    safe = torch.where(torch.isinf(lse), 0.0, lse)
    out = torch.zeros_like(out1, dtype=torch.promote_types(out1.dtype, torch.float32))
    for part, part_lse in ((out1, lse1), (out2, lse2)):
        out = out + part * torch.exp(part_lse - safe).unsqueeze(-1)
    return out.to(out1.dtype), lse
