"""What happens to columns that leave the 16-bit window: they are ranked, scored, chosen and packed into the history.

Caller: cache/state.py, at the end of a prefill and at a flush. The mathematics of the scores is in scoring.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.quantize import KeyRounding
from ..kernels.saliency import select_salient
from . import guards, scoring
from .scoring import Chunk, SharedProbes

if TYPE_CHECKING:
    from .state import LayerState


def rank(state: LayerState, valid: Tensor) -> Tensor:
    """int64 [B,m]: place of window columns among the row's valid columns since the beginning."""
    return state.history.valid_count().unsqueeze(1) + valid.long().cumsum(1) - 1


def score_chunk(
    state: LayerState, chunk: Chunk, query: Tensor | None, scaling: float, probes: SharedProbes | None
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """Scores of all columns of a prefill (None: nothing is known) and the evidence that those which stay keep."""
    policy, window = state.policy, state.window
    if not policy.splits:
        return None, None
    if not policy.uses_attention:
        return scoring.position_scores(policy, chunk.rank, state.shape.kv_heads, state.sequence_id), None
    if query is None:
        guards.warn_without_queries()
        return None, None
    scores, total, count = scoring.chunk_evidence(
        policy, chunk, query, scaling=scaling, sequence_id=state.sequence_id, layer=state.layer_index, shared=probes
    )
    if chunk.old:
        old_total, old_count = window.evidence()
        total[:, :, : chunk.old] += old_total
        count[:, : chunk.old] += old_count
        merged = scoring.window_scores(policy, total, count, chunk.rank)
        scores = torch.cat([merged[:, :, : chunk.old], scores[:, :, chunk.old :]], dim=2)
    window.evident = True
    return scores, (total, count)


def score_window(state: LayerState, chunk: Chunk) -> Tensor | None:
    """Scores of the window's columns at a flush; None: nothing is known."""
    policy, window = state.policy, state.window
    if window.buffers is not None and window.evident:
        return scoring.window_scores(policy, *window.evidence(), chunk.rank)
    if policy.splits and not policy.uses_attention:
        return scoring.position_scores(policy, chunk.rank, state.shape.kv_heads, state.sequence_id)
    return None


def retire(
    state: LayerState,
    chunk: Chunk,
    value: Tensor,
    scores: Tensor | None,
    leaving: int,
    rounding: KeyRounding | None = None,
) -> None:
    """Pack the first `leaving` columns of a chunk; sinks among them go to their slots."""
    if leaving == 0:
        return
    policy, heads = state.policy, state.shape.kv_heads
    valid, rank = chunk.valid[:, :leaving], chunk.rank[:, :leaving]
    key, value = chunk.key[:, :, :leaving], value[:, :, :leaving]
    stored = valid & (rank >= policy.sink_tokens)
    if not policy.splits:
        salient = stored if policy.salient_ratio == 1.0 else torch.zeros_like(stored)
        salient = salient.unsqueeze(1).expand(-1, heads, -1)
    elif scores is None:
        salient = scoring.spread(stored, policy.salient_ratio, heads)
    else:
        salient = select_salient(scores[:, :, :leaving].contiguous(), stored, policy.salient_ratio)
    moved = state.history.store.pack(key, value, salient.contiguous(), stored, valid, rounding)
    state.window.fill_sinks(key, value, rank, valid)
    state.layout_version += int(moved)
