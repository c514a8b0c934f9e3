"""Named points at which a fault test may strike: `kill` a rank, `raise`, make a value NaN, `hang`.

A plan is a JSON list of {"rank", "step", "point", "action"}; `step` counts optimizer steps, -1 is any. It is read
only if the process was started with QG_FAULT_PLAN set AND QG_FAULT_TESTS=1; otherwise a point costs one look.
Used by tests/train/test_faults.py through engine, loop and checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import time
from functools import cache
from typing import Any

import torch

from ..base.distributed import world


@cache
def _plan() -> list[dict[str, Any]]:
    if os.environ.get("QG_FAULT_TESTS") != "1":
        return []
    return json.loads(os.environ.get("QG_FAULT_PLAN", "[]"))


def point(name: str, step: int = -1) -> None:
    """Carry out what the plan has for this rank, step and point."""
    if not _plan():
        return
    for fault in _due(name, step):
        action = fault["action"]
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "signal":
            os.kill(os.getpid(), getattr(signal, fault.get("signal", "SIGTERM")))
        elif action == "hang":
            time.sleep(3600)
        elif action == "oserror":
            raise OSError(28, "No space left on device", name)
        elif action == "out_of_memory":
            raise torch.OutOfMemoryError("planned by a fault test")


def tensor(name: str, step: int, value: torch.Tensor) -> torch.Tensor:
    """`value`, or `value` made NaN if the plan says so."""
    if _plan() and any(fault["action"] == "nan" for fault in _due(name, step)):
        return value * float("nan")
    return value


def _due(name: str, step: int) -> list[dict[str, Any]]:
    rank = world().rank
    return [f for f in _plan() if f["point"] == name and f["rank"] == rank and f.get("step", -1) in (-1, step)]
