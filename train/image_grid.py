"""Sample grids as PNG: a row for every class, or rows in order. Called by evaluate_images.py, launch/sample.py."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..base.files import write_atomic

SHOWN_PIXELS = 48
GAP = 1
MOST_CLASSES = 10


def by_class(labels_N: Tensor, num_classes: int, columns: int) -> list[int]:
    """Numbers of the first `columns` samples of every class (of the first ten), class after class; classes that have fewer
    are left out, unless all have."""
    found = [(labels_N == label).nonzero()[:columns, 0].tolist() for label in range(min(num_classes, MOST_CLASSES))]
    full = [row for row in found if len(row) == columns]
    return [number for row in full for number in row] or list(range(min(len(labels_N), columns * columns)))


def grid_image(images_NCHW: Tensor, columns: int) -> Image.Image:
    """uint8 images side by side, `columns` in a row, small ones enlarged by whole pixels."""
    count, channels, height, width = images_NCHW.shape
    rows = -(-count // columns)
    canvas = torch.full((channels, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP), 255, dtype=torch.uint8)
    for number, image in enumerate(images_NCHW.cpu()):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        canvas[:, top : top + height, left : left + width] = image
    picture = to_picture(canvas)
    factor = max(1, SHOWN_PIXELS // height)
    size = (picture.width * factor, picture.height * factor)
    return picture if factor == 1 else picture.resize(size, Image.Resampling.NEAREST)


def to_picture(image_CHW: Tensor) -> Image.Image:
    """A uint8 image, grey or colour, for Pillow."""
    array = image_CHW.cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def png_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_image(image_CHW: Tensor, path: Path) -> None:
    """One uint8 image as PNG."""
    save_png(to_picture(image_CHW), path)


def save_png(picture: Image.Image, path: Path) -> None:
    write_atomic(path, png_bytes(picture))
