"""Starting processes and reading their lines, and the arithmetic of many GPUs. What two processes send is counted in
tests/train/test_parallel.py."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

OPTIONS = argparse.Namespace(arms=["data:zero0"], rows=1, kind="experts", seconds=0.1, tiny=True, strong=False)
PROGRAM = """
import json, os, sys
rank, world = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
assert "--worker" in sys.argv and "--tiny" in sys.argv and "--strong" not in sys.argv
open(os.path.join({folder!r}, rank), "w").write(os.environ["MASTER_PORT"])
print("warning: not a line of the record")
print(json.dumps(dict(gpus=world, what="data:zero0", rank=rank, tokens_per_second=100 * world)))
"""


def test_every_process_is_started_and_the_first_ones_lines_are_kept(monkeypatch, tmp_path: Path, capsys) -> None:
    import scaling

    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(folder=str(tmp_path)))
    monkeypatch.setattr(scaling, "__file__", str(program))
    words = ["--gpus", "1", "3", "--arms", "data:zero0", "--tiny", "--out", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
    scaling.main()
    lines = json.loads((tmp_path / "found.json").read_text())["lines"]
    assert [(line["gpus"], line["rank"]) for line in lines] == [(1, "0"), (3, "0")]
    ports = {(tmp_path / str(rank)).read_text() for rank in range(3)}
    assert len(ports) == 1
    assert "3.00x" in capsys.readouterr().out


@pytest.fixture
def machine() -> Any:
    from scale_simulator import Machine

    return Machine()


def plan(name: str, experts: int) -> Any:
    from scale_simulator import Plan, bases

    return Plan(bases()[name], experts)


@pytest.mark.parametrize("name", ["135M", "8B"])
def test_estimates_hold_together(machine: Any, name: str) -> None:
    from scale_simulator import STATE_BYTES, estimate

    for arm in STATE_BYTES:
        alone, many = (estimate(machine, plan(name, 16), gpus, arm) for gpus in (1, 8))
        assert alone is not None
        assert many is not None
        assert alone.sent == 0
        assert many.memory <= machine.capacity
        assert alone.seconds / 8.01 < many.seconds < alone.seconds
        assert (many.sent == 0) == arm.startswith("expert")
        twice = estimate(machine, plan(name, 32), 8, arm)
        assert twice is not None
        assert 1.7 < twice.seconds / many.seconds < 2.4  # micro-batches are whole numbers


def test_bytes_are_those_of_the_formulas(machine: Any) -> None:
    from quietgoose.train.parallel import ring_bytes, zero3_bytes
    from scale_simulator import base_bytes, estimate

    work = replace(plan("135M", 16), step_tokens=12_288, micro_tokens=24_576)  # one micro-batch on each of 8 GPUs
    trained, base = 16 * work.shape.lora, int(base_bytes(work.shape))
    two, three = (estimate(machine, work, 8, f"data:zero{stage}") for stage in (2, 3))
    assert two is not None
    assert three is not None
    assert two.sent == ring_bytes(trained, 8, 2)
    zero = {"stage3_param_persistence_threshold": 0}
    assert three.sent == pytest.approx(zero3_bytes([(base // 2, 2), (trained, 4)], trained, 8, 1, zero), rel=1e-9)
    large = estimate(
        machine, plan("8B", 1), 8, "data:zero3"
    )  # its base is gathered twice, but for the last 5e8 entries
    assert large is not None
    eight = plan("8B", 1).shape
    want = 7 / 8 * (2 * base_bytes(eight) - 1e9 + 3 * 4 * eight.lora)
    assert large.sent == pytest.approx(want, rel=1e-9)


def test_what_does_not_fit_is_none_and_rounds_make_it_fit(machine: Any) -> None:
    from scale_simulator import estimate

    assert estimate(machine, plan("70B", 16), 8, "expert:zero0") is None
    small = replace(machine, capacity=machine.capacity / 2)
    rounds = estimate(small, plan("8B", 166), 64, "data:zero3")
    assert rounds is not None
    assert rounds.waves > 1


def test_measurements_replace_assumptions_and_tables_what_stands_between_the_marks(monkeypatch, tmp_path: Path) -> None:
    import scale_simulator as simulator

    training, scaling, page = tmp_path / "training.json", tmp_path / "scaling.json", tmp_path / "page.md"
    line = {"kind": "experts", "experts": 12, "rows": 48, "hardware": "a card"}
    training.write_text(json.dumps({"lines": [
        {"arm": "llama3", "what": "bf16 matmul peak", "tflops": 500.0, "hardware": "a card"},
        {"arm": "ours", "what": "slow", "tflops": 50.0, **line}, {"arm": "ours", "what": "fast", "tflops": 100.0, **line},
    ]}))  # fmt: skip
    arm = {"what": "data:zero2", "sent_bytes": 1, "formula_bytes": 2}
    scaling.write_text(json.dumps({"lines": [
        {"what": "link", "gpus": 2, "gigabytes_per_second": 300.0}, {"what": "link", "gpus": 4, "gigabytes_per_second": 200.0},
        {**arm, "gpus": 1, "tokens_per_second": 100}, {**arm, "gpus": 2, "tokens_per_second": 190},
    ]}))  # fmt: skip
    machine, notes = simulator.measured(training, scaling)
    assert (machine.matmul, machine.share_small, machine.host) == (500e12, 0.2, 200e9)
    assert "fast" in notes["share_small"]
    assert notes["share_large"].startswith("assumed")
    page.write_text(f"before\n\n{simulator.MARK}\n\nold\n\n{simulator.END}\nafter\n")
    words = ["--training", str(training), "--scaling", str(scaling), "--into", str(page)]
    monkeypatch.setattr(sys, "argv", ["scale_simulator.py", *words])
    simulator.main()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| data:zero2 | 2 | 1.90 |" in text


FAILING = """
import json, os, sys, time
rank, arms = int(os.environ["RANK"]), sys.argv[sys.argv.index("--arms") + 1 : sys.argv.index("--rows")]
for arm in arms:
    if arm == "loud:zero0" and rank == 0:
        print(json.dumps(dict(gpus=2, what=arm, failed="not today")), flush=True)
        os._exit(1)
    if arm == "quiet:zero0" and rank == 1:
        os._exit(1)
    if arm in ("loud:zero0", "quiet:zero0"):
        time.sleep(600)  # in a collective that the other never joins
    if rank == 0:
        print(json.dumps(dict(gpus=2, what=arm, tokens_per_second=1)), flush=True)
"""


def test_a_process_that_fails_costs_its_arm_and_neither_the_run_nor_the_rest(monkeypatch, tmp_path: Path) -> None:
    import scaling

    program, out = tmp_path / "program.py", tmp_path / "found.json"
    program.write_text(FAILING)
    monkeypatch.setattr(scaling, "__file__", str(program))
    monkeypatch.setattr(scaling, "GRACE", 0.5)
    arms = ["data:zero0", "loud:zero0", "quiet:zero0", "data:zero2"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--gpus", "2", "--arms", *arms, "--out", str(out)])
    scaling.main()
    lines = json.loads(out.read_text())["lines"]
    assert [(line["what"], "failed" in line) for line in lines] == [(a, a[0] in "lq") for a in arms]


def test_an_arm_that_never_ends_does_not_outlive_the_budget(monkeypatch, tmp_path: Path) -> None:
    import scaling

    program, out = tmp_path / "program.py", tmp_path / "found.json"
    program.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(scaling, "__file__", str(program))
    monkeypatch.setattr(scaling, "GRACE", 0.0)
    monkeypatch.setattr(scaling, "SPARE", 0.5)
    words = ["--gpus", "2", "--arms", "data:zero0", "data:zero2", "--budget-seconds", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
    scaling.main()
    lines = json.loads(out.read_text())["lines"]
    assert [line["what"] for line in lines] == ["data:zero0", "data:zero2"]
    assert "failed" in lines[0]
    assert "skipped" in lines[1]


def test_what_tiny_runs_leave_is_no_measurement_of_a_machine(tmp_path: Path) -> None:
    """Their rates round to 0, by which nothing can be divided."""
    import scale_simulator as simulator

    training, scaling = tmp_path / "training.json", tmp_path / "scaling.json"
    line = {
        "arm": "ours",
        "kind": "experts",
        "experts": 12,
        "rows": 48,
        "what": "tiny",
        "tflops": 0.0,
        "hardware": "cpu",
    }
    training.write_text(json.dumps({"lines": [line]}))
    scaling.write_text(json.dumps({"lines": [{"what": "link", "gpus": 2, "gigabytes_per_second": 0.0}]}))
    assert simulator.measured(training, scaling)[0] == simulator.Machine()
