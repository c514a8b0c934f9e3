"""A small set of images with classes that a network can tell apart: bright bars at a place that is the class."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


class Bars:
    """As train/data/images.py's ImageSet, kept in memory: a bar of noise at one of `classes` places, other noise elsewhere."""

    def __init__(self, count: int, seed: int, classes: int = 4, side: int = 8, flip: bool = True) -> None:
        random = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % classes
        rows = 0.2 * torch.rand(count, 1, side, side, generator=random)
        for number, label in enumerate(self.labels.tolist()):
            rows[number, :, label * side // classes : (label + 1) * side // classes] += 0.7
        self.rows = rows * 2 - 1
        self.digest, self.flip = f"bars-{count}-{seed}-{classes}-{side}", flip
        self.num_classes, self.pixel_shape = classes, (1, side, side)

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index_B: Tensor, flipped_B: Tensor | None = None, device=None) -> Tensor:
        images = self.rows[index_B.cpu()]
        if flipped_B is not None:
            images = torch.where(flipped_B.cpu()[:, None, None, None], images.flip(-1), images)
        return images.to(device or index_B.device)


@pytest.fixture(scope="session")
def bars() -> type[Bars]:
    return Bars
