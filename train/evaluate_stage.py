"""The `evaluate` stage: every arm on every task, and the traces that the report shows. Called by train/pipeline.py."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..base.errors import RecipeError
from ..base.files import write_json
from ..evaluation.report import Trace
from ..evaluation.run import evaluate
from ..evaluation.tables import mean_values, write_results
from ..evaluation.tasks import Item, Task, find_tasks, load_task
from ..routing.library import ExpertLibrary
from ..routing.model import attach
from ..routing.statistics import collect, entropy, token_votes
from . import skills
from .arms import build_arms
from .base_models import LoadedBase, load_base
from .data.rows import SKILLS
from .evaluate_thoughts import evaluate_thoughts, thoughts_writer
from .recipe import EvaluateSettings, Recipe
from .stages import Context, Writer, the_base, the_library
from .tasks import task_of
from .thought_settings import has_experts, has_thoughts

TRACED_PROMPTS = 24


def load_tasks(settings: EvaluateSettings, seed: int) -> list[Task]:
    """The tasks of `evaluate.collection`/`include`, then `evaluate.tasks` (name -> folder, or `skills:NAME`).

    Raises RecipeError CFG-026 if there is none; DataError for what is wrong with one.
    """
    folders = find_tasks(settings.collection, settings.split, settings.include) if settings.collection else []
    tasks = [load_task(folder, settings.split, settings.limit) for folder in folders]
    tasks += [task_of(name, source, settings.split, seed, settings.limit) for name, source in settings.tasks.items()]
    if not tasks:
        raise RecipeError("evaluate: no tasks; set evaluate.collection or evaluate.tasks", code="CFG-026")
    return tasks


def run_evaluate(context: Context) -> Writer:
    """The table of routers, if there are experts; then the table of thoughts, if the run has that stage."""
    base = the_base(context, "evaluate")
    facts = {**context.facts, "base": base.id, **({"note": "; ".join(base.notes)} if base.notes else {})}
    writers = [evaluate_routing(context, base, facts)] if has_experts(context.recipe) else []
    if has_thoughts(context.recipe):
        found = evaluate_thoughts(context, own_base(context, base))
        writers.append(thoughts_writer(context, found, facts))

    def write(folder: Path) -> None:
        for writer in writers:
            writer(folder)

    return write


def own_base(context: Context, base: LoadedBase) -> LoadedBase:
    """The model that thinks: the base, or what the `thoughts` stage made of all its weights."""
    if context.recipe.thoughts.trainable != "full":
        return base
    folder = context.folder.require("thoughts", "evaluate") / "model"
    return load_base(dataclasses.replace(context.recipe.base, model=str(folder)), context.device)


def evaluate_routing(context: Context, base: LoadedBase, facts: Mapping[str, Any]) -> Writer:
    """Every arm of evaluate.arms on every task, and the traces that the report shows."""
    recipe = context.recipe
    settings = recipe.evaluate
    library = the_library(context, base, "evaluate", gates=True)
    tasks = load_tasks(settings, recipe.seed)
    arms, limited = build_arms(settings.arms, base.model, library, tasks, recipe.router.k, recipe.seed)
    with torch.inference_mode():
        results = evaluate(
            base.model, base.tokenizer, tasks, arms, device=context.device, batch_tokens=settings.batch_tokens,
            max_new_tokens=settings.max_new_tokens, bootstrap=settings.bootstrap, baseline=settings.baseline,
            seed=recipe.seed, arm_tasks=limited, on_progress=context.progress,
        )  # fmt: skip
        attach(base.model, library, recipe.router.name, recipe.router.k, seed=recipe.seed)
        traces = [
            trace(base, library, label, item, _needed(recipe, label, item), context.device)
            for label, item in _samples(tasks, TRACED_PROMPTS)
        ]
        routing = routing_summary(traces, library)
    context.event("routing", **routing)
    context.event("results", **mean_values(results))

    def write(folder: Path) -> None:
        write_results(results, folder, recipe.name, facts)
        write_json(folder / "routing.json", routing)
        write_json(folder / "traces.json", [dataclasses.asdict(one) for one in traces])

    return write


def trace(
    base: LoadedBase, library: ExpertLibrary, label: str, item: Item, needed: Sequence[str | None], device: torch.device
) -> Trace:
    """How the attached router treats one prompt with its gold answer. `needed`: per token of the text the expert that
    the position must pick (the one whose skill predicts the token after it), None where any will do."""
    ids = base.tokenizer(item.prompt + item.completion, add_special_tokens=False)["input_ids"]
    routings = collect(base.model, {"input_ids": torch.tensor([ids], device=device)})
    return Trace(
        tokens=[base.tokenizer.decode([token]) for token in ids],
        experts=library.names,
        votes=token_votes(routings, len(library)).tolist(),
        modules={site: routing.index_TK[:, 0].tolist() for site, routing in routings.items()},
        expected=[library.index(name) if name in library.names else -1 for name in needed] if needed else None,
        label=label,
        entropy=entropy(routings),
    )


def routing_summary(traces: Sequence[Trace], library: ExpertLibrary) -> dict[str, Any]:
    """Load and accuracy of the routing over the traced texts: share of weight per expert; entropy of a token's
    weights at a site, mean, nats; share of decisive tokens whose needed expert has the largest weight summed over all sites
    (None if no token is decisive)."""
    votes_TN = np.concatenate([np.asarray(one.votes) for one in traces])
    needed_T = np.concatenate([np.asarray(one.expected or [-1] * len(one.tokens)) for one in traces])
    decisive = needed_T >= 0
    right = votes_TN.argmax(1)[decisive] == needed_T[decisive]
    tokens = [len(one.tokens) for one in traces]
    return {
        "entropy": round(float(np.average([one.entropy or 0.0 for one in traces], weights=tokens)), 4),
        "load": dict(zip(library.names, (votes_TN.sum(0) / votes_TN.sum()).round(4).tolist(), strict=True)),
        "decisive_tokens": int(decisive.sum()),
        "decisive_right": round(float(right.mean()), 4) if decisive.any() else None,
    }


def _needed(recipe: Recipe, label: str, item: Item) -> list[str | None]:
    """The expert every position needs, known for the procedural skills (a character is a token there)."""
    source = recipe.evaluate.tasks.get(label.split()[0], "")
    if recipe.base.model != "nano" or not source.startswith(SKILLS):
        return []
    return skills.needed_experts(item.prompt, item.completion)


def _samples(tasks: Sequence[Task], number: int) -> list[tuple[str, Item]]:
    """The first items of every task in turn, `number` in all."""
    rounds = itertools.zip_longest(
        *([(f"{task.name} {i + 1}", item) for i, item in enumerate(task.items)] for task in tasks)
    )
    return [sample for round_ in rounds for sample in round_ if sample is not None][:number]
