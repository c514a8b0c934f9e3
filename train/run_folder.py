"""The folder of one run: who holds it, where a stage writes, which stages are finished and still whole.

A stage's result is written aside, flushed, renamed, then sealed by `DONE.json` with a hash of every file. A sealed
stage is skipped at the next start; a sealed stage whose settings changed, or whose files changed, is an error.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..base.errors import ArtifactError, QuietGooseError, RecipeError, StorageError
from ..base.files import fsync_folder, read_json, sha256_file, sha256_json, write_json

DONE = "DONE.json"
LOCK = ".lock"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run. All ranks see the same folder."""

    root: Path

    def stage(self, name: str) -> Path:
        return self.root / "stages" / name

    def checkpoints(self, name: str) -> Path:
        return self.stage(name) / "checkpoints"

    def result(self, name: str) -> Path:
        """Where a stage's result lies: the export in the open, the others beside their checkpoints."""
        return self.root / "export" if name == "export" else self.stage(name) / "result"

    def require(self, name: str, wanted_by: str) -> Path:
        """The result of an earlier stage; RecipeError CFG-020 if it never ran."""
        if not (self.stage(name) / DONE).is_file():
            raise RecipeError(
                f"stages: '{wanted_by}' needs the result of '{name}', which is not in {self.root}; "
                f"put '{name}' before '{wanted_by}' in stages",
                code="CFG-020",
            )
        return self.result(name)

    def finished(self, name: str, settings: Mapping[str, Any], *, files: Collection[str] | None = None) -> bool:
        """True if the stage is sealed, its settings are these and every file (or those in `files`) still has its hash."""
        seal = self.stage(name) / DONE
        if not seal.is_file():
            return False
        record = read_json(seal)
        if record["settings_sha256"] != sha256_json(settings):
            changed = _changed(record["settings"], settings)
            raise RecipeError(
                f"stage '{name}' in {self.root} was finished with other settings: {'; '.join(changed)}. "
                "Set them back, or choose another output folder",
                code="CFG-021",
            )
        _verify(self.result(name), record["files"], files)
        return True

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A folder to write the stage's result into; renamed into place and flushed when the block ends well."""
        target = self.result(name)
        self.stage(name).mkdir(parents=True, exist_ok=True)
        for left_over in target.parent.glob(f"{target.name}.tmp-*"):
            shutil.rmtree(left_over)
        staging = target.with_name(f"{target.name}.tmp-{os.getpid()}-{time.time_ns()}")
        staging.mkdir()
        try:
            yield staging
        except OSError as error:
            raise StorageError(f"{staging}: {error.strerror or error}; stage '{name}' has no result yet") from error
        flush_tree(staging)
        if target.exists():  # left by a kill between rename and seal: never sealed, so never a finished result
            shutil.rmtree(target)
        os.replace(staging, target)
        fsync_folder(target.parent)

    def seal(self, name: str, settings: Mapping[str, Any]) -> None:
        """Write DONE.json: from now on the stage is finished."""
        write_json(
            self.stage(name) / DONE,
            {
                "stage": name,
                "settings": settings,
                "settings_sha256": sha256_json(settings),
                "files": hash_tree(self.result(name)),
            },
        )


@contextmanager
def held(folder: RunFolder) -> Iterator[None]:
    """Hold the run folder's lock (rank 0). QG-RUN-004 if another live process has it; a dead one's is taken over."""
    folder.root.mkdir(parents=True, exist_ok=True)
    handle: IO[str] = (folder.root / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        handle.close()
        raise QuietGooseError(
            f"{folder.root} is in use by process {owner}; wait for it, stop it, or choose another output folder",
            code="RUN-004",
        ) from error
    handle.seek(0)
    handle.truncate()
    handle.write(str(os.getpid()))
    handle.flush()
    try:
        yield
    finally:
        handle.close()


def in_use(root: Path) -> bool:
    """Whether a live process holds the run folder's lock. Writes nothing."""
    path = root / LOCK
    if not path.is_file():
        return False
    with path.open(encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def hash_tree(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below `folder`, in path order."""
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def flush_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        else:
            fsync_folder(path)
    fsync_folder(folder)


def _verify(folder: Path, files: Mapping[str, str], only: Collection[str] | None = None) -> None:
    found = hash_tree(folder) if folder.is_dir() else {}
    for path in sorted(set(files) | set(found) if only is None else only):
        if files.get(path) != found.get(path):
            state = "is missing" if path not in found else "is new" if path not in files else "has changed"
            raise ArtifactError(
                f"{folder / path} {state} since the stage was finished; restore it, or delete {folder.parent} to redo it",
                code="EXP-001",
            )


def _changed(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of settings that differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [line for key in keys for line in _changed(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix.rstrip('.')} was {old!r}, is {new!r}"]
