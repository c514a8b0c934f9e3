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
import torch

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_waits_for_the_device_are_counted() -> None:
    from scaling import waits

    device, one = torch.device("cuda"), torch.ones(1, device="cuda")
    assert waits(lambda: one + 1, device) == 0
    assert waits(lambda: (one.item(), one.cpu()), device) >= 2


@pytest.fixture
def machine() -> Any:
    from scale_measured import measured

    return measured()[0]


def plan(name: str, experts: int) -> Any:
    from scale_simulator import Plan, bases

    return Plan(bases()[name], experts)


@pytest.mark.parametrize("name", ["135M", "8B"])
def test_estimates_hold_together(machine: Any, name: str) -> None:
    from scale_simulator import ARMS, estimate

    for arm in ARMS:
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


def test_what_does_not_fit_is_none_and_rounds_or_a_second_forward_make_it_fit(machine: Any) -> None:
    """Without recomputation autograd keeps every weight that ZeRO-3 gathers (train/state_memory.py): 70B whole is 131 GiB."""
    from scale_simulator import best, estimate

    assert estimate(machine, plan("70B", 16), 8, "expert:zero0") is None
    for gpus in (8, 512):
        assert estimate(machine, plan("70B", 1), gpus, "data:zero3") is None
        again = best(machine, plan("70B", 1), gpus, "data:zero3")
        assert again is not None
        assert again.recomputed
    small = replace(machine, capacity=machine.capacity / 2)
    rounds = estimate(small, plan("8B", 166), 64, "data:zero2")
    assert rounds is not None
    assert rounds.waves > 1
    assert rounds.memory <= small.capacity


def test_across_hosts_every_port_carries_its_share(machine: Any) -> None:
    assert machine.link(8) == machine.host
    assert machine.link(64) == min(machine.host, 8 * machine.port)
    assert replace(machine, port=10e9).link(64) == 80e9


def test_simulated_steps_are_those_that_were_measured(machine: Any) -> None:
    """The fit goes back to the steps it was made of, from 2,048 to 32,768 tokens, and memory to what another run had reserved."""
    import scale_measured
    from scale_simulator import ARMS, Plan, bases, estimate

    files = scale_measured.MEASURED
    lines = scale_measured.lines_of(scale_measured.RESULTS / files["training"][-1])
    steps = [x for x in lines if x["arm"] == "ours" and x["compile"] == "graph"]
    assert len({x["rows"] for x in steps}) > 1
    for line in steps:
        work = Plan(
            bases()["135M"], line["experts"], step_tokens=512 * line["rows"] // line["experts"], micro_tokens=32768
        )
        found = estimate(machine, work, 1, "data:zero2")
        assert found is not None
        assert 1e3 * found.step == pytest.approx(line["ms"], rel=0.01)
    lines = scale_measured.lines_of(scale_measured.RESULTS / files["scaling"])
    arms = [x for x in lines if x["what"] in ARMS and scale_measured.standard(x)]
    assert {1, 2} <= {x["gpus"] for x in arms}
    for line in arms:
        work = Plan(bases()["135M"], 12, step_tokens=2048 * line["gpus"])
        found = estimate(machine, work, line["gpus"], line["what"])
        assert found is not None
        assert found.memory / 2**30 == pytest.approx(line["reserved_gib"], rel=0.15)
        if (line["what"], line["gpus"]) == ("data:zero3", 1):  # the host's time: no other term comes near
            assert 1e3 * found.step == pytest.approx(line["ms"], rel=0.02)


def test_processes_share_adamw_but_not_the_passes_over_whole_vectors(machine: Any) -> None:
    from scale_simulator import estimate

    work = replace(plan("135M", 16), step_tokens=12_288)
    trained, machine = 16 * work.shape.lora, replace(machine, floor=0.0, host=1e30, share_small=1e30)
    alone, eight = (estimate(machine, work, gpus, "data:zero2") for gpus in (1, 8))
    assert alone is not None
    assert eight is not None
    assert alone.step == pytest.approx(trained * (28 + 52) / machine.memory + 20e-6)
    assert eight.step == pytest.approx(trained * (28 / 8 + 52) / machine.memory + 3 * 20e-6)


def test_the_page_says_what_the_files_hold() -> None:
    """After MEASURED names newer files: python benchmarks/scale_simulator.py --into docs/scale.md"""
    import scale_simulator as simulator

    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    between = page.partition(simulator.MARK)[2].partition(simulator.END)[0]
    assert between.strip() == "\n\n".join(simulator.tables(*simulator.measured()))


def test_measurements_take_the_place_of_earlier_ones_and_tables_of_what_stands_between_the_marks(
    monkeypatch, tmp_path: Path
) -> None:
    import scale_simulator as simulator
    from training_cases import shapes

    training, scaling, page = tmp_path / "training.json", tmp_path / "scaling.json", tmp_path / "page.md"
    shape, line = (
        shapes()["smollm2"],
        {"arm": "ours", "kind": "experts", "compile": "graph", "hardware": "a card", "tflops": 9.0},
    )
    spent = 80 * shape.lora / 3e12  # the optimiser's, an expert
    training.write_text(json.dumps({"lines": [
        {"arm": "llama3", "what": "bf16 matmul peak", "tflops": 500.0, "hardware": "a card"},
        # 60 ms and 1 ms a row of 512 tokens
        {**line, "what": "one", "experts": 1, "rows": 4, "ms": 64 + 1e3 * spent},
        {**line, "what": "ten", "experts": 10, "rows": 40, "ms": 100 + 1e4 * spent},
    ]}))  # fmt: skip
    arm = {
        "what": "data:zero2", "trained": 12 * shape.lora, "rows_a_gpu": 48, "sent_bytes": 1, "formula_bytes": 2, "ms": 90.0,
        "reserved_gib": 17.0,
    }  # fmt: skip
    link = {"what": "link", "mebibytes": 256.0}
    scaling.write_text(json.dumps({"lines": [
        {**link, "gpus": 2, "gigabytes_per_second": 300.0}, {**link, "gpus": 4, "gigabytes_per_second": 200.0},
        {**arm, "gpus": 1, "tokens_per_second": 100}, {**arm, "gpus": 2, "tokens_per_second": 190},
    ]}))  # fmt: skip
    (before, old), (machine, notes) = simulator.measured(), simulator.measured([training], scaling)
    assert (machine.matmul, machine.host, machine.hooks) == (500e12, 200e9, before.hooks)
    assert machine.floor == pytest.approx(60e-3 / 30)
    assert machine.share_small == pytest.approx(shape.flops * 512 / 1e-3 / 500e12)
    assert "training.json" in notes["floor"]
    assert notes["hooks"] == old["hooks"]
    # the large base was not timed again: its time a token without the floor's, over the new peak
    large = before.share_large * before.matmul / 500e12
    assert machine.share_large == pytest.approx(large, rel=0.05)
    page.write_text(f"before\n\n{simulator.MARK}\n\nold\n\n{simulator.END}\nafter\n")
    words = ["--training", str(training), "--scaling", str(scaling), "--into", str(page)]
    monkeypatch.setattr(sys, "argv", ["scale_simulator.py", *words])
    simulator.main()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| data:zero2 | 2 | 90.0 |" in text
    assert "| 1.90 |" in text


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
    """Their rates round to 0, by which nothing can be divided, and their ZeRO-3 is of another model."""
    from scale_measured import measured
    from scale_simulator import tables

    training, scaling = tmp_path / "training.json", tmp_path / "scaling.json"
    line = {"arm": "ours", "kind": "experts", "compile": "graph", "what": "tiny", "tflops": 0.0, "hardware": "cpu"}
    lines = [{**line, "experts": n, "rows": 4 * n, "ms": 1.0} for n in (1, 12)]
    peak = {"arm": "llama3", "what": "bf16 matmul peak", "tflops": 0.0, "hardware": "cpu"}
    training.write_text(json.dumps({"lines": [*lines, peak]}))
    three = {"what": "data:zero3", "gpus": 1, "ms": 1.0, "trained": 1000, "rows_a_gpu": 48, "reserved_gib": None}
    link = {"what": "link", "gpus": 2, "mebibytes": 0.25, "gigabytes_per_second": 1.0}
    scaling.write_text(json.dumps({"lines": [link, three]}))
    assert measured([training], scaling) == measured()
    assert "Checked" not in "".join(tables(*measured(), scaling))
