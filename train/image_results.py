"""What the evaluation of an image run found, as JSON and as a table with the floors first. Called by evaluate_images.py,
pipeline.py (console), and whoever compares runs.

image_results.json: unet, facts (what it was measured on), judge, samplers (and their order, since JSON files are written with
sorted keys), floors (by count: train, test), points (step, weights, sampler, count, scores, seconds) in the order in which they
were judged. The verdict's point is the last step's `average` by the first sampler.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.errors import ArtifactError
from ..base.files import read_json, write_atomic, write_json

NAME = "image_results"
FORMAT = 1
COLUMNS = {  # column -> (heading, digits)
    "jfd": ("JFD", 3),
    "kid": ("KID-J x1000", 3),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "class_accuracy": ("class accuracy", 3),
    "nearest_ratio": ("nearest ratio", 3),
    "copies": ("copies", 3),
    "velocity_loss": ("held-out velocity loss", 4),
    "fid": ("FID", 2),
}
SHORT = ("jfd", "kid", "class_accuracy", "velocity_loss")
FLOORS = {"train": "floor: other training images", "test": "floor: held-out images"}


def read_image_results(folder: Path) -> dict[str, Any]:
    """ArtifactError EXP-001 without the file, EXP-004 for another format."""
    path = folder / f"{NAME}.json"
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; run the stage 'evaluate'", code="EXP-001")
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise ArtifactError(f"{path}: format {found.get('format')}; this release reads {FORMAT}", code="EXP-004")
    found["samplers"] = {name: found["samplers"][name] for name in found["order"]}
    return found


def final_point(results: Mapping[str, Any], weights: str = "average") -> Mapping[str, Any]:
    """The last step's point by the first sampler, in the full count."""
    last = max(point["step"] for point in results["points"])
    first = next(iter(results["samplers"]))
    found = [p for p in results["points"] if (p["step"], p["weights"], p["sampler"]) == (last, weights, first)]
    return max(found, key=lambda point: point["count"])


def table(results: Mapping[str, Any], columns: Sequence[str] = tuple(COLUMNS)) -> tuple[list[str], list[list[str]]]:
    """(header, rows): for every count its floors, then its points. `columns`: those that are shown, where they were measured."""
    used = [name for name in columns if any(name in point["scores"] for point in results["points"])]
    header = ["", "samples", *(COLUMNS[name][0] for name in used)]
    rows: list[list[str]] = []
    for count in sorted({point["count"] for point in results["points"]}, reverse=True):
        floors = results["floors"][str(count)]
        rows += [[FLOORS[name], str(count), *_cells(floors[name], used)] for name in FLOORS]
        for point in results["points"]:
            if point["count"] == count:
                label = f"step {point['step']}, {point['weights']}, {point['sampler']}"
                rows.append([label, str(count), *_cells(point["scores"], used)])
    return header, rows


def write_image_results(results: Mapping[str, Any], folder: Path, title: str, facts: Mapping[str, Any]) -> None:
    """image_results.json, .md and .csv."""
    write_json(folder / f"{NAME}.json", _plain({**results, "facts": dict(facts)}))
    header, rows = table(results)
    judge = results["judge"]
    lines = [
        f"# {title}: samples",
        "",
        f"Judge: a convolutional network trained on {judge['task']} of the training images, {100 * judge['accuracy']:.2f} % "
        f"right on held-out ones (weights {judge['digest'][:12]}). JFD is the Frechet distance in its features, not FID. Compare "
        "only rows of the same number of samples; the floors are what real images get.",
        "",
        _line(header),
        _line(["---", *["---:"] * (len(header) - 1)]),
        *(_line(row) for row in rows),
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    write_atomic(folder / f"{NAME}.md", "\n".join(lines) + "\n")
    write_atomic(folder / f"{NAME}.csv", _csv(results))


def _cells(scores: Mapping[str, float], used: Sequence[str]) -> list[str]:
    return [_cell(scores, name) for name in used]


def _cell(scores: Mapping[str, float], name: str) -> str:
    value = scores.get(name)
    if value is None or not math.isfinite(value):
        return "-"
    digits = COLUMNS[name][1]
    if name == "jfd":
        return (
            f"{value:.{digits}f} ± {scores['jfd_sd']:.{digits}f}"
            if math.isfinite(scores["jfd_sd"])
            else f"{value:.{digits}f}"
        )
    if name == "kid":
        return f"{1000 * value:.{digits}f} ± {1000 * scores['kid_se']:.{digits}f}"
    return f"{value:.{digits}f}"


def _csv(results: Mapping[str, Any]) -> str:
    buffer = io.StringIO()
    names = sorted({name for point in results["points"] for name in point["scores"]})
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["step", "weights", "sampler", "count", "seconds", *names])
    for count, floors in results["floors"].items():
        for kind, scores in floors.items():
            writer.writerow(["", f"floor {kind}", "", count, "", *(scores.get(name, "") for name in names)])
    for point in results["points"]:
        own = [point[key] for key in ("step", "weights", "sampler", "count", "seconds")]
        writer.writerow([*own, *(point["scores"].get(name, "") for name in names)])
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """JSON has no NaN: such numbers become null."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
