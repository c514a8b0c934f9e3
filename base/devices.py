"""Which device a user means, refused before anything is loaded if this machine has not got it (train/export.py, launch/), and where
a model lies, which a captured step depends on (cache/decode.py, thoughts/rollout.py)."""

from __future__ import annotations

import torch
from torch import nn

from .errors import RecipeError


def usable_device(wanted: str | torch.device | None = None, option: str = "device") -> torch.device:
    """The device called `wanted`; None and "auto": a GPU if PyTorch sees one, otherwise the CPU.

    RecipeError CFG-082, whose text begins with `option`, for a name that is none and for a device that is not there.
    """
    if wanted is None or wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise RecipeError(f"{option} {wanted}: allowed are auto, cpu, cuda, cuda:1, ...", code="CFG-082") from error
    if device.type == "cpu":
        return device
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if there is None or there.type != device.type:
        what = "GPU" if device.type == "cuda" else device.type
        raise RecipeError(f"{option} {wanted}: there is no {what} that PyTorch sees; use cpu", code="CFG-082")
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise RecipeError(
            f"{option} {wanted}: PyTorch sees {count} of this kind, so at most {device.type}:{count - 1}",
            code="CFG-082",
        )
    return device


def addresses(model: nn.Module) -> tuple[int, ...]:
    """Where parameters and buffers lie: what a captured step reads in place, and must be captured anew for when it changes."""
    return tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
