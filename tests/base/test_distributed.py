"""Work on rank 0 that others wait for, over gloo with a collective time limit shorter than the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from quietgoose.base.distributed import on_main_patiently

WORKER = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from quietgoose.base.distributed import on_main_patiently
from quietgoose.base.errors import DataError
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=3))
ran = []

def long():
    ran.append(rank)
    time.sleep(4)
    return {"answer": 42}

assert on_main_patiently(long, 0.2) == {"answer": 42}
assert ran == ([0] if rank == 0 else [])

def fails():
    raise DataError("a bad file", code="DATA-042")

try:
    on_main_patiently(fails, 0.2)
except DataError as error:
    assert error.code == "QG-DATA-042"
else:
    raise SystemExit("no error")
dist.barrier()  # nobody leaves while the other still listens: gloo aborts in its own clean-up now and then
dist.destroy_process_group()
"""


def test_waiting_for_rank_0_outlasts_the_limit_of_a_collective(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=60) for process in started] == [0, 0]


def test_one_process_just_does_it() -> None:
    assert on_main_patiently(lambda: 3) == 3
