"""What a recipe says about images and their evaluation. Imports no torch. Used by train/recipe_images.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..alignment.settings import JudgeSettings, SamplerSettings


@dataclass
class ImageSettings:
    """Where images come from and what they become.

    source       `digits` (embedded, 8x8 grey), a .parquet file, a folder of images by class (or with train/ and test/ of
                 such), or a Hugging Face dataset name, `NAME:CONFIG` if it has several
    test         as source, for the held-out images; null: the source's `test_split`, else `holdout` of the training rows
    image_column, label_column       null: the column of type Image, and `label`/`labels`/`class`
    size         side in pixels: resized (antialiased bicubic) and cropped in the middle; null: as they are, all alike
    colour       auto (as the first image), rgb or grey
    flip         mirror images at random while training
    vae          a folder with a diffusers AutoencoderKL: the U-Net works on its latents, encoded once and kept on disk
    on_bad_image error, or skip (counted)
    cache        where decoded images, latents and features are kept; null: ~/.cache/quietgoose
    """

    source: str = "digits"
    split: str = "train"
    test: str | None = None
    test_split: str = "test"
    holdout: float = 0.1
    image_column: str | None = None
    label_column: str | None = None
    size: int | None = None
    colour: Literal["auto", "rgb", "grey"] = "auto"
    flip: bool = False
    limit: int | None = None
    vae: str | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    cache: str | None = None


@dataclass
class ImageEvaluation:
    """How samples are judged: `count` samples against as many images, always with the floors at the same count.

    at           steps at which the curve has a point, besides the last one; steps beyond that have none
    at_count     samples of such a point (null: count)
    samplers     the settings compared; the first is the one that verdicts use; none: `ode`, with the defaults
    raw          judge the last raw weights too, by the first sampler
    neighbours   k of precision and recall; subsets, subset_size: of the kernel distance; bootstrap: resamples of JFD's spread
    inception    a TorchScript file with the Inception weights of 2015-12-05: adds a column that may be called FID
    """

    count: int = 10_000
    at: list[int] = field(default_factory=list)
    at_count: int | None = None
    samplers: dict[str, SamplerSettings] = field(default_factory=dict)
    raw: bool = True
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    neighbours: int = 3
    subsets: int = 100
    subset_size: int = 1000
    bootstrap: int = 20
    inception: str | None = None
