"""The weight of the alignment: over the training (with HASTE's stop) and over the time of the path.

Pure functions, so that nothing of a schedule needs saving. Called by train/jobs/urepa.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .model_settings import AlignSettings


def stop_step(settings: AlignSettings, total_steps: int) -> int:
    """The first step without alignment (HASTE, Wang et al. 2025: alignment helps early and hurts late)."""
    return math.ceil(settings.stop * total_steps)


def step_weight(settings: AlignSettings, step: int, total_steps: int) -> float:
    """lambda of 0-based `step`; exactly 0 from the stop on."""
    if settings.weight == 0 or step >= stop_step(settings, total_steps):
        return 0.0
    share = min(1.0, step / max(1, total_steps))
    factor = {"constant": 1.0, "linear": 1.0 - share, "cosine": 0.5 * (1.0 + math.cos(math.pi * share))}
    return settings.weight * factor[settings.schedule]


def time_weight(settings: AlignSettings, t_B: Tensor) -> Tensor:
    """Factor of lambda at every image's t, fp32 [B]: `ends` is min(1, max(1.5 - 2t, 2t - 0.5)) (U-REPA's best lambda(t))."""
    if settings.over_time == "constant":
        return torch.ones_like(t_B, dtype=torch.float32)
    return torch.maximum(1.5 - 2.0 * t_B, 2.0 * t_B - 0.5).clamp(max=1.0).float()
