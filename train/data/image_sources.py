"""Reads images with labels: the embedded digits, a folder by class, parquet, Hugging Face datasets.

A source becomes a `Source`: how many rows, the class names, and one call that decodes row i. What is wrong with a row names
the file or dataset, the row and the reason (DATA-040). Called by images.py.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...base.errors import DataError, suggest
from ...base.files import sha256_file, sha256_json
from ..image_settings import ImageSettings

DIGITS = "digits"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LABEL_NAMES = ("label", "labels", "class", "cls", "fine_label", "target")
IMAGE_NAMES = ("image", "img", "images", "jpg", "png")
MAX_PIXELS = 64_000_000


@dataclass(frozen=True)
class Source:
    """Rows of images. `image(i)` decodes a row; `labels` are numbers into `classes`; `where(i)` names a row to a person;
    `key` changes when the source does."""

    key: str
    labels: np.ndarray
    classes: tuple[str, ...]
    image: Callable[[int], Image.Image]
    where: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.labels)


def open_source(
    settings: ImageSettings, name: str, split: str, known: Sequence[str] = (), loaded: dict[str, Any] | None = None
) -> Source | None:
    """The rows of one split; None if the source has no such split. `known`: class names of the training rows; `loaded`:
    datasets by name that are open already, and are added to.

    Raises DataError DATA-040 (no such source, no column), DATA-041 (labels).
    """
    if name == DIGITS:
        return _digits() if split == settings.split else None
    path = Path(name).expanduser()
    if path.suffix == ".parquet":
        return _parquet(settings, path, known) if split == settings.split or settings.test == name else None
    if path.is_dir() and _is_dataset(path):
        return _dataset(settings, str(path), split, known, loaded)
    if path.is_dir():
        return _folder(path, split, known, main=split == settings.split)
    if name.startswith(("/", ".", "~")) or path.suffix:
        raise DataError(f"images: {name}: no such file or folder", code="DATA-040")
    return _dataset(settings, name, split, known, loaded)


def decode(data: bytes | Path, where: str) -> Image.Image:
    """A picture, upright. DataError DATA-042 says why it cannot be decoded."""
    try:
        picture = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        if math.prod(picture.size) > MAX_PIXELS:
            raise DataError(
                f"{where}: {picture.size[0]}x{picture.size[1]} pixels; at most {MAX_PIXELS}", code="DATA-042"
            )
        return ImageOps.exif_transpose(picture)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: is no image that can be decoded ({_short(error)})", code="DATA-042") from error


def to_array(picture: Image.Image, colour: str, size: int | None, where: str) -> np.ndarray:
    """uint8 [C, H, W]: resized to cover size x size and cropped in the middle, or as it is."""
    try:
        if picture.mode.startswith("I"):
            picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        picture = picture.convert("L" if colour == "grey" else "RGB")
        if size is not None and picture.size != (size, size):
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{where}: is no image that can be decoded ({_short(error)})", code="DATA-042") from error
    array = np.asarray(picture, dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _digits() -> Source:
    """scikit-learn's handwritten digits (UCI, 1,797 images of 8x8, values 0 to 16)."""
    from sklearn.datasets import load_digits

    found = load_digits(return_X_y=True)
    values = np.rint(np.asarray(found[0]).reshape(-1, 8, 8) * (255.0 / 16.0)).astype(np.uint8)
    return Source(
        DIGITS,
        np.asarray(found[1], dtype=np.int64),
        tuple("0123456789"),
        lambda i: Image.fromarray(values[i]),
        lambda i: f"digit {i}",
    )


def _folder(root: Path, split: str, known: Sequence[str], *, main: bool) -> Source | None:
    """ROOT/CLASS/*.png, or ROOT/SPLIT/CLASS/*.png; files directly in ROOT are one class."""
    base = root / split
    if not base.is_dir():
        if not main:
            return None
        base = root
    files = sorted(path for path in base.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not files:
        raise DataError(f"images: {base}: no image in it (endings {', '.join(ENDINGS)})", code="DATA-040")
    names = [path.relative_to(base).parts[0] if path.parent != base else "images" for path in files]
    numbers, classes = _numbered(names, known, str(base))
    stats = [(str(path.relative_to(base)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return Source(
        sha256_json(stats), numbers, classes, lambda i: decode(files[i], str(files[i])), lambda i: str(files[i])
    )


def _is_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json")) or any(path.rglob("*.parquet"))


def _parquet(settings: ImageSettings, path: Path, known: Sequence[str]) -> Source:
    if not path.is_file():
        raise DataError(f"images: {path}: no such file", code="DATA-040")
    from datasets import Dataset

    try:
        rows = Dataset.from_parquet(str(path))
    except Exception as error:  # whatever reader or cache fails with: the file is named
        raise DataError(f"images: {path}: cannot be read as parquet ({_short(error)})", code="DATA-040") from error
    return _columns(settings, rows, str(path), _hash(path), known)


def _hash(path: Path) -> str:
    """Of a file's content; read once in a run unless the file changes."""
    stat = path.stat()
    return _hash_once(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _hash_once(path: Path, size: int, changed_ns: int) -> str:
    return sha256_file(path)


def _dataset(
    settings: ImageSettings, name: str, split: str, known: Sequence[str], loaded: dict[str, Any] | None
) -> Source | None:
    """A Hugging Face dataset by name (`NAME:CONFIG`) or folder; no code of it is run."""
    loaded = {} if loaded is None else loaded
    if name not in loaded:
        loaded[name] = _splits(settings, name)
    rows = loaded[name].get(split)
    if rows is None and split == settings.split:
        raise DataError(f"images: {name} has no split '{split}'; it has {', '.join(loaded[name])}", code="DATA-040")
    return None if rows is None else _columns(settings, rows, name, str(rows._fingerprint), known)


def _splits(settings: ImageSettings, name: str) -> Mapping[str, Any]:
    from datasets import load_dataset, load_from_disk

    from .hub import load_hub_dataset

    try:
        if (Path(name) / "state.json").is_file():
            return {settings.split: load_from_disk(name)}
        if (Path(name) / "dataset_dict.json").is_file():
            return load_from_disk(name)  # type: ignore[return-value]
        if Path(name).is_dir():
            return load_dataset(name)  # type: ignore[return-value]
        return load_hub_dataset(name)
    except Exception as error:  # the hub, its cache and many readers raise many kinds
        raise DataError(
            f"images: {name}: neither a file or folder here nor a dataset that can be loaded ({_short(error)}); "
            "images from files: --images.source FILE.parquet --images.test FILE.parquet",
            code="DATA-040",
        ) from error


def _columns(settings: ImageSettings, rows: Any, name: str, key: str, known: Sequence[str]) -> Source:
    """Rows of a datasets.Dataset, their image column left encoded so that a bad one can be named."""
    from datasets import Image as ImageColumn

    column = _image_column(settings, rows, name)
    rows = rows.cast_column(column, ImageColumn(decode=False))
    label = _label_column(settings, rows, name)
    if label is None:
        numbers, classes = np.zeros(len(rows), dtype=np.int64), ("images",)
    else:
        names = getattr(rows.features[label], "names", None)
        numbers, classes = _numbered(rows[label][:], known, f"{name}, column {label}", names)
    pictures = rows.select_columns([column]).with_format(None)

    def image(row: int) -> Image.Image:
        cell = pictures[row][column]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise DataError(f"{name}, row {row}: has no image", code="DATA-042")
        return decode(cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]), f"{name}, row {row}")

    return Source(sha256_json([key, column, label]), numbers, classes, image, lambda row: f"{name}, row {row}")


def _image_column(settings: ImageSettings, rows: Any, name: str) -> str:
    columns = list(rows.column_names)
    wanted = settings.image_column
    if wanted is not None:
        if wanted not in columns:
            raise _no_column("image_column", wanted, name, columns)
        return wanted
    typed = [key for key, feature in rows.features.items() if type(feature).__name__ == "Image"]
    found = typed or [key for key in IMAGE_NAMES if key in columns]
    if not found:
        raise DataError(
            f"images: {name}: no image column among {', '.join(columns)}; set image_column", code="DATA-040"
        )
    return found[0]


def _label_column(settings: ImageSettings, rows: Any, name: str) -> str | None:
    """None: the images have no labels and are one class."""
    columns = list(rows.column_names)
    if settings.label_column is not None and settings.label_column not in columns:
        raise _no_column("label_column", settings.label_column, name, columns)
    return settings.label_column or next((key for key in LABEL_NAMES if key in columns), None)


def _no_column(setting: str, wanted: str, name: str, columns: list[str]) -> DataError:
    return DataError(
        f"images.{setting}: '{wanted}' is no column of {name};{suggest(wanted, columns)} it has {', '.join(columns)}",
        code="DATA-040",
    )


def _numbered(
    values: Sequence[Any], known: Sequence[str], where: str, names: Sequence[str] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class numbers int64 and class names. Whole numbers stay as they are; texts are numbered in sorted order."""
    kinds = {type(value) for value in values}
    if kinds <= {int} and values:
        numbers = np.asarray(values, dtype=np.int64)
        count = len(names or known) or int(numbers.max()) + 1
        if numbers.min() < 0 or numbers.max() >= count:
            raise DataError(
                f"images: {where}: label {numbers.min() if numbers.min() < 0 else numbers.max()}; allowed are 0 to "
                f"{count - 1}",
                code="DATA-041",
            )
        return numbers, tuple(names or known or map(str, range(count)))
    if not kinds <= {str}:
        shown = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
        raise DataError(f"images: {where}: labels must be whole numbers or texts, found {shown}", code="DATA-041")
    classes = tuple(known) or tuple(sorted(set(values)))
    place = {name: number for number, name in enumerate(classes)}
    foreign = sorted(set(values) - set(place))
    if foreign:
        raise DataError(f"images: {where}: class '{foreign[0]}' is not among the training classes", code="DATA-041")
    return np.asarray([place[value] for value in values], dtype=np.int64), classes


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
