"""Which rank holds the others up (row R14 of the fault matrix): a hung one is named as the run ends, a slow one while it goes on.

Hung: every rank's watching thread (train/stop.py) lays down where its main thread stands, in a folder that all ranks see. The
rank that is not waiting for the others is the one that they wait for.
Slow: every rank's seconds of the sections that wait for nobody travel with the vector that a step exchanges anyway.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ..base import distributed
from ..base.distributed import World
from ..base.files import read_json, write_json

PREFIX = ".hang-"
GATHER_SECONDS = 5.0
ROOT = str(Path(__file__).resolve().parents[1]) + os.sep
WAITING_IN = (("engine.py", "_agree"), ("verdict.py", "read"))
"""Where the host waits for the device, and the device for the other ranks."""

SECTIONS = ("data", "forward")
WINDOW = 20
"""Steps over which a rank's median is taken."""

SLOW_FACTOR = 5.0
SHARE_OF_STEP = 0.1
"""Less than this of a step is too little to speak of."""


class HangWitness:
    """What the ranks of one start say of themselves when one of them makes no progress. Made by all ranks together."""

    def __init__(self, folder: Path) -> None:
        """Collective. `folder` is seen by all ranks."""
        self.world = distributed.world()
        if self.world.is_main:
            for old in folder.glob(f"{PREFIX}*"):
                shutil.rmtree(old, ignore_errors=True)
        self.folder = folder / f"{PREFIX}{distributed.broadcast(time.time_ns())}"

    def called(self) -> bool:
        """Whether another rank makes no progress and asks where the others are."""
        return self.folder.exists()

    def testify(self, section: str, seconds: float) -> str:
        """Say where this rank is, hear the others, name who hangs. Called from the watching thread."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        record = {"section": section, "seconds": seconds, "waits": waits(frame), "where": place(frame)}
        try:
            write_json(self.folder / f"rank_{self.world.rank}.json", record)
        except OSError:  # a full disk must not keep a hung run alive
            return verdict({self.world.rank: record}, self.world.size)
        until = time.monotonic() + GATHER_SECONDS
        while len(found := self._heard()) < self.world.size and time.monotonic() < until:
            time.sleep(0.1)
        return verdict(found, self.world.size)

    def _heard(self) -> dict[int, dict[str, Any]]:
        files = {rank: self.folder / f"rank_{rank}.json" for rank in range(self.world.size)}
        return {rank: read_json(file) for rank, file in files.items() if file.is_file()}


def verdict(records: dict[int, dict[str, Any]], size: int) -> str:
    """Who hangs, where, and who waits for it, from the records of the ranks that answered."""
    told = {rank: f"{r['section']} ({r['where']})" for rank, r in records.items()}
    silent = [rank for rank in range(size) if rank not in records]
    hung = [rank for rank, record in records.items() if not record["waits"]]
    parts = [f"rank {rank}: no progress for {records[rank]['seconds']:.0f} s in: {told[rank]}" for rank in hung]
    parts += [f"rank {rank}: gives no sign of life" for rank in silent]
    waiting = "; ".join(f"rank {rank} in {told[rank]}" for rank in records if rank not in hung)
    if not parts:
        longest = max(record["seconds"] for record in records.values())
        return f"all ranks wait for each other, no progress for {longest:.0f} s: {waiting}"
    return "; ".join(parts) + (f"; waiting for it: {waiting}" if waiting else "")


def waits(frame: FrameType | None) -> bool:
    """Whether a thread is inside something that ends only when the other ranks come."""
    while frame is not None:
        file = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}distributed{os.sep}" in file:
            return True
        if _is_ours(file) and (os.path.basename(file), frame.f_code.co_name) in WAITING_IN:
            return True
        frame = frame.f_back
    return False


def place(frame: FrameType | None) -> str:
    """File, line and function of the innermost frame of this package, or of the innermost one."""
    inner = frame
    while frame is not None and not _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    shown = frame or inner
    return "?" if shown is None else f"{Path(shown.f_code.co_filename).name}:{shown.f_lineno} {shown.f_code.co_name}"


def _is_ours(file: str) -> bool:
    """Whether a file is this package's; a virtual environment may lie below it."""
    return file.startswith(ROOT) and "site-packages" not in file[len(ROOT) :]


@dataclass(frozen=True)
class Slow:
    """A rank that takes much longer than the others for a section; seconds are medians over the window."""

    rank: int
    section: str
    seconds: float
    others: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} takes {self.seconds:.3f} s a step for {self.section}, the others {self.others:.3f} s; all ranks "
            "wait for it: look at its machine (disk, other jobs, clock)"
        )


class SlowRanks:
    """Finds ranks that are SLOW_FACTOR times slower than the others, every WINDOW steps; a rank is named once, and again
    after it has been as fast as the others."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._steps: deque[tuple[float, ...]] = deque(maxlen=WINDOW)
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._named: set[tuple[int, str]] = set()

    def share(self, data: float, forward: float) -> list[float]:
        """This rank's summand of the vector that `look` reads: its seconds at its place, zero elsewhere."""
        vector = [0.0] * (len(SECTIONS) * self.world.size)
        for number, seconds in enumerate((data, forward)):
            vector[number * self.world.size + self.world.rank] = seconds
        return vector

    def look(self, seconds: Sequence[float], step_seconds: float) -> list[Slow]:
        """Take the sum over ranks of one step's shares; the ranks that turned slow, the same on every rank."""
        self._steps.append(tuple(seconds))
        self._seconds.append(step_seconds)
        if self.world.size == 1 or len(self._steps) < WINDOW:
            return []
        medians = [statistics.median(values) for values in zip(*self._steps)]
        floor = SHARE_OF_STEP * statistics.median(self._seconds)
        self._steps.clear()
        self._seconds.clear()
        size = self.world.size
        slow = [
            one
            for number, section in enumerate(SECTIONS)
            for one in _compare(medians[number * size : (number + 1) * size], section, floor)
        ]
        fresh = [one for one in slow if (one.rank, one.section) not in self._named]
        self._named = {(one.rank, one.section) for one in slow}
        return fresh


def _compare(medians: Sequence[float], section: str, floor: float) -> list[Slow]:
    found = []
    for rank, seconds in enumerate(medians):
        others = statistics.median([value for other, value in enumerate(medians) if other != rank])
        if seconds > SLOW_FACTOR * others and seconds - others > floor:
            found.append(Slow(rank, section, seconds, others))
    return found
