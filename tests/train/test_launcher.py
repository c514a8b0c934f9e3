"""The real `deepspeed` launcher, two CPU processes: signals to the command, to its child, and the child's death.

Rows R3 and R7 of reliability.md. No process may be left, whatever was signalled.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from quietgoose.base.files import read_json
from quietgoose.train.stop import read_outcome

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]
WORKER = Path(__file__).with_name("rank_worker.py")


def launch(tmp_path: Path, case: dict) -> subprocess.Popen:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"out": str(tmp_path), "cases": [case]}))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [
            sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2",
            "--master_port", str(port), str(WORKER), str(settings),
        ],
        env=environment, stdout=(tmp_path / "log").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def wait_for(condition, tmp_path: Path, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.1)


def family(command: subprocess.Popen) -> tuple[psutil.Process, list[psutil.Process]]:
    """The launcher's child and the ranks."""
    (child,) = psutil.Process(command.pid).children()
    return child, child.children()


@pytest.mark.parametrize("target", ["command", "child", "child_killed"])
def test_r3_r7_signals_to_the_launcher(tmp_path: Path, target: str) -> None:
    case = {"run": "run", "strategy": "zero2", "steps": 100_000, "every": 100_000, "step_seconds": 0.02}
    command = launch(tmp_path, case)
    wait_for(lambda: (tmp_path / "run" / "first_step").exists(), tmp_path)
    child, ranks = family(command)
    assert len(ranks) == 2
    if target == "command":
        command.terminate()
    else:
        child.send_signal(signal.SIGTERM if target == "child" else signal.SIGKILL)
    _, alive = psutil.wait_procs([child, *ranks], timeout=35)
    for process in alive:
        process.kill()
    command.wait(10)
    assert not alive, f"left behind: {alive}"
    outcome = read_json(tmp_path / "run" / "outcome.json")
    checkpoints = tmp_path / "run" / "checkpoints"
    if target == "child_killed":
        assert command.returncode == 0  # the launcher's lie that outcome.json is there for
        assert read_outcome(tmp_path / "run") == 7
        assert not checkpoints.exists()
        return
    assert (outcome["state"], outcome["code"]) == ("stopped", 75), (tmp_path / "log").read_text()[-3000:]
    (saved,) = checkpoints.iterdir()
    assert f"checkpoint of step {int(saved.name.removeprefix('step_'))} holds" in outcome["message"]
