"""What a person sees of a run: rank 0 shows progress with tokens a second and time left, every rank keeps a log file.

On a terminal a rich bar, elsewhere plain lines at most every few seconds. Every line goes through `redact`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .redaction import RedactingFormatter, redact

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

    from .types import StepReport

PLAIN_SECONDS = 5.0
SMOOTHING = 0.9
LIBRARIES = ("DeepSpeed", "transformers", "datasets", "mlflow", "torch.distributed", "httpx", "httpcore", "urllib3")


class Console:
    """`line` prints, `stage` makes a bar and its callback, `progress` a counter for work without steps. Silent on
    other ranks. `stream` is stderr, so that tables on stdout can be piped."""

    def __init__(self, main: bool, stream: TextIO | None = None, plain_seconds: float = PLAIN_SECONDS) -> None:
        from rich.console import Console as RichConsole

        self.main = main
        self.plain_seconds = plain_seconds
        self._rich = RichConsole(file=stream or sys.stderr, highlight=False)
        self.fancy = main and self._rich.is_terminal
        self._progress: Progress | None = None

    def line(self, text: str) -> None:
        if not self.main:
            return
        if self.fancy:
            self._rich.print(redact(text), markup=False)
        else:  # one write, no wrapping at an invented width
            self._rich.file.write(f"{redact(text)}\n")
            self._rich.file.flush()

    def show(self, table: RenderableType) -> None:
        """Print a rich table or panel."""
        if self.main:
            self._rich.print(table)

    @contextmanager
    def stage(self, name: str, total: int, first: int = 0) -> Iterator[StageConsole]:
        """A bar of `total` steps of which `first` are done already; yields the callback."""
        with self._bar() as progress:
            stage = StageConsole(self, name, total, progress)
            stage.resumed(first)
            yield stage
            stage.finish()

    def progress(self, what: str) -> Callable[[str, int, int], None]:
        """A callback (part, done, total) for work that counts in other units, for example batches of an evaluation."""
        return _Counter(self, what)

    @contextmanager
    def _bar(self) -> Iterator[Progress | None]:
        if not self.fancy:
            yield None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:<12}"), BarColumn(bar_width=30), MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"), TimeElapsedColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self._rich, refresh_per_second=4) as progress:
            yield progress


class StageConsole:
    """Callback of one stage."""

    def __init__(self, console: Console, name: str, total: int, progress: Progress | None) -> None:
        self._console = console
        self._name = name
        self._total = total
        self._progress = progress
        self._task = None if progress is None else progress.add_task(name, total=total, facts="")
        self._shown = -1e9
        self._done = 0
        self._seconds: float | None = None
        self._rate = 0.0
        self._last: str = ""

    def resumed(self, first: int) -> None:
        self._done = first
        if first:
            self._console.line(f"{self._name}: continues at step {first} of {self._total}")
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=first)

    def on_step(self, report: StepReport) -> None:
        if not self._console.main:
            return
        self._done = report.step + 1
        old = self._seconds
        self._seconds = report.seconds if old is None else SMOOTHING * old + (1 - SMOOTHING) * report.seconds
        rate = report.tokens / report.seconds if report.seconds > 0 else 0.0
        self._rate = rate if old is None else SMOOTHING * self._rate + (1 - SMOOTHING) * rate
        left = duration(self._seconds * (self._total - self._done))
        thoughts = thought_facts(report)
        self._last = f"loss {report.loss:.4f}{thoughts}, {self._rate:,.0f} {report.unit}/s, {left} left"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._done, facts=self._last)
        elif time.monotonic() - self._shown >= self._console.plain_seconds:
            self._plain()

    def on_save(self, path: Path) -> None:
        self._console.line(f"{self._name}: saved {path.name}")

    def on_event(self, kind: str, **fields: Any) -> None:
        """Events with a code are for people as well."""
        if "code" in fields:
            rest = ", ".join(f"{key} {value}" for key, value in fields.items() if key != "code")
            self._console.line(f"{fields['code']} {self._name}: {kind.replace('_', ' ')}: {rest}")

    def finish(self) -> None:
        if self._console.main and self._progress is None and self._last:
            self._plain()

    def _plain(self) -> None:
        self._shown = time.monotonic()
        self._console.line(f"{self._name}: step {self._done} of {self._total}, {self._last}")


def thought_facts(report: StepReport) -> str:
    """What a person wants to see of thoughts at every step: nats they save and the mixing weight."""
    if "reward_mean" not in report.extra:
        return ""
    return f", thoughts save {report.extra['reward_mean']:+.3f} nats, weight {report.extra['mixing_weight']:.2f}"


class _Counter:
    """Lines or a bar for (part, done, total)."""

    def __init__(self, console: Console, what: str) -> None:
        self._console = console
        self._what = what
        self._started = 0.0
        self._shown = -1e9
        self._bar: Any = None
        self._progress: Any = None

    def __call__(self, part: str, done: int, total: int) -> None:
        if not self._console.main:
            return
        now = time.monotonic()
        self._started = self._started or now  # the time before the first call belongs to something else
        left = duration((now - self._started) / max(1, done) * (total - done))
        if self._console.fancy:
            self._draw(f"{part}, {left} left", done, total)
        elif now - self._shown >= self._console.plain_seconds or done >= total:
            self._shown = now
            self._console.line(f"{self._what}: {done} of {total}, {part}, {left} left")

    def _draw(self, facts: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = self._console._bar()
            self._progress = self._bar.__enter__()
            self._task = self._progress.add_task(self._what, total=total, facts="")
        self._progress.update(self._task, completed=done, total=total, facts=facts)
        if done >= total:
            self._bar.__exit__(None, None, None)
            self._bar = None


def duration(seconds: float) -> str:
    """`7 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def open_log(folder: Path, rank: int) -> Path:
    """Send Python's logging and warnings of this rank to logs/rank<N>.log, redacted; libraries no longer write to the
    console. Returns the file. Call once, after the libraries' own set-up if they make handlers at import."""
    path = folder / "logs" / f"rank{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, logging.FileHandler)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    for name in LIBRARIES:
        library = logging.getLogger(name)
        for own in list(library.handlers):
            library.removeHandler(own)
        library.addHandler(logging.NullHandler())
        library.propagate = True
    logging.getLogger("quietgoose").info("process %d, rank %d, command %s", os.getpid(), rank, " ".join(sys.argv))
    return path
