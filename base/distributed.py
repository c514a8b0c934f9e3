"""Process-group helpers that are no-ops in one process. Only torch.distributed is used, so that no room
above needs DeepSpeed to talk to its peers. Callers: train/, evaluation/.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import QuietGooseError

ObjectT = TypeVar("ObjectT")


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world() -> World:
    """Rank and size: from the process group if there is one, else from RANK and WORLD_SIZE, else one process."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    return World(
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
        int(os.environ.get("LOCAL_RANK", "0")),
    )


def active() -> bool:
    """True if a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    if active():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; returns the tensor."""
    if active():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """True on all ranks if `flag` is true on one. Collective."""
    if not active():
        return flag
    value = torch.tensor([1.0 if flag else 0.0], device=_collective_device(device))
    return bool(all_reduce_sum(value).item() > 0)


def broadcast(value: ObjectT) -> ObjectT:
    """Rank 0's object on all ranks. Collective."""
    if not active():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[[], ObjectT]) -> ObjectT:
    """`action` on rank 0; its result, or the QuietGooseError it raised, on all ranks. Collective."""
    outcome: Any = None
    if world().is_main:
        try:
            outcome = action()
        except QuietGooseError as error:
            outcome = error
    outcome = broadcast(outcome)
    if isinstance(outcome, QuietGooseError):
        raise outcome
    return outcome


def on_main_patiently(action: Callable[[], ObjectT], look_seconds: float = 1.0) -> ObjectT:
    """As `on_main`, for work that may take longer than a collective may: the action runs in a thread of rank 0 while all ranks
    ask every `look_seconds` whether it is done. Collective."""
    if not active():
        return action()
    box: list[ObjectT] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(device)
            box.append(action())
        except BaseException as error:
            failures.append(error)

    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    thread = threading.Thread(target=work, name="quietgoose-main", daemon=True)
    if world().is_main:
        thread.start()
    while not broadcast(not thread.is_alive()):
        time.sleep(look_seconds)
    if failures and not isinstance(failures[0], QuietGooseError):
        raise failures[0]  # the others are told by the end of this process
    failed = broadcast(failures[0] if failures else None)
    if failed is not None:
        raise failed
    return broadcast(box[0] if world().is_main else None)  # type: ignore[return-value]


def gather(value: ObjectT) -> list[ObjectT]:
    """Every rank's object, in rank order, on all ranks. Collective."""
    if not active():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def _collective_device(device: torch.device | str) -> torch.device | str:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return "cpu" if str(device) == "cpu" else device
