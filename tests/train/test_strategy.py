"""Strategy files: what DeepSpeed silently accepts is refused here; every default that matters is written out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quietgoose.base.errors import RecipeError
from quietgoose.train.strategy import FOLDER, check, load_strategy, merge

NAMES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


def merged(name: str, trainable: int = 10**9) -> dict:
    return merge(load_strategy(name), micro_rows=2, micro_count=3, world_size=4, trainable=trainable)


def test_all_files_load() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(NAMES)
    for name in NAMES:
        assert merged(name)["zero_optimization"]["stage"] == int(name[4])


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"zero_optimisation": {"stage": 3}}, "unknown key 'zero_optimisation'. Did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "Did you mean 'overlap_comm'"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}}, "Did you mean 'device'"),
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}, "set train.optimizer.clip"),
        ({"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}, "belongs to the recipe"),
        ({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, "base.dtype"),
        ({"zero_optimization": {"stage": 4}}, "allowed are 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": True}}, "allowed are 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}, "bool is wanted"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "unknown key"),
    ],
)
def test_refusals(strategy: dict, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(strategy, "test")
    assert message in str(caught.value)


def test_all_problems_at_once_and_unknown_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimisation": {}, "fp16": {}, "zero_optimization": {"stage": 9}}))
    with pytest.raises(RecipeError, match=r"fp16.*stage is 9.*zero_optimisation"):
        load_strategy(str(path))
    with pytest.raises(RecipeError, match="Did you mean 'zero2'"):
        load_strategy("zero22")
    path.write_text("{")
    with pytest.raises(RecipeError, match=r"CFG-010.*not a JSON file"):
        load_strategy(str(path))


def test_merged_zero2_is_golden() -> None:
    assert merged("zero2") == {
        "zero_optimization": {
            "stage": 2,
            "reduce_scatter": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_partitions": True,
            "allgather_bucket_size": 50_000_000,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "round_robin_gradients": True,
            "parameter_alignment": False,
            "ignore_unused_parameters": True,
            "compute_grad_norm": False,
            "offload_optimizer": {"device": "none", "pin_memory": True, "ratio": 1.0},
        },
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "train_batch_size": 24,
        "gradient_clipping": 0.0,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }


def test_collectives_are_timed_only_if_asked() -> None:
    """DeepSpeed's own reading of the configuration: for it the mere presence of the block is "on"."""
    from deepspeed.comm.config import DeepSpeedCommsConfig

    for asked, expected in (({}, False), ({"enabled": False}, False), ({"enabled": True}, True)):
        given = {**load_strategy("zero2"), **({"comms_logger": asked} if asked else {})}
        merged = merge(given, micro_rows=1, micro_count=1, world_size=2, trainable=1000)
        assert DeepSpeedCommsConfig(merged).comms_logger_enabled is expected


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_deepspeed_measures_is_on(name: str) -> None:
    """As DeepSpeed itself reads what it is given: its loggers, timers and profilers wait for the device."""
    from deepspeed.runtime.config import DeepSpeedConfig

    read = DeepSpeedConfig(merge(load_strategy(name), micro_rows=1, micro_count=1, world_size=1, trainable=1000))
    on = {
        "comms_logger": read.comms_config.comms_logger_enabled, "wall_clock_breakdown": read.wall_clock_breakdown,
        "memory_breakdown": read.memory_breakdown, "flops_profiler": read.flops_profiler_config.enabled,
        "dump_state": read.dump_state, "throughput": read.timers_config.enabled, "waits": read.timers_config.synchronized,
        "monitors": read.monitor_config.enabled, "autotuning": read.autotuning_config.enabled,
        "data_efficiency": read.data_efficiency_enabled,
    }  # fmt: skip
    assert [what for what, value in on.items() if value] == []
    assert read.steps_per_print > 10**8


def test_zero2_overlaps_only_where_it_is_asked_for() -> None:
    """DeepSpeed waits for the device at every bucket under overlap_comm: off by itself, as in zero2.json."""
    for given, wanted in ((None, False), (True, True)):
        zero = {"stage": 2} if given is None else {"stage": 2, "overlap_comm": given}
        found = merge({"zero_optimization": zero}, micro_rows=2, micro_count=3, world_size=2, trainable=10**6)
        assert found["zero_optimization"]["overlap_comm"] is wanted
    assert load_strategy("zero2")["zero_optimization"]["overlap_comm"] is False


def test_one_process_overlaps_nothing() -> None:
    alone = merge(
        {"zero_optimization": {"stage": 2, "overlap_comm": True}},
        micro_rows=2,
        micro_count=3,
        world_size=1,
        trainable=10**6,
    )
    assert not alone["zero_optimization"]["overlap_comm"]


def test_nothing_automatic_and_small_buckets_for_small_runs() -> None:
    for name in NAMES:
        assert "auto" not in json.dumps(merged(name))
        assert merged(name, trainable=1000)["zero_optimization"]["reduce_bucket_size"] == 2**16
