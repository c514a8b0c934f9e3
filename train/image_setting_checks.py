"""Ranges of the settings of images, teachers, judges and samplers. No torch. Called by train/image_checks.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..alignment.settings import FitSettings, check_sampler
from ..base.files import safe_name
from .recipe import Recipe

Problem = tuple[str, str]


def image_setting_ranges(recipe: Recipe) -> list[tuple[str, float, float, float]]:
    """(setting, value, lowest, highest)."""
    images, teacher, judged = recipe.images, recipe.teacher, recipe.evaluate.images
    numbers: list[tuple[str, float, float, float]] = [
        ("images.holdout", images.holdout, 0.0, 0.9),
        ("teacher.patch", teacher.patch, 1, 1024),
        ("teacher.width", teacher.width, 4, 1 << 16),
        ("teacher.layers", teacher.layers, 1, 1024),
        ("teacher.heads", teacher.heads, 1, 1024),
        ("teacher.mask_ratio", teacher.mask_ratio, 0.01, 0.99),
        ("teacher.decoder_width", teacher.decoder_width, 4, 1 << 16),
        ("teacher.decoder_layers", teacher.decoder_layers, 0, 1024),
        ("teacher.resize", teacher.resize, 1, 1 << 14),
        ("teacher.cache_gib", teacher.cache_gib, 0.0, 1e9),
        ("evaluate.images.count", judged.count, 16, 1 << 30),
        ("evaluate.images.neighbours", judged.neighbours, 1, 1000),
        ("evaluate.images.subsets", judged.subsets, 1, 1 << 20),
        ("evaluate.images.subset_size", judged.subset_size, 2, 1 << 20),
        ("evaluate.images.bootstrap", judged.bootstrap, 0, 1 << 20),
        ("evaluate.images.judge.width", judged.judge.width, 1, 1 << 14),
        *(("evaluate.images.at", step, 1, 1 << 40) for step in judged.at),
        *_fit("teacher.train", teacher.train),
        *_fit("evaluate.images.judge.train", judged.judge.train),
    ]
    for name, value, low in (
        ("images.size", images.size, 1), ("images.limit", images.limit, 1), ("teacher.grid", teacher.grid, 1),
        ("evaluate.images.at_count", judged.at_count, 16),
    ):  # fmt: skip
        if value is not None:
            numbers.append((name, value, low, 1 << 40))
    return numbers


def check_image_settings(recipe: Recipe) -> Iterator[Problem]:
    """What ranges alone do not tell."""
    images, teacher, judged = recipe.images, recipe.teacher, recipe.evaluate.images
    if teacher.width % teacher.heads:
        yield "CFG-092", f"teacher.width: {teacher.width} is no multiple of teacher.heads ({teacher.heads})"
    if teacher.width % 4 or teacher.decoder_width % 4:
        yield "CFG-092", "teacher.width, teacher.decoder_width: must be multiples of 4 (positions of two axes)"
    if images.vae is not None and not Path(images.vae).expanduser().is_dir():
        yield "CFG-005", f"images.vae: {images.vae}: no such folder"
    if judged.inception is not None and not Path(judged.inception).expanduser().is_file():
        yield "CFG-093", f"evaluate.images.inception: {judged.inception}: no such file"
    for name, sampler in judged.samplers.items():
        safe_name(name, "sampler")
        yield from (("CFG-090", line) for line in check_sampler(sampler, f"evaluate.images.samplers.{name}"))
        if sampler.guidance != 1.0 and recipe.urepa.label_drop == 0 and "urepa" in recipe.stages:
            yield (
                "CFG-090",
                f"evaluate.images.samplers.{name}.guidance: {sampler.guidance} needs a U-Net that was trained without labels too; set "
                "urepa.label_drop above 0 (0.1), or guidance: 1",
            )


def _fit(name: str, fit: FitSettings) -> list[tuple[str, float, float, float]]:
    return [
        (f"{name}.steps", fit.steps, 1, 1 << 40),
        (f"{name}.batch", fit.batch, 1, 1 << 20),
        (f"{name}.lr", fit.lr, 1e-12, 10.0),
        (f"{name}.weight_decay", fit.weight_decay, 0.0, 10.0),
        (f"{name}.warmup", fit.warmup, 0.0, 1.0),
    ]
