"""What happens to columns that leave the 16-bit window: they are ranked, scored, chosen and packed into the history.

Caller: cache/state.py, at the end of a prefill and at a flush. The mathematics of the scores is in scoring.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.quantize import KeyRounding
from . import guards, scoring
from .columns import Columns

if TYPE_CHECKING:
    from .state import LayerState


def score_chunk(
    state: LayerState, columns: Columns, key: Tensor, query: Tensor | None, scaling: float
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """Scores of all columns of a prefill (None: nothing is known) and the evidence that those which stay keep."""
    policy, window = state.policy, state.window
    if not policy.splits:
        return None, None
    if not policy.uses_attention:
        return scoring.position_scores(policy, columns.rank, state.shape.kv_heads, state.sequence_id), None
    if query is None:
        guards.warn_without_queries()
        return None, None
    scores = scoring.chunk_scores(policy, columns, key, query, scaling=scaling)
    window.evident = True
    old, leaving = columns.old, columns.leaving
    if not old and leaving == key.shape[2]:
        return scores, None  # nothing stays
    total, count = scoring.chunk_evidence(policy, columns, scores)
    if old:
        old_total, old_count = window.evidence()
        total[:, :, :old] += old_total
        count[:, :old] += old_count
        merged = scoring.window_scores(policy, total, count, columns.rank)
        scores = torch.cat([merged[:, :, :old], scores[:, :, old:]], dim=2)
    return scores, (total[:, :, leaving:], count[:, leaving:])


def score_window(state: LayerState, columns: Columns) -> Tensor | None:
    """Scores of the window's columns at a flush; None: nothing is known."""
    policy, window = state.policy, state.window
    if window.buffers is not None and window.evident:
        return scoring.window_scores(policy, *window.evidence(), columns.rank)
    if policy.splits and not policy.uses_attention:
        return scoring.position_scores(policy, columns.rank, state.shape.kv_heads, state.sequence_id)
    return None


def retire(
    state: LayerState,
    columns: Columns,
    key: Tensor,
    value: Tensor,
    scores: Tensor | None,
    rounding: KeyRounding | None = None,
) -> None:
    """Pack the first `leaving` of the columns, key and value [B,Hk,m,D]; sinks among them go to their slots."""
    leaving = columns.leaving
    if leaving == 0:
        return
    policy, ratio, salient = state.policy, state.policy.salient_ratio, None
    if not policy.splits:
        scores = None
    elif scores is None:
        salient = scoring.spread(columns.stored, ratio, state.shape.kv_heads)
    else:
        scores = scores[:, :, :leaving]
    key, value = key[:, :, :leaving], value[:, :, :leaving]
    moved = state.history.store.pack(
        key,
        value,
        columns.stored,
        columns.leaving_valid,
        ratio=ratio,
        scores=scores,
        salient=salient,
        rounding=rounding,
    )
    if columns.sinks:
        state.window.fill_sinks(key, value, columns.rank[:, :leaving], columns.leaving_valid)
    state.layout_version += int(moved)
