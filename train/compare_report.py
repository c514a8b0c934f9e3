"""The comparison as tables: arms beside floors, paired differences, curves, costs, the verdict in words. Called by compare.py."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.files import write_atomic

COLUMNS = {
    "jfd": ("JFD", 1.0, 3),
    "kid": ("KID-J x1000", 1000.0, 3),
    "class_accuracy": ("class accuracy", 1.0, 3),
    "precision": ("precision", 1.0, 3),
    "recall": ("recall", 1.0, 3),
    "nearest_ratio": ("nearest ratio", 1.0, 3),
    "copies": ("copies", 1.0, 3),
    "velocity_loss": ("held-out velocity loss", 1.0, 4),
}
VERDICTS = {
    "gain": "{t} is better than every control at equal steps: its JFD is lower beyond the seeds' 95 % interval.",
    "no gain shown": "No gain of {t} is shown: against at least one control the difference in JFD lies within the seeds' interval.",
    "loss": "{t} is worse than at least one control: its JFD is higher beyond the seeds' 95 % interval.",
    "undecided": "Nothing is claimed of {t}: a control is missing, or there are too few seeds for an interval.",
}


def write_comparison(comparison: Mapping[str, Any], folder: Path, title: str, facts: Mapping[str, Any]) -> None:
    """compare.md and compare.csv."""
    write_atomic(folder / "compare.md", markdown(comparison, title, facts))
    write_atomic(folder / "compare.csv", _csv(comparison))


def markdown(comparison: Mapping[str, Any], title: str, facts: Mapping[str, Any]) -> str:
    """The whole report as text."""
    judge, verdict = comparison["judge"], comparison["verdict"]
    against = "; ".join(f"against {other}: {word}" for other, word in verdict["against"].items())
    lines = [
        f"# {title}",
        "",
        f"**{VERDICTS[verdict['result']].format(t=verdict['treatment'] or 'the treatment')}** {against}",
        "",
        f"Judge: {100 * judge['accuracy']:.2f} % right on held-out images ({judge['task']}). JFD is a Frechet distance in its "
        "features, not FID. Arms share the U-Net, its initial weights, the order of the images, times and noise; mean over seeds "
        "(lowest to highest seed).",
        "",
        f"## Scores at equal steps ({comparison['final']})",
        "",
        *_table(*score_table(comparison)),
        "",
    ]
    if comparison["differences"]:
        lines += [
            f"## {comparison['treatment']} minus the other arm, same seed (95 % interval over seeds)", "",
            *_table(*difference_table(comparison)), "",
        ]  # fmt: skip
    lines += ["## JFD by point", "", *_table(*curve_table(comparison)), ""]
    lines += ["## Cost", "", *_table(*cost_table(comparison)), ""]
    lines += [
        "## Arms",
        "",
        *(f"- **{arm}**: {settings or 'the recipe'}" for arm, settings in comparison.get("arms", {}).items()),
    ]
    lines += ["", *(f"- {name}: {value}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def score_table(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): the floors at the same count, then the arms."""
    scores: Mapping[str, Any] = comparison["scores"][comparison["final"]]
    count = comparison["final"].split(", ")[-1].split()[0]
    used = [name for name in COLUMNS if any(name in one for seeds in scores.values() for one in seeds.values())]
    rows = [
        [f"floor: {kind}", "", *(_number(floor.get(name), name) for name in used)]
        for kind, floor in comparison["floors"].get(count, {}).items()
    ]
    for arm, seeds in scores.items():
        rows.append(
            [arm, str(len(seeds)), *(_spread([one.get(name) for one in seeds.values()], name) for name in used)]
        )
    return ["arm", "seeds", *(COLUMNS[name][0] for name in used)], rows


def difference_table(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    used = [n for n in COLUMNS if any(found.get(n) for found in comparison["differences"].values())]
    rows = [
        [other, *(_interval(found.get(name), name) for name in used)]
        for other, found in comparison["differences"].items()
    ]
    return ["against", *(COLUMNS[name][0] for name in used)], rows


def curve_table(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    arms = list(comparison["costs"])
    rows = [
        [label, *(_spread([one.get("jfd") for one in by_arm.get(arm, {}).values()], "jfd") for arm in arms)]
        for label, by_arm in comparison["scores"].items()
    ]
    return ["point", *arms], rows


def cost_table(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Of every arm; and the treatment's JFD at the arm's whole cost."""
    rows = []
    for arm, cost in comparison["costs"].items():
        equal = comparison["equal"].get(arm, {})
        own = [
            "" if equal.get(m) is None else f"{equal[m][2]:.3f} against {equal[m][1]:.3f}" for m in ("seconds", "pflop")
        ]
        rows.append([
            arm, _plain(cost["token_cosine"], 3), _plain(cost["images_per_second"], 0), _plain(cost["seconds"], 4),
            _plain(cost["teacher_seconds"], 1),
            _plain(cost["fill_seconds"], 1), _plain(cost["pflop"], 6), _plain(cost["once_pflop"], 3), *own,
        ])  # fmt: skip
    treatment, count = comparison["treatment"] or "treatment", comparison["equal_count"]
    header = [
        "arm", "token cosine", "images/s", "s a step", "teacher s", "features s", "PFLOP a step", "PFLOP once",
        f"JFD of {treatment} at its seconds ({count} samples)",
        f"JFD of {treatment} at its FLOPs ({count} samples)",
    ]  # fmt: skip
    return header, rows


def _spread(values: Sequence[float | None], name: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    shown = _number(statistics.fmean(known), name)
    return shown if len(known) == 1 else f"{shown} ({_number(min(known), name)} to {_number(max(known), name)})"


def _interval(found: Mapping[str, Any] | None, name: str) -> str:
    if not found:
        return "-"
    shown = _number(found["mean"], name, sign=True)
    if found["low"] is None:
        return f"{shown} (one seed)"
    return f"{shown} [{_number(found['low'], name, sign=True)}, {_number(found['high'], name, sign=True)}]"


def _number(value: float | None, name: str, sign: bool = False) -> str:
    if value is None:
        return "-"
    _, factor, digits = COLUMNS[name]
    return f"{factor * value:{'+' if sign else ''}.{digits}f}"


def _plain(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _csv(comparison: Mapping[str, Any]) -> str:
    """A row a point, arm and seed."""
    buffer = io.StringIO()
    names = sorted(
        {n for arms in comparison["scores"].values() for seeds in arms.values() for one in seeds.values() for n in one}
    )
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["point", "arm", "seed", *names])
    for label, by_arm in comparison["scores"].items():
        for arm, seeds in by_arm.items():
            for seed, one in seeds.items():
                writer.writerow([label, arm, seed, *("" if one.get(n) is None else one[n] for n in names)])
    return buffer.getvalue()
