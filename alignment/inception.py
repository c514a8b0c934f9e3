"""Features of the Inception network that FID is defined by, from a TorchScript file that the user brings.

The file is the usual export of the 2015-12-05 weights: called as `network(images_uint8_BCHW, return_features=True)` it gives
fp32 [B, 2048]. Only distances in these features are called FID here. Called by train/evaluate_images.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..base.errors import RecipeError
from .judging import Features


def open_inception(path: Path, device: torch.device) -> Features:
    """uint8 [B, C, H, W] -> fp32 [B, D] on `device`. RecipeError CFG-093 if the file is none such."""
    if not path.is_file():
        raise RecipeError(f"evaluate.images.inception: {path}: no such file", code="CFG-093")
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise RecipeError(
            f"evaluate.images.inception: {path}: cannot be opened as TorchScript ({str(error).splitlines()[0][:200]})",
            code="CFG-093",
        ) from error

    @torch.no_grad()
    def features(images_BCHW: Tensor) -> Tensor:
        colour = images_BCHW.expand(-1, 3, -1, -1) if images_BCHW.shape[1] == 1 else images_BCHW
        return network(colour.to(device), return_features=True).float()

    return features
