"""The straight path from data (t = 0) to noise (t = 1), and the random numbers of a training step.

    x_t = (1 - t) x + t eps,   v = eps - x                     (REPA loss.py; u-repa.md 1.2)

Times, noise and dropped labels are hashes of (seed, place of the row in the endless order of the training): the same for every
arm of a comparison, any number of processes, any micro-batch, and after a resume. Called by train/jobs/urepa.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.randomness import uniform
from .noise import normal

TIME, NOISE, DROP, GAP = range(4)


def interpolate(x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """x_t, in the dtype of the images."""
    t_B111 = t_B[:, None, None, None]
    return (1.0 - t_B111) * x_BCHW + t_B111 * noise_BCHW


def velocity(x_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """The target v = dx_t / dt."""
    return noise_BCHW - x_BCHW


def times(seed: int, place_B: Tensor) -> Tensor:
    """t, fp32 [B], uniform in [0, 1)."""
    return uniform(seed, TIME, place_B)


def noise_like(seed: int, place_B: Tensor, x_BCHW: Tensor) -> Tensor:
    """eps, fp32, standard normal, in the shape of `x_BCHW`."""
    return normal(seed, place_B, x_BCHW.shape[1:], NOISE)


def earlier(seed: int, place_B: Tensor, t_B: Tensor, gap: float) -> Tensor:
    """A time up to `gap` before t, fp32 [B], not below 0: what an average that teaches sees (SRA, Jiang et al. 2025)."""
    return (t_B - gap * uniform(seed, GAP, place_B)).clamp(min=0.0)


def drop_labels(seed: int, place_B: Tensor, labels_B: Tensor, share: float, null: int) -> Tensor:
    """Labels with `share` of them replaced by the null class, which is the number of classes."""
    return torch.where(uniform(seed, DROP, place_B) < share, null, labels_B)
