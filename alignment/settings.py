"""What a recipe says about teachers, judges and samplers. Imports no torch: the recipe's checks read it.

Used by train/recipe_images.py; the numbers are explained in docs/images.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

TeacherKind = Literal["none", "self", "label", "random", "file", "ema"]
TRAINED: tuple[TeacherKind, ...] = ("self", "label")
SamplerMethod = Literal["euler", "heun", "sde"]


@dataclass
class FitSettings:
    """A plain AdamW training of a small network on one device: the pipeline's own teacher, and the judge."""

    steps: int = 1000
    batch: int = 512
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05


@dataclass
class TeacherSettings:
    """The frozen network whose tokens the U-Net is aligned with.

    kind         none | self (a ViT trained here by masked autoencoding, no labels) | label (the same ViT trained on the
                 labels) | random (its weights as they begin) | file (a ViT or DINOv2 folder of transformers, safetensors) |
                 ema (none from outside: the U-Net's own average at lower noise, as SRA)
    path         file: the folder
    resize       file: the side that images are resized to (bicubic) before the network, a multiple of its patch
    grid         resize the teacher's tokens to this grid (bilinear, or by area where it shrinks); null: its own grid
    patch, width, layers, heads      shape of the ViT of self, label and random
    mask_ratio, decoder_width, decoder_layers      of masked autoencoding
    cache        auto (on disk if it fits into cache_gib and the disk), disk, off (the teacher runs every step)
    seed         of weights and masks; a control of its own, so that arms of different seeds share one teacher
    """

    kind: TeacherKind = "self"
    path: str | None = None
    resize: int = 224
    grid: int | None = None
    patch: int = 2
    width: int = 192
    layers: int = 6
    heads: int = 3
    mask_ratio: float = 0.6
    decoder_width: int = 128
    decoder_layers: int = 2
    seed: int = 0
    cache: Literal["auto", "disk", "off"] = "auto"
    cache_gib: float = 32.0
    train: FitSettings = field(default_factory=FitSettings)


@dataclass
class SamplerSettings:
    """From noise (t = 1) to an image (t = 0).

    method           euler, heun (ODE) or sde (Euler-Maruyama; uniform down to `last`, then one deterministic step)
    guidance         classifier-free: v_u + guidance * (v_c - v_u); 1 is none
    guidance_low, guidance_high      only while low <= t <= high
    batch            images at once; part of the result's identity, since matrix products may differ by batch size
    """

    method: SamplerMethod = "euler"
    steps: int = 50
    guidance: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    last: float = 0.04
    batch: int = 1000


@dataclass
class JudgeSettings:
    """The classifier in whose features samples are compared with images; never the teacher."""

    width: int = 64
    seed: int = 1000
    train: FitSettings = field(default_factory=lambda: FitSettings(steps=1500, batch=512, lr=2e-3, weight_decay=0.05))


def check_sampler(settings: SamplerSettings, name: str) -> list[str]:
    """What is wrong with the settings, as sentences; `name` is how the recipe calls them."""
    found = []
    if settings.steps < 1 or (settings.method == "sde" and settings.steps < 2):
        found.append(f"{name}.steps: {settings.steps}; at least 1, at least 2 for sde")
    if settings.batch < 1:
        found.append(f"{name}.batch: {settings.batch}; at least 1")
    if not 0.0 <= settings.guidance_low <= settings.guidance_high <= 1.0:
        low, high = settings.guidance_low, settings.guidance_high
        found.append(f"{name}.guidance_low, guidance_high: {low}, {high}; allowed are 0 <= low <= high <= 1")
    if not 0.0 < settings.last < 1.0:
        found.append(f"{name}.last: {settings.last}; above 0, below 1")
    if not 0 <= settings.guidance < math.inf:
        found.append(f"{name}.guidance: {settings.guidance}; at least 0; 1 is no guidance")
    return found
