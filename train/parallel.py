"""Expert parallelism: every process owns experts, their rows, gradients and moments; only the frozen base is everywhere.

    W processes, N experts: process r trains the experts r, r + W, ...  Nothing of what is trained is ever sent: a step's one
    message is the vector of verdict.py, (terms + groups + flags) * 8 bytes. Data parallelism sends every gradient besides:
    `ring_bytes`, `zero3_bytes`.

DeepSpeed is told of a data-parallel group of this process alone, through its `mpu` argument, so each of its stages 0 to 2
works on what the process owns. ZeRO-3 is refused: it is there to divide the frozen base, which one process cannot.
Called by the stages (what is owned), the engine and state.py (where it is).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..base import distributed
from ..base.errors import RecipeError
from .recipe import RowTrainSettings
from .strategy import zero_stage


def owned(names: Sequence[str], settings: RowTrainSettings, strategy: str) -> tuple[str, ...] | None:
    """The experts that this process trains; None if all processes train all. RecipeError DIST-005 if it cannot be."""
    if settings.parallel == "data":
        return None
    world = distributed.world()
    stage = zero_stage(strategy)
    if stage == 3:
        raise RecipeError(
            f"train.parallel: expert is impossible with strategy {strategy}: ZeRO-3 divides the frozen base over "
            "processes that train the same; set train.parallel: data, or strategy zero0, zero1 or zero2",
            code="DIST-005",
        )
    if world.size > len(names):
        raise RecipeError(
            f"train.parallel: expert: {world.size} processes for {len(names)} experts leave some with none; start at most "
            f"{len(names)} processes or set train.parallel: data",
            code="DIST-005",
        )
    return tuple(names[world.rank :: world.size])


class Alone:
    """What DeepSpeed calls an mpu: the data-parallel group is this process. Collective to make."""

    def __init__(self) -> None:
        world = distributed.world()
        self._group = [dist.new_group([rank]) for rank in range(world.size)][world.rank]
        self._rank = world.rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._group  # type: ignore[return-value]

    def get_data_parallel_group_ranks(self) -> list[int]:
        return [self._rank]

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._group  # type: ignore[return-value]


def everywhere(
    names: Sequence[str], groups: Sequence[str], parameters: Mapping[str, nn.Parameter]
) -> tuple[tuple[str, ...], dict[str, torch.Size]]:
    """(groups, shape of every trained parameter) over all processes, in the order of the loss terms. Collective."""
    mine = (list(groups), {name: tuple(p.shape) for name, p in parameters.items()})
    found = [dict(zip(own, shapes.items())) for own, shapes in distributed.gather(mine)]
    by_group = {group: entry for part in found for group, entry in part.items()}
    order = tuple(name for name in names if name in by_group)
    return order, {by_group[group][0]: torch.Size(by_group[group][1]) for group in order}


RING_PASSES = {0: 2, 1: 3, 2: 3}
"""How often (W - 1) / W of all trained entries are sent in a step, by ZeRO stage. An all-reduce is two passes; ZeRO-1 and 2
(DeepSpeed 0.19.8, reduce_scatter on) all-reduce whole buckets and then gather the new weights."""


def ring_bytes(entries: int, world: int, stage: int, element: int = 4) -> int:
    """Bytes a process sends in a step of data parallelism for what is trained, with collectives as rings; stages 0 to 2."""
    return math.ceil(RING_PASSES[stage] * (world - 1) / world * entries * element)


def zero3_bytes(
    weights: Iterable[tuple[int, int]], trained: int, world: int, micro_batches: int, zero: Mapping[str, Any]
) -> int:
    """Bytes a process sends in a step under ZeRO-3, DeepSpeed 0.19.8, from a run's fourth micro-batch on:

        (W - 1) / W (m (L + 4 P) + S)

    m micro-batches each gather the L bytes of all weights with more than stage3_param_persistence_threshold entries, frozen and
    trained, and scatter the gradients of the P trained entries; smaller weights, S bytes, are gathered once, after the
    optimizer. `weights`: (entries, bytes an entry) of every tensor; `zero`: the strategy's `zero_optimization`.

    Backward finds what forward gathered only as far as stage3_max_reuse_distance goes: see `gathered_again`.
    """
    most = int(zero["stage3_param_persistence_threshold"])
    sizes = [(entries > most, entries * element) for entries, element in weights]
    large, small = (sum(size for is_large, size in sizes if is_large == wanted) for wanted in (True, False))
    return math.ceil((world - 1) / world * (micro_batches * (large + 4 * trained) + small))


def gathered_again(after: float, entries: float = 0.0, reuse: float = 1e9) -> float:
    """Share of `entries` large weights, used in a row, that ZeRO-3 lets go after their forward and gathers a second time.

    `after`: entries of the model between the last of them and the end of the forward. Backward comes back to a weight past
    all that follow it twice; DeepSpeed keeps those nearer than `reuse` (stage3_max_reuse_distance).
    """
    far = after + entries - reuse / 2
    return min(1.0, max(0.0, far / entries)) if entries else float(far >= 0)
