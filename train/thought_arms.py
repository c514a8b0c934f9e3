"""The rows of the table of thoughts: one model, with its thoughts, without them, and with what should not help.

base          before thoughts were trained: the LoRA on top off        shuffled  every position gets another item's thought
no_thought    as trained, nothing thought                              pause     START again and again instead of a thought
untrained     greedy thoughts by START, END and head as they began     random    tokens drawn evenly instead of a thought
thought       greedy thoughts before every answer token
temperature   no_thought, logits divided by one number fitted on other rows: what mere sharpening gives

A row of a batch is one continuation after its prompt; every position that predicts one of its tokens, or end-of-text, is an
anchor. Used by train/evaluate_thoughts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..base import distributed
from ..base.errors import DataError, RecipeError
from ..base.seeding import generator
from ..evaluation.encoding import encode_task, end_of_text, padding
from ..evaluation.run import OwnScoring
from ..evaluation.scoring import (
    LeafScores,
    TreeBatch,
    TreeRow,
    collate,
    logits_only_at,
    scoring_attention,
    tree_batches,
    tree_mask,
    tree_rows,
)
from ..evaluation.tasks import Task
from ..kernels.linear_loss import scores
from ..kernels.wide_head import unrounded
from ..routing.on_top import TopLora
from ..thoughts.anchors import IGNORED, choose_anchors
from ..thoughts.attention import restore
from ..thoughts.branch import language_head, look_ahead
from ..thoughts.config import ThoughtConfig
from ..thoughts.parameters import ThoughtParameters
from ..thoughts.policy import ModelPolicy, Policy, PolicyTensors
from ..thoughts.prefix import run_prefix
from ..thoughts.rollout import rollout
from ..thoughts.scoring import shuffled
from ..thoughts.types import Anchors, Prefix, Thoughts
from .types import Batch

CONTROLS = {"pause": "pause", "random": "random_thoughts"}
TEMPERATURES = tuple(2.0 ** (step / 8) for step in range(-16, 17))
NOT_SCORED = -1
"""Number of a leaf that is not among those scored."""

Arm = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class ThinkingModel:
    """A model with its thoughts, ready to be scored. `top`: where its LoRA lies, None if it has none; `began`: START, END
    and head before training; `donors`: two items whose thoughts the arm shuffled takes where a batch holds one prompt only."""

    policy: Policy
    config: ThoughtConfig
    top: TopLora | None
    tokenizer: Any
    seed: int
    branch_tokens: int
    began: ThoughtParameters | None = None
    donors: tuple[TreeRow, ...] = ()


def build_thought_arms(
    names: Sequence[str], thinker: ThinkingModel, temperature: Callable[[], float]
) -> dict[str, Arm]:
    """Arms by row name. `temperature()` fits the temperature arm's number; called only if that arm is asked for."""
    arms: dict[str, Arm] = {}
    for name in names:
        if name == "base":
            arms[name] = lambda: _without_adapter(thinker)
        elif name == "no_thought":
            arms[name] = lambda: _plain(thinker)
        elif name == "temperature":
            arms[name] = lambda: _tempered(thinker, temperature())
        elif name == "untrained":
            arms[name] = _untrained(thinker)
        else:
            arms[name] = _thinking(thinker, name)
    return arms


@contextmanager
def _plain(thinker: ThinkingModel) -> Iterator[None]:
    """Logits are not rounded to the model's dtype: those of the arms that think are not either."""
    restore(thinker.policy.model)  # type: ignore[arg-type]
    with unrounded(thinker.policy.model.get_output_embeddings()):
        yield


@contextmanager
def _without_adapter(thinker: ThinkingModel) -> Iterator[None]:
    with _plain(thinker), nullcontext() if thinker.top is None else thinker.top.bound(None):
        yield


@contextmanager
def _tempered(thinker: ThinkingModel, temperature: float) -> Iterator[None]:
    head: Any = thinker.policy.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, logits: logits / temperature)
    try:
        with _plain(thinker):
            yield
    finally:
        handle.remove()


def _untrained(thinker: ThinkingModel) -> Arm:
    """Thoughts as they were before the first step."""
    if thinker.began is None:
        raise RecipeError("evaluate.thoughts.arms: 'untrained' needs the parameters before training", code="CFG-025")
    before = replace(thinker, policy=ModelPolicy(thinker.policy.model, thinker.began), top=None)

    @contextmanager
    def enter() -> Iterator[OwnScoring]:
        with _without_adapter(thinker), _thinking(before, "untrained")() as scoring:
            yield scoring

    return enter


def _thinking(thinker: ThinkingModel, name: str) -> Arm:
    @contextmanager
    def enter() -> Iterator[OwnScoring]:
        try:
            options = {"thoughts": True} if name == "thought" else {}
            yield OwnScoring(lambda batch, leaves: score_tree(thinker, name, batch, leaves), options)
        finally:
            restore(thinker.policy.model)  # type: ignore[arg-type]

    return enter


@torch.no_grad()
def score_tree(thinker: ThinkingModel, arm: str, batch: TreeBatch, into: LeafScores) -> None:
    """Add a batch's predictions to `into`, each made after a thought of its own (evaluation/scoring.py says what is added)."""
    device = batch.token_BT.device
    trees = with_donor(batch.rows, thinker.donors) if arm == "shuffled" else batch.rows
    rows, leaf_B = leaf_rows(trees, end_of_text(thinker.tokenizer), padding(thinker.tokenizer), device)
    policy, tensors = thinker.policy, thinker.policy.tensors()
    with policy.bind(tensors):
        prefix = run_prefix(policy.model, rows)
    config = replace(scoring_config(thinker.config, arm), limit=int((rows.labels_BT != IGNORED).sum(1).max()))
    anchors = choose_anchors(config, rows, seed=thinker.seed, step=0)
    thoughts = think(thinker, arm, tensors, prefix, rows, anchors, config)
    if arm == "shuffled":
        thoughts = shuffled(thoughts, *answer_places(trees, anchors))
        assert bool((thoughts.anchors.valid_BA == anchors.valid_BA).all()), "every anchor has another item's thought"
    nll_BA, hit_BA = first_token(thinker, tensors, prefix, rows, thoughts)
    valid_BA = anchors.valid_BA & (leaf_B[:, None] >= 0)
    labels_BA = rows.labels_BT.gather(1, anchors.index_BA.clamp_min(0))
    end_BA = valid_BA & (anchors.index_BA == anchors.index_BA.amax(1, keepdim=True))
    assert bool((labels_BA[end_BA] == end_of_text(thinker.tokenizer)).all())
    leaf_BA = leaf_B[:, None].expand_as(valid_BA)
    for target, wanted, value in (
        (into.sum_L, valid_BA & ~end_BA, -nll_BA), (into.end_L, end_BA, -nll_BA), (into.missed_L, valid_BA, ~hit_BA),
    ):  # fmt: skip
        target.index_add_(0, leaf_BA[wanted], value[wanted].double())


def think(
    thinker: ThinkingModel, arm: str, tensors: PolicyTensors, prefix: Prefix, rows: Batch, anchors: Anchors,
    config: ThoughtConfig,
) -> Thoughts:  # fmt: skip
    """The thoughts of an arm: greedy, pauses, or random tokens (those of `shuffled` before they are exchanged)."""
    random = generator(thinker.seed, "thoughts", "evaluation", arm)
    per_anchor = rows.tokens_BT.shape[0] * config.tokens
    at_once = max(1, thinker.branch_tokens // per_anchor)
    return rollout(thinker.policy, tensors, prefix, rows, anchors, config, random, greedy=True, at_once=at_once)


def donor_rows(tasks: Sequence[Task], tokenizer: Any) -> tuple[TreeRow, ...]:
    """The gold answers of two items of different prompts; empty if there are none."""
    found: dict[str, TreeRow] = {}
    for task in tasks:
        for index, item in enumerate(task.items):
            if item.prompt not in found:
                (coded,) = encode_task(task, tokenizer, [index], None)
                found[item.prompt] = TreeRow(coded.ref, coded.prompt, (coded.leaves[coded.gold],), NOT_SCORED)
            if len(found) == 2:
                return tuple(found.values())
    return ()


def with_donor(rows: Sequence[TreeRow], donors: Sequence[TreeRow]) -> tuple[TreeRow, ...]:
    """Rows of one prompt, and one of another, which is not scored; others as they are. DataError DATA-001 if there is none."""
    prompts = {row.prompt for row in rows}
    if len(prompts) > 1:
        return tuple(rows)
    other = next((row for row in donors if row.prompt not in prompts), None)
    if other is None:
        raise DataError("evaluate.thoughts.arms: 'shuffled' needs items of two different prompts", code="DATA-001")
    return (*rows, other)


def answer_places(rows: Sequence[TreeRow], anchors: Anchors) -> tuple[Tensor, Tensor]:
    """(slot, group) int64 [B, A], what `shuffled` exchanges by: the number of the answer's token, as far as answers to two
    prompts have one, END with END; and one group a prompt, because what its choices think before their first token is the same.
    """
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
    longest = [0] * len(prompts)
    for row in rows:
        longest[prompts[row.prompt]] = max(longest[prompts[row.prompt]], *map(len, row.leaves))
    shared = sorted(longest)[-2]
    group_B = torch.tensor([prompts[row.prompt] for row in rows for _ in row.leaves], device=anchors.index_BA.device)
    valid_BA = anchors.valid_BA
    number_BA = (valid_BA.cumsum(1) - 1).clamp(0, shared - 1)
    end_BA = valid_BA & (anchors.index_BA == anchors.index_BA.amax(1, keepdim=True))
    return number_BA.masked_fill(end_BA, shared), group_B[:, None].expand_as(valid_BA)


def scoring_config(config: ThoughtConfig, arm: str) -> ThoughtConfig:
    """As trained, but one thought an anchor, an anchor at every label, and one scored token: the next. A model that was
    trained with pauses or random thoughts has them in the arm `thought`."""
    trained = config.control if config.control in CONTROLS.values() else "none"
    return replace(
        config, lookahead=1, samples=1, anchors="every", control=CONTROLS.get(arm, trained), rollout_cache="exact",
        limit=None,
    )  # fmt: skip


def first_token(
    thinker: ThinkingModel, tensors: PolicyTensors, prefix: Prefix, rows: Batch, thoughts: Thoughts
) -> tuple[Tensor, Tensor]:
    """(-log p(next token), is it the argmax) after each thought, fp32 and bool [B, A], mixed as in training."""
    model, head = thinker.policy.model, language_head(thinker.policy.model)
    count, branch = thoughts.anchors.count, thoughts.tokens_BAST.shape[-1] + 2
    size = max(1, thinker.branch_tokens // (rows.tokens_BT.shape[0] * branch))
    parts = []
    for first in range(0, count, size):
        with thinker.policy.bind(tensors):
            ahead = look_ahead(model, tensors.thought, prefix, rows, thoughts.part(first, first + size), 1)
        wide_BAV = scores(head(ahead.mixed_BASJD[:, :, 0, 0]))
        label_BA = ahead.labels_BAJ[..., 0]
        logprob_BA = wide_BAV.log_softmax(-1).gather(-1, label_BA[..., None]).squeeze(-1)
        parts.append((-logprob_BA, wide_BAV.argmax(-1) == label_BA))
    nll, hit = zip(*parts)
    return torch.cat(nll, 1), torch.cat(hit, 1)


def leaf_rows(rows: Sequence[TreeRow], eos: int, pad: int, device: Any) -> tuple[Batch, Tensor]:
    """(every continuation behind its prompt as a row of its own, the number of each leaf). Labels: its tokens, then end."""
    pairs = [
        (row.prompt, leaf, row.first_leaf + n if row.first_leaf >= 0 else NOT_SCORED)
        for row in rows
        for n, leaf in enumerate(row.leaves)
    ]
    width = max(len(prompt) + len(leaf) for prompt, leaf, _ in pairs)
    tokens, labels, segments = [], [], []
    for prompt, leaf, _ in pairs:
        rest = width - len(prompt) - len(leaf)
        tokens.append([*prompt, *leaf, *[pad] * rest])
        labels.append([*[IGNORED] * (len(prompt) - 1), *leaf, eos, *[IGNORED] * rest])
        segments.append([1] * (width - rest) + [0] * rest)
    position_BT = torch.arange(width).expand(len(pairs), width).clone()
    batch = Batch(
        torch.tensor(tokens), torch.tensor(labels), position_BT, torch.tensor(segments, dtype=torch.int32),
        torch.zeros(len(pairs), dtype=torch.int64),
    )  # fmt: skip
    return batch.to(device), torch.tensor([number for *_, number in pairs], device=device)


@torch.no_grad()
def fit_temperature(thinker: ThinkingModel, tasks: Sequence[Task], batch_tokens: int, device: Any) -> float:
    """The one temperature of TEMPERATURES under which the gold answers of `tasks` are likeliest, nothing thought.
    Collective: every rank takes its share of the items and gets the same number."""
    model, tokenizer, here = thinker.policy.model, thinker.tokenizer, distributed.world()
    eos, pad = end_of_text(tokenizer), padding(tokenizer)
    total_K = torch.zeros(len(TEMPERATURES), dtype=torch.float64, device=device)
    items = [
        replace(item, leaves=(item.leaves[item.gold],), gold=0)
        for task in tasks
        for item in encode_task(task, tokenizer, range(here.rank, len(task.items), here.size), None)
    ]
    head: Any = model.get_output_embeddings()
    with (
        unrounded(head),
        scoring_attention(model, max((len(i.prompt) + len(i.leaves[0]) + 1 for i in items), default=0)),
    ):
        for part in tree_batches(tree_rows(items), batch_tokens, model.config.vocab_size):
            batch = collate(part, eos, pad, device)
            with logits_only_at(model, batch.source_U):
                logits_UV = model(
                    input_ids=batch.token_BT, position_ids=batch.position_BT,
                    attention_mask=tree_mask(batch.branch_BT), use_cache=False,
                ).logits[0]  # fmt: skip
            wide_PV = scores(logits_UV[batch.where_P])
            for number, temperature in enumerate(TEMPERATURES):
                logprob_PV = (wide_PV / temperature).log_softmax(-1)
                total_K[number] -= logprob_PV.gather(1, batch.target_P[:, None]).double().sum()
    return TEMPERATURES[int(distributed.all_reduce_sum(total_K).argmin())]
