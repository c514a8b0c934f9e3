"""Strategy files: ZeRO stage, offload, communication. Nothing else.

There is no `bf16` block: with it DeepSpeed recasts fp32 experts and gates to bf16. Without it every stage, ZeRO-3 and
offload included, trains fp32 tensors over a frozen base in whatever dtype it was loaded (tests/train/test_engine.py).

DeepSpeed accepts `zero_optimisation` and silently trains with ZeRO-0, and its defaults moved inside 0.19
(deepspeed.md 2.5). So unknown keys are refused here with the nearest name, batch, learning rate, clipping and
accumulation are refused because the recipe owns them, and `merge` writes out every default that matters.
The dry run: `deepspeed launch/train.py --config ... --dry_run` names the strategy it would use.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.errors import RecipeError, suggest

FOLDER = Path(__file__).resolve().parent.parent / "deepspeed_configs"
STAGES = (0, 1, 2, 3)
BUCKET_ALIGNMENT = 2**16
OFFLOAD_DEVICES = ("cpu", "none")

OWNED_BY_RECIPE = {
    "train_batch_size": "train.rows_per_expert",
    "train_micro_batch_size_per_gpu": "train.micro_rows",
    "gradient_accumulation_steps": "train.rows_per_expert and train.micro_rows",
    "managed_gradient_accumulation": "the engine",
    "gradient_clipping": "train.optimizer.clip",
    "optimizer": "train.optimizer",
    "scheduler": "train.optimizer.schedule",
    "fp16": "base.dtype (bfloat16 or float32)",
    "bf16": "base.dtype (bfloat16 or float32)",
    "checkpoint": "checkpoint",
    "load_universal_checkpoint": "resume",
}

TOP: dict[str, Any] = {
    "zero_allow_untested_optimizer": False,
    "zero_force_ds_cpu_optimizer": False,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "communication_data_type": "fp32",
    "steps_per_print": 1_000_000_000,
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "dump_state": False,
    "comms_logger": {"enabled": False},
}

OFFLOAD_OPTIMIZER: dict[str, Any] = {"device": "none", "pin_memory": True, "ratio": 1.0}
OFFLOAD_PARAM: dict[str, Any] = {"device": "none", "pin_memory": True}

_SHARED: dict[str, Any] = {
    "stage": 0,
    "reduce_scatter": True,
    "reduce_bucket_size": 50_000_000,
    "allgather_partitions": True,
    "allgather_bucket_size": 50_000_000,
    "overlap_comm": False,
    "contiguous_gradients": True,
}
_PARTITIONED_STATE: dict[str, Any] = {
    **_SHARED,
    "round_robin_gradients": False,
    "parameter_alignment": False,
    "ignore_unused_parameters": True,
    "compute_grad_norm": False,
    "offload_optimizer": OFFLOAD_OPTIMIZER,
}
_PARTITIONED_WEIGHTS: dict[str, Any] = {
    **_SHARED,
    "overlap_comm": True,
    "sub_group_size": 1_000_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_gather_16bit_weights_on_model_save": False,
    "memory_efficient_linear": False,
    "override_module_apply": False,
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "offload_param": OFFLOAD_PARAM,
}
ZERO: dict[int, dict[str, Any]] = {
    0: dict(_SHARED),
    1: {**_PARTITIONED_STATE, "stage": 1},
    # overlap_comm waits for the device at every bucket, and an expert's gradient is complete only when backward ends: two H100s
    # trained 1.82 times as fast as one with it, 1.96 times without
    2: {**_PARTITIONED_STATE, "stage": 2, "round_robin_gradients": True},
    3: {**_PARTITIONED_WEIGHTS, "stage": 3},
}


def load_strategy(name_or_path: str) -> dict[str, Any]:
    """The checked content of `deepspeed_configs/NAME.json` or of a JSON file at a path.

    RecipeError CFG-010 (not found, not JSON), CFG-011 (unknown key or value), CFG-012 (the recipe owns the key).
    """
    path = _find(name_or_path)
    try:
        strategy = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"strategy {path}: not a JSON file ({error})", code="CFG-010") from error
    if not isinstance(strategy, dict):
        raise RecipeError(f"strategy {path}: an object is wanted, not {type(strategy).__name__}", code="CFG-010")
    check(strategy, str(path))
    return strategy


def check(strategy: Mapping[str, Any], where: str) -> None:
    """Refuse what a strategy may not hold; all problems in one message."""
    problems: list[str] = []
    owned = [key for key in strategy if key in OWNED_BY_RECIPE]
    for key in owned:
        problems.append(f"'{key}' belongs to the recipe: set {OWNED_BY_RECIPE[key]} there and remove it here")
    known: dict[str, Any] = {**TOP, "zero_optimization": {}}
    rest = {key: value for key, value in strategy.items() if key not in OWNED_BY_RECIPE}
    zero = rest.get("zero_optimization", {})
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    if stage not in STAGES or isinstance(stage, bool):
        problems.append(f"zero_optimization.stage is {stage!r}; allowed are 0, 1, 2, 3")
    else:
        known["zero_optimization"] = ZERO[stage]
    problems += _unknown(rest, known, "")
    problems += _impossible_offload(rest)
    if problems:
        code = "CFG-012" if len(owned) == len(problems) else "CFG-011"
        raise RecipeError(f"strategy {where}: {'; '.join(problems)}", code=code)


def _impossible_offload(strategy: Mapping[str, Any]) -> list[str]:
    """Offload goes to the host's memory, whole, and AdamW there is torch's own fused one, which needs no compiler."""
    found = []
    zero = strategy.get("zero_optimization", {})
    for what in ("offload_optimizer", "offload_param"):
        settings = zero.get(what, {}) if isinstance(zero, Mapping) else {}
        settings = settings if isinstance(settings, Mapping) else {}
        if settings.get("device", "none") not in OFFLOAD_DEVICES:
            found.append(
                f"zero_optimization.{what}.device is {settings['device']!r}; allowed are {', '.join(OFFLOAD_DEVICES)} "
                "(disks are not used: put what does not fit on more processes)"
            )
        if settings.get("ratio", 1.0) != 1.0:
            found.append(
                f"zero_optimization.{what}.ratio is {settings['ratio']!r}; the optimizer goes to the host whole: set 1.0"
            )
    if strategy.get("zero_force_ds_cpu_optimizer") is True:
        found.append("zero_force_ds_cpu_optimizer is true; offload updates with torch's fused AdamW: remove it")
    return found


def offloads(zero: Mapping[str, Any], what: str = "offload_optimizer") -> bool:
    """Whether merged or given `zero_optimization` settings move the optimizer (or `offload_param`: the weights) to the host."""
    return zero.get(what, {}).get("device", "none") != "none"


def zero_stage(name_or_path: str) -> int:
    """The ZeRO stage of a strategy; RecipeError as `load_strategy`."""
    return int(load_strategy(name_or_path)["zero_optimization"]["stage"])


def merge(
    strategy: Mapping[str, Any], *, micro_rows: int, micro_count: int, world_size: int, trainable: int
) -> dict[str, Any]:
    """The configuration DeepSpeed is given: every default written out, no `auto`, recipe values filled in.

    `trainable` (entries of all trained tensors) bounds the buckets: a gate run needs no 200 MB of buffers.
    Clipping is 0 for DeepSpeed because the engine clips per group itself.
    """
    check(strategy, "given")
    stage = int(strategy["zero_optimization"]["stage"])
    merged = _overlay(copy.deepcopy(TOP), strategy)
    zero = _overlay(copy.deepcopy(ZERO[stage]), strategy["zero_optimization"])
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        zero[bucket] = min(int(zero[bucket]), -(-trainable // BUCKET_ALIGNMENT) * BUCKET_ALIGNMENT)
    if stage in (1, 2) and offloads(zero):
        zero["compute_grad_norm"] = True  # DeepSpeed refuses to go without under offload
    if world_size == 1 and stage < 3:
        zero["overlap_comm"] = False  # nothing to overlap with
    merged["zero_optimization"] = zero
    merged["bf16"] = {"enabled": False}
    merged["fp16"] = {"enabled": False}
    merged["train_micro_batch_size_per_gpu"] = micro_rows
    merged["gradient_accumulation_steps"] = micro_count
    merged["train_batch_size"] = micro_rows * micro_count * world_size
    merged["gradient_clipping"] = 0.0
    if not merged["comms_logger"]["enabled"]:
        del merged["comms_logger"]  # DeepSpeed 0.19 takes the block itself for "on": a device synchronisation for every
        # collective, timed anew over all collectives so far, so that step 3,000 takes twice as long as step 100
    merged["timers"] = {
        "throughput": {"enabled": False, "synchronized": False}
    }  # they wait for the device twice a step
    return merged


def _find(name_or_path: str) -> Path:
    candidate = Path(name_or_path)
    if candidate.suffix == ".json" or candidate.parent != Path("."):
        if candidate.is_file():
            return candidate
        raise RecipeError(f"strategy: no file {candidate}", code="CFG-010")
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    if name_or_path not in names:
        raise RecipeError(
            f"strategy '{name_or_path}' is unknown; allowed are {', '.join(names)} or a path ending in .json."
            + suggest(name_or_path, names),
            code="CFG-010",
        )
    return FOLDER / f"{name_or_path}.json"


def _unknown(given: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> list[str]:
    problems = []
    for key, value in given.items():
        if key not in known:
            problems.append(f"unknown key '{prefix}{key}'.{suggest(key, list(known))}")
            continue
        expected = known[key]
        if isinstance(expected, Mapping):
            if isinstance(value, Mapping):
                problems += _unknown(value, expected, f"{prefix}{key}.")
            else:
                problems.append(f"{prefix}{key} is {value!r}; an object is wanted")
        elif not _same_kind(value, expected):
            problems.append(f"{prefix}{key} is {value!r}; {type(expected).__name__} is wanted")
    return problems


def _same_kind(value: Any, expected: Any) -> bool:
    if isinstance(expected, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(expected, bool)
    if isinstance(expected, (int, float)):
        return isinstance(value, (int, float))
    return isinstance(value, type(expected))


def _overlay(base: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in given.items():
        base[key] = _overlay(base[key], value) if isinstance(base.get(key), dict) else copy.deepcopy(value)
    return base
