"""report.html of an image run: sample grids, the table of scores with its floors, scores and losses by step.

One self-contained page; how it is made safe stands in page.py. Pictures stand in it as data. Called by train/image_report.py:

    write_images_report(path, title, [Table(...)], [Picture("step 4000", png)], scores, events=read_events(...), facts=...)
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..base.files import write_atomic
from .page import render
from .report import curves

FRAGMENT = Path(__file__).with_name("images_report.html")
MAX_BYTES = 8_000_000


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows."""

    caption: str
    png: bytes


@dataclass(frozen=True)
class Table:
    """Texts; a row whose first cell begins with `floor` is drawn paler."""

    title: str
    lead: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Line:
    """One curve: values at steps."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Curves over steps; `floors`: (name, value) of horizontal lines."""

    title: str
    lines: Sequence[Line]
    floors: Sequence[tuple[str, float]] = field(default_factory=tuple)


def write_images_report(
    path: Path,
    title: str,
    tables: Sequence[Table],
    pictures: Sequence[Picture],
    scores: Sequence[Chart],
    *,
    events: Iterable[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write the page, at most 8 MB: the last pictures are left out first, which a note says."""
    shown = list(pictures)
    text = ""
    while True:
        left_out = len(pictures) - len(shown)
        small = [f"Left out to keep this page small: {left_out} of {len(pictures)} pictures."] if left_out else []
        text = render(FRAGMENT, _page(title, tables, shown, scores, events, facts, [*notes, *small]), images=True)
        if len(text.encode()) <= MAX_BYTES or not shown:
            break
        shown.pop()
    write_atomic(path, text)
    return path


def _page(
    title: str, tables: Sequence[Table], pictures: Sequence[Picture], scores: Sequence[Chart],
    events: Iterable[Mapping[str, Any]], facts: Mapping[str, Any] | None, notes: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    return {
        "title": title,
        "facts": [[str(key), str(value)] for key, value in (facts or {}).items()],
        "notes": list(notes),
        "tables": [asdict(table) for table in tables],
        "pictures": [{"caption": one.caption, "source": _data_address(one.png)} for one in pictures],
        "scores": [asdict(chart) for chart in scores],
        "curves": [{"title": stage["stage"], "lines": stage["lines"]} for stage in curves(events)],
    }


def _data_address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
