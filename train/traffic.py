"""Bytes that collectives send, counted where PyTorch dispatches them, so whoever calls: DeepSpeed, the engine, a checkpoint.

    with Traffic() as traffic: engine.step(batch)
    traffic.sent      # bytes this process sends, summed over collectives

What a ring sends per process for n bytes of payload in a group of W: all-reduce 2 (W - 1) / W n; reduce, broadcast, all-gather
(n the gathered whole) and reduce-scatter (n the whole that is reduced) (W - 1) / W n. Other algorithms send as much or more.
Called by tests and benchmarks/scaling.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

RING_PASSES = {
    "allreduce_": 2, "allreduce_coalesced_": 2, "reduce_": 1, "broadcast_": 1, "allgather_": 1, "_allgather_base_": 1,
    "allgather_into_tensor_coalesced_": 1, "reduce_scatter_": 1, "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
}  # fmt: skip


class Traffic(TorchDispatchMode):
    """While open, `payload` counts bytes by collective, `calls` how often, `sent` what a ring sends for all of them. Groups of
    one process send nothing and do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name not in RING_PASSES:
            return
        group = next((a for a in args if isinstance(a, torch.ScriptObject)), None)
        world = dist.get_world_size() if group is None else dist.ProcessGroup.unbox(group).size()
        if world == 1:
            return
        # the whole is the largest of the arguments: input and output differ by the group's size
        size = max(sum(t.numel() * t.element_size() for t in _tensors(argument)) for argument in args)
        self.payload[name] += size
        self.calls[name] += 1
        self.sent += RING_PASSES[name] * (world - 1) / world * size


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for part in argument:
            yield from _tensors(part)
