"""events.jsonl: everything a run has to say, written first and flushed line by line; MLflow and the report read it.

One object a line: `time` (wall clock), `elapsed` (seconds of this start, monotonic), `kind`, then the fields. A line torn
by a kill is cut off at the next start. What cannot be written is counted; a full disk costs lines, never the run.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .redaction import redact

NAME = "events.jsonl"


class EventLog:
    """Appends events to `path`. `say` is told once if a write fails."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path = path
        self.lost = 0
        self._say = say
        self._started = time.monotonic()
        self._handle: IO[bytes] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            cut_torn_line(path)
            self._handle = path.open("ab", buffering=0)
        except OSError as error:
            self._failed(error)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event. Secrets are masked; NaN and infinities become text, as JSON has none."""
        record = {"time": round(time.time(), 3), "elapsed": round(time.monotonic() - self._started, 3), "kind": kind}
        line = json.dumps(redact.value(_finite({**record, **fields})), ensure_ascii=False, separators=(",", ":"))
        if self._handle is None:
            self.lost += 1
            return
        try:
            data = f"{line}\n".encode()
            if self._handle.write(data) != len(data):
                cut_torn_line(self.path)
                raise OSError("only a part of the line was written")
        except OSError as error:
            self._failed(error)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _failed(self, error: OSError) -> None:
        self.lost += 1
        if self.lost == 1:
            self._say(f"QG-IO-003 {self.path}: {error.strerror or error}; training goes on, events are lost")


def cut_torn_line(path: Path) -> None:
    """Cut what follows the last newline: the rest of a line that a kill or a full disk tore."""
    if not path.is_file():
        return
    with path.open("rb+") as handle:
        end = handle.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 4096)
            handle.seek(start)
            found = handle.read(position - start).rfind(b"\n")
            if found >= 0:
                position = start + found + 1
                break
            position = start
        if position < end:
            handle.truncate(position)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    if isinstance(value, (bool, str, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)
