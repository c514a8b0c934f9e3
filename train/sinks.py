"""Where a run speaks: one object that the pipeline talks to, in front of the console and the tracker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ..base.distributed import World
from .console import Console, StageConsole
from .recipe import Recipe
from .settings import flatten, plain
from .tracking import StageTracker, Tracker
from .types import StepReport

SHARED_RESULTS = (
    "results.json", "results.md", "results.csv", "routing.json", "thoughts.json", "thoughts.md", "thoughts.csv",
    "generated.json", "generated.md", "generated.csv", "deciles.json", "thoughts.html", "quietgoose.json",
    "image_results.json", "image_results.md", "image_results.csv", "samples", "teacher.json",
)  # fmt: skip


class Sinks:
    """Callback of the training loop and context manager of the run; it ends the tracking with what ended the run.
    Silent on every rank but the first."""

    def __init__(self, recipe: Recipe, root: Path, world: World) -> None:
        self.main = world.is_main
        self.console = Console(self.main)
        self.tracker = Tracker(
            recipe.tracking,
            root,
            settings_of_run=flatten(plain(recipe)),
            name=recipe.name,
            main=self.main,
            say=self.console.line,
        )
        self._stage: tuple[str, StageTracker] | None = None
        self._bar: StageConsole | None = None
        self._count: Callable[[str, int, int], None] = self.console.progress("evaluate")

    def __enter__(self) -> Sinks:
        self.tracker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tracker.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        self.console.line(text)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A child run of the tracking."""
        self.say(f"== {name}")
        self._count = self.console.progress(name)
        with self.tracker.stage(name) as tracked:
            self._stage = (name, tracked)
            try:
                yield
            finally:
                self._stage = None

    @contextmanager
    def training(self, stage: str, steps: int) -> Iterator[None]:
        """A progress bar."""
        with self.console.stage(stage, steps) as self._bar:
            try:
                yield
            finally:
                self._bar = None

    def on_step(self, report: StepReport) -> None:
        if self._stage is not None:
            self._stage[1].on_step(report)
        if self._bar is not None:
            self._bar.on_step(report)

    def on_save(self, path: Path) -> None:
        """Checkpoints tell of themselves through `event`."""

    def on_event(self, kind: str, **fields: Any) -> None:
        self.event(kind, **fields)

    def event(self, kind: str, **fields: Any) -> None:
        if kind == "resume" and self._bar is not None and fields.get("step"):
            self._bar.resumed(int(fields["step"]))
        if "code" in fields:
            self.say(f"{fields['code']} {fields.get('reason', kind)}")
        if self._stage is not None:
            fields = {"stage": self._stage[0], **fields}
        self.tracker.event(kind, **fields)

    def progress(self, arm: str, done: int, total: int) -> None:
        self._count(arm, done, total)

    def table(self, title: str, header: list[str], rows: list[list[str]]) -> None:
        """A table on the console."""
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for number, name in enumerate(header):
            table.add_column(name, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.show(table)

    def result(self, stage: str, folder: Path) -> None:
        """Tables and manifests become artifacts, weights never."""
        for name in SHARED_RESULTS if self.main else ():
            if (folder / name).is_file():
                self.tracker.artifact(folder / name, stage, stage)
            elif (folder / name).is_dir():
                self.tracker.artifact(folder / name, f"{stage}/{name}", stage)
