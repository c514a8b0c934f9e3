"""Files that are whole or absent, names that stay in their folder, hashes. Callers: every room that writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import NameRefused, SecurityError, StorageError

if TYPE_CHECKING:
    import torch

NAME_RULE = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
RESERVED = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)), *(f"lpt{i}" for i in range(1, 10))}


def safe_name(name: str, what: str = "expert") -> str:
    """`name` if it can be a folder name anywhere; NameRefused (SEC-002) otherwise."""
    shown = ascii(unicodedata.normalize("NFKC", name))[:80]
    if not NAME_RULE.match(name) or name.lower() in RESERVED:
        raise NameRefused(
            f"{what} name {shown}: allowed are 1 to 64 of A-Z a-z 0-9 _ - and no reserved device name; rename it"
        )
    return name


def inside(root: Path, path: Path | str) -> Path:
    """`root / path`, resolved, refused (SEC-003) if it leaves `root` by `..`, an absolute path or a link."""
    base = root.resolve()
    target = (base / path).resolve()
    if target != base and base not in target.parents:
        raise SecurityError(f"{path}: leaves the folder {root}; nothing was read", code="SEC-003")
    return target


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of named tensors: names, dtypes, shapes and bytes, in name order. Device and strides do not matter."""
    import torch  # here, so that checking a recipe costs no torch import

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_writable(path: Path, option: str, *, folder: bool = False) -> None:
    """StorageError IO-010, whose text begins with `option`, unless a file can be written at `path` (`folder`: files in it).

    Tried for real and before long work: a file without a name is opened where the first one would go, in the nearest folder
    that is there. Nothing is left behind, and folders that are missing are not made.
    """
    with storing(option):
        if path.exists() and path.is_dir() != folder:
            raise OSError(f"{path} is {'no folder' if folder else 'a folder'}")
        place = path if folder else path.parent
        while not place.exists():
            place = place.parent
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(place)) from error


@contextmanager
def storing(option: str) -> Iterator[None]:
    """StorageError IO-010, whose text begins with `option`, for an OSError within."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{option}: cannot be written there ({_reason(error)})", code="IO-010") from error


def _reason(error: OSError) -> str:
    where = f": {error.filename}" if isinstance(error.filename, str) else ""
    return f"{error.strerror}{where}" if error.strerror else str(error)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write, flush to disk, rename, flush the folder: readers see the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    payload = data.encode() if isinstance(data, str) else data
    with staging.open("wb") as handle:
        handle.write(payload)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(staging, path)
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
