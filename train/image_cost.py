"""What a run of a comparison cost, in seconds and in arithmetic, the teacher's part apart. Called by train/compare.py.

Seconds of a step are the mean over the run's steps without those that took ten times the median (compilation, a pause). What is
paid once, the teacher's training and its features of all images, is charged in full to every run that uses it, though runs share it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..alignment.schedules import stop_step
from ..alignment.settings import TRAINED
from .image_flops import BACKWARD, training_flops, vit_flops
from .recipe import Recipe
from .unet_folder import UNetCard

OUTLIER = 10.0
PETA = 1e15
LAST_STEPS = 50


def run_cost(recipe: Recipe, card: UNetCard, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """seconds, pflop (of a step); once_seconds, once_pflop (of the teacher); images_per_second; token_cosine (of the training's last
    steps); features (the teacher's hash) and fill_seconds (of its features, if this run computed them). pflop is null where the
    teacher's arithmetic is not known (a file, the average, latents)."""
    steps = [float(e["seconds"]) for e in events if e.get("kind") == "step" and e.get("stage") == "urepa"]
    seconds = _mean_step(steps)
    served = next((e for e in reversed(events) if e.get("kind") == "teacher_features"), {})
    filled = max(
        (float(e.get("fill_seconds", 0.0)) for e in events if e.get("kind") == "teacher_features"), default=0.0
    )
    trained = 0.0
    if recipe.teacher.kind in TRAINED:
        trained = float(next((e["seconds"] for e in reversed(events) if e.get("kind") == "teacher"), 0.0))
    unet = next((e for e in reversed(events) if e.get("kind") == "unet"), {})
    rows = int(unet.get("images", 0)) * (2 if recipe.images.flip else 1)
    pflop, once = _arithmetic(recipe, card, served, rows)
    return {
        "seconds": seconds, "once_seconds": trained, "pflop": pflop, "once_pflop": once,
        "images_per_second": recipe.urepa.train.rows_per_expert / seconds if seconds else None,
        "token_cosine": _last_cosine(events), "teacher_seconds": trained, "fill_seconds": filled, "features": card.teacher,
    }  # fmt: skip


def share_fills(costs: Sequence[dict[str, Any]]) -> None:
    """Runs that found features computed by another one are charged what that one paid."""
    paid: dict[str, float] = {}
    for cost in costs:
        paid[cost["features"]] = max(paid.get(cost["features"], 0.0), cost["fill_seconds"])
    for cost in costs:
        cost["fill_seconds"] = paid[cost["features"]] if cost["features"] else 0.0
        cost["once_seconds"] = cost["teacher_seconds"] + cost["fill_seconds"]


def _last_cosine(events: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean token cosine of the last steps that had a teacher."""
    found = [float(e["extra"]["token_cosine"]) for e in events if "token_cosine" in e.get("extra", {})]
    return statistics.fmean(found[-LAST_STEPS:]) if found else None


def _mean_step(steps: Sequence[float]) -> float | None:
    if not steps:
        return None
    limit = OUTLIER * statistics.median(steps)
    return statistics.fmean(value for value in steps if value <= limit)


def _arithmetic(
    recipe: Recipe, card: UNetCard, served: Mapping[str, Any], all_rows: int
) -> tuple[float | None, float | None]:
    """(PFLOP of a step, PFLOP paid once). The teacher's training is counted as if it saw all tokens, which masked autoencoding
    does not: an upper bound."""
    teacher, align, rows = recipe.teacher, recipe.urepa.align, recipe.urepa.train.rows_per_expert
    plain = training_flops(card.backbone, None, card.shape, card.num_classes, 0, (0, 0))
    if teacher.kind == "none" or align.weight == 0:
        return rows * plain / PETA, 0.0
    if teacher.kind in ("file", "ema") or recipe.images.vae is not None:
        return None, None
    height, width = served.get("grid", (0, 0))
    dim = int(served.get("dim", teacher.width))
    whole = training_flops(card.backbone, align, card.shape, card.num_classes, dim, (int(height), int(width)))
    share = stop_step(align, card.steps) / card.steps
    vit = vit_flops(card.shape, teacher.patch, teacher.width, teacher.layers, teacher.heads)
    once = 0.0
    if teacher.kind in TRAINED:
        once += BACKWARD * vit * teacher.train.steps * teacher.train.batch / PETA
    step = rows * (share * whole + (1 - share) * plain)
    if served.get("source") == "disk":
        once += vit * all_rows / PETA
    else:
        step += rows * share * vit
    return step / PETA, once
