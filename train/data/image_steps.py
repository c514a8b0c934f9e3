"""What the U-Net's training step is given: images, labels, places, and the teacher's tokens of those images.

A step's rows are a pure function of data, seed and step (ImageLoader); this rank's share is cut into equal micro-batches. The next
step is made ready in the background. Called by train/stages_images.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ...base.errors import RecipeError
from ...base.files import sha256_json
from ..types import StepBatch
from .images import ImageBatch, ImageLoader
from .loader import Share

Features = Callable[[ImageBatch], Tensor]
"""The teacher's tokens of a batch as it is (mirrored where it is mirrored), [B, N, D]."""


@dataclass(frozen=True)
class AlignBatch:
    """One micro-batch on one rank.

    images_BCHW  fp32 in [-1, 1], or latents
    labels_B     int64
    place_B      int64, the row's place in the endless order of the training: its random numbers are hashes of it
    teacher_BND  the teacher's tokens of the clean images; None: nobody teaches at this step
    """

    images_BCHW: Tensor
    labels_B: Tensor
    place_B: Tensor
    teacher_BND: Tensor | None = None

    def to(self, device: torch.device | str) -> AlignBatch:
        """The same batch on the device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> AlignBatch:
        return AlignBatch(*(None if t is None else change(t) for t in vars(self).values()))  # type: ignore[arg-type]


class ImageSteps:
    """Batches by step, as the training loop asks for them. `names`: the job's loss terms, each counted in images.
    `teaches(step)`: whether features are wanted at all."""

    def __init__(
        self,
        loader: ImageLoader,
        names: Sequence[str],
        micro_rows: int,
        features: Features | None = None,
        teaches: Callable[[int], bool] = lambda step: True,
    ) -> None:
        self.loader, self.names = loader, tuple(names)
        self.features, self._teaches = features, teaches
        self.share = image_share(loader.batch, micro_rows, loader.world)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="quietgoose-images")
        self._ahead: tuple[int, Future[StepBatch]] | None = None

    @property
    def micro_count(self) -> int:
        return self.share.micros

    def hash(self) -> str:
        """Hash of what decides every batch. World and micro size do not count."""
        loader = self.loader
        return sha256_json([loader.images.digest, loader.images.flip, loader.batch, loader.seed, list(self.names)])

    def step(self, step: int) -> StepBatch:
        ahead, self._ahead = self._ahead, None
        made = ahead[1] if ahead is not None and ahead[0] == step else self._worker.submit(self._make, step)
        batch = made.result()
        self._ahead = (step + 1, self._worker.submit(self._make, step + 1))
        return batch

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    @torch.no_grad()
    def _make(self, step: int) -> StepBatch:
        if self.loader.device.type == "cuda" and self.loader.device.index is not None:
            torch.cuda.set_device(self.loader.device)  # of this thread
        batch = self.loader.at(step)
        wanted = self.features is not None and self._teaches(step)
        teacher = self.features(batch) if wanted and self.features is not None else None
        whole = AlignBatch(batch.images_BCHW, batch.labels_B, batch.place_B.to(batch.labels_B.device), teacher)
        rows = self.share.rows
        micro = tuple(
            whole.map(lambda tensor, m=m: tensor[m * rows : (m + 1) * rows]) for m in range(self.share.micros)
        )
        count_E = torch.full((len(self.names),), float(self.loader.batch), dtype=torch.float64)
        return StepBatch(step, micro, count_E, self.loader.batch, "images")


def image_share(batch: int, micro_rows: int, world: int) -> Share:
    """The fewest equal micro-batches of at most `micro_rows` images. RecipeError CFG-091 if the images of a step do not divide by
    the processes."""
    if batch % world:
        raise RecipeError(
            f"urepa.train.rows_per_expert: {batch} images a step over {world} processes; choose a multiple of {world}",
            code="CFG-091",
        )
    per_rank = batch // world
    micros = next(n for n in range(-(-per_rank // micro_rows), per_rank + 1) if per_rank % n == 0)
    return Share(micros, per_rank // micros)
