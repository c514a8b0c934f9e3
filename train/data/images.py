"""Images in memory or mapped from disk, and batches as a pure function of the step.

A source (image_sources.py) is decoded once into uint8 rows under `cache`, found again by what it was made from, and named by
a hash of its pixels and labels. `ImageLoader.at(step)` needs no state: resuming needs the step only, and the union of all
ranks' rows is the same for any number of processes.

    images = open_images(ImageSettings(source="digits"))
    batch = ImageLoader(images, 64, seed=0).at(step)      # batch.images_BCHW in [-1, 1]
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...base.built_once import built_once
from ...base.errors import DataError, RecipeError
from ...base.files import read_json, sha256_json, write_json
from ...base.randomness import uniform
from ...base.seeding import derive, generator
from ..image_settings import ImageSettings
from .build import default_cache
from .image_sources import Source, open_source, to_array
from .latents import Latents, open_latents

Part = Literal["train", "test"]
RESIDENT_BYTES = 8 * 2**30
HOLDOUT_SEED = 20_260_101
DECODED = 512
FORMAT = 1
log = logging.getLogger("quietgoose.data")


@dataclass(frozen=True)
class ImageBatch:
    """images_BCHW: fp32 in [-1, 1], or latents; labels_B: int64; index_B: int64, the rows' numbers; flipped_B: bool;
    place_B: int64, their places in the endless order, on the CPU."""

    images_BCHW: Tensor
    labels_B: Tensor
    index_B: Tensor
    flipped_B: Tensor
    place_B: Tensor

    def __len__(self) -> int:
        return len(self.labels_B)


class ImageSet:
    """One part of a source. `shape`: (C, H, W) of what the U-Net sees, `pixel_shape` that of the images."""

    def __init__(
        self,
        rows: np.ndarray,
        labels: np.ndarray,
        classes: tuple[str, ...],
        digest: str,
        *,
        flip: bool,
        skipped: int = 0,
    ) -> None:
        self.rows, self.labels, self.classes, self.digest = rows, torch.from_numpy(labels), classes, digest
        self.flip, self.skipped = flip, skipped
        self.latents: Latents | None = None
        self._resident: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.rows.shape[1:]
        return channels, height, width

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.pixel_shape if self.latents is None else self.latents.shape

    def pixels(
        self, index_B: Tensor, flipped_B: Tensor | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """fp32 [B, C, H, W] in [-1, 1] of the rows `index_B`, mirrored where `flipped_B`."""
        where = torch.device(device or index_B.device)
        table = self._table(where)
        if table is None:
            values = torch.from_numpy(self.rows[index_B.cpu().numpy()]).to(where, non_blocking=True)
        else:
            values = table[index_B.to(table.device)]
        images = _levels(where).index_select(0, values.flatten().int()).view(values.shape)
        if flipped_B is None:
            return images
        return torch.where(flipped_B.to(where)[:, None, None, None], images.flip(-1), images)

    def inputs(
        self, index_B: Tensor, flipped_B: Tensor, seed: int, place_B: Tensor, device: torch.device | str | None = None
    ) -> Tensor:
        """What the U-Net sees of the rows: their pixels, or a draw from their latents by (seed, place)."""
        if self.latents is None:
            return self.pixels(index_B, flipped_B, device)
        return self.latents.draw(index_B, flipped_B, seed, place_B, torch.device(device or index_B.device))

    def decode(self, images_BCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] from what the U-Net sees."""
        return images_BCHW if self.latents is None else self.latents.decode(images_BCHW)

    def labels_for(self, count: int, seed: int) -> Tensor:
        """int64 [count]: labels in this set's proportions (by rounding, not by chance), in random order."""
        ordered = self.labels.sort().values
        chosen = ordered[((torch.arange(count) + 0.5) * len(ordered) / count).long()]
        return chosen[torch.randperm(count, generator=generator(seed, "labels"))]

    def _table(self, device: torch.device) -> Tensor | None:
        """All rows on `device` if they are few enough there; None: gathered on the CPU."""
        if device.type == "cpu" or self.rows.nbytes > RESIDENT_BYTES:
            return None
        if device not in self._resident:
            self._resident[device] = torch.from_numpy(np.ascontiguousarray(self.rows)).to(device)
        return self._resident[device]


class ImageLoader:
    """Batches of `batch` rows over all ranks. Each epoch is a permutation by (seed, epoch); ranks take equal slices."""

    def __init__(
        self, images: ImageSet, batch: int, seed: int, rank: int = 0, world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if batch < 1 or batch % world:
            raise RecipeError(
                f"a batch of {batch} images over {world} processes: choose a multiple of {world}", code="CFG-091"
            )
        self.images, self.batch, self.seed, self.rank, self.world = images, batch, seed, rank, world
        self.device = torch.device(device)
        self._orders: dict[int, Tensor] = {}

    def at(self, step: int) -> ImageBatch:
        """This rank's rows of optimizer step `step` (0-based), on the device."""
        index_B, place_B = self.rows_of(step, self.rank, self.world)
        flipped_B = torch.zeros(len(index_B), dtype=torch.bool)
        if self.images.flip:
            flipped_B = uniform(derive(self.seed, "flip"), place_B) < 0.5
        index, flipped = index_B.to(self.device), flipped_B.to(self.device)
        images_BCHW = self.images.inputs(index, flipped, derive(self.seed, "latent"), place_B, self.device)
        return ImageBatch(images_BCHW, self.images.labels[index_B].to(self.device), index, flipped, place_B)

    def rows_of(self, step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
        """(row numbers int64, places in the endless order int64) of one rank."""
        share = self.batch // world
        place_B = step * self.batch + rank * share + torch.arange(share)
        epoch_B, within_B = place_B // len(self.images), place_B % len(self.images)
        rows_B = torch.empty_like(place_B)
        for epoch in epoch_B.unique().tolist():
            here = epoch_B == epoch
            rows_B[here] = self._order(epoch)[within_B[here]]
        return rows_B, place_B

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key >= epoch - 1}
            self._orders[epoch] = torch.randperm(len(self.images), generator=generator(self.seed, "images", epoch))
        return self._orders[epoch]


@cache
def _levels(device: torch.device) -> Tensor:
    """fp32 [256]: the float nearest to byte / 127.5 - 1, looked up, because devices round the arithmetic differently."""
    exact = (2 * torch.arange(256, dtype=torch.float64) - 255) / 255
    return exact.float().to(device)


def open_images(settings: ImageSettings, part: Part = "train", device: torch.device | str = "cpu") -> ImageSet:
    """One part of the recipe's images, decoded at the first call (processes that come meanwhile wait), latents too.

    Raises DataError: DATA-040 (no such source), DATA-041 (labels), DATA-042 (an image that cannot be decoded),
    DATA-043 (sizes that differ, too few images).
    """
    return _open(settings, (part,), torch.device(device))[0]


def open_both(settings: ImageSettings, device: torch.device | str = "cpu") -> tuple[ImageSet, ImageSet]:
    """(train, test) as `open_images` has them; the source is opened and hashed once, and one autoencoder serves both."""
    train, test = _open(settings, ("train", "test"), torch.device(device))
    return train, test


def _open(settings: ImageSettings, parts: Sequence[Part], device: torch.device) -> list[ImageSet]:
    loaded: dict[str, Any] = {}
    source = open_source(settings, settings.source, settings.split, (), loaded)
    if source is None or not len(source):
        raise DataError(f"images: {settings.source}: no rows in split '{settings.split}'", code="DATA-040")
    held = open_source(settings, settings.test or settings.source, _test_split(settings), source.classes, loaded)
    key = sha256_json(
        [FORMAT, source.key, None if held is None else held.key, settings.size, settings.colour, settings.limit,
         settings.holdout, settings.on_bad_image]
    )  # fmt: skip
    folder = built_once(cache_folder(settings) / "images" / key[:32], lambda out: _build(settings, source, held, out))
    sets = [_part(folder, part, flip=settings.flip) for part in parts]
    if settings.vae is not None:
        for images, latents in zip(sets, open_latents(settings, sets, cache_folder(settings), device)):
            images.latents = latents
    return sets


def _part(folder: Path, part: Part, *, flip: bool) -> ImageSet:
    facts = read_json(folder / "images.json")
    found = facts[part]
    rows = np.memmap(folder / f"{part}.u8", dtype=np.uint8, mode="c", shape=(found["count"], *facts["shape"]))
    labels = np.fromfile(folder / f"{part}_labels.i64", dtype=np.int64)
    return ImageSet(rows, labels, tuple(facts["classes"]), found["digest"], flip=flip, skipped=found["skipped"])


def cache_folder(settings: ImageSettings) -> Path:
    return Path(settings.cache).expanduser() if settings.cache else default_cache()


def _test_split(settings: ImageSettings) -> str:
    return settings.split if settings.test and Path(settings.test).suffix == ".parquet" else settings.test_split


def _build(settings: ImageSettings, source: Source, held: Source | None, out: Path) -> None:
    """Decode both parts into `out`. Without a held-out source a share of the rows, by hash, becomes the test part."""
    train = np.arange(len(source))
    test = np.arange(0 if held is None else len(held))
    if held is None:
        aside = (uniform(HOLDOUT_SEED, torch.from_numpy(train)) < settings.holdout).numpy()
        held, train, test = source, train[~aside], train[aside]
    train, test = train[: settings.limit], test[: settings.limit]
    if not len(train) or not len(test):
        raise DataError(
            f"images: {settings.source}: {len(train)} training and {len(test)} held-out images; both parts need some: set "
            "images.test or images.holdout",
            code="DATA-043",
        )
    first = source.image(int(train[0]))
    colour = settings.colour
    if colour == "auto":
        colour = "grey" if first.mode in ("L", "1", "LA") or first.mode.startswith("I") else "rgb"
    shape = to_array(first, colour, settings.size, source.where(int(train[0]))).shape
    facts: dict[str, Any] = {"shape": list(shape), "classes": list(source.classes)}
    for part, origin, numbers in (("train", source, train), ("test", held, test)):
        facts[part] = _decode_part(settings, origin, numbers, colour, shape, out / part)
    write_json(out / "images.json", facts)


def _decode_part(
    settings: ImageSettings, source: Source, numbers: np.ndarray, colour: str, shape: tuple[int, ...], out: Path
) -> dict[str, Any]:
    digest = hashlib.sha256(f"{shape}|{source.classes}|".encode())
    kept: list[int] = []
    with out.with_suffix(".u8").open("wb") as file:
        for number, array in _decoded(settings, source, numbers, colour, shape):
            file.write(array.tobytes())
            digest.update(array.tobytes())
            kept.append(number)
    if not kept:
        raise DataError(f"images: {settings.source}: every image of the {out.name} part is bad", code="DATA-043")
    labels = source.labels[kept]
    labels.tofile(out.with_name(f"{out.name}_labels.i64"))
    digest.update(labels.tobytes())
    skipped = len(numbers) - len(kept)
    if skipped:
        log.warning("images: %d of %d left out of %s", skipped, len(numbers), out.name)
    return {"count": len(kept), "skipped": skipped, "digest": digest.hexdigest()}


def _decoded(
    settings: ImageSettings, source: Source, numbers: np.ndarray, colour: str, shape: tuple[int, ...]
) -> Iterator[tuple[int, np.ndarray]]:
    """(row, uint8 [C, H, W]) in order, decoded by threads; a bad row ends it, or is left out."""

    def one(number: int) -> np.ndarray | DataError:
        where = source.where(number)
        try:
            array = to_array(source.image(number), colour, settings.size, where)
            if array.shape != tuple(shape):
                raise DataError(
                    f"{where}: is {array.shape[2]}x{array.shape[1]} pixels, the first image {shape[2]}x{shape[1]}; set "
                    "images.size",
                    code="DATA-043",
                )
            return array
        except DataError as error:
            if settings.on_bad_image == "error":
                raise
            log.warning("%s; left out", error)
            return error

    with ThreadPoolExecutor(4) as threads:
        for start in range(0, len(numbers), DECODED):
            group = numbers[start : start + DECODED].tolist()
            for number, array in zip(group, threads.map(one, group)):
                if isinstance(array, np.ndarray):
                    yield number, array
