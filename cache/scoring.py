"""From attention to the choice of salient tokens: scores of a chunk, scores of a flushed window, choice without queries.

    prompt   p_i as kernels/saliency gives it, from probe rows of the chunk
    window   p_i = (attention from the chunk's probes + from every decoded query) / (how many of them saw token i)

The second needs the first as a sum and a count; ROW_LENGTH weights rows by their length, about the same for all rows of a
window, so its sums are divided by the length now and multiplied back later. ACCUMULATED divides by nothing. AUTHORS_CODE
differs from EQ8 in prompts only. RECENT and RANDOM look at positions, never at attention. Caller: cache/state.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.saliency import SaliencyMode, choose_probes, probe_saliency, share
from ..kernels.saliency.probes import hash_positions
from .policy import Policy

_CHUNK_STRIDE = 1_000_003  # tells the draws of a row's chunks apart


@dataclass(frozen=True)
class Chunk:
    """Keys of a chunk (after what was in the window) and what the scores of its columns need."""

    key: Tensor  # [B, Hk, m, D]
    valid: Tensor  # bool [B, m]
    rank: Tensor  # int64 [B, m], among the row's valid columns since the beginning
    old: int  # leading columns that were in the window before


class SharedProbes:
    """The probe rows of one forward: chosen by the first layer that asks, handed down to those behind it.

    They depend on what all layers of a cache have in common: which new tokens are valid, how many came before, the rows' ids,
    the policy. A layer that is not behind the last one begins another forward.
    """

    def __init__(self) -> None:
        self._layer = -1
        self._for: Hashable = None
        self._probes: Tensor | None = None

    def of(self, layer: int, what: Hashable, choose: Callable[[], Tensor]) -> Tensor:
        """The forward's probes, int64 [B,P]; `what` tells apart that which may differ between layers (device, policy)."""
        if self._probes is None or layer <= self._layer or what != self._for:
            self._for, self._probes = what, choose()
        self._layer = layer
        return self._probes


def chunk_evidence(
    policy: Policy, chunk: Chunk, query: Tensor, *, scaling: float, sequence_id: Tensor, layer: int = 0,
    shared: SharedProbes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(scores fp32 [B,Hk,m], evidence total fp32 [B,Hk,m], count fp32 [B,m]) from probe rows of query [B,H,n,D].

    The softmax of a probe row runs over the chunk and the window before it, not over packed history.
    """
    fresh = chunk.valid[:, chunk.old :]

    def choose() -> Tensor:
        before = chunk.rank[:, chunk.old] - fresh[:, 0].long() + 1  # valid columns of the row ahead of these queries
        return choose_probes(
            fresh, recent_fraction=policy.probe_recent, random_fraction=policy.probe_random, cap=policy.probe_cap,
            seed=policy.seed, sequence_id=sequence_id + before * _CHUNK_STRIDE, mode=policy.saliency,
        )  # fmt: skip

    probes = choose() if shared is None else shared.of(layer, (policy, fresh.shape, fresh.device), choose)
    index = probes.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    rows = query.gather(2, index)
    probes = torch.where(probes >= 0, probes + chunk.old, -1)
    scores = probe_saliency(rows, chunk.key, probes, chunk.valid, scaling=scaling, mode=policy.saliency).float()
    count = _seen_by(probes, chunk.valid.shape[1])
    total = scores.masked_fill(~chunk.valid.unsqueeze(1), 0.0)
    if policy.saliency is not SaliencyMode.ACCUMULATED:
        total = total * count.unsqueeze(1)
    if policy.saliency is SaliencyMode.ROW_LENGTH:
        total = total / _length(chunk.rank)
    return scores, total, count


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


def _seen_by(probes: Tensor, width: int) -> Tensor:
    """fp32 [B, width]: probes (int64 [B,P], -1 = none) at or after each column."""
    marks = torch.zeros(probes.shape[0], width + 1, device=probes.device)
    marks.scatter_add_(1, probes + 1, (probes >= 0).float())
    return marks[:, 1:].flip(1).cumsum(1).flip(1)


def _length(rank: Tensor) -> Tensor:
    """fp32 [B,1,1]: tokens of each row so far."""
    return (rank[:, -1] + 1).clamp(min=1).float().view(-1, 1, 1)
