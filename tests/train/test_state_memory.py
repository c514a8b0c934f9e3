"""What the dry run says of weights, gradients and optimizer is what DeepSpeed holds, measured in two processes on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from quietgoose.train.state_memory import Held, Trained, held
from quietgoose.train.strategy import load_strategy

NUMBERS = 8 * 192 * 192  # memory_worker.py
WHOLE, FROZEN = 4 * NUMBERS, 2 * NUMBERS
SMALL_BUCKET = 2**16


def strategy(stage: int, **more: Any) -> dict:
    return {"zero_optimization": {"stage": stage, **more}}


# with overlap_comm DeepSpeed waits at every bucket, so that the peak is the same each time; without, gloo's threads let go of a
# bucket sooner or later
ZERO2 = strategy(2, overlap_comm=True, round_robin_gradients=True)
CASES = [
    {"name": "zero2", "strategy": ZERO2, "kind": "many", "micros": 2},
    {"name": "zero2_long", "strategy": ZERO2, "kind": "long", "micros": 1},
    {"name": "zero3", "strategy": load_strategy("zero3"), "kind": "many", "micros": 1},
    {
        "name": "zero3_let_go", "kind": "many", "micros": 1,
        "strategy": strategy(
            3, reduce_bucket_size=SMALL_BUCKET, stage3_max_live_parameters=0, stage3_max_reuse_distance=0,
            stage3_prefetch_bucket_size=0, stage3_param_persistence_threshold=0,
        ),
    },
]  # fmt: skip


def told(case: dict, world: int) -> Held:
    trained = Trained(NUMBERS, FROZEN, long=case["kind"] == "long", micros=case["micros"])
    return held(trained, case["strategy"], world)


@pytest.mark.distributed
def test_the_estimate_is_what_deepspeed_holds(ranks) -> None:
    done = ranks(CASES, 2, worker=Path(__file__).with_name("memory_worker.py"))
    assert done.codes == [0, 0]
    for case in CASES:
        found: SimpleNamespace = done.results[case["name"]]
        expected = told(case, 2)
        # between steps ZeRO-3 keeps what it gathered where it will be used again soon
        kept = WHOLE + FROZEN if case["name"] == "zero3" else 0
        assert found.always - kept == pytest.approx(expected.always, rel=0.03), (case["name"], found, expected)
        peak = found.always + max(found.backward, found.step)
        assert 0.97 < expected.peak(0) / peak < 1.12, (case["name"], found, expected)


def test_by_hand() -> None:
    """A thousand million numbers over four processes, buckets of 50 million."""
    number, bucket = 10**9, 4 * 50_000_000
    trained = Trained(number, frozen=2 * number, micros=1)
    zero0, zero2, zero3 = (held(trained, load_strategy(f"zero{z}"), 4) for z in (0, 2, 3))
    assert (zero0.always, zero0.backward) == (14 * number, 8 * number), "gradient, and a flat copy of it"
    assert zero2.always == 2 * number + 4 * number + 3 * number
    assert zero2.backward == 2 * bucket + number, "a bucket, one flat copy, the gradient's part"
    overlapping = {"zero_optimization": {**load_strategy("zero2")["zero_optimization"], "overlap_comm": True}}
    assert held(trained, overlapping, 4).backward == zero2.backward + bucket
    assert zero3.always == (2 * number) // 4 + 5 * number + bucket
    assert zero3.backward == 6 * number + 2 * bucket, "without recomputation all weights are whole"
    recomputed = held(Trained(number, 2 * number, recomputed=True), load_strategy("zero3"), 4)
    assert recomputed.backward == 4 * 10**9 + 2 * bucket, "stage3_max_live_parameters"
    apart = held(Trained(number, 2 * number, frozen_apart=True), load_strategy("zero3"), 4)
    assert apart.always - zero3.always == 2 * number - (2 * number) // 4
    assert apart.backward == zero3.backward - 2 * number, "DeepSpeed gathers nothing that it does not know"


def test_one_process_gathers_and_sends_nothing() -> None:
    alone = held(Trained(10**6, 10**6), load_strategy("zero3"), 1)
    bucket = 2**18 * -(-4 * 10**6 // 2**18)
    assert alone == Held(10**6 + 20 * 10**6 + bucket, 2 * bucket, 4 * 10**6)
    assert held(Trained(10**6), load_strategy("zero0"), 1) == Held(12 * 10**6, 4 * 10**6, 4 * 10**6)


@pytest.mark.parametrize("world", [1, 4])
def test_offload_takes_optimizer_and_gradients_to_the_host(world: int) -> None:
    number = 4 * 10**6
    trained = Trained(number, frozen=number)
    here, away = (held(trained, load_strategy(name), world) for name in ("zero2", "zero2_offload"))
    assert here.always - away.always == 12 * number // world
    assert (here.host, away.host) == (0, 20 * number // world)
    assert away.step == 0
    here, away = (held(trained, load_strategy(name), world) for name in ("zero3", "zero3_offload"))
    assert here.always - away.always == (20 * number + number) // world, "with offload_param the weights' parts too"
    assert away.host == (24 * number + number) // world
    assert here.host == 0


def test_a_peak_is_in_the_backward_pass_or_in_the_step() -> None:
    assert Held(always=10, backward=3, step=5).peak(1) == 15
    assert Held(always=10, backward=3, step=5).peak(4) == 17
