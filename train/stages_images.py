"""The `urepa` stage: images, teacher and U-Net put together and trained. Called by train/pipeline.py.

urepa   -> unet.json, average.safetensors, raw.safetensors, projector.safetensors, steps/ (train/unet_folder.py)
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..alignment.backbone import build_backbone
from ..alignment.features import serve_features
from ..alignment.judging import judged_count
from ..alignment.teachers import open_teacher
from ..alignment.training import TRAINED
from ..base.seeding import derive
from .data.image_steps import Features, ImageSteps
from .data.images import ImageLoader, ImageSet, cache_folder, open_both, open_images
from .image_checks import draws_images
from .jobs.urepa import TeacherShape, UrepaJob, check_job
from .recipe import Recipe
from .snapshots import collect
from .stages import Context, Stage, Writer
from .strategy import zero_stage
from .unet_folder import STEPS, UNetCard, save_unet


@dataclass(frozen=True)
class Taught:
    """What the U-Net learns from: the shape of the tokens, where they come from, the teacher's hash."""

    shape: TeacherShape | None = None
    features: Features | None = None
    digest: str = ""


def urepa_settings(recipe: Recipe) -> Mapping[str, Any]:
    """Everything the weights depend on, and the steps at which they are kept."""
    images = {k: v for k, v in vars(recipe.images).items() if k != "cache"}
    teacher = {k: v for k, v in vars(recipe.teacher).items() if k not in ("cache", "cache_gib")}
    return json.loads(
        json.dumps(
            {"seed": recipe.seed, "images": images, "teacher": teacher if aligned(recipe) else None, "urepa": recipe.urepa,
             "at": curve_steps(recipe)},
            default=dataclasses.asdict,
        )
    )  # fmt: skip


def aligned(recipe: Recipe) -> bool:
    """Whether somebody teaches."""
    return recipe.teacher.kind != "none"


def curve_steps(recipe: Recipe) -> list[int]:
    """Steps before the last one at which weights are kept."""
    return sorted({step for step in recipe.evaluate.images.at if 0 < step < recipe.urepa.train.steps})


def run_urepa(context: Context) -> Writer:
    recipe, settings, train = context.recipe, context.recipe.urepa, context.recipe.urepa.train
    images = open_images(recipe.images, "train", context.device)
    if "evaluate" in recipe.stages:  # before hours of what could not be judged
        judged_count(*open_both(recipe.images, context.device), recipe.evaluate.images.count)
    taught = the_teacher(context, images)
    backbone = build_backbone(settings.backbone, images.shape, images.num_classes, derive(recipe.seed, "unet"))
    job = UrepaJob(backbone, settings, train.steps, recipe.seed, taught.shape)
    rank, size = context.world.rank, context.world.size
    loader = ImageLoader(images, train.rows_per_expert, recipe.seed, rank, size, context.device)
    data = ImageSteps(loader, job.names, train.micro_rows, taught.features, lambda step: job.weight_at(step) > 0)
    check_job(settings.align, settings.compile, zero_stage(train.strategy or recipe.strategy), data.micro_count)
    counts = {"backbone": _count(job.backbone), "projector": _count(job.projector)}
    context.event("unet", parameters=counts, images=len(images), classes=images.num_classes, **job.describe())
    trained = context.train("urepa", job, data, train, taught.digest, curve_steps(recipe))
    card = UNetCard(
        settings.backbone, images.shape, images.classes, images.digest, train.steps, job.tap or "", taught.digest
    )

    def write(folder: Path) -> None:
        save_unet(card, trained, folder)
        collect(context.folder.stage("urepa") / STEPS, curve_steps(recipe), folder / STEPS)

    return write


def image_stages(evaluate: Stage, export: Stage) -> tuple[Stage, ...]:
    """The image family's stages; `evaluate` and `export` of the language family go on serving its recipes."""

    def either(language: Stage, images: Stage) -> Stage:
        def of(recipe: Recipe) -> Stage:
            return images if draws_images(recipe) else language

        return Stage(
            language.name, lambda recipe: of(recipe).settings(recipe), lambda context: of(context.recipe).run(context)
        )

    return (
        _later("teacher", "teacher_stage", "teacher_stage_settings", "run_teacher"),
        Stage("urepa", urepa_settings, run_urepa),
        either(evaluate, _later("evaluate", "evaluate_images", "evaluate_settings", "run_evaluate")),
        either(export, _later("export", "export_images", "export_settings", "run_export")),
        _later("compare", "compare", "compare_settings", "run_compare"),
    )


def _later(name: str, module: str, settings: str, run: str) -> Stage:
    """A stage whose module is imported when it is asked for."""

    def get(attribute: str) -> Any:
        return getattr(importlib.import_module(f".{module}", __package__), attribute)

    return Stage(name, lambda recipe: get(settings)(recipe), lambda context: get(run)(context))


def the_teacher(context: Context, images: ImageSet) -> Taught:
    """The recipe's teacher with its features: cached on disk, or computed every step."""
    recipe = context.recipe
    if recipe.teacher.kind == "none":
        return Taught()
    if recipe.teacher.kind == "ema":
        unet = build_backbone(recipe.urepa.backbone, images.shape, images.num_classes, seed=0)
        return Taught(own_shape(unet, recipe.urepa.align.teacher_tap), None, "ema")
    folder = context.folder.require("teacher", "urepa") if recipe.teacher.kind in TRAINED else None
    teacher = open_teacher(recipe.teacher, images, context.device, folder)
    assert teacher is not None
    source = serve_features(
        teacher, images, recipe.teacher, cache_folder(recipe.images), event=context.event, progress=context.progress
    )
    return Taught(TeacherShape(source.dim, source.grid), source.features_for, source.digest)


def own_shape(unet: Any, tap: str) -> TeacherShape:
    """Of the tokens that the U-Net's own average teaches with."""
    from ..alignment.taps import resolve_tap

    dim, grid = unet.tap_shape(resolve_tap(unet, tap, "urepa.align.teacher_tap"))
    return TeacherShape(dim, grid, own=True)


def _count(module: Any) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())
