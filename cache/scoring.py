"""From attention to the choice of salient tokens: scores of a chunk, scores of a flushed window, choice without queries.

    prompt   p_i as kernels/saliency gives it, from probe rows of the chunk
    window   p_i = (attention from the chunk's probes + from every decoded query) / (how many of them saw token i)

The second needs the first as a sum and a count; ROW_LENGTH weights rows by their length, about the same for all rows of a
window, so its sums are divided by the length now and multiplied back later. ACCUMULATED divides by nothing. AUTHORS_CODE
differs from EQ8 in prompts only. RECENT and RANDOM look at positions, never at attention. Caller: cache/packing.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.saliency import SaliencyMode, probe_saliency, share
from ..kernels.saliency.probes import hash_positions
from .columns import Columns
from .policy import Policy


def chunk_scores(policy: Policy, columns: Columns, key: Tensor, query: Tensor, *, scaling: float) -> Tensor:
    """Scores fp32 [B,Hk,m] of keys [B,Hk,m,D] from the probe rows among the new queries [B,H,n,D].

    The softmax of a probe row runs over the chunk and the window before it, not over packed history.
    """
    assert columns.probes is not None
    rows = query.gather(2, columns.query_rows.expand(-1, query.shape[1], -1, query.shape[3]))
    return probe_saliency(
        rows, key, columns.probes, columns.valid, scaling=scaling, mode=policy.saliency, first=columns.first
    ).float()


def chunk_evidence(policy: Policy, columns: Columns, scores: Tensor) -> tuple[Tensor, Tensor]:
    """What `chunk_scores` are made of: (total fp32 [B,Hk,m], count fp32 [B,m]), both the caller's to change."""
    count = columns.seen_by.clone()
    total = scores.masked_fill(~columns.valid.unsqueeze(1), 0.0)
    if policy.saliency is not SaliencyMode.ACCUMULATED:
        total = total * count.unsqueeze(1)
    if policy.saliency is SaliencyMode.ROW_LENGTH:
        total = total / _length(columns.rank)
    return total, count


def window_scores(policy: Policy, total: Tensor, count: Tensor, rank: Tensor) -> Tensor:
    """Scores fp32 [B,Hk,m] of window columns from their evidence (total [B,Hk,m], count [B,m])."""
    if policy.saliency is SaliencyMode.ACCUMULATED:
        return total
    scores = total / count.clamp(min=1.0).unsqueeze(1)
    return scores * _length(rank) if policy.saliency is SaliencyMode.ROW_LENGTH else scores


def position_scores(policy: Policy, rank: Tensor, kv_heads: int, sequence_id: Tensor) -> Tensor:
    """Scores of RECENT and RANDOM, fp32 [B,Hk,m]: functions of a token's rank in its row."""
    if policy.saliency is SaliencyMode.RECENT:
        return rank.float().unsqueeze(1).expand(-1, kv_heads, -1)
    heads = torch.arange(1, kv_heads + 1, device=rank.device).view(1, -1, 1)
    hashed = hash_positions(rank.unsqueeze(1), sequence_id.view(-1, 1, 1) * 65537 + heads, policy.seed)
    return (hashed >> 38).float() / 2**24


def spread(stored: Tensor, ratio: float, kv_heads: int) -> Tensor:
    """Salient tokens where nothing is known: ceil(ratio * count) of each row, evenly spaced; bool [B,Hk,m]."""
    place = stored.long().cumsum(1)  # 1 for the first stored token
    chosen = stored & (share(ratio, place) > share(ratio, (place - 1).clamp(min=0)))
    return chosen.unsqueeze(1).expand(-1, kv_heads, -1)


def _length(rank: Tensor) -> Tensor:
    """fp32 [B,1,1]: tokens of each row so far."""
    return (rank[:, -1] + 1).clamp(min=1).float().view(-1, 1, 1)
