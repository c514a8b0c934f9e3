"""What a training step of a U-Net holds at its peak, found by taking that step with tensors that have shapes and no numbers.

The job's own forward and backward pass run on torch's fake CPU tensors, and the bytes of all storages alive at once are counted:
activations kept for the backward pass, what is recomputed, work space of single operations. Weights and the batch were there before,
gradients of weights are part of `state_bytes`: neither is counted. Not compiled, so it is an upper bound for `urepa.compile: true`,
which keeps less; fused attention keeps no attention matrix, as on a GPU. Called by train/plan_images.py.
"""

from __future__ import annotations

import dataclasses
import warnings

import torch

from ..alignment.backbone import build_backbone
from .data.image_steps import AlignBatch
from .jobs.urepa import TeacherShape, UrepaJob
from .living_bytes import Shapes, drop_gradients, peak_bytes
from .recipe_images import UrepaSettings


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
        drop_gradients(job)
        return peak_bytes(lambda: job(batch).total.backward(), there)
