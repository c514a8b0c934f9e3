"""Outcome files, exit codes, signals: the parts that need no second process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from quietgoose.base.errors import NumericError, QuietGooseError, StopRequested
from quietgoose.base.files import read_json
from quietgoose.train import stop as stopping
from quietgoose.train.stop import (
    OUTCOME,
    STOP_FILE,
    Progress,
    StopControl,
    read_outcome,
    request_stop,
    run_guarded,
)


def fail(error: Exception):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "state"),
    [
        (StopRequested("signal", saved=True), 75, "stopped"),
        (StopRequested("signal", saved=False), 76, "stopped"),
        (NumericError("nan"), 5, "failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), 8, "failed"),
    ],
)
def test_errors_become_codes_and_outcomes(tmp_path: Path, error: Exception, code: int, state: str) -> None:
    assert run_guarded(tmp_path, fail(error)) == code
    assert read_outcome(tmp_path) == code
    assert read_json(tmp_path / OUTCOME)["state"] == state


def test_lost_peer_and_plain_bugs(tmp_path: Path) -> None:
    control = StopControl(tmp_path).install()
    control.close()
    assert read_outcome(tmp_path) == 7  # running, then nothing: killed
    assert run_guarded(tmp_path, fail(RuntimeError("Connection closed by peer [127.0.0.1]:1"))) == 7
    with pytest.raises(RuntimeError, match="a bug"):
        run_guarded(tmp_path, fail(RuntimeError("a bug")))
    assert read_outcome(tmp_path) == 1
    assert run_guarded(tmp_path, lambda: None) == 0
    assert read_outcome(tmp_path) == 0
    assert read_outcome(tmp_path / "nothing") == 3


@pytest.mark.parametrize("error", [StopRequested("asked", saved=True), NumericError("nan"), ValueError("a bug"), None])
def test_the_outcome_says_how_many_steps_were_taken(tmp_path: Path, error: Exception | None) -> None:
    """By the training that ended so; a training that was finished before has none to tell."""
    progress = Progress()
    control = StopControl(tmp_path, progress=progress)

    def main() -> None:
        for failure in (None, error):
            with control.watching():
                progress.step = 51
                if failure is not None:
                    raise failure

    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="a bug"):
            run_guarded(tmp_path, main, progress)
    else:
        run_guarded(tmp_path, main, progress)
    assert read_json(tmp_path / OUTCOME)["step"] == (51 if error else None)


def test_a_second_job_leaves_the_first_ones_outcome_alone(tmp_path: Path) -> None:
    StopControl(tmp_path).install().close()
    before = (tmp_path / OUTCOME).read_bytes()
    assert run_guarded(tmp_path, fail(QuietGooseError("in use", code="RUN-004"))) == 2
    assert (tmp_path / OUTCOME).read_bytes() == before


@pytest.fixture
def control(tmp_path: Path):
    made = StopControl(tmp_path).install()
    yield made
    made.close()


def test_one_interrupt_saves_a_second_later_one_does_not(control: StopControl, monkeypatch) -> None:
    assert control.flags() == (0.0, 0.0)
    os.kill(os.getpid(), signal.SIGINT)
    assert control.flags() == (1.0, 0.0)
    os.kill(os.getpid(), signal.SIGTERM)  # the launcher's, 10 ms after a Ctrl-C
    os.kill(os.getpid(), signal.SIGINT)  # the same key press, forwarded
    assert control.flags() == (1.0, 0.0)
    monkeypatch.setattr(stopping, "SAME_KEY_PRESS_SECONDS", 0.0)
    os.kill(os.getpid(), signal.SIGINT)
    assert control.flags() == (1.0, 1.0)
    assert control.reason() == "SIGINT"


def test_handlers_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    StopControl(tmp_path).install().close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_stop_file_is_seen_and_a_stale_one_is_not(tmp_path: Path) -> None:
    request_stop(tmp_path)
    os.utime(tmp_path / STOP_FILE, (1, 1))
    control = StopControl(tmp_path).install()
    try:
        assert not (tmp_path / STOP_FILE).exists()
        request_stop(tmp_path, now=True)
        end = time.monotonic() + 10
        while not control.requested() and time.monotonic() < end:
            time.sleep(0.05)
        assert control.flags() == (1.0, 1.0)
    finally:
        control.close()
