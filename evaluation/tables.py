"""Results as JSON (one schema version), Markdown and CSV. Called by the evaluate stage and
launch/evaluate.py."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.errors import ArtifactError
from ..base.files import write_atomic, write_json
from .intervals import Interval
from .results import ALL, SCHEMA_VERSION, Cell, Mean, Results

ORACLE = "oracle"


def to_json(results: Results, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A JSON value; `facts` are the caller's (model, date, hardware, versions). Intervals are [value, low,
    high]."""
    return {
        "schema_version": SCHEMA_VERSION,
        "facts": dict(facts or {}),
        "settings": dict(results.settings),
        "tasks": list(results.tasks),
        "arms": list(results.arms),
        "baseline": results.baseline,
        "cells": [
            {
                "task": cell.task,
                "arm": cell.arm,
                "metric": cell.metric,
                "items": cell.items,
                **_intervals(cell),
            }
            for cell in results.cells
        ],
        "means": [
            {"group": mean.group, "arm": mean.arm, "tasks": mean.tasks, **_intervals(mean)} for mean in results.means
        ],
        "seconds": {arm: round(value, 3) for arm, value in results.seconds.items()},
        "notes": list(results.notes),
    }


def from_json(value: Mapping[str, Any]) -> Results:
    """Results without their per-item scores; ArtifactError (EXP-010) for another schema version."""
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"results: schema_version is {version!r}, allowed is {SCHEMA_VERSION}; evaluate again",
            code="EXP-010",
        )
    cells = tuple(Cell(row["task"], row["arm"], row["metric"], row["items"], *_read(row)) for row in value["cells"])
    means = tuple(Mean(row["group"], row["arm"], row["tasks"], *_read(row)) for row in value["means"])
    return Results(
        tuple(value["tasks"]),
        tuple(value["arms"]),
        value["baseline"],
        cells,
        means,
        value["seconds"],
        value["settings"],
        tuple(value["notes"]),
    )


def to_markdown(results: Results, title: str = "Results", facts: Mapping[str, Any] | None = None) -> str:
    """Means with intervals first, then accuracy and nats per answer token of every task."""
    lines = [f"# {title}", ""]
    lines += [f"- {key}: {value}" for key, value in (facts or {}).items()]
    lines += [f"- {note}" for note in results.notes]
    if facts or results.notes:
        lines.append("")
    for group in dict.fromkeys(mean.group for mean in results.means):
        lines += _mean_table(results, group)
    lines += _task_table(results, "Accuracy, per cent [95 % interval]", lambda cell: percent(cell.accuracy))
    lines += _task_table(results, "Nats per answer token", lambda cell: f"{cell.nats.value:.3f}")
    lines += [
        f"Intervals: bootstrap over items, {results.settings['bootstrap']} resamples; differences are paired "
        f"against `{results.baseline}`; a mean over tasks takes the set of tasks as fixed.",
        "",
    ]
    return "\n".join(lines)


def to_csv(results: Results) -> str:
    """One line per task and arm."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("accuracy", "nats", "difference")
    writer.writerow(
        ["task", "arm", "metric", "items"] + [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    )
    for cell in results.cells:
        values = [cell.accuracy, cell.nats, cell.difference]
        numbers = [n for one in values for n in ((one.value, one.low, one.high) if one else ("", "", ""))]
        writer.writerow([cell.task, cell.arm, cell.metric, cell.items, *numbers])
    return text.getvalue()


def write_results(
    results: Results,
    folder: Path,
    title: str = "Results",
    facts: Mapping[str, Any] | None = None,
    name: str = "results",
) -> list[Path]:
    """`<name>.json`, `<name>.md`, `<name>.csv` in `folder`."""
    paths = [folder / f"{name}.{end}" for end in ("json", "md", "csv")]
    write_json(paths[0], to_json(results, facts))
    write_atomic(paths[1], to_markdown(results, title, facts))
    write_atomic(paths[2], to_csv(results))
    return paths


def summary(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows for a terminal: every arm, mean accuracy in per cent of every group of tasks, with intervals."""
    groups = [group for group in dict.fromkeys(mean.group for mean in results.means) if group != ALL] or [ALL]
    counts = {mean.group: mean.tasks for mean in results.means}
    header = ["arm", *(f"{group} ({counts[group]} task{'s' * (counts[group] > 1)})" for group in groups)]
    rows = []
    for arm in results.arms:
        means = [results.mean(arm, group) for group in groups]
        rows.append([arm, *("" if mean is None else percent(mean.accuracy) for mean in means)])
    return header, rows


def arm_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows for a terminal: every arm, accuracy in per cent and difference from the baseline, with intervals, and
    nats per answer token; means over all tasks."""
    rows = []
    for arm in results.arms:
        mean = results.mean(arm)
        if mean is not None:
            difference = "" if mean.difference is None else percent(mean.difference, signed=True)
            rows.append([arm, percent(mean.accuracy), difference, f"{mean.nats.value:.3f}"])
    return ["arm", "right", f"minus {results.baseline}", "nats a token"], rows


def gap_closed(results: Results, arm: str, group: str = ALL) -> float | None:
    """Share of the way from the baseline to the oracle; None without an oracle above the baseline."""
    ends = [results.mean(name, group) for name in (results.baseline, arm, ORACLE)]
    base, own, oracle = (mean.accuracy.value if mean else None for mean in ends)
    if base is None or own is None or oracle is None or oracle <= base:
        return None
    return (own - base) / (oracle - base)


def mean_values(results: Results) -> dict[str, float]:
    """`accuracy/<arm>/<group>` and `nats/<arm>/<group>`: what MLflow shows of a table."""
    values = {f"accuracy/{mean.arm}/{mean.group}": mean.accuracy.value for mean in results.means}
    return values | {f"nats/{mean.arm}/{mean.group}": mean.nats.value for mean in results.means}


def percent(value: Interval, signed: bool = False) -> str:
    """`71.4 [69.0, 73.9]`, in per cent; a signed value shows its plus."""
    mark = "+" if signed else ""
    return f"{100 * value.value:{mark}.1f} [{100 * value.low:{mark}.1f}, {100 * value.high:{mark}.1f}]"


def _mean_table(results: Results, group: str) -> list[str]:
    means = [mean for mean in results.means if mean.group == group]
    gaps = {mean.arm: gap_closed(results, mean.arm, group) for mean in means}
    with_gap = any(gap is not None for gap in gaps.values())
    header = ["arm", "accuracy", f"minus {results.baseline}", "nats per token"] + ["gap closed"] * with_gap
    rows = []
    for mean in means:
        difference = "" if mean.difference is None else percent(mean.difference, signed=True)
        row = [mean.arm, percent(mean.accuracy), difference, f"{mean.nats.value:.3f}"]
        gap = gaps[mean.arm]
        rows.append(row + ["" if gap is None else f"{100 * gap:.0f} %"] * with_gap)
    return [f"## Mean of {means[0].tasks} tasks ({group})", "", *_markdown(header, rows), ""]


def _task_table(results: Results, title: str, show: Any) -> list[str]:
    rows = []
    for task in results.tasks:
        cells = [results.cell(task, arm) for arm in results.arms]
        first = next((cell for cell in cells if cell is not None), None)
        if first is not None:
            shown = ["" if cell is None else show(cell) for cell in cells]
            rows.append([task, first.metric, str(first.items), *shown])
    return [f"## {title}", "", *_markdown(["task", "metric", "items", *results.arms], rows), ""]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _intervals(entry: Cell | Mean) -> dict[str, Any]:
    def three(value: Interval | None) -> list[float] | None:
        return None if value is None else [round(number, 6) for number in (value.value, value.low, value.high)]

    return {
        "accuracy": three(entry.accuracy),
        "nats": three(entry.nats),
        "difference": three(entry.difference),
    }


def _read(row: Mapping[str, Any]) -> tuple[Interval, Interval, Interval | None]:
    difference = row["difference"]
    return (
        Interval(*row["accuracy"]),
        Interval(*row["nats"]),
        None if difference is None else Interval(*difference),
    )
