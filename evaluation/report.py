"""report.html: one self-contained page - results, tokens coloured by their experts, layers, loss curves.

How a page is made safe stands in page.py. Called by the pipeline at the end of a run:

    write_report(folder / "report.html", title, results=results, traces=traces, events=read_events(path))
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import DataError
from ..base.files import write_atomic
from .page import render
from .results import Results
from .tables import to_json

FRAGMENT = Path(__file__).with_name("report.html")
MAX_BYTES = 300_000
MAX_POINTS = 150
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")


@dataclass(frozen=True)
class Trace:
    """Routing of one text. votes[t][n]: routing weight expert n got from token t, over all sites (any scale).

    modules     site name -> [T][N] weights, or [T] index of the first expert (-1: no expert at this site)
    expected    per token the index of the expert it needs, -1 where any will do; None if not known
    label       a heading; by default the prompt's number
    entropy     of the routers' weights, mean over sites and tokens, nats; None if not measured
    """

    tokens: Sequence[str]
    experts: Sequence[str]
    votes: Sequence[Sequence[float]]
    modules: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    expected: Sequence[int] | None = None
    label: str = ""
    entropy: float | None = None


def write_report(
    path: Path,
    title: str,
    *,
    results: Results | None = None,
    traces: Sequence[Trace] = (),
    events: Iterable[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    highlight: str | None = None,
) -> Path:
    """Write the page, at most 300 KB: the modules of the last traces are left out first, which a note says.

    events: rows of events.jsonl; those with a `step` and `losses` (name -> nats) make the curves, by `stage`.
    highlight: the arm drawn in colour in the picture of means. Raises DataError (DATA-005) for a ragged
    trace.
    """
    if len({tuple(trace.experts) for trace in traces}) > 1:
        raise DataError("traces: all must name the same experts in the same order", code="DATA-005")
    drawn = curves(events)
    lines = dict.fromkeys(line["name"] for stage in drawn for line in stage["lines"])
    said = [*notes, *(results.notes if results else ())]
    shown = [_trace(trace, number) for number, trace in enumerate(traces, start=1)]
    page = {
        "title": title,
        "facts": [[str(key), str(value)] for key, value in (facts or {}).items()],
        "notes": said,
        "highlight": highlight,
        "experts": list(traces[0].experts if traces else lines),
        "results": None if results is None else to_json(results),
        "traces": shown,
        "heat": _heat(shown),
        "curves": drawn,
    }
    for trace in shown:
        for site in trace["sites"]:
            site["top"] = _packed(site["top"])
    text = render(FRAGMENT, page)
    left_out = 0
    while len(text.encode()) > MAX_BYTES and left_out < len(shown):
        left_out += 1
        shown[-left_out]["sites"] = []
        which = f"the last {left_out} of {len(shown)} prompts"
        page["notes"] = [*said, f"Left out to keep this page small: the modules of {which}."]
        text = render(FRAGMENT, page)
    write_atomic(path, text)
    return path


def read_events(path: Path) -> list[dict[str, Any]]:
    """Rows of an events.jsonl; a last line cut by a kill is left out. An absent file has none."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise DataError(f"{path}:{number}: not a JSON object ({error})", code="DATA-001") from error
    return [row for row in rows if isinstance(row, dict)]


def curves(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One picture a stage, one line a loss; at most 150 points, each the mean of neighbouring steps. A step
    that was run again after a resume counts once, as it was last."""
    stages: dict[str, dict[str, dict[int, float]]] = {}
    for event in events:
        losses, step = event.get("losses"), event.get("step")
        if not isinstance(losses, Mapping) or not isinstance(step, int):
            continue
        lines = stages.setdefault(str(event.get("stage", "training")), {})
        for name, value in losses.items():
            if isinstance(value, int | float) and np.isfinite(value):
                lines.setdefault(str(name), {})[step] = float(value)
    return [
        {"stage": stage, "lines": [_thin(name, points) for name, points in lines.items()]}
        for stage, lines in stages.items()
        if lines
    ]


def _thin(name: str, points: Mapping[int, float]) -> dict[str, Any]:
    steps = np.array(sorted(points))
    values = np.array([points[step] for step in steps.tolist()])
    parts = min(len(steps), MAX_POINTS)
    return {
        "name": name,
        "steps": [int(part[-1]) for part in np.array_split(steps, parts)],
        "values": [round(float(part.mean()), 4) for part in np.array_split(values, parts)],
    }


def _trace(trace: Trace, number: int) -> dict[str, Any]:
    """A trace as the page reads it: votes in per mille, per module the first expert of every token."""
    length, experts = len(trace.tokens), len(trace.experts)
    votes_TN = np.asarray(trace.votes, dtype=np.float64)
    if votes_TN.shape != (length, experts):
        raise DataError(
            f"trace {number}: votes have shape {votes_TN.shape}, not ({length} tokens, {experts} experts)",
            code="DATA-005",
        )
    if trace.expected is not None and len(trace.expected) != length:
        raise DataError(f"trace {number}: {len(trace.expected)} expected experts, {length} tokens", code="DATA-005")
    share_TN = votes_TN / np.maximum(votes_TN.sum(axis=1, keepdims=True), 1e-12)
    return {
        "label": trace.label,
        "tokens": list(trace.tokens),
        "experts": list(trace.experts),
        "votes": np.rint(1000 * share_TN).astype(int).tolist(),
        "expected": None if trace.expected is None else [int(index) for index in trace.expected],
        "sites": [_site(name, rows, length, number) for name, rows in trace.modules.items()],
    }


def _site(name: str, rows: Sequence[Any], length: int, number: int) -> dict[str, Any]:
    values = np.asarray(rows)
    if len(values) != length or values.ndim > 2:
        raise DataError(
            f"trace {number}: module {name} has shape {values.shape}, the trace has {length} tokens",
            code="DATA-005",
        )
    if values.ndim == 2:
        values = np.where(values.max(axis=1) > 0, values.argmax(axis=1), -1)
    layer, kind = _place(name)
    return {"layer": layer, "kind": kind, "top": values.astype(int).tolist()}


def _packed(top: list[int]) -> str | list[int]:
    """One character a token (`.` for none) where the experts are few enough; the list as it is otherwise."""
    if max(top, default=0) >= len(DIGITS):
        return top
    return "".join("." if index < 0 else DIGITS[index] for index in top)


def _place(name: str) -> tuple[int, str]:
    """Layer number and kind of module of a site's name; a site outside the layers stands in layer 0."""
    found = LAYER.search(name)
    return (int(found[1]) if found else 0), name.rsplit(".", 1)[-1]


def _heat(traces: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How often every expert comes first in every layer, over the tokens and modules of all traces."""
    sites = [site for trace in traces for site in trace["sites"]]
    if not sites:
        return None
    experts = traces[0]["experts"]
    first: dict[int, np.ndarray] = {}
    for site in sites:
        chosen = np.array(site["top"])
        count_N = np.bincount(chosen[chosen >= 0], minlength=len(experts))
        first[site["layer"]] = first.get(site["layer"], np.zeros(len(experts))) + count_N
    layers = sorted(first)
    share = [np.round(first[layer] / max(first[layer].sum(), 1), 4).tolist() for layer in layers]
    return {"experts": experts, "layers": layers, "share": share}
