"""report.html of a comparison: tables, JFD by step of every arm, one grid of samples for each. Called by pipeline.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation.images_report import Chart, Line, Picture, Table, write_images_report
from .compare_report import COLUMNS, VERDICTS, cost_table, difference_table, score_table
from .image_results import FLOORS
from .run_folder import RunFolder

SAMPLES = "samples"
DRAWN = ("jfd", "class_accuracy", "velocity_loss")


def write_comparison_report(
    run: Path, title: str, comparison: Mapping[str, Any], runs: Mapping[str, Path], facts: Mapping[str, Any]
) -> Path:
    """`run`/report.html. `runs`: output folder of every run, ARM-SEED; the first seed of every arm gives its grid."""
    verdict = comparison["verdict"]
    words = VERDICTS[verdict["result"]].format(t=verdict["treatment"] or "the treatment")
    against = "; ".join(f"against {other}: {word}" for other, word in verdict["against"].items())
    tables = [
        Table("Scores at equal steps", f"{words} {against} ({comparison['final']})", *score_table(comparison)),
        Table(
            "Differences",
            "Treatment minus the other arm, paired by seed; 95 % interval.",
            *difference_table(comparison),
        ),
        Table("Cost", "The teacher's training and features apart; scores at equal cost.", *cost_table(comparison)),
    ]
    shown = [table for table in tables if table.rows]
    return write_images_report(
        run / "report.html", title, shown, arm_pictures(comparison, runs), arm_charts(comparison), facts=facts
    )  # fmt: skip


def arm_charts(comparison: Mapping[str, Any]) -> list[Chart]:
    """Mean over seeds by step, a line for every arm, for every score and number of samples with two points or more."""
    points: dict[str, dict[int, Mapping[str, Any]]] = {}
    first = comparison["final"].split(", ")[2]
    for label, by_arm in comparison["scores"].items():
        step, weights, sampler, count = label.split(", ")
        if (weights, sampler) == ("average", first):
            points.setdefault(count.split()[0], {})[int(step.split()[1])] = by_arm
    charts = []
    for count, steps in points.items():
        for name in DRAWN:
            lines = [line for arm in comparison["costs"] if len((line := _line(arm, name, steps)).steps) > 1]
            floors = comparison["floors"].get(count, {})
            drawn = [
                (FLOORS[k].removeprefix("floor: "), floors[k][name]) for k in FLOORS if floors.get(k, {}).get(name)
            ]
            if lines:
                charts.append(Chart(f"{COLUMNS[name][0]}, {count} samples, mean over seeds", lines, drawn))
    return charts


def arm_pictures(comparison: Mapping[str, Any], runs: Mapping[str, Path]) -> list[Picture]:
    """The last step's grid of every arm's first seed: the same labels and noise."""
    final = comparison["final"].split(", ")
    name = f"{int(final[0].split()[1]):08d}_{final[1]}_{final[2]}.png"
    made: dict[str, Picture] = {}
    for run, output in runs.items():
        arm, _, seed = run.rpartition("-")
        path = RunFolder(output).result("evaluate") / SAMPLES / name
        if arm not in made and path.is_file():
            made[arm] = Picture(f"{arm}, seed {seed}, {final[0]}", path.read_bytes())
    return list(made.values())


def _line(arm: str, name: str, steps: Mapping[int, Mapping[str, Any]]) -> Line:
    found: list[tuple[int, float]] = []
    for step in sorted(steps):
        values = [one[name] for one in steps[step].get(arm, {}).values() if one.get(name) is not None]
        if values:
            found.append((step, round(statistics.fmean(values), 5)))
    return Line(arm, [step for step, _ in found], [value for _, value in found])
