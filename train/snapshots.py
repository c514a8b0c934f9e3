"""Weights kept at chosen steps, so that a run's curve can be judged afterwards. A callback of the training loop."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..base import distributed
from ..base.errors import StorageError
from ..base.files import fsync_folder
from .engine import Engine
from .run_folder import flush_tree
from .types import StepReport
from .unet_folder import save_weights


class Snapshots:
    """After step `n` of `at` the whole weights and their average lie in `folder/n`. Collective at those steps."""

    def __init__(self, engine: Engine, folder: Path, at: Collection[int]) -> None:
        self._engine, self._folder, self._at = engine, folder, frozenset(at)

    def on_step(self, report: StepReport) -> None:
        step = report.step + 1
        if step not in self._at:
            return
        trained = self._engine.trainable()
        distributed.on_main(lambda: self._write(step, trained))

    def on_save(self, path: Path) -> None:
        """Checkpoints are another matter."""

    def on_event(self, kind: str, **fields: Any) -> None:
        """Nothing to do."""

    def _write(self, step: int, trained: Any) -> None:
        target = self._folder / f"{step:08d}"
        staging = target.with_name(f"{target.name}.tmp")
        try:
            shutil.rmtree(staging, ignore_errors=True)
            save_weights(trained, staging)
            flush_tree(staging)
            shutil.rmtree(target, ignore_errors=True)  # a resume from an older checkpoint came here again
            os.replace(staging, target)
            fsync_folder(self._folder)
        except OSError as error:
            raise StorageError(f"{staging}: {error.strerror or error}") from error


def collect(folder: Path, at: Collection[int], result: Path) -> None:
    """Copy the snapshots of `at` into a stage's result. StorageError if one is missing."""
    for step in sorted(at):
        source = folder / f"{step:08d}"
        if not source.is_dir():
            raise StorageError(
                f"{source}: weights of step {step} are missing; delete the stage's folder and start again"
            )
        shutil.copytree(source, result / source.name)
