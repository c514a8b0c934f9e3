"""A text with the thoughts of a model before every token, scored: what thoughts.html shows.

    trace = thought_trace(model, tokenizer, input_ids, ThoughtGeneration(samples=4, temperature=1.0))

All positions think, teacher-forced, by the routines of training: one ordinary pass, one rollout, one scoring pass.
Callers: launch/generate.py, the evaluation stage of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..base.errors import DataError
from ..thoughts.anchors import choose_anchors
from ..thoughts.attention import restore
from ..thoughts.generation import ThoughtGeneration, ThoughtState
from ..thoughts.policy import ModelPolicy, PolicyTensors
from ..thoughts.prefix import run_prefix
from ..thoughts.rollout import rollout
from ..thoughts.scoring import Scores, score_thoughts
from ..thoughts.types import PAUSE, TextRows, Thoughts
from .thoughts_report import SampledThought, ThoughtTrace

ANCHORS_AT_ONCE = 256


@torch.no_grad()
def thought_trace(
    model: Any, tokenizer: Any, input_ids: Tensor, settings: ThoughtGeneration, *, new_from: int | None = None, label: str = "",
    row: int = 0,
) -> ThoughtTrace:  # fmt: skip
    """Score every token but the first of one text, int64 [1, L], by a model that carries thoughts (`thought_state`).

    `settings`: sizes, temperature and generator of the thoughts; every token is thought about, whatever `think_at` says.
    With several thoughts the prediction is the mean of theirs, as in generation. `row`: of the text in the batch that generated
    it, which names the thoughts that were drawn (base/randomness.py). Raises DataError DATA-033 for L < 2.
    """
    if input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise DataError(
            f"a text of shape {tuple(input_ids.shape)} cannot be scored; one row of at least 2 tokens", code="DATA-033"
        )
    state: ThoughtState = model.thought_state
    state.check()
    config = replace(settings.applied_to(state.config), anchors="every", limit=None)
    policy, rows = ModelPolicy(model, state.parameters), TextRows(input_ids)
    tensors = PolicyTensors(state.tensors(input_ids.device))
    try:
        prefix = run_prefix(model, rows)
        row_ids = torch.tensor([row], device=input_ids.device)
        anchors = choose_anchors(config, rows, seed=0, step=0, row_ids=row_ids, one_document=True)
        thoughts = rollout(
            policy, tensors, prefix, rows, anchors, config, settings.generator, greedy=settings.temperature == 0,
            at_once=ANCHORS_AT_ONCE,
        )  # fmt: skip
        scores = score_thoughts(policy, tensors, prefix, rows, thoughts, config, chunk=ANCHORS_AT_ONCE)
    finally:
        restore(model)
    return _trace(tokenizer, input_ids[0], thoughts, scores, new_from, label)


def _trace(
    tokenizer: Any, ids_L: Tensor, thoughts: Thoughts, scores: Scores, new_from: int | None, label: str
) -> ThoughtTrace:
    """Anchor i thinks before token i + 1; the last anchor has nothing to predict."""
    mixed_AS = scores.mixed_BASJ[0, :-1, :, 0]
    mean_A = math.log(mixed_AS.shape[1]) - (-mixed_AS).logsumexp(-1)
    weight_AS = scores.weight_BASJ[0, :-1, :, 0]
    texts = [[thought_text(tokenizer, ids) for ids in samples] for samples in thoughts.tokens_BAST[0, :-1].tolist()]
    numbers = zip(
        texts, scores.reward_BAS[0].tolist(), thoughts.logprob_BAST[0].sum(-1).tolist(), weight_AS.tolist()
    )  # fmt: skip
    sampled = [[SampledThought(*parts) for parts in zip(*samples)] for samples in numbers]
    return ThoughtTrace(
        tokens=[tokenizer.decode([token]) for token in ids_L.tolist()],
        base_nll=[None, *scores.base_BAJ[0, :-1, 0].tolist()],
        mixed_nll=[None, *mean_A.tolist()],
        weight=[None, *weight_AS.mean(-1).tolist()],
        thoughts=[[], *sampled],
        new_from=new_from,
        label=label,
    )


def thought_text(tokenizer: Any, ids: list[int]) -> str:
    """A thought as text; a pause token, which is no vocabulary row, as `<pause>`."""
    decode: Callable[..., str] = tokenizer.decode
    if PAUSE not in ids:
        return decode(ids)
    return "".join("<pause>" if token == PAUSE else decode([token]) for token in ids)
