"""Samplers of a velocity model on the straight path x_t = (1 - t) x + t eps, v = eps - x; t runs from 1 to 0.

ODE (Euler, Heun): dx = v dt. SDE (Euler-Maruyama, REPA's sampler, Ma et al. 2024 eq. 5-7): with E[eps | x] = x + (1 - t) v
the score is s = -(x + (1 - t) v) / t; with diffusion g = 2 t the drift is v - g s / 2 and every step adds
sqrt(g |dt|) z. It runs uniformly from 1 to `last` and ends with one step of the drift to 0. States are fp32 (ODE) and fp64 (SDE).
Guidance (Ho & Salimans 2022): v_u + w (v_c - v_u) while low <= t <= high (Kynkaanniemi et al. 2024), v_c elsewhere; the
null label is `num_classes`.

Called by train/evaluate_images.py and train/export_images.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ..base.errors import RecipeError
from .noise import normal
from .settings import SamplerSettings

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_BCHW, t_B fp32 in [0, 1], labels_B int64) -> v_BCHW"""

Fresh = Callable[[int], Tensor]
"""Step number -> standard normal noise of the batch's shape, for the SDE."""

STEP_NOISE = 1


def sample(
    velocity: Velocity, noise_BCHW: Tensor, labels_B: Tensor, settings: SamplerSettings, num_classes: int,
    fresh: Fresh | None = None,
) -> Tensor:  # fmt: skip
    """fp32 [B, C, H, W] images (or latents) from noise. `fresh`: the SDE's noise of every step; required for `sde`."""
    guided = guide(velocity, labels_B, settings, num_classes)
    if settings.method != "sde":
        return _ode(guided, noise_BCHW.float(), settings.steps, heun=settings.method == "heun")
    if fresh is None:
        raise RecipeError("sampler: method sde needs the noise of its steps", code="CFG-090")
    return _sde(guided, noise_BCHW.double(), settings, fresh)


def guide(
    velocity: Velocity, labels_B: Tensor, settings: SamplerSettings, num_classes: int
) -> Callable[[Tensor, float], Tensor]:
    """(x_BCHW, t) -> the guided velocity in the dtype of x. Without guidance the unconditional model is never run. It is a
    call of its own, so that every call has one shape, which a compiled or captured model wants."""
    null_B = torch.full_like(labels_B, num_classes)

    def at(x_BCHW: Tensor, t: float) -> Tensor:
        x = x_BCHW.float()
        t_B = torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
        with_label = velocity(x, t_B, labels_B).to(x_BCHW.dtype)
        if settings.guidance == 1.0 or not settings.guidance_low <= t <= settings.guidance_high:
            return with_label
        without = velocity(x, t_B, null_B).to(x_BCHW.dtype)
        return without + settings.guidance * (with_label - without)

    return at


def _ode(velocity: Callable[[Tensor, float], Tensor], x_BCHW: Tensor, steps: int, *, heun: bool) -> Tensor:
    for now, after in _grid(1.0, 0.0, steps):
        slope = velocity(x_BCHW, now)
        step = after - now
        if heun and after > 0.0:  # the last step is Euler's: the velocity at t = 0 was never trained for
            slope = 0.5 * (slope + velocity(x_BCHW + step * slope, after))
        x_BCHW = x_BCHW + step * slope
    return x_BCHW


def _sde(
    velocity: Callable[[Tensor, float], Tensor], x_BCHW: Tensor, settings: SamplerSettings, fresh: Fresh
) -> Tensor:
    last = settings.last
    for number, (now, after) in enumerate(_grid(1.0, last, settings.steps - 1)):
        step = after - now
        drift = _drift(x_BCHW, velocity(x_BCHW, now), now)
        x_BCHW = x_BCHW + step * drift + (2.0 * now * -step) ** 0.5 * fresh(number).to(x_BCHW)
    return (x_BCHW - last * _drift(x_BCHW, velocity(x_BCHW, last), last)).float()


def _drift(x_BCHW: Tensor, v_BCHW: Tensor, t: float) -> Tensor:
    """v - g s / 2 with g = 2 t and s = -(x + (1 - t) v) / t, which is v + x + (1 - t) v."""
    return v_BCHW + x_BCHW + (1.0 - t) * v_BCHW


def _grid(start: float, end: float, steps: int) -> Iterator[tuple[float, float]]:
    """(t, next t) of every step, equally long; the ends are met exactly."""
    points = [start + (end - start) * k / steps for k in range(steps)] + [end]
    return pairwise(points)


@torch.no_grad()
def sample_rows(
    velocity: Velocity, index_B: Tensor, labels_B: Tensor, shape: tuple[int, int, int], settings: SamplerSettings,
    num_classes: int, seed: int,
) -> Tensor:  # fmt: skip
    """fp32 [B, C, H, W]: the samples numbered `index_B`. Sample i is a pure function of seed and i (and, to the last bit,
    of the batch's size, as matrix products may be)."""
    noise = normal(seed, index_B, shape)
    return sample(
        velocity, noise, labels_B, settings, num_classes,
        lambda step: normal(seed, index_B, shape, STEP_NOISE, step),
    )  # fmt: skip
