"""Expert parallelism is data parallelism's curve without its bytes, over real ranks; and a checkpoint fits any of them."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from quietgoose.base import distributed
from quietgoose.base.distributed import World
from quietgoose.base.errors import RecipeError
from quietgoose.train.parallel import gathered_again, owned, ring_bytes, zero3_bytes
from quietgoose.train.recipe import RowTrainSettings

CONFTEST = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
WORKER = Path(__file__).with_name("parallel_worker.py")
STEPS = 6
ONE_DATA = {"kind": "experts", "strategy": "zero0", "parallel": "data", "steps": STEPS}


@pytest.fixture
def start(fork_server, tmp_path: Path) -> Callable[..., dict[str, SimpleNamespace]]:
    def run(cases: list[dict], world: int) -> dict[str, SimpleNamespace]:
        port = str(CONFTEST["free_port"]())
        processes = []
        for rank in range(world):
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }  # fmt: skip
            settings = {"out": str(tmp_path), "cases": cases, "environment": environment}
            arguments = (str(WORKER), {"SETTINGS": settings}, "__qg_rank__")
            processes.append(fork_server.Process(target=runpy.run_path, args=arguments))
            processes[-1].start()
        assert [CONFTEST["_join"](process) for process in processes] == [0] * world
        return {c["name"]: SimpleNamespace(**json.loads((tmp_path / f"{c['name']}.json").read_text())) for c in cases}

    return run


def case(name: str, **more) -> dict:
    return {**ONE_DATA, "name": name, "run": name, **more}


def same(found: SimpleNamespace, want: SimpleNamespace) -> None:
    assert found.losses == pytest.approx(want.losses[-len(found.losses) :], rel=1e-5)
    for mine, theirs in zip(found.norms, want.norms[-len(found.norms) :]):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert found.trained == pytest.approx(want.trained, rel=1e-4, abs=1e-4)
    assert found.squares == pytest.approx(want.squares, rel=1e-4)


@pytest.mark.distributed
def test_one_curve_and_no_bytes(start) -> None:
    strategies = ("zero0", "zero1", "zero2")
    cases = [case("data", traffic=True), case("data2", strategy="zero2", traffic=True)]
    cases += [case(f"expert-{s}", parallel="expert", strategy=s, traffic=True) for s in strategies]
    cases += [case("gates-data", kind="gates"), case("gates-expert", kind="gates", parallel="expert", strategy="zero2")]
    cases += [case("many", parallel="expert", experts=1), case("zero3", parallel="expert", strategy="zero3")]
    alone = start([case("alone"), case("gates-alone", kind="gates")], 1)
    found = start(cases, 2)
    same(found["data"], alone["alone"])
    for strategy in strategies:
        same(found[f"expert-{strategy}"], alone["alone"])
    for name in ("gates-data", "gates-expert"):
        same(found[name], alone["gates-alone"])
    expert, data = found["expert-zero0"], found["data"]
    assert (expert.own, expert.here * 3) == (["e0", "e2"], 2 * expert.entries)
    # what is sent: the vector of losses, norms and flags, by one all-reduce, and nothing else
    assert expert.calls == {"allreduce_": 1}
    assert expert.sent == 8 * (3 + 3) * 2 * 0.5
    for result, stage in ((data, 0), (found["data2"], 2)):
        assert result.sent - expert.sent == pytest.approx(ring_bytes(data.entries, 2, stage), rel=0.02), stage
    assert "1 experts leave some with none" in found["many"].error
    assert "ZeRO-3 divides the frozen base" in found["zero3"].error


SENT_BY_ZERO3 = {
    "small weights once": {"stage3_param_persistence_threshold": 300},
    "nothing within reach": {
        "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
    },
}  # fmt: skip


@pytest.mark.distributed
def test_what_zero3_sends(start, tmp_path: Path) -> None:
    """Two micro-batches a step over a base of small and large weights, as far as weights stay."""
    cases = []
    for name, settings in SENT_BY_ZERO3.items():
        path = tmp_path / f"{name}.strategy.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 3, **settings}}))
        cases.append(case(name, strategy=str(path), traffic=True, rows=4, steps=3))
    found = start(cases, 2)
    for name, result in found.items():
        assert result.micro_batches == 2
        small = [e for e, _ in result.weights if e <= result.zero["stage3_param_persistence_threshold"]]
        assert bool(small) == (name != "nothing within reach")
        assert result.payload["_reduce_scatter_base_"] == 2 * 4 * result.entries
        formula = zero3_bytes(result.weights, result.entries, 2, 2, result.zero)
        if name == "nothing within reach":  # forward and backward gather: 2 L, but for what has no backward
            gathers = formula - 4 * result.entries
            assert result.sent - formula == pytest.approx(gathers, rel=0.25)
        else:
            assert result.sent == pytest.approx(formula, rel=0.02)


@pytest.mark.distributed
def test_the_benchmark_of_scaling_finds_what_its_formulas_say(start) -> None:
    arms = ("data:zero1", "data:zero3", "expert:zero2")
    found = start([{"name": "scaling", "benchmark": arms}], 2)["scaling"].found
    assert found["link"]["gigabytes_per_second"] > 0
    for arm in arms:
        line = found[arm]
        assert line["tokens_per_second"] > 0
        assert line["rows_a_gpu"] == 12  # weak scaling: a row of every expert on each, or two of half of them
        assert line["sent_bytes"] == pytest.approx(line["formula_bytes"], rel=2e-3, abs=300), arm
        assert (line["formula_bytes"] == 0) == arm.startswith("expert")


def test_what_lies_too_far_for_zero3_is_gathered_again() -> None:
    assert gathered_again(0, 135e6) == 0.0  # SmolLM2
    assert gathered_again(0, 8e9) == pytest.approx(1 - 0.5 / 8)
    assert [gathered_again(135e6), gathered_again(8e9)] == [0.0, 1.0]  # the bank, which is read before the base


@pytest.mark.distributed
def test_a_checkpoint_goes_on_with_other_ranks_and_the_other_way(start) -> None:
    """Three steps by experts on two ranks, then data parallel on one, and the other way round."""
    start([case("first", run="a", parallel="expert", strategy="zero2", steps=3)], 2)
    then = start([case("whole"), case("then", run="a"), case("one", run="b", steps=3)], 1)
    whole = then["whole"]
    assert then["then"].start == 3
    same(then["then"], whole)
    last = start([case("last", run="b", parallel="expert", strategy="zero1")], 2)["last"]
    assert last.start == 3
    same(last, whole)


def test_what_a_process_owns(monkeypatch) -> None:
    names = ["a", "b", "c", "d", "e"]
    monkeypatch.setattr(distributed, "world", lambda: World(1, 2, 1))
    assert owned(names, RowTrainSettings(), "zero2") is None
    assert owned(names, RowTrainSettings(parallel="expert"), "zero2") == ("b", "d")
    with pytest.raises(RecipeError, match="2 processes for 1 experts"):
        owned(names[:1], RowTrainSettings(parallel="expert"), "zero0")


@pytest.mark.parametrize(("world", "stage", "want"), [(1, 0, 0), (2, 0, 4000), (8, 0, 7000), (8, 2, 10500)])
def test_bytes_of_a_ring(world: int, stage: int, want: int) -> None:
    assert ring_bytes(1000, world, stage) == want
