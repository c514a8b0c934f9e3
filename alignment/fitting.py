"""A plain training of a small network on one device: the pipeline's own teacher and the judge.

AdamW, warm-up and cosine to zero, gradients clipped at norm 1, bf16 autocast on a GPU. What a step sees must be a pure
function of its number, so that a training goes on from its state file as if it had not been stopped. Called by training.py
and judge.py.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..base.errors import NumericError
from ..base.seeding import generator
from .settings import FitSettings

Progress = Callable[[str, int, int], None]
SAVE_SECONDS = 60.0
LOOK_EVERY = 50


class Pixels(Protocol):
    """A set of images, as train/data/images.py makes it: rows by number, fp32 in [-1, 1]."""

    labels: Tensor
    digest: str
    flip: bool

    @property
    def num_classes(self) -> int: ...
    @property
    def pixel_shape(self) -> tuple[int, int, int]: ...
    def __len__(self) -> int: ...
    def pixels(
        self, index_B: Tensor, flipped_B: Tensor | None = None, device: torch.device | str | None = None
    ) -> Tensor: ...


def silent(what: str, done: int, total: int) -> None:
    """A progress nobody looks at."""


def fit(
    module: nn.Module, loss_at: Callable[[int], Tensor], settings: FitSettings, device: torch.device, *,
    what: str, state: Path | None = None, progress: Progress = silent,
) -> float:  # fmt: skip
    """Train `module` in place; returns the mean loss of the last steps. `state`: a file to go on from, written each minute.

    NumericError NUM-010 if the loss is not finite.
    """
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.99), fused=device.type == "cuda")
    first = _restore(module, optimizer, state, device)
    saved, recent = time.monotonic(), torch.zeros((), device=device)
    module.train()
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * schedule(step, settings)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        recent = loss.detach() if step == first else recent.lerp(loss.detach(), 0.1)
        if step % LOOK_EVERY == 0 or step + 1 == settings.steps:
            if not bool(torch.isfinite(recent)):
                raise NumericError(f"{what}: the loss is not finite at step {step}; lower its lr", code="NUM-010")
            progress(what, step + 1, settings.steps)
            if state is not None and time.monotonic() - saved > SAVE_SECONDS:
                _save(module, optimizer, state, step + 1)
                saved = time.monotonic()
    module.eval().requires_grad_(False)
    return float(recent)


def schedule(step: int, settings: FitSettings) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine to zero."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, settings.steps - warm)))


def rows_at(step: int, count: int, batch: int, seed: int, device: torch.device) -> tuple[Tensor, torch.Generator]:
    """(row numbers drawn evenly for the step, a generator on `device` for its other draws)."""
    random = generator(seed, "fit", step, device=device)
    return torch.randint(count, (min(batch, count),), generator=random, device=device), random


def augmented(images: Pixels, rows_B: Tensor, random: torch.Generator, device: torch.device, *, shift: int) -> Tensor:
    """Pixels of the rows, mirrored at random if the set is, moved by up to `shift` pixels (reflected at the edge)."""
    flipped_B = None
    if images.flip:
        flipped_B = torch.rand(len(rows_B), generator=random, device=device) < 0.5
    pixels = images.pixels(rows_B, flipped_B, device)
    if shift == 0:
        return pixels
    batch, _, height, width = pixels.shape
    padded = nn.functional.pad(pixels, (shift,) * 4, mode="reflect")
    top_B, left_B = torch.randint(2 * shift + 1, (2, batch), generator=random, device=device)
    row_BH = top_B[:, None] + torch.arange(height, device=device)
    column_BW = left_B[:, None] + torch.arange(width, device=device)
    picked = padded.permute(0, 2, 3, 1)[
        torch.arange(batch, device=device)[:, None, None], row_BH[:, :, None], column_BW[:, None, :]
    ]
    return picked.permute(0, 3, 1, 2).contiguous()


def _save(module: nn.Module, optimizer: torch.optim.Optimizer, state: Path, step: int) -> None:
    staging = state.with_suffix(".tmp")
    torch.save({"step": step, "module": module.state_dict(), "optimizer": optimizer.state_dict()}, staging)
    os.replace(staging, state)


def _restore(module: nn.Module, optimizer: torch.optim.Optimizer, state: Path | None, device: torch.device) -> int:
    if state is None or not state.is_file():
        return 0
    found: dict[str, Any] = torch.load(state, map_location=device, weights_only=True)
    module.load_state_dict(found["module"])
    optimizer.load_state_dict(found["optimizer"])
    return int(found["step"])
