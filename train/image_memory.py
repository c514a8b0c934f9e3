"""What a training step of a U-Net holds at its peak, found by taking that step with tensors that have shapes and no numbers.

The job's own forward and backward pass run on torch's fake CPU tensors, and the bytes of all storages alive at once are counted:
activations kept for the backward pass, what is recomputed, work space of single operations. Weights and the batch were there before,
gradients of weights are part of `state_bytes`: neither is counted. Not compiled, so it is an upper bound for `urepa.compile: true`,
which keeps less; fused attention keeps no attention matrix, as on a GPU. Called by train/plan_images.py.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..alignment.backbone import build_backbone
from .data.image_steps import AlignBatch
from .jobs.urepa import TeacherShape, UrepaJob
from .recipe_images import UrepaSettings


class Shapes(FakeTensorMode):
    """Tensors without numbers; a copy of a module (the average that teaches) stays among them."""

    def __deepcopy__(self, memo: Any) -> Shapes:
        return self


class LivingBytes(TorchDispatchMode):
    """Bytes of the storages that operations made while this was entered: `now` alive, and `peak`, the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def before(self, tensors: Any) -> None:
        """These were there before and do not count."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.now -= size


def peak_bytes(step: Callable[[], Any], before: Any) -> int:
    """The most that lives at once while `step` runs; the tensors `before` do not count."""
    with LivingBytes() as living:
        living.before(before)
        step()
    return living.peak


def step_bytes(
    settings: UrepaSettings, shape: tuple[int, int, int], num_classes: int, teacher: TeacherShape | None, rows: int
) -> int:
    """Peak of a step of `rows` images [C, H, W] in one process, without weights, gradients, optimizer and batch."""
    with Shapes(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # by the copy of the average
        backbone = build_backbone(settings.backbone, shape, num_classes, 0)
        steps = settings.train.steps
        job = UrepaJob(backbone, dataclasses.replace(settings, compile=False), steps, 0, teacher)
        taught = next((step for step in (0, steps // 2) if job.weight_at(step) > 0), 0)
        job.begin_step(taught, torch.ones(len(job.names)))
        tokens = None
        if teacher is not None and not teacher.own:
            tokens = torch.zeros(rows, teacher.grid[0] * teacher.grid[1], teacher.dim)
        numbers = torch.zeros(rows, dtype=torch.int64)
        batch = AlignBatch(torch.zeros(rows, *shape), numbers, numbers.clone(), tokens)
        there = [*job.parameters(), *job.buffers(), *(t for t in vars(batch).values() if t is not None)]
        for weight in job.parameters():
            weight.register_post_accumulate_grad_hook(_drop_gradient)
        return peak_bytes(lambda: job(batch).total.backward(), there)


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None
