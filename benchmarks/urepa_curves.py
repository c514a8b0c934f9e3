"""Draws a comparison's curves: JFD against steps, an arm a line, its lowest to highest seed as a band.

    python benchmarks/urepa_curves.py RUN/stages/compare/result/compare.json docs/pictures/urepa_compare.svg

Points of one count of samples and one sampler only (the distance depends on both): those of `evaluate.images.at_count`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

POINT = re.compile(r"step (\d+), average, (\w+), (\d+) samples")


def curves(comparison: dict[str, Any], sampler: str = "ode") -> dict[str, dict[int, list[float]]]:
    """Arm -> step -> JFD by seed, at the smallest count of samples that any point has."""
    found: dict[str, dict[int, list[float]]] = {}
    points = [(POINT.fullmatch(label), by_arm) for label, by_arm in comparison["scores"].items()]
    counts = [int(match[3]) for match, _ in points if match]
    for match, by_arm in points:
        if match is None or match[2] != sampler or int(match[3]) != min(counts):
            continue
        for arm, seeds in by_arm.items():
            found.setdefault(arm, {})[int(match[1])] = [one["jfd"] for one in seeds.values()]
    return found


def draw(comparison: dict[str, Any], path: Path) -> None:
    """An SVG without dates, so that the same numbers give the same file."""
    mpl.rcParams["svg.hashsalt"] = "quietgoose"
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.subplots()
    for arm, by_step in sorted(curves(comparison).items()):
        steps = sorted(by_step)
        mean = [sum(by_step[step]) / len(by_step[step]) for step in steps]
        (line,) = axes.plot(steps, mean, marker="o", label=arm, linewidth=1.5)
        low, high = [min(by_step[step]) for step in steps], [max(by_step[step]) for step in steps]
        axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set_xscale("log")
    ticks = sorted({step for by_step in curves(comparison).values() for step in by_step})
    axes.set_xticks(ticks, [f"{step:,}" for step in ticks])
    axes.minorticks_off()
    axes.set_xlabel("steps of 256 images")
    axes.set_ylabel("JFD, lower is better")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="compare.json of a finished comparison")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.comparison.read_text(encoding="utf-8")), options.picture)


if __name__ == "__main__":
    main()
