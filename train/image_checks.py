"""Cross-checks of the image family's settings. No torch. Called by train/checks.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ..alignment.settings import TRAINED
from .image_setting_checks import check_image_settings, image_setting_ranges
from .recipe import Recipe

Problem = tuple[str, str]


def draws_images(recipe: Recipe) -> bool:
    """Whether the run is of the image family: it trains a U-Net, or has trained one."""
    return "urepa" in recipe.stages or "compare" in recipe.stages or finished(recipe, "urepa")


def image_needs(recipe: Recipe) -> dict[str, list[str]]:
    """Stage -> stages whose result it needs."""
    taught = ["teacher"] if recipe.teacher.kind in TRAINED and "compare" not in recipe.stages else []
    needs = {"urepa": taught, "compare": []}
    if draws_images(recipe):
        needs |= {"evaluate": ["urepa"], "export": ["urepa"]}
    return needs


def image_ranges(recipe: Recipe) -> list[tuple[str, float, float, float]]:
    """(setting, value, lowest, highest)."""
    align, average = recipe.urepa.align, recipe.urepa.average
    numbers: list[tuple[str, float, float, float]] = [
        ("urepa.label_drop", recipe.urepa.label_drop, 0.0, 1.0),
        ("urepa.align.weight", align.weight, 0.0, 1e6),
        ("urepa.align.token", align.token, 0.0, 1e6),
        ("urepa.align.manifold", align.manifold, 0.0, 1e6),
        ("urepa.align.hidden", align.hidden, 1, 1 << 20),
        ("urepa.align.stop", align.stop, 0.0, 1.0),
        ("urepa.align.noise_gap", align.noise_gap, 0.0, 1.0),
        ("urepa.average.decay", average.decay, 0.0, 1.0),
        ("urepa.backbone.time_scale", recipe.urepa.backbone.time_scale, 1e-6, 1e6),
    ]
    for name in ("patch", "width", "heads"):
        value = getattr(recipe.urepa.backbone, name)
        if value is not None:
            numbers.append((f"urepa.backbone.{name}", value, 1, 1 << 20))
    return numbers + image_setting_ranges(recipe)


def check_images(recipe: Recipe) -> Iterator[Problem]:
    """What is wrong with an image run."""
    if not draws_images(recipe):
        return
    yield from check_image_settings(recipe)
    language = [stage for stage in recipe.stages if stage in ("base", "experts", "gates", "thoughts")]
    if language:
        yield "CFG-004", f"stages: {', '.join(language)} train language models and urepa images; make two recipes"
    backbone, align = recipe.urepa.backbone, recipe.urepa.align
    if backbone.kind == "diffusers" and importlib.util.find_spec("diffusers") is None:
        yield "ENV-005", "urepa.backbone.kind: diffusers needs pip install 'quietgoose[images]'; or set it to sit_down"
    if backbone.kind != "diffusers" and backbone.diffusers:
        yield "CFG-123", f"urepa.backbone.diffusers: is set while kind is {backbone.kind}; set kind: diffusers"
    shaped = [k for k in ("patch", "width", "heads", "blocks") if getattr(backbone, k) is not None]
    if backbone.kind == "diffusers" and shaped:
        yield (
            "CFG-123",
            f"urepa.backbone.{shaped[0]}: belongs to sit_down; set the U-Net's own in urepa.backbone.diffusers",
        )
    path = recipe.teacher.path
    if recipe.teacher.kind == "file" and not (path and Path(path).expanduser().is_dir()):
        yield (
            "CFG-092",
            f"teacher.path: {recipe.teacher.path}: kind file needs the folder of a ViT or DINOv2 in safetensors",
        )
    if align.projector == "conv" and align.order == "inside":
        yield (
            "CFG-123",
            "urepa.align.order: inside needs the layers of projector mlp; a single convolution has no inside",
        )
    if align.token == 0 and align.manifold == 0 and align.weight > 0 and recipe.teacher.kind != "none":
        yield "CFG-123", "urepa.align: token and manifold are both 0, so nothing is aligned; set teacher.kind: none"
    yield from _check_compare(recipe)


def _check_compare(recipe: Recipe) -> Iterator[Problem]:
    compare = recipe.compare
    if "compare" not in recipe.stages:
        return
    if not compare.arms or not compare.seeds:
        yield "CFG-124", "compare: set compare.arms (name -> settings that differ) and compare.seeds"
    for name in (*compare.controls, *([compare.treatment] if compare.treatment else [])):
        if name not in compare.arms:
            yield "CFG-124", f"compare: '{name}' is none of compare.arms ({', '.join(compare.arms)})"


def finished(recipe: Recipe, stage: str) -> bool:
    """Whether the run folder holds the stage's sealed result."""
    return (Path(recipe.output) / "stages" / stage / "DONE.json").is_file()
