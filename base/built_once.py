"""A folder that several processes want and one makes: under a lock, beside its place, renamed when whole.

What a killed maker left is found by the next one, which may go on from it. Callers: train/data (decoded images, latents),
alignment/ (teachers, judges, features).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from .errors import StorageError
from .files import fsync_folder


def built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build(staging)` unless it is there already. Other processes of this machine, or of a file
    system with flock, wait for the maker. StorageError IO-001 if it cannot be written."""
    if folder.is_dir():
        return folder
    staging = folder.with_name(f"{folder.name}.building")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{folder.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.is_dir():
                return folder
            staging.mkdir(exist_ok=True)
            build(staging)
            os.replace(staging, folder)
            fsync_folder(folder.parent)
    except OSError as error:
        raise StorageError(f"{staging}: {error.strerror or error}; nothing was kept in {folder}") from error
    return folder
