"""The learning rate of a step: a pure function, so that nothing of a schedule needs saving."""

from __future__ import annotations

import math

from .recipe import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, total_steps: int) -> float:
    """Rate of 0-based `step`: linear warm-up over `warmup * total_steps` (rounded up) steps, then constant, linear or
    cosine decay to `min_lr_ratio * lr` at the end."""
    warmup = math.ceil(settings.warmup * total_steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.lr
    share = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = 1.0 - share if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
    return settings.lr * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * left)
