"""The `evaluate` stage: every arm on every task, and the traces that the report shows. Called by train/pipeline.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..base.errors import RecipeError
from ..base.files import write_json
from ..evaluation.report import Trace
from ..evaluation.results import Results
from ..evaluation.run import evaluate
from ..evaluation.tables import write_results
from ..evaluation.tasks import Task, find_tasks, load_task, make_task
from ..routing.library import ExpertLibrary
from ..routing.model import attach, detach
from ..routing.routers import SiteVectors
from ..routing.statistics import average_activation, collect, token_votes
from . import skills
from .arms import build_arms
from .base_models import LoadedBase
from .data.attention import model_inputs
from .data.build import build_step_data, resolve_sources
from .recipe import EvaluateSettings, TrainSettings
from .stages import Context, Writer, the_base, the_library

TRACED_PROMPTS = 12
ACTIVATION_ROWS = 32


def load_tasks(settings: EvaluateSettings, seed: int) -> list[Task]:
    """The tasks of `evaluate.collection`/`include`, then `evaluate.tasks` (name -> folder, or `skills:NAME`).

    Raises RecipeError CFG-026 if there is none; DataError for what is wrong with one.
    """
    folders = find_tasks(settings.collection, settings.split, settings.include) if settings.collection else []
    tasks = [load_task(folder, settings.split, settings.limit) for folder in folders]
    for name, source in settings.tasks.items():
        if source.startswith(skills.PREFIX):
            rows = skills.rows(source.removeprefix(skills.PREFIX), settings.split, seed)[: settings.limit]
            group = "two experts" if source.endswith("mixed") else "one expert"
            tasks.append(make_task(name, rows, group, source))
        else:
            tasks.append(load_task(source, settings.split, settings.limit))
    if not tasks:
        raise RecipeError("evaluate: no tasks; set evaluate.collection or evaluate.tasks", code="CFG-026")
    return tasks


def run_evaluate(context: Context) -> Writer:
    recipe = context.recipe
    settings = recipe.evaluate
    base = the_base(context, "evaluate")
    library = the_library(context, base, "evaluate", gates=True)
    tasks = load_tasks(settings, recipe.seed)
    arms, limited = build_arms(
        settings.arms, base.model, library, tasks, recipe.router.k, recipe.seed,
        lambda: mean_activations(context, base, library),
    )  # fmt: skip
    with torch.inference_mode():
        results = evaluate(
            base.model, base.tokenizer, tasks, arms, device=context.device, batch_tokens=settings.batch_tokens,
            max_new_tokens=settings.max_new_tokens, bootstrap=settings.bootstrap, baseline=settings.baseline,
            seed=recipe.seed, arm_tasks=limited, on_progress=context.progress("evaluate"),
        )  # fmt: skip
        attach(base.model, library, recipe.router.name, recipe.router.k, seed=recipe.seed)
        traces = [trace(base, library, task, item) for task, item in _samples(tasks)]
        routing = _routing_summary(base, library, tasks)
    detach(base.model)
    context.event("routing", **routing)
    context.keep(results=results, traces=traces)

    def write(folder: Path) -> None:
        write_results(results, folder, recipe.name, {**context.facts, **{"base": base.id, "notes": list(base.notes)}})
        write_json(folder / "routing.json", routing)

    return write
