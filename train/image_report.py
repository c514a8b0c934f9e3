"""report.html of an image run from what it left on disk. Called by pipeline.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.images_report import Chart, Line, Picture, Table, write_images_report
from ..evaluation.report import read_events
from .image_results import COLUMNS, FLOORS, NAME, read_image_results, table

SAMPLES = "samples"
DRAWN = ("jfd", "kid", "class_accuracy", "velocity_loss")
LEAD = (
    "Samples before a judge that is no teacher: a classifier trained on the training images, {accuracy:.2f} % right on held-out "
    "ones. JFD is the Frechet distance in its features; it is not FID. Compare only rows of one number of samples."
)


def write_report_of_images(run: Path, evaluated: Path, title: str, facts: Mapping[str, Any]) -> Path:
    """`run`/report.html; without results of the `evaluate` stage it has the loss curves only."""
    tables: list[Table] = []
    pictures: list[Picture] = []
    charts: list[Chart] = []
    if (evaluated / f"{NAME}.json").is_file():
        results = read_image_results(evaluated)
        facts = {**facts, **results.get("facts", {})}  # what it was measured on: the report may be made elsewhere
        header, rows = table(results)
        lead = LEAD.format(accuracy=100 * results["judge"]["accuracy"])
        tables.append(Table("Scores", lead, header, rows))
        pictures = read_pictures(evaluated)
        charts = score_charts(results)
    return write_images_report(
        run / "report.html", title, tables, pictures, charts, events=read_events(run / "events.jsonl"), facts=facts
    )  # fmt: skip


def read_pictures(evaluated: Path) -> list[Picture]:
    """Sample grids, the last step's first."""
    found = sorted((evaluated / SAMPLES).glob("*.png"), key=lambda path: (-int(path.stem[:8]), path.stem))
    made = []
    for path in found:
        step, weights, sampler = path.stem.split("_", 2)
        made.append(Picture(f"step {int(step)}, {weights} weights, sampler {sampler}", path.read_bytes()))
    return made


def score_charts(results: Mapping[str, Any]) -> list[Chart]:
    """A chart for every drawn score and number of samples that has a curve of two points or more."""
    charts = []
    points = [point for point in results["points"] if point["weights"] == "average"]
    for count in sorted({point["count"] for point in points}):
        for name in DRAWN:
            lines = _lines([p for p in points if p["count"] == count and p["scores"].get(name) is not None], name)
            if not lines:
                continue
            floors = results["floors"][str(count)]
            drawn = [
                (FLOORS[kind].removeprefix("floor: "), floors[kind][name]) for kind in FLOORS if floors[kind].get(name)
            ]
            charts.append(Chart(f"{COLUMNS[name][0].removesuffix(' x1000')}, {count} samples", lines, drawn))
    return charts


def _lines(points: Sequence[Mapping[str, Any]], name: str) -> list[Line]:
    lines = []
    for sampler in dict.fromkeys(point["sampler"] for point in points):
        own = sorted((p["step"], p["scores"][name]) for p in points if p["sampler"] == sampler)
        if len(own) > 1:
            lines.append(Line(sampler, [step for step, _ in own], [round(value, 5) for _, value in own]))
    return lines
