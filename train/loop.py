"""The training loop: resume, step, save, stop. Everything that matters is decided alike on all ranks.

Called by the stages through train/pipeline.py: `train(engine, data, checkpoints, callbacks, stop, ...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..base.errors import NumericError, StopRequested, StorageError
from . import faults
from .checkpoint import Checkpoints
from .engine import Engine
from .recipe import ResumeSettings
from .stop import StopControl
from .types import StepBatch, StepReport

BAD_STEPS_IN_ROW = 3
FAILED_SAVES_IN_ROW = 3


class Data(Protocol):
    def step(self, step: int) -> StepBatch: ...


class Callback(Protocol):
    """`on_step` after every step, `on_save` after every committed checkpoint, `on_event` for everything else."""

    def on_step(self, report: StepReport) -> None: ...

    def on_save(self, path: Path) -> None: ...

    def on_event(self, kind: str, **fields: Any) -> None: ...


def train(
    engine: Engine,
    data: Data,
    checkpoints: Checkpoints,
    callbacks: Sequence[Callback],
    stop: StopControl,
    total_steps: int,
    *,
    every: int,
    resume: ResumeSettings,
) -> int:
    """Train up to `total_steps`; returns the step it started at. A finished run ends with a checkpoint, so that a
    kill between training and export costs nothing.

    StopRequested (75 saved, 76 not) after a signal or the stop file; NumericError NUM-001 after three bad steps in a
    row; StorageError IO-001 after three saves in a row that the disk refused.
    """
    with stop.watching():
        first = checkpoints.resume(engine, resume)
        saved = first
        for step in range(first, total_steps):
            stop.beat(f"data of step {step}")
            batch = data.step(step)
            stop.beat(f"step {step}")
            faults.point("step", step)
            report = engine.step(batch, stop.flags)
            for callback in callbacks:
                callback.on_step(report)
            _guard(engine, report, callbacks)
            done = step + 1
            wanted, at_once = engine.flags
            if at_once:
                raise StopRequested(f"{stop.reason()}: stopped after step {done}, not saved", saved=False)
            if wanted or done % every == 0 or done == total_steps:
                stop.beat(f"save at step {done}")
                saved = _save(engine, checkpoints, callbacks, done) or saved
            if wanted:
                raise StopRequested(
                    f"{stop.reason()}: stopped after step {done}, checkpoint of step {saved} holds; "
                    "start the same command again to continue",
                    saved=saved == done,
                )
    return first


def _guard(engine: Engine, report: StepReport, callbacks: Sequence[Callback]) -> None:
    if not report.skipped:
        return
    for callback in callbacks:
        callback.on_event("step_skipped", code="QG-NUM-001", step=report.step, reason=engine.fault)
    if engine.skipped_in_row >= BAD_STEPS_IN_ROW:
        raise NumericError(
            f"{engine.fault}; {engine.skipped_in_row} bad steps in a row, {engine.skipped} in all. The last checkpoint "
            "is untouched: lower train.optimizer.lr or look at the rows of these steps, then start again"
        )


def _save(engine: Engine, checkpoints: Checkpoints, callbacks: Sequence[Callback], step: int) -> int | None:
    path = checkpoints.save(engine, step)
    if path is not None:
        for callback in callbacks:
            callback.on_save(path)
        return step
    if checkpoints.failed_in_row >= FAILED_SAVES_IN_ROW:
        raise StorageError(
            f"{checkpoints.folder}: {FAILED_SAVES_IN_ROW} saves in a row failed; free space there or choose another "
            "output folder, then start again"
        )
    return None
