"""What every benchmark measures with: counts of calls, quantiles, limits, and the report of what failed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import measure
import pytest
import torch
from measure import Times

CPU = torch.device("cpu")


def test_quantiles_of_times() -> None:
    times = Times.of([5.0, 1.0, 2.0, 3.0, 4.0, 90.0])
    assert times == Times(3.5, 2.0, 5.0, 17.5, 90.0, 6)
    assert times.short(1) == {"ms": 3.5, "p20": 2.0, "p80": 5.0}
    assert Times.of([2.0]) == Times(2.0, 2.0, 2.0, 2.0, 2.0, 1)


@pytest.mark.parametrize(
    ("most", "seconds", "least", "count"), [(7, 60.0, 3, 7), (40, 0.0, 3, 3), (40, 0.0, 12, 12), (5, 60.0, 9, 9)]
)
def test_steps_are_counted_after_two_that_warm_up(most: int, seconds: float, least: int, count: int) -> None:
    calls = []
    assert measure.time_steps(lambda: calls.append(0), CPU, most, seconds, least).count == count
    assert len(calls) == count + 2


def test_a_step_that_takes_its_time_is_seen() -> None:
    assert 4.0 < measure.time_steps(lambda: time.sleep(0.005), CPU, 40, 0.02).median < 50.0
    milliseconds, result = measure.elapsed(lambda: time.sleep(0.005) or "made", CPU)
    assert result == "made"
    assert 4.0 < milliseconds < 50.0
    assert measure.time_calls(lambda: time.sleep(0.005), CPU, 0.03).count in (5, 6)
    assert measure.time_calls(lambda: None, CPU, 0.0, least=8).count == 8


def test_limits_count_what_was_moved_and_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocks(step, device, count):
        step()
        return [0.5, 0.5, 0.5, *[2.0] * (count - 4), 4.0]  # the first three warm up

    monkeypatch.setattr(measure, "intervals", blocks)
    assert measure.matmul_limit(CPU, 64) == 2 * 64**3 / 2e-3
    monkeypatch.setattr(measure, "time_steps", lambda step, *rest: Times.of([step() is None, 4.0, 4.0]))
    assert measure.copy_bandwidth(CPU) == 2 * 2**24 / 4e-3


def test_no_memory_is_read_without_a_gpu() -> None:
    assert measure.peak_of(lambda: 3, CPU) == (3, None)
    measure.reset_peak(CPU)
    assert (measure.peak(CPU), measure.held(CPU), measure.gib(None), measure.mib(None)) == (None, None, None, "-")
    assert (measure.gib(3 * 2**29), measure.mib(3 * 2**20)) == (1.5, "3")


def test_what_fails_is_a_line_of_the_report(tmp_path: Path) -> None:
    def broken() -> dict[str, float]:
        raise ValueError("not today")

    def large() -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything")

    rows = [measure.attempt(work, CPU) for work in (broken, large, lambda: {"ms": 1.0})]
    assert [measure.why_not(row) for row in rows] == [
        "error: ValueError: not today", "out of memory: CUDA out of memory", None
    ]  # fmt: skip
    report = {**measure.about(CPU), "rows": rows}
    measure.write(report, tmp_path / "new" / "found.json")
    assert json.loads((tmp_path / "new" / "found.json").read_text()) == report
    assert torch.__version__.split("+")[0] in report["versions"]
