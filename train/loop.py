"""The training loop: resume, step, save, stop. Everything that matters is decided alike on all ranks.

Called by the stages through train/pipeline.py: `train(engine, data, checkpoints, callbacks, stop, ...)`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..base.errors import DataError, NumericError, StopRequested, StorageError
from . import faults
from .checkpoint import Checkpoints
from .engine import Engine
from .recipe import ResumeSettings
from .stalls import SlowRanks
from .stop import StopControl
from .types import StepBatch, StepReport
from .verdict import Pending

BAD_STEPS_IN_ROW = 3
EMPTY_STEPS_IN_ROW = 10
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
    row, DataError DATA-004 after ten without a label token; StorageError IO-001 after three saves in a row that the disk refused.
    """
    with stop.watching():
        first = checkpoints.resume(engine, resume)
        saved = stop.progress.step = first
        waiting: deque[Pending] = deque()
        slow = SlowRanks(engine.world)
        for step in range(first, total_steps):
            stop.beat(f"data of step {step}")
            began = time.perf_counter()
            batch = data.step(step)
            faults.point("step", step)
            own = time.perf_counter() - began
            stop.beat(f"step {step}")
            waiting.append(
                engine.submit(batch, lambda own=own: (*stop.flags(), *slow.share(own, engine.forward_seconds)))
            )
            done = stop.progress.step = step + 1
            saving = done % every == 0 or done == total_steps
            wanted, at_once = _reports(engine, waiting, callbacks, slow, 0 if saving else engine.lag)
            if wanted or at_once:  # asked for in a step before the last, maybe
                wanted, at_once = (
                    max(pair) for pair in zip((wanted, at_once), _reports(engine, waiting, callbacks, slow, 0))
                )
            if at_once:
                raise StopRequested(f"{stop.reason()}: stopped after step {done}, not saved", saved=False)
            if wanted or saving:
                stop.beat(f"save at step {done}")
                saved = _save(engine, checkpoints, callbacks, done) or saved
            if wanted:
                raise StopRequested(
                    f"{stop.reason()}: stopped after step {done}, checkpoint of step {saved} holds; "
                    "start the same command again to continue",
                    saved=saved == done,
                )
    return first


def _reports(
    engine: Engine, waiting: deque[Pending], callbacks: Sequence[Callback], slow: SlowRanks, keep: int
) -> tuple[float, float]:
    """Report submitted steps, oldest first, until `keep` are left; whether one of them carried the wish to stop, and to stop
    at once."""
    wanted = at_once = 0.0
    while len(waiting) > keep:
        report = engine.report(waiting.popleft())
        for callback in callbacks:
            callback.on_step(report)
        _guard(engine, report, callbacks)
        for one in slow.look(engine.flags[2:], report.seconds):
            for callback in callbacks:
                callback.on_event("rank_slow", code="QG-DIST-003", step=report.step, reason=str(one), **vars(one))
        wanted, at_once = max(wanted, engine.flags[0]), max(at_once, engine.flags[1])
    return wanted, at_once


def _guard(engine: Engine, report: StepReport, callbacks: Sequence[Callback]) -> None:
    if not report.skipped:
        return
    code = "DATA-004" if report.empty else "NUM-001"
    for callback in callbacks:
        callback.on_event("step_skipped", code=f"QG-{code}", step=report.step, reason=engine.fault)
    if engine.empty_in_row >= EMPTY_STEPS_IN_ROW:
        raise DataError(
            f"{engine.fault}, {engine.empty_in_row} steps in a row; check loss_on and the data, then start again",
            code=code,
        )
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
