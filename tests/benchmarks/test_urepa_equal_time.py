"""Scores at equal time with step times measured alone, on made-up numbers and on the committed ones."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="urepa_curves.py draws with it")
import urepa_equal_time
from urepa_equal_time import equal_time, runs_of, step_seconds, table

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def points(at_50: float, at_100: float) -> dict[str, dict[str, float]]:
    """Of one arm: seeds 0 and 1, a distance of 2 apart."""
    return {"50": {"0": at_50 - 1, "1": at_50 + 1}, "100": {"0": at_100 - 1, "1": at_100 + 1}}


def made_up() -> tuple[dict[str, Any], dict[str, Any]]:
    """100 steps. A's take 1 s, the others' 2 s; D and B pay 40 s once, E 10 s. What the comparison says of seconds is nonsense."""
    curves = {"A": points(30, 20), "D": points(24, 14), "B": points(26, 16), "E": points(28, 18)}
    scores: dict[str, Any] = {}
    for step in ("50", "100"):
        for count, add in ((40, 0.0), (60, -5.0)) if step == "100" else ((40, 0.0),):
            scores[f"step {step}, average, ode, {count} samples"] = {
                arm: {seed: {"jfd": value + add} for seed, value in curve[step].items()}
                for arm, curve in curves.items()
            }
    scores["step 100, average, a_guided, 60 samples"] = scores["step 100, average, ode, 60 samples"]
    scores["step 100, raw, ode, 60 samples"] = {arm: {"0": {"jfd": 99.0}, "1": {"jfd": 99.0}} for arm in curves}
    once = {"A": 0.0, "D": 40.0, "B": 40.0, "E": 10.0}
    comparison = {
        "arms": {"A": {"teacher.kind": "none"}, "D": {}, "B": {"urepa.align.tap": "2"}, "E": {"teacher.kind": "random"}},
        "costs": {arm: {"seconds": 77.0, "once_seconds": seconds} for arm, seconds in once.items()},
        "scores": scores, "treatment": "D", "steps": 100, "equal_count": 40, "samplers": {"a_guided": {}, "ode": {}},
        "final": "step 100, average, ode, 60 samples",
    }  # fmt: skip
    cases = {
        "plain U-Net, compiled": {"ms": 1000.0}, "urepa, compiled, features from a table": {"ms": 2000.0},
        "plain U-Net, eager": {"ms": 9000.0}, "teacher alone": {"error": "out of memory"},
    }  # fmt: skip
    return comparison, {"cases": cases}


def test_an_arm_takes_the_step_that_it_is_and_pays_its_teacher_once() -> None:
    """A's 100 s are D's step (100 - 40) / 2 = 30, before its first point; E's 210 s its step 85, B's 240 s its last."""
    comparison, throughput = made_up()
    assert step_seconds(comparison, throughput) == {"A": 1.0, "D": 2.0, "B": 2.0, "E": 2.0}
    found = equal_time(comparison, throughput)
    assert found["A"] is None
    assert found["E"] == pytest.approx(
        {"seconds": 210.0, "jfd": 18.0, "treatment_step": 85.0, "treatment_jfd": 24 - 10 * (85 - 50) / 50}
    )
    assert found["B"] == pytest.approx({"seconds": 240.0, "jfd": 16.0, "treatment_step": 100.0, "treatment_jfd": 14.0})
    assert "| A |  | before its first point |" in table(comparison, throughput, [1])


def test_a_teacher_of_several_runs_is_charged_to_each_in_part() -> None:
    """Of A's 150 s D needs 10 for a quarter of its teacher; E pays a quarter of its own."""
    comparison, throughput = made_up()
    throughput["cases"]["plain U-Net, compiled"]["ms"] = 1500.0
    found = equal_time(comparison, throughput, 4)
    assert found["A"] == pytest.approx(
        {"seconds": 150.0, "jfd": 20.0, "treatment_step": 70.0, "treatment_jfd": 24 - 10 * 20 / 50}
    )
    assert found["E"] is not None
    assert found["E"]["seconds"] == 202.5
    assert "| A | 20.0 | 23.0 (150.0 s, step 55) | 20.0 (150.0 s, step 70) |" in table(comparison, throughput, [1, 4])


def test_only_the_average_s_curve_counts() -> None:
    comparison, throughput = made_up()
    runs = runs_of(comparison, step_seconds(comparison, throughput), 1)
    labels = {(p["step"], p["sampler"], p["count"]) for p in runs["D"][0]["points"]}
    assert labels == {(50, "ode", 40), (100, "ode", 40), (100, "ode", 60), (100, "a_guided", 60)}
    raw = copy.deepcopy(comparison)
    del raw["scores"]["step 100, raw, ode, 60 samples"]
    assert equal_time(raw, throughput) == equal_time(comparison, throughput)


def test_the_committed_comparison_reads_as_the_page_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(RESULTS / f"2026-11-26_urepa_{name}_h100.json") for name in ("compare", "throughput")]
    monkeypatch.setattr(sys, "argv", ["urepa_equal_time.py", *files, "--shared-by", "1", "4"])
    urepa_equal_time.main()
    said = capsys.readouterr().out
    page = (RESULTS.parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
    rows = [line for line in said.splitlines() if line.startswith("|") and "---" not in line]
    assert len(rows) == 5
    assert all(row in page for row in rows), said
    comparison = json.loads(Path(files[0]).read_text(encoding="utf-8"))
    assert comparison["scores"]["step 4000, average, ode, 5000 samples"].keys() == comparison["arms"].keys()
