"""The `teacher` stage: a small ViT trained on the training images, by masked autoencoding or on the labels.

It is no job of the engine: a minute on one GPU, on rank 0, into a folder named by hash that other runs find again
(alignment/training.py); a kill costs at most a minute. The stage's result is a copy of that folder.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..alignment.judging import judged_count
from ..alignment.training import TRAINED, train_teacher
from ..base import distributed
from ..base.errors import RecipeError
from ..base.files import read_json
from .data.images import cache_folder, open_both
from .recipe import Recipe
from .stages import Context, Writer


def teacher_stage_settings(recipe: Recipe) -> Mapping[str, Any]:
    """Everything the teacher's weights depend on."""
    images = {k: v for k, v in vars(recipe.images).items() if k not in ("cache", "vae")}
    teacher = {
        k: v for k, v in vars(recipe.teacher).items() if k not in ("cache", "cache_gib", "grid", "path", "resize")
    }
    return json.loads(json.dumps({"images": images, "teacher": teacher}, default=dataclasses.asdict))


def run_teacher(context: Context) -> Writer:
    """RecipeError CFG-092 for a kind that is not trained here."""
    recipe = context.recipe
    if recipe.teacher.kind not in TRAINED:
        raise RecipeError(
            f"stages: 'teacher' trains teacher.kind {' or '.join(TRAINED)}; {recipe.teacher.kind} needs no such stage",
            code="CFG-092",
        )
    pixels = dataclasses.replace(recipe.images, vae=None)
    train, test = open_both(pixels, context.device)
    if "evaluate" in recipe.stages:  # before anything is trained that could not be judged
        judged_count(train, test, recipe.evaluate.images.count)

    def make() -> Path:
        return train_teacher(
            recipe.teacher, train, context.device, cache_folder(recipe.images), held_out=test, progress=context.progress
        )

    made = distributed.on_main_patiently(make)
    facts = read_json(made / "teacher.json") if context.world.is_main else {}
    shown = {name: facts[name] for name in ("loss", "probe_accuracy", "seconds", "device") if name in facts}
    context.event("teacher", teacher=recipe.teacher.kind, **shown)
    return lambda folder: shutil.copytree(made, folder, dirs_exist_ok=True)  # type: ignore[return-value]
