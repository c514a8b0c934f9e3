"""The whole evaluation: tasks x arms, sharded over ranks, in few large batches that are built once for all
arms.

An arm is a function that returns a context manager; within it the model is in the arm's state (a router set,
an expert switched on, adapters off). Where rows of one batch need different states (oracle: every task its
own expert), the context manager yields a `PerRow`, which is entered around every batch with the items of its
rows. Where log-likelihoods are made otherwise (thoughts), it yields an `OwnScoring`.

    results = evaluate(model, tokenizer, tasks, {"base": lambda: adapters_off(model), "phatgoose":
    nullcontext})

Called by the evaluate stage and launch/evaluate.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from ..base.distributed import gather, world
from ..base.errors import DataError, MemoryExhausted, RecipeError, suggest
from .encoding import EncodedItem, ItemRef, encode_task, end_of_text, padding
from .generation import (
    PromptBatch,
    collate_prompts,
    generate_batch,
    is_correct,
    prompt_batches,
    prompt_rows,
)
from .results import ItemScores, Results, summarise
from .scoring import LeafScores, TreeBatch, collate, score_batch, scoring_attention, tree_batches, tree_rows
from .tasks import Task

Generation = Literal["never", "numbers", "always"]
Arm = Callable[[], AbstractContextManager[Any]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PerRow:
    """What an arm's context manager yields if its rows differ: `enter(refs)` is a context manager for one
    batch whose row b belongs to the item `refs[b]`."""

    enter: Callable[[Sequence[ItemRef]], AbstractContextManager[Any]]


@dataclass(frozen=True)
class OwnScoring:
    """What an arm's context manager yields if its log-likelihoods are not those of one forward of the model:
    `score(batch, leaves)` adds a batch's predictions to `leaves`, as scoring.score_batch does. `options` go to
    `model.generate`."""

    score: Callable[[TreeBatch, LeafScores], None]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Plan:
    """This rank's share of some tasks, as batches on the device, and what a leaf's number means."""

    tasks: tuple[Task, ...]
    items: list[EncodedItem]
    trees: list[TreeBatch]
    prompts: list[PromptBatch]
    leaf_length_L: np.ndarray
    first_leaf_N: np.ndarray

    @property
    def batches(self) -> int:
        return len(self.trees) + len(self.prompts)


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    arms: Mapping[str, Arm],
    *,
    device: torch.device | str,
    batch_tokens: int = 8192,
    max_new_tokens: int = 64,
    generate: Generation = "numbers",
    bootstrap: int = 1000,
    baseline: str = "base",
    seed: int = 0,
    arm_tasks: Mapping[str, Sequence[str]] | None = None,
    on_progress: Progress | None = None,
) -> Results:
    """Score every arm on every task (on `arm_tasks[arm]` where given). Collective: all ranks get all results.

    generate: which generate tasks are really generated. `numbers`: those with numeric targets, whose rule
    reads a free text, while string targets are judged by the teacher-forced pass (greedy emits the answer
    iff each of its tokens and end-of-text is the argmax); `always`; `never`.
    batch_tokens: tokens of a forward pass, padding included; a large GPU takes 131072 for a small model.
    on_progress(arm, done, total) counts batches of this rank.
    Raises RecipeError (CFG-001) for unknown names, DataError for items that do not fit, MemoryExhausted
    (MEM-001).
    """
    chosen = _check(tasks, arms, baseline, arm_tasks or {})
    plans: dict[tuple[str, ...], _Plan] = {}
    for names in dict.fromkeys(chosen.values()):
        own = [task for task in tasks if task.name in names]
        plans[names] = _plan(own, tokenizer, model, device, batch_tokens, max_new_tokens, generate)
    total = sum(plans[names].batches for names in chosen.values())
    scores: dict[tuple[str, str], tuple[list[int], ItemScores]] = {}
    seconds: dict[str, float] = {}
    done = 0
    for arm, names in chosen.items():
        plan, start = plans[names], time.monotonic()

        def tick(arm: str = arm) -> None:
            nonlocal done
            done += 1
            if on_progress is not None:
                on_progress(arm, done, total)

        with _memory_named(batch_tokens), scoring_attention(model, _longest(plan)), arms[arm]() as state:
            scores |= {(arm, name): found for name, found in _run(model, tokenizer, plan, state, device, tick).items()}
        seconds[arm] = time.monotonic() - start
    merged, slowest = _merge(scores, seconds, {task.name: len(task.items) for task in tasks})
    metrics = {task.name: _metric(task, generate) for task in tasks}
    cells, means = summarise(tasks, list(arms), merged, metrics, baseline, bootstrap, seed)
    settings = {
        "bootstrap": bootstrap,
        "seed": seed,
        "generate": generate,
        "max_new_tokens": max_new_tokens,
        "batch_tokens": batch_tokens,
        "processes": world().size,
    }
    names = tuple(task.name for task in tasks)
    return Results(names, tuple(arms), baseline, cells, means, slowest, settings, scores=merged)


def _check(
    tasks: Sequence[Task], arms: Mapping[str, Arm], baseline: str, arm_tasks: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """The tasks of every arm, in the order of `tasks`; RecipeError for a name that does not exist."""
    names = [task.name for task in tasks]
    if not names or not arms:
        raise RecipeError("evaluation: at least one task and one arm are needed", code="CFG-001")
    if len(set(names)) != len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise RecipeError(f"evaluation: two tasks are named '{double}'; rename one", code="CFG-001")
    wanted = [("baseline", baseline, list(arms)), *(("arm", arm, list(arms)) for arm in arm_tasks)]
    wanted += [("task", name, names) for subset in arm_tasks.values() for name in subset]
    for what, name, allowed in wanted:
        if name not in allowed:
            raise RecipeError(
                f"evaluation: {what} '{name}' is not among {', '.join(allowed)}.{suggest(name, allowed)}",
                code="CFG-001",
            )
    return {arm: tuple(name for name in names if name in arm_tasks.get(arm, names)) for arm in arms}


def _plan(
    tasks: Sequence[Task],
    tokenizer: Any,
    model: Any,
    device: torch.device | str,
    batch_tokens: int,
    max_new_tokens: int,
    generate: Generation,
) -> _Plan:
    here, eos, pad = world(), end_of_text(tokenizer), padding(tokenizer)
    context = getattr(model.config, "max_position_embeddings", None)
    by_task = {
        task.name: encode_task(task, tokenizer, range(here.rank, len(task.items), here.size), context) for task in tasks
    }
    items = [item for task in tasks for item in by_task[task.name]]
    rows = [
        row
        for task in tasks
        if _generated(task, generate)
        for row in prompt_rows(task, by_task[task.name], max_new_tokens)
    ]
    longest = max((len(row.prompt) + row.limit for row in rows), default=0)
    if context is not None and longest > context:
        raise DataError(
            f"a prompt and its budget of new tokens are {longest} tokens, the model takes {context}; "
            f"lower max_new_tokens (now {max_new_tokens})",
            code="DATA-004",
        )
    generated = [collate_prompts(part, pad, device) for part in prompt_batches(rows, batch_tokens)]
    lengths = [len(leaf) for item in items for leaf in item.leaves]
    first = np.cumsum([0, *(len(item.leaves) for item in items)])[:-1]
    batches = tree_batches(tree_rows(items), batch_tokens, model.config.vocab_size)
    trees = [collate(part, eos, pad, device) for part in batches]
    return _Plan(tuple(tasks), items, trees, generated, np.array(lengths), first)


def _run(
    model: Any, tokenizer: Any, plan: _Plan, state: Any, device: torch.device | str, tick: Callable[[], None]
) -> dict[str, tuple[list[int], ItemScores]]:
    """One arm over the plan: per task the indices of this rank's items and their scores."""
    leaves = LeafScores.zeros(len(plan.leaf_length_L), device)
    for tree in plan.trees:
        if isinstance(state, OwnScoring):
            state.score(tree, leaves)
        else:
            with _rows(state, tree.refs):
                score_batch(model, tree, leaves)
        tick()
    tasks = {task.name: task for task in plan.tasks}
    eos, pad = end_of_text(tokenizer), padding(tokenizer)
    generated: dict[ItemRef, bool] = {}
    for batch in plan.prompts:
        options = state.options if isinstance(state, OwnScoring) else {}
        with _rows(state, batch.refs):
            texts = generate_batch(model, batch, eos, pad, **options)
        for ref, new in zip(batch.refs, texts, strict=True):
            task = tasks[ref.task]
            generated[ref] = is_correct(new, task.items[ref.index].target, task, tokenizer)
        tick()
    return _item_scores(plan, leaves, generated)


def _item_scores(
    plan: _Plan, leaves: LeafScores, generated: Mapping[ItemRef, bool]
) -> dict[str, tuple[list[int], ItemScores]]:
    sum_L, end_L, missed_L = (part.cpu().numpy() for part in (leaves.sum_L, leaves.end_L, leaves.missed_L))
    rank_L = sum_L / plan.leaf_length_L
    found: dict[str, list[tuple[int, float, float, float]]] = {task.name: [] for task in plan.tasks}
    for item, first in zip(plan.items, plan.first_leaf_N, strict=True):
        gold = first + item.gold
        if len(item.leaves) > 1:
            right = int(rank_L[first : first + len(item.leaves)].argmax()) == item.gold
        else:
            right = generated.get(item.ref, bool(missed_L[gold] == 0))
        answer = (float(right), -float(sum_L[gold] + end_L[gold]), float(plan.leaf_length_L[gold] + 1))
        found[item.ref.task].append((item.ref.index, *answer))
    scores: dict[str, tuple[list[int], ItemScores]] = {}
    for name, rows in found.items():
        table = np.array(rows, dtype=np.float64).reshape(-1, 4)
        scores[name] = (table[:, 0].astype(int).tolist(), ItemScores(table[:, 1], table[:, 2], table[:, 3]))
    return scores


def _merge(
    scores: Mapping[tuple[str, str], tuple[list[int], ItemScores]],
    seconds: Mapping[str, float],
    sizes: Mapping[str, int],
) -> tuple[dict[tuple[str, str], ItemScores], dict[str, float]]:
    """All ranks' scores in item order, and each arm's slowest rank."""
    gathered = gather((scores, seconds))
    merged: dict[tuple[str, str], ItemScores] = {}
    for key in scores:
        whole = ItemScores(*(np.full(sizes[key[1]], np.nan) for _ in range(3)))
        for part, _ in gathered:
            indices, own = part[key]
            whole.correct_N[indices] = own.correct_N
            whole.nats_N[indices] = own.nats_N
            whole.tokens_N[indices] = own.tokens_N
        merged[key] = whole
    return merged, {arm: max(times[arm] for _, times in gathered) for arm in seconds}


def _rows(state: Any, refs: Sequence[ItemRef]) -> AbstractContextManager[Any]:
    return state.enter(refs) if isinstance(state, PerRow) else nullcontext()


@contextmanager
def _memory_named(batch_tokens: int) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryExhausted(
            f"evaluation: out of GPU memory; batch_tokens {batch_tokens}, try {max(1, batch_tokens // 2)}",
            code="MEM-001",
        ) from error


def _generated(task: Task, generate: Generation) -> bool:
    return task.kind == "generate" and (generate == "always" or (generate == "numbers" and task.match == "number"))


def _metric(task: Task, generate: Generation) -> str:
    """How the task is judged, in words for the table."""
    if task.kind == "choice":
        return "choice by likelihood per token"
    if not _generated(task, generate):
        return "exact match, teacher-forced"
    return "last number, generated" if task.match == "number" else "exact match, generated"


def _longest(plan: _Plan) -> int:
    return max((len(item.prompt) + max(map(len, item.leaves)) + 1 for item in plan.items), default=0)
