"""A tiny run of the `urepa` stage for rank_worker.py: random images, a teacher of random features, a U-Net of four blocks.

A case names: align and urepa (changes of the recipe's settings), teacher ("fixed", "own", "none"), micro_rows, backbone ("diffusers").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from quietgoose.alignment.backbone import build_backbone
from quietgoose.alignment.model_settings import AlignSettings, BackboneSettings
from quietgoose.base.seeding import generator
from quietgoose.train.data.image_steps import ImageSteps
from quietgoose.train.data.images import ImageBatch, ImageLoader, ImageSet
from quietgoose.train.jobs.urepa import TeacherShape, UrepaJob
from quietgoose.train.recipe import OptimizerSettings, TrainSettings
from quietgoose.train.recipe_images import UrepaSettings
from quietgoose.train.stages_images import own_shape

IMAGES, CLASSES, DIM, GRID, ROWS, TOTAL_STEPS, SEED = 30, 5, 6, (4, 4), 8, 20, 3
OPTIMIZER = OptimizerSettings(lr=2e-3, clip=0.5, warmup=0.0, eps=1e-4)
BACKBONE = BackboneSettings(preset="nano", width=16, heads=2, patch=2)
UNET2D = BackboneSettings(
    kind="diffusers",
    diffusers={"block_out_channels": [16, 16], "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8,
               "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
)  # fmt: skip


def optimizer() -> OptimizerSettings:
    return OPTIMIZER


def images_of() -> ImageSet:
    random = np.random.default_rng(0)
    rows = random.integers(0, 256, (IMAGES, 1, 8, 8), dtype=np.uint8)
    labels = random.integers(0, CLASSES, IMAGES)
    return ImageSet(rows, labels.astype(np.int64), tuple("abcde"), "tiny", flip=True)


def features_of(batch: ImageBatch) -> torch.Tensor:
    """Tokens that depend on the row and its mirroring alone."""
    every = torch.randn(2, IMAGES, GRID[0] * GRID[1], DIM, generator=generator(7, "features"))
    return every[batch.flipped_B.long(), batch.index_B]


def settings_of(case: dict[str, Any]) -> UrepaSettings:
    align = AlignSettings(**{"hidden": 12, **case.get("align", {})})
    train = TrainSettings(
        steps=TOTAL_STEPS, rows_per_expert=ROWS, micro_rows=case.get("micro_rows", ROWS), optimizer=OPTIMIZER
    )
    return UrepaSettings(
        backbone=UNET2D if case.get("backbone") == "diffusers" else BACKBONE,
        align=align,
        train=train,
        **case.get("urepa", {}),
    )


def build(case: dict[str, Any], rank: int, world: int) -> tuple[UrepaJob, ImageSteps, Callable[[], str]]:
    settings, images = settings_of(case), images_of()
    unet: Any = build_backbone(settings.backbone, images.shape, CLASSES, SEED)
    with torch.no_grad():  # zero initialisations would hide half of the gradients in the first steps
        for number, parameter in enumerate(unet.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(SEED, "awake", number)))
    kind = case.get("teacher", "fixed")
    shape = {"fixed": TeacherShape(DIM, GRID), "none": None}.get(kind) or (
        own_shape(unet, "last") if kind == "own" else None
    )
    job = UrepaJob(unet, settings, TOTAL_STEPS, SEED, shape)
    loader = ImageLoader(images, ROWS, SEED, rank, world)
    data = ImageSteps(
        loader, job.names, settings.train.micro_rows, features_of if kind == "fixed" else None,
        lambda step: job.weight_at(step) > 0,
    )  # fmt: skip
    return job, data, lambda: ""
