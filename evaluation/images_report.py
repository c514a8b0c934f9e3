"""report.html of an image run: sample grids, the table of scores with its floors, scores and losses by step.

One self-contained page; how it is made safe stands in page.py. Pictures stand in it as data. Called by train/image_report.py:

    write_images_report(path, title, [Table(...)], [Picture("step 4000", png)], scores, events=read_events(...), facts=...)
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..base.files import write_atomic
from .page import render
from .report import curves

FRAGMENT = Path(__file__).with_name("images_report.html")
MAX_BYTES = 8_000_000
CHARACTER, ENTRY = 9, 32  # most bytes of a caption's character in the page, and of what stands around a picture


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
    page: dict[str, Any] = {
        "title": title,
        "facts": [[str(key), str(value)] for key, value in (facts or {}).items()],
        "notes": [*notes, _left_out(len(pictures), len(pictures))],
        "tables": [asdict(table) for table in tables],
        "pictures": [],
        "scores": [asdict(chart) for chart in scores],
        "curves": [{"title": stage["stage"], "lines": stage["lines"]} for stage in curves(events)],
    }
    room = MAX_BYTES - len(render(FRAGMENT, page, images=True).encode())
    entries = [{"caption": one.caption, "source": _data_address(one.png)} for one in pictures]
    sizes = accumulate(len(one["source"]) + CHARACTER * len(one["caption"]) + ENTRY for one in entries)
    shown = sum(size <= room for size in sizes)
    page["notes"] = [*notes, *([_left_out(len(pictures) - shown, len(pictures))] if shown < len(pictures) else [])]
    page["pictures"] = entries[:shown]
    write_atomic(path, render(FRAGMENT, page, images=True))
    return path


def _left_out(count: int, of: int) -> str:
    return f"Left out to keep this page small: {count} of {of} pictures."


def _data_address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
