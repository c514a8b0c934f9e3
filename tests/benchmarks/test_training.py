"""The training benchmark runs anywhere, and a mode that trains otherwise than eager code reports no speed."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """The engine forms a process group of this process; it goes away with its environment."""
    from quietgoose.train.engine import shutdown

    if torch.cuda.is_available():
        pytest.skip("the engine's group is NCCL's there, which has no collectives of a CPU")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    before = {name: os.environ.get(name) for name in names}
    yield
    shutdown()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def bench(monkeypatch: pytest.MonkeyPatch, out: Path, *arms: str) -> Any:
    """Run `arms` of the small shapes on the CPU; the lines that were written."""
    import training

    words = ["--tiny", "--device", "cpu", "--rows", "1", "--seconds", "0.01", "--out", str(out), "--arms", *arms]
    monkeypatch.setattr(sys, "argv", ["training.py", *words])
    training.main()
    return json.loads(out.read_text())["lines"]


@pytest.mark.usefixtures("group")
def test_arms_run_and_are_added_to_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    bench(monkeypatch, out, "ours")
    lines = bench(monkeypatch, out, "gates", "profile")
    assert not [line for line in lines if "failed" in line or "skipped" in line]
    found = {line["what"]: line for line in lines if line["arm"] in ("ours", "gates")}
    assert {"12 experts off", "1 experts off", "16 gates, off", "1 gate, as many rows in all, off"} <= set(found)
    for line in found.values():
        assert line["tokens_per_second"] > 0
        assert math.isfinite(line["loss"])
    assert found["16 gates, off"]["rows"] == found["1 gate, as many rows in all, off"]["rows"] == 16
    assert [line["what"] for line in lines if line["arm"] == "profile"] == ["12 experts", "16 gates"]
    one = "1 gate, as many rows in all"
    ratio = found["16 gates, off"]["ms"] / found[f"{one}, off"]["ms"]
    (ratios,) = [line for line in lines if line["arm"] == "ratios"]
    assert ratios[f"16 gates, time against {one}"] == pytest.approx(ratio, abs=0.01)


def test_ratios_compare_what_one_call_measured() -> None:
    import training

    bench = object.__new__(training.Bench)
    bench.modes, put = lambda: ("layers", "graph"), []
    bench.put = lambda **line: put.append(line)
    bench.found = {
        ("peft", "plain loop"): {"tokens_per_second": 14_000},
        ("ours", "12 experts graph"): {"tokens_per_second": 287_000},
        ("ours", "16 experts layers"): {"tokens_per_second": 28_000},
    }
    bench.ratios()
    assert put == [
        {"arm": "ratios", "what": "layers", "16 experts, rate against PEFT's plain loop": 2.0},
        {"arm": "ratios", "what": "graph", "12 experts, rate against PEFT's plain loop": 20.5},
    ]


@pytest.mark.usefixtures("group")
def test_a_failure_is_a_line_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import training

    own = training.running

    def broken(kind: str, shape: Any, experts: int, *rest: Any, **settings: Any) -> Any:
        if experts == 16:
            raise RuntimeError("not today")
        return own(kind, shape, experts, *rest, **settings)

    monkeypatch.setattr(training, "running", broken)
    found = {line["what"]: line for line in bench(monkeypatch, tmp_path / "found.json", "ours")}
    assert "not today" in found["16 experts off"]["failed"]
    assert found["1 experts off"]["ms"] > 0


@pytest.mark.usefixtures("group")
def test_a_mode_whose_gradients_are_wrong_is_red_although_its_losses_agree(monkeypatch, tmp_path: Path) -> None:
    """Three modes, all of them eager code here; in `graph` a fifth of one expert's gradient has the wrong sign."""
    import training

    own = training.running

    @contextmanager
    def planted(*given: Any, compile: str, **settings: Any) -> Iterator[Any]:
        with own(*given, compile="off", **settings) as run:
            if compile == "graph":
                flat = run.job.bank.flat("e1")
                sign = torch.ones_like(flat)
                sign[: len(sign) // 5] = -1
                flat.register_hook(lambda gradient: gradient * sign)
            yield run

    known = ("layers", "off", "graph")
    monkeypatch.setattr(training, "running", planted)
    monkeypatch.setattr(training.Bench, "modes", lambda self: tuple(mode for mode in known if mode not in self.red))
    benches: list[Any] = []
    own_gate = training.Bench.gate
    monkeypatch.setattr(training.Bench, "gate", lambda self: benches.append(self) or own_gate(self))
    lines = {line["what"]: line for line in bench(monkeypatch, tmp_path / "found.json", "gate")}
    assert lines["experts layers"]["moved"] < 1e-3
    assert lines["gates layers"]["moved"] < 1e-3
    assert lines["experts graph"]["worst"] < training.LOSS_LIMIT, "the losses alone would not tell"
    assert lines["experts graph"]["moved"] > training.MOVED_LIMIT
    assert benches[0].red == {"graph"}
    assert benches[0].modes() == ("layers", "off")


@pytest.mark.parametrize(
    ("line", "green"),
    [
        ({"losses": [1.0], "worst": 0.002, "moved": 0.06}, True),
        ({"losses": [1.0], "worst": 0.02, "moved": 0.06}, False),
        ({"losses": [1.0], "worst": 0.002, "moved": 0.2}, False),
        ({"losses": [1.0], "worst": 0.002, "moved": math.nan}, False),
        ({"losses": [math.nan]}, False),
        ({"losses": [1.0]}, True),
    ],
)
def test_what_the_gate_lets_pass(line: dict[str, Any], green: bool) -> None:
    from training import agrees

    assert agrees(line) == green
