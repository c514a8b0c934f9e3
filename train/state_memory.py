"""What weights, gradients and optimizer hold in one process, by the strategy's own settings. Bytes; no GPU, no model.

Read in DeepSpeed 0.19.8 (zero/stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py) and measured against it on the CPU
(tests/train/test_state_memory.py). N trained fp32 numbers, P = N / processes, K = what of the gradient a process keeps: P, or N where
the trained tensors are few and long, because DeepSpeed keeps a tensor's gradient whole if any of it is the process's own; b the
reduce bucket, about N at most.

    stage   always                                   in the backward pass beside activations        in the optimizer's step
    0       4N weight, 8N moments                    4N gradient, a flat copy of it to all-reduce    4N
    1       4N weight, 4P copy, 8P moments           4N, or the bucket; a flat copy of it            4K and 4P
    2       4N weight, 4P copy, 8P moments           one bucket, two under overlap_comm, a flat      4K and 4P
                                                     copy, 4K, 4K + 4P more under accumulation
    3       4P weight, 4P copy, 8P moments, 4P       two buckets; weights whole                      4P
            gradient, one bucket

ZeRO-3 gathers weights, frozen ones too, when a module runs and lets go of them behind it; but autograd keeps the transposed view of
every weight that a linear was called with, and the view keeps the memory. So without recomputation all weights of the model are
whole between forward and backward, whatever stage3_max_live_parameters says (DeepSpeed's cure, memory_efficient_linear, replaces
torch.nn.functional.linear for the whole process and is off). With recomputation what is needed again within
stage3_max_reuse_distance stays, up to stage3_max_live_parameters.

Offload moves copy, moments and gradients to the host (`host`); with offload_param the parts of the weights too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .strategy import merge, offloads

FLOAT = 4


@dataclass(frozen=True)
class Trained:
    """What a stage trains and what is frozen beside it.

    numbers        trained fp32 numbers of this process's share of the groups
    frozen         bytes of the frozen tensors, whole
    frozen_apart   DeepSpeed does not know the frozen part, so every process holds it whole (thoughts)
    long           the trained tensors are few and long (banks of experts, a flat LoRA)
    micros         micro-batches of a step
    recomputed     activations are recomputed
    """

    numbers: int
    frozen: int = 0
    frozen_apart: bool = False
    long: bool = False
    micros: int = 1
    recomputed: bool = False


@dataclass(frozen=True)
class Held:
    """Bytes of one process: `always`, more in the `backward` pass, more in the optimizer's `step`; `host`: in the host's memory."""

    always: int
    backward: int
    step: int
    host: int = 0

    def peak(self, activations: int) -> int:
        """The most on the device in a step whose forward and backward pass hold `activations` at their peak."""
        return self.always + max(activations + self.backward, self.step)


def held(trained: Trained, strategy: Mapping[str, Any], world: int) -> Held:
    """What a process of `world` holds under a strategy (train/strategy.py load_strategy)."""
    settings = merge(strategy, micro_rows=1, micro_count=trained.micros, world_size=world, trainable=trained.numbers)
    zero = settings["zero_optimization"]
    stage = int(zero["stage"])
    if stage == 0:
        whole = FLOAT * trained.numbers
        return Held(trained.frozen + 3 * whole, whole + (whole if world > 1 else 0), whole)
    return _gathered(trained, zero, world) if stage == 3 else _whole(trained, zero, world)


def _whole(trained: Trained, zero: Mapping[str, Any], world: int) -> Held:
    """ZeRO-1 and 2: weights whole everywhere."""
    whole, part = FLOAT * trained.numbers, -(-FLOAT * trained.numbers // world)
    bucket = FLOAT * int(zero["reduce_bucket_size"])
    buckets = bucket * (2 if zero["overlap_comm"] else 1)
    kept = whole if trained.long else part
    flat = min(bucket, whole) if world > 1 else 0
    if offloads(zero):
        more = part if trained.micros > 1 else 0  # of earlier micro-batches, on the host
        return Held(trained.frozen + whole, buckets + flat + min(whole, bucket), 0, 5 * part + more)
    if int(zero["stage"]) == 1:
        backward = max(whole, buckets) + max(flat, kept if world == 1 else 0)
    else:
        several = whole > bucket or world == 1
        backward = buckets + flat + (kept if several else 0)
        backward += (kept if several else 2 * kept) if trained.micros > 1 else 0
    return Held(trained.frozen + whole + 3 * part, backward, kept + part)


def _gathered(trained: Trained, zero: Mapping[str, Any], world: int) -> Held:
    """ZeRO-3: weights in parts, whole while they are used."""
    whole, part = FLOAT * trained.numbers, -(-FLOAT * trained.numbers // world)
    bucket = FLOAT * int(zero["reduce_bucket_size"])
    frozen_whole = trained.frozen if trained.frozen_apart else 0
    frozen_part = 0 if trained.frozen_apart else -(-trained.frozen // world)
    live = whole + (0 if trained.frozen_apart else trained.frozen)
    if trained.recomputed:
        live = min(live, FLOAT * int(zero["stage3_max_live_parameters"]))
    optimizer_away, parts_away = offloads(zero), offloads(zero, "offload_param")
    if world == 1 and not parts_away:
        live = 0  # the part is the whole
    weights = frozen_part + part
    states = 4 * part  # copy, moments, gradient
    always = frozen_whole + bucket + (0 if parts_away else weights) + (0 if optimizer_away else states)
    host = (weights if parts_away else 0) + (states + part if optimizer_away else 0)
    return Held(always, live + 2 * bucket, live if optimizer_away else live + part, host)
