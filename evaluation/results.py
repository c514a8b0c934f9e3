"""What an evaluation found: one `Cell` per task and arm, one `Mean` per group of tasks and arm, with
intervals.

`summarise` turns per-item scores into both. Called by evaluation/run.py; evaluation/tables.py writes them
down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .intervals import (
    Interval,
    interval,
    macro,
    mean_draws,
    paired_difference,
    ratio_draws,
    resamples,
)
from .tasks import Task

SCHEMA_VERSION = 1
ALL = "all"


@dataclass(frozen=True)
class ItemScores:
    """Per item of one task under one arm, float64 [n]: right (0 or 1), nats of the gold answer, its tokens
    (end-of-text counted)."""

    correct_N: np.ndarray
    nats_N: np.ndarray
    tokens_N: np.ndarray


@dataclass(frozen=True)
class Cell:
    """One task under one arm. `difference`: accuracy minus the baseline's on the same items, None for the
    baseline itself or where it was not run. `nats`: per answer token."""

    task: str
    arm: str
    metric: str
    items: int
    accuracy: Interval
    nats: Interval
    difference: Interval | None


@dataclass(frozen=True)
class Mean:
    """Macro mean of a group of tasks under one arm; only arms that ran on every task of the group have
    one."""

    group: str
    arm: str
    tasks: int
    accuracy: Interval
    nats: Interval
    difference: Interval | None


@dataclass(frozen=True)
class Results:
    """An evaluation. `seconds`: wall-clock per arm, the slowest rank's. `scores` stays in memory for further
    comparisons (`difference`); it is not written down."""

    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    baseline: str
    cells: tuple[Cell, ...]
    means: tuple[Mean, ...]
    seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    scores: Mapping[tuple[str, str], ItemScores] = field(default_factory=dict, repr=False, compare=False)

    def cell(self, task: str, arm: str) -> Cell | None:
        return next((cell for cell in self.cells if (cell.task, cell.arm) == (task, arm)), None)

    def mean(self, arm: str, group: str = ALL) -> Mean | None:
        return next((mean for mean in self.means if (mean.group, mean.arm) == (group, arm)), None)

    def difference(self, arm: str, other: str, tasks: Sequence[str] = ()) -> Interval:
        """Macro accuracy of `arm` minus `other`, paired over the items of `tasks` (all by default), with
        interval. KeyError if one of them was not run on one of the tasks."""
        names = list(tasks) or list(self.tasks)
        values, draws = [], []
        for task in names:
            delta = self.scores[arm, task].correct_N - self.scores[other, task].correct_N
            values.append(float(delta.mean()))
            count_RN = resamples(len(delta), self.settings["bootstrap"], self.settings["seed"], task)
            draws.append(mean_draws(delta, count_RN))
        return macro(values, draws)


@dataclass(frozen=True)
class _Draws:
    """Value and resamples of one cell, kept to average over tasks."""

    accuracy: tuple[float, np.ndarray]
    nats: tuple[float, np.ndarray]
    difference: tuple[float, np.ndarray] | None


def summarise(
    tasks: Sequence[Task],
    arms: Sequence[str],
    scores: Mapping[tuple[str, str], ItemScores],
    metrics: Mapping[str, str],
    baseline: str,
    bootstrap: int,
    seed: int,
) -> tuple[tuple[Cell, ...], tuple[Mean, ...]]:
    """Cells and means from `scores[arm, task]`; `metrics[task]` names how the task was judged."""
    cells: list[Cell] = []
    draws: dict[tuple[str, str], _Draws] = {}
    for task in tasks:
        count_RN = resamples(len(task.items), bootstrap, seed, task.name)
        reference = scores.get((baseline, task.name))
        for arm in arms:
            own = scores.get((arm, task.name))
            if own is None:
                continue
            cell, drawn = _cell(task.name, arm, metrics[task.name], own, reference, arm == baseline, count_RN)
            cells.append(cell)
            draws[arm, task.name] = drawn
    means = [
        mean
        for group, names in _groups(tasks).items()
        for arm in arms
        if (mean := _mean(group, arm, [draws.get((arm, name)) for name in names])) is not None
    ]
    return tuple(cells), tuple(means)


def _cell(
    task: str,
    arm: str,
    metric: str,
    own: ItemScores,
    reference: ItemScores | None,
    is_baseline: bool,
    count_RN: np.ndarray,
) -> tuple[Cell, _Draws]:
    accuracy = (float(own.correct_N.mean()), mean_draws(own.correct_N, count_RN))
    nats = (
        float(own.nats_N.sum() / own.tokens_N.sum()),
        ratio_draws(own.nats_N, own.tokens_N, count_RN),
    )
    difference = None
    paired = None
    if reference is not None and not is_baseline:
        delta_N = own.correct_N - reference.correct_N
        difference = (float(delta_N.mean()), mean_draws(delta_N, count_RN))
        paired = paired_difference(own.correct_N, reference.correct_N, count_RN)
    cell = Cell(task, arm, metric, len(own.correct_N), interval(*accuracy), interval(*nats), paired)
    return cell, _Draws(accuracy, nats, difference)


def _mean(group: str, arm: str, draws: Sequence[_Draws | None]) -> Mean | None:
    present = [drawn for drawn in draws if drawn is not None]
    if len(present) != len(draws):
        return None
    differences = [drawn.difference for drawn in present if drawn.difference is not None]
    return Mean(
        group,
        arm,
        len(present),
        _macro([drawn.accuracy for drawn in present]),
        _macro([drawn.nats for drawn in present]),
        _macro(differences) if len(differences) == len(present) else None,
    )


def _macro(pairs: Sequence[tuple[float, np.ndarray]]) -> Interval:
    return macro([value for value, _ in pairs], [draws for _, draws in pairs])


def _groups(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """Task names per named group, then all of them."""
    groups: dict[str, list[str]] = {}
    for task in tasks:
        if task.group:
            groups.setdefault(task.group, []).append(task.name)
    groups[ALL] = [task.name for task in tasks]
    return groups
