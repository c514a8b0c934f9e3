"""Starts a recipe under the DeepSpeed launcher and returns what really became of it. Used by `quietgoose train`.

The launcher's exit code is not the truth (deepspeed.md 2.2: 0 when its child was killed), `outcome.json` is. It runs in
a session of its own: Ctrl-C and SIGTERM reach this process only, which then asks the run to stop through the stop file,
so that the shell prompt comes back after the save. Secrets are taken out of the environment, because the launcher prints
MLFLOW variables and puts them on command lines of other nodes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from ..base.errors import ExitCode
from .checks import cuda_devices
from .redaction import SECRET_NAME

SAME_KEY_PRESS_SECONDS = 1.0
POLL_SECONDS = 0.2
SETTLE_SECONDS = 35.0
PR_SET_PDEATHSIG = 1
TRAIN = Path(__file__).resolve().parents[1] / "launch" / "train.py"


class _Wish:
    """What signals ask for: "", "save", "now"."""

    def __init__(self) -> None:
        self.word = ""
        self._first = 0.0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.word and number == signal.SIGINT and now - self._first >= SAME_KEY_PRESS_SECONDS:
            self.word = "now"
        elif not self.word:
            self.word, self._first = "save", now


def launch(output: Path, arguments: Sequence[str], processes: int | None, launcher_options: Sequence[str] = ()) -> int:
    """Run launch/train.py with `arguments`; the exit code of outcome.json in `output`."""
    command, environment = launch_line(arguments, processes, launcher_options)
    before = _stamp(output)
    wish = _Wish()
    previous = {n: signal.signal(n, wish.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_die_with_parent)
        from .stop import read_outcome, request_stop  # imports torch, while the launcher starts

        while child.poll() is None:
            if wish.word and output.is_dir() and _asked(output) != wish.word:
                request_stop(output, now=wish.word == "now")
            time.sleep(POLL_SECONDS)
        return _result(output, before, child.returncode, read_outcome)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def launch_line(
    arguments: Sequence[str], processes: int | None, launcher_options: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """(command, environment) of the launcher: all GPUs, or two processes on the CPU, unless `processes` says."""
    environment = without_secrets(os.environ)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *launcher_options]
    if not any(option.startswith("--master_port") for option in launcher_options):
        command += ["--master_port", str(_free_port())]
    if not cuda_devices():
        cores = len(os.sched_getaffinity(0))
        processes = processes or min(2, cores)
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    if processes:
        command += ["--num_accelerators", str(processes)]
    return [*command, str(TRAIN), *arguments], environment


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment less every variable whose name says secret, and MLflow's user name."""
    return {
        name: value
        for name, value in environment.items()
        if not SECRET_NAME.search(name) and name != "MLFLOW_TRACKING_USERNAME"
    }


def _result(output: Path, before: int, launcher_code: int, read_outcome: Callable[[Path], int]) -> int:
    """The new outcome's code; the launcher's own if no rank got as far as writing one."""
    if _stamp(output) == before:
        return launcher_code if launcher_code > 0 else int(ExitCode.ENVIRONMENT)
    deadline = time.monotonic() + SETTLE_SECONDS
    while '"running"' in (output / "outcome.json").read_text() and time.monotonic() < deadline:
        if launcher_code not in (0, 143, 130, 1):  # a rank ended by itself; nobody else will write
            break
        time.sleep(POLL_SECONDS)
    return read_outcome(output)


def _stamp(output: Path) -> int:
    path = output / "outcome.json"
    return path.stat().st_mtime_ns if path.is_file() else 0


def _asked(output: Path) -> str:
    path = output / "STOP"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    """Linux: the launcher gets SIGTERM when this process dies, and the ranks then save and stop."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
