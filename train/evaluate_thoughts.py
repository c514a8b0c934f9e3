"""The `evaluate` stage's part about thoughts: the table of arms, gain by entropy, and the page that shows thoughts.

    thoughts.{json,md,csv}    every arm on every task of evaluate.thoughts
    generated.{json,md,csv}   the tasks whose answers are generated
    deciles.json              nats saved by decile of entropy on evaluate.thoughts.text
    thoughts.html             what was thought, and its worth

Called by train/evaluate_stage.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..base.errors import DataError
from ..base.files import write_atomic, write_json
from ..evaluation.results import Results
from ..evaluation.run import evaluate
from ..evaluation.tables import mean_values, to_markdown, write_results
from ..evaluation.tasks import Task
from ..evaluation.thoughts_report import ThoughtTrace, write_thoughts_report
from ..evaluation.thoughts_trace import thought_trace
from ..routing.sites import all_sites
from ..thoughts.generation import ThoughtGeneration
from ..thoughts.parameters import ThoughtParameters
from ..thoughts.policy import ModelPolicy
from . import thought_deciles
from .base_models import LoadedBase
from .data.build import build_step_data
from .data.loader import StepData
from .recipe import Recipe, ThoughtEvaluation, TrainSettings
from .stages import Context, Writer
from .stages_thoughts import fresh_parameters, put_below
from .tasks import task_of, with_split
from .thought_arms import ThinkingModel, build_thought_arms, donor_rows, fit_temperature
from .thought_model import hidden_size, put_thinking, read_thinking
from .thought_settings import GENERATING, arm_applies, thought_plan

NAME, GENERATED, DECILES, PAGE = "thoughts", "generated", "deciles.json", "thoughts.html"
ANSWERS_ONLY = (
    "The model learned to think before the tokens of answers only (thoughts.loss_on: completion). Here the tokens of the questions "
    "are thought about and coloured as well; the means above leave them out."
)
SHOWN_TEXTS = 8
SHOWN_SAMPLES = 3


@dataclasses.dataclass(frozen=True)
class ThoughtFindings:
    """What was found; parts that the recipe does not ask for are None or empty."""

    results: Results | None
    generated: Results | None
    gains: thought_deciles.TokenGains | None
    traces: list[ThoughtTrace]


def evaluate_thoughts(context: Context, base: LoadedBase) -> ThoughtFindings:
    """Put the thoughts on the model and score it. Collective."""
    recipe, settings = context.recipe, context.recipe.evaluate.thoughts
    thinker = thinking_model(context, base)
    tasks = load_tasks(settings.tasks, settings, recipe)
    generated = load_tasks(settings.generated, settings, recipe)
    data = _text(context, base) if settings.text is not None and thinker.config.thinks else None
    with torch.no_grad():
        results = _table(context, thinker, tasks) if tasks else None
        written = _table(context, thinker, generated, GENERATING) if generated else None
        gains = None if data is None else thought_deciles.token_gains(thinker, data, context.device)
        traces = _traces(base, [*tasks, *generated], context) if thinker.config.thinks else []
    for kind, table in (("thoughts", results), ("generated", written)):
        if table is not None:
            context.event(kind, **mean_values(table))
    return ThoughtFindings(results, written, gains, traces)


def thinking_model(context: Context, base: LoadedBase) -> ThinkingModel:
    """The base with experts, LoRA on top and thoughts, as the `thoughts` stage left them."""
    recipe = context.recipe
    folder = context.folder.require("thoughts", "evaluate")
    put_below(context, base, "evaluate")
    thinking = read_thinking(folder, hidden_size(base.model), all_sites(base.model))
    top = put_thinking(base.model.requires_grad_(False), thinking)
    return ThinkingModel(
        ModelPolicy(base.model, thinking.parameters.requires_grad_(False)), thinking.config, top, base.tokenizer,
        recipe.seed, recipe.evaluate.batch_tokens, as_begun(context, base),
    )  # fmt: skip


def as_begun(context: Context, base: LoadedBase) -> ThoughtParameters:
    """START, END and head before the first step: a function of base, recipe and seed."""
    settings = context.recipe.thoughts
    made = fresh_parameters(base, settings, thought_plan(settings), context.recipe.seed)
    return made.to(context.device).requires_grad_(False)


def load_tasks(
    sources: Mapping[str, str], settings: ThoughtEvaluation, recipe: Recipe, split: str | None = None
) -> list[Task]:
    """Tasks by name and source in a split (default: evaluate.split)."""
    chosen, limit = split or recipe.evaluate.split, settings.limit
    return [task_of(name, source, chosen, recipe.seed, limit) for name, source in sources.items()]


def _table(
    context: Context, thinker: ThinkingModel, tasks: list[Task], generating: Sequence[str] | None = None
) -> Results:
    """Every arm on every task; with `generating` only those arms, and numeric answers are generated."""
    recipe, settings = context.recipe, context.recipe.evaluate
    names = [
        name for name in settings.thoughts.arms if arm_applies(name, recipe.thoughts.trainable, thinker.config.thinks)
    ]
    names = [name for name in names if generating is None or name in generating]
    fitted = with_split(settings.thoughts.tasks, settings.thoughts.temperature_split)
    names, notes = _possible(names, tasks, fitted, settings.thoughts.temperature_split)
    if not names:
        raise DataError(f"evaluate.thoughts.arms: no arm is left ({'; '.join(notes)})", code="DATA-002")
    for note in notes:
        context.event("left_out", message=note)

    @cache
    def temperature() -> float:
        held_out = load_tasks(fitted, settings.thoughts, recipe, settings.thoughts.temperature_split)
        found = fit_temperature(thinker, held_out, settings.batch_tokens, context.device)
        context.event("temperature", value=found)
        return found

    thinker = dataclasses.replace(thinker, donors=donor_rows(tasks, thinker.tokenizer))
    results = evaluate(
        thinker.policy.model, thinker.tokenizer, tasks, build_thought_arms(names, thinker, temperature),
        device=context.device, batch_tokens=settings.batch_tokens, generate="never" if generating is None else "numbers",
        max_new_tokens=settings.max_new_tokens, bootstrap=settings.bootstrap,
        baseline="no_thought" if "no_thought" in names else names[0], seed=recipe.seed, on_progress=context.progress,
        arm_tasks={"temperature": tuple(fitted)} if "temperature" in names else None,
    )  # fmt: skip
    return dataclasses.replace(results, notes=(*results.notes, *notes))


def _possible(
    names: Sequence[str], tasks: Sequence[Task], fitted: Mapping[str, str], split: str
) -> tuple[list[str], list[str]]:
    """The arms that these tasks allow, and what must be said of the others. `fitted`: the tasks that have `split`."""
    kept, notes = list(names), []
    missing = [task.name for task in tasks if task.name not in fitted]
    if "temperature" in kept and missing:
        notes.append(f"temperature: left out for {', '.join(missing)}: no split {split} to fit the number on")
        if len(missing) == len(tasks):
            kept.remove("temperature")
    if "shuffled" in kept and len({item.prompt for task in tasks for item in task.items}) < 2:
        notes.append("shuffled: left out, since all items have one prompt and there is no other thought to give them")
        kept.remove("shuffled")
    return kept, notes


def _text(context: Context, base: LoadedBase) -> StepData:
    """Packed rows of evaluate.thoughts.text, at most evaluate.thoughts.rows, all in one step: this rank's share."""
    recipe = context.recipe
    settings = dataclasses.replace(recipe.data, loss_on=recipe.thoughts.loss_on)

    def build(rows: int) -> StepData:
        train = TrainSettings(steps=1, rows_per_expert=rows, micro_rows=max(1, recipe.thoughts.train.micro_rows))
        return build_step_data(
            {"text": recipe.evaluate.thoughts.text}, base.tokenizer, settings, train, recipe.seed, context.world.rank,
            context.world.size,
        )  # fmt: skip

    data = build(recipe.evaluate.thoughts.rows)
    there = data.experts[0].rows
    return data if there >= recipe.evaluate.thoughts.rows else build(there)


def _traces(base: LoadedBase, tasks: list[Task], context: Context) -> list[ThoughtTrace]:
    """A few items with sampled thoughts before every token (rank 0 shows them)."""
    if not context.world.is_main:
        return []
    random = torch.Generator(device="cpu").manual_seed(context.recipe.seed)
    settings = ThoughtGeneration(samples=SHOWN_SAMPLES, temperature=1.0, generator=random)
    found = []
    for number in range(SHOWN_TEXTS):
        for task in tasks:
            if number < len(task.items) and len(found) < SHOWN_TEXTS:
                item = task.items[number]
                text = item.prompt + item.continuations[item.gold]
                ids = base.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
                label = f"{task.name} {number + 1}"
                trace = thought_trace(base.model, base.tokenizer, ids.to(context.device), settings, label=label)
                answers_only = context.recipe.thoughts.loss_on == "completion"
                found.append(
                    dataclasses.replace(trace, counted_from=_answer_start(base, item.prompt) if answers_only else 0)
                )
    return found


def _answer_start(base: LoadedBase, prompt: str) -> int:
    return len(base.tokenizer(prompt, add_special_tokens=False)["input_ids"])


def thoughts_writer(context: Context, found: ThoughtFindings, facts: Mapping[str, Any]) -> Writer:
    """Writes tables, deciles and page into the stage's result."""
    recipe = context.recipe

    def write(folder: Path) -> None:
        text = ""
        if found.results is not None:
            write_results(found.results, folder, f"{recipe.name}: thoughts", facts, NAME)
            text = to_markdown(found.results, f"{recipe.name}: thoughts", facts)
        if found.generated is not None:
            write_results(found.generated, folder, f"{recipe.name}: thoughts, generated answers", facts, GENERATED)
        if found.gains is not None:
            groups = thought_deciles.deciles(found.gains, recipe.evaluate.bootstrap, recipe.seed)
            totals = thought_deciles.totals(
                found.gains, recipe.evaluate.bootstrap, recipe.seed, before=recipe.thoughts.trainable != "full"
            )
            write_json(folder / DECILES, {"deciles": thought_deciles.to_json(groups), "all": totals})
            write_atomic(folder / f"{NAME}.md", f"{text}\n{thought_deciles.to_markdown(groups, totals)}")
        if found.traces:
            notes = [ANSWERS_ONLY] if recipe.thoughts.loss_on == "completion" else []
            write_thoughts_report(folder / PAGE, f"{recipe.name}: thoughts", found.traces, facts=facts, notes=notes)

    return write
