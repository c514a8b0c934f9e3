"""The teacher's tokens for training batches: computed every step, or once and kept on disk.

On disk stands one fp16 file for a teacher, a data set and its mirrored images, each named by hash; rows are filled in
portions in order, so a killed filling goes on. On a GPU with room the file is held in its memory. When an existing file is
opened some rows are computed again and compared. Called by train/jobs/urepa.py.

    source = serve_features(teacher, images, settings, cache)
    source.features_for(batch)          # fp32 [B, N, D], of the same mirror image as the batch
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..base.built_once import built_once
from ..base.errors import ArtifactError, NumericError, StorageError
from ..base.files import sha256_json, write_json
from .fitting import Pixels, Progress, silent
from .settings import TeacherSettings
from .teachers import Teacher

PORTION = 512
CHECKED_ROWS = 4
LOWEST_COSINE = 0.99
RESIDENT_SHARE = 0.4
FILE, FACTS = "features.f16", "features.json"


class Rows(Protocol):
    """What is used of a batch: rows' numbers, and which are mirrored."""

    @property
    def index_B(self) -> Tensor: ...
    @property
    def flipped_B(self) -> Tensor: ...


class OnlineFeatures:
    """The teacher runs on every batch."""

    kind = "online"

    def __init__(self, teacher: Teacher, images: Pixels) -> None:
        self.teacher, self.images = teacher, images
        self.dim, self.grid, self.digest = teacher.dim, teacher.grid, teacher.digest

    def features_for(self, batch: Rows) -> Tensor:
        pixels = self.images.pixels(batch.index_B, batch.flipped_B, self.teacher.device)
        return self.teacher.features(pixels)


class CachedTeacher:
    """Features from a file; `folder` is the cache's root. Filled at the first opening, by one process."""

    kind = "disk"

    def __init__(self, teacher: Teacher, images: Pixels, folder: Path, progress: Progress = silent) -> None:
        self.teacher, self.images, self.device = teacher, images, teacher.device
        self.dim, self.grid, self.digest = teacher.dim, teacher.grid, teacher.digest
        started = time.perf_counter()
        key = sha256_json([teacher.digest, images.digest, images.flip])
        self.folder = folder / "features" / key[:32]
        self.was_there = self.folder.is_dir()
        built_once(self.folder, lambda out: _fill(teacher, images, out, progress))
        self.seconds = time.perf_counter() - started
        shape = _shape(teacher, images)
        size, wanted = (self.folder / FILE).stat().st_size, int(np.prod(shape)) * 2
        if size != wanted:
            raise ArtifactError(
                f"{self.folder / FILE}: has {size} bytes, not {wanted}; delete the folder", code="EXP-004"
            )
        self._table = np.memmap(self.folder / FILE, dtype=np.float16, mode="c", shape=shape)
        self.nbytes = int(self._table.nbytes)
        if self.was_there:
            self._compare()
        self._resident = self._load() if self._fits() else None

    @property
    def resident(self) -> bool:
        """Whether the features are in the GPU's memory."""
        return self._resident is not None

    def features_for(self, batch: Rows) -> Tensor:
        """fp32 [B, N, D] on the teacher's device."""
        flip_B = batch.flipped_B.long() if self.images.flip else torch.zeros_like(batch.index_B)
        if self._resident is not None:
            return self._resident[flip_B.to(self.device), batch.index_B.to(self.device)].float()
        rows = self._table[flip_B.cpu().numpy(), batch.index_B.cpu().numpy()]
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.device, non_blocking=True).float()

    def _fits(self) -> bool:
        if self.device.type != "cuda":
            return False
        return self.nbytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(self.device)[0]

    def _load(self) -> Tensor:
        """The file in the GPU's memory, portion by portion."""
        held = torch.empty(self._table.shape, dtype=torch.float16, device=self.device)
        for flip in range(held.shape[0]):
            for start in range(0, held.shape[1], PORTION):
                part = np.ascontiguousarray(self._table[flip, start : start + PORTION])
                held[flip, start : start + PORTION].copy_(torch.from_numpy(part))
        return held

    def _compare(self) -> None:
        """A few rows computed again: the file must hold this teacher's tokens of these images."""
        index_B = torch.linspace(0, len(self.images) - 1, min(CHECKED_ROWS, len(self.images))).long()
        for flip in range(2 if self.images.flip else 1):
            fresh = self.teacher.features(self.images.pixels(index_B, torch.full(index_B.shape, bool(flip))))
            kept = torch.from_numpy(np.ascontiguousarray(self._table[flip, index_B.numpy()])).to(fresh)
            cosine = float(torch.nn.functional.cosine_similarity(fresh, kept, dim=-1).mean())
            if not cosine >= LOWEST_COSINE:
                raise ArtifactError(
                    f"{self.folder}: kept features differ from the teacher's (cosine {cosine:.3f}); delete the folder",
                    code="EXP-004",
                )


FeatureSource = OnlineFeatures | CachedTeacher


def serve_features(
    teacher: Teacher, images: Pixels, settings: TeacherSettings, cache: Path, *,
    event: Callable[..., None] | None = None, progress: Progress = silent,
) -> FeatureSource:  # fmt: skip
    """By teacher.cache; `event` is told which it became, the sizes and the seconds. StorageError IO-002 if `disk` does not
    fit the disk."""
    size = int(np.prod(_shape(teacher, images))) * 2
    there = (cache / "features" / sha256_json([teacher.digest, images.digest, images.flip])[:32]).is_dir()
    room = there or size < 0.9 * _free(cache)
    if settings.cache == "disk" and not room:
        raise StorageError(
            f"teacher.cache disk: features take {size / 2**30:.1f} GiB, {cache} has {_free(cache) / 2**30:.1f} free; set "
            "images.cache to a larger disk, or teacher.cache off",
            code="IO-002",
        )
    wanted = settings.cache == "disk" or (settings.cache == "auto" and room and size <= settings.cache_gib * 2**30)
    source = CachedTeacher(teacher, images, cache, progress) if wanted else OnlineFeatures(teacher, images)
    if event is not None:
        event("teacher_features", **describe(source, size))
    return source


def describe(source: FeatureSource, size: int) -> Mapping[str, Any]:
    """Facts for the log: both grids, sizes, and what filling cost."""
    facts: dict[str, Any] = {
        "source": source.kind, "teacher": source.teacher.kind, "digest": source.digest[:16], "dim": source.dim,
        "teacher_grid": list(source.teacher.own_grid), "grid": list(source.grid), "gib": round(size / 2**30, 3),
    }  # fmt: skip
    if isinstance(source, CachedTeacher):
        facts |= {"found": source.was_there, "fill_seconds": round(source.seconds, 2), "on_gpu": source.resident}
    return facts


def _shape(teacher: Teacher, images: Pixels) -> tuple[int, int, int, int]:
    return (2 if images.flip else 1, len(images), teacher.grid[0] * teacher.grid[1], teacher.dim)


def _free(cache: Path) -> int:
    there = next(path for path in (cache, *cache.resolve().parents) if path.exists())
    return shutil.disk_usage(there).free


def _fill(teacher: Teacher, images: Pixels, out: Path, progress: Progress) -> None:
    """Append portions in order; whole portions that an earlier process left are kept."""
    flips, count, tokens, dim = _shape(teacher, images)
    portions = [(flip, start) for flip in range(flips) for start in range(0, count, PORTION)]
    row_bytes = tokens * dim * 2
    with (out / FILE).open("ab") as file:
        done = _whole(file.tell(), count, flips, row_bytes)
        file.truncate(sum(min(PORTION, count - start) for _, start in portions[:done]) * row_bytes)
        file.seek(0, os.SEEK_END)
        for number, (flip, start) in enumerate(portions[done:], start=done + 1):
            index_B = torch.arange(start, min(start + PORTION, count))
            pixels = images.pixels(index_B, torch.full(index_B.shape, bool(flip)), teacher.device)
            features = teacher.features(pixels).half()
            if not bool(torch.isfinite(features).all()):
                raise NumericError(f"teacher {teacher.kind}: features are not finite in fp16", code="NUM-011")
            file.write(features.cpu().contiguous().view(torch.uint8).numpy().data)
            progress("teacher features", number, len(portions))
        file.flush()
        os.fsync(file.fileno())
    write_json(out / FACTS, {"teacher": teacher.digest, "images": images.digest, "shape": [flips, count, tokens, dim]})


def _whole(size: int, count: int, flips: int, row_bytes: int) -> int:
    """Number of whole portions in a file of `size` bytes."""
    whole = 0
    for _ in range(flips):
        for start in range(0, count, PORTION):
            size -= min(PORTION, count - start) * row_bytes
            if size < 0:
                return whole
            whole += 1
    return whole
