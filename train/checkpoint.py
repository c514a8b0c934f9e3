"""Checkpoints that are whole or absent: staging folder, hashes, manifest last, rename (reliability.md section 3).

    step_00000100/  state.safetensors  every trained parameter with its AdamW moments, whole, fp32 (train/state.py)
                    rng.safetensors    the generators of every rank
                    state.json         step, counters, world size, stage
                    recipe.yaml        the resolved recipe
                    MANIFEST.json      written last: sizes and sha256 of the others, identity of the run, its own hash

Nothing is ever pickled or unpickled, and neither world size nor ZeRO stage is baked in. There is no pointer file: the
newest folder that verifies is the one. A folder that does not verify becomes `.corrupt` and is named in an event.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..base import distributed
from ..base.errors import ArtifactError, NumericError, QuietGooseError, SecurityError
from ..base.files import fsync_folder, read_json, sha256_file, sha256_json, write_atomic, write_json
from . import faults, state
from .recipe import ResumeSettings

if TYPE_CHECKING:
    from .engine import Engine

SCHEMA = 1
STATE, RNG, INFO, RECIPE, MANIFEST = (
    "state.safetensors",
    "rng.safetensors",
    "state.json",
    "recipe.yaml",
    "MANIFEST.json",
)
FILES = (STATE, RNG, INFO, RECIPE)
NAME = re.compile(r"step_(\d{8,})\Z")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
SPACE_FACTOR = 1.2
SLOW_SECONDS = 20.0

Event = Callable[..., None]


def _no_event(kind: str, **fields: Any) -> None:
    """Events go nowhere unless the caller wants them."""


@dataclass(frozen=True)
class Found:
    """A verified checkpoint."""

    path: Path
    step: int


class Checkpoints:
    """The checkpoints of one stage in `folder`.

    `identity`: hashes that must not change between save and resume (recipe, base, data, code); a difference is
    ArtifactError CKPT-005 unless its key is in `resume.allow`. `event(kind, **fields)` is told what happened.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        identity: Mapping[str, Any] | None = None,
        recipe_yaml: str = "",
        event: Event = _no_event,
    ) -> None:
        self.folder = folder
        self.keep = max(2, keep)
        self.identity = dict(identity or {})
        self.recipe_yaml = recipe_yaml
        self.event = event
        self.failed_in_row = 0

    # ------------------------------------------------------------------ save

    def save(self, engine: Engine, step: int) -> Path | None:
        """Write `step_...` for a state after `step` optimizer steps. Collective. None if the disk refused: nothing is
        left behind, every rank knows, training may go on; `failed_in_row` counts."""
        started = time.monotonic()
        faults.point("save.before", step)
        generators = distributed.gather(_generators())
        tensors = state.gather(engine)
        faults.point("save.gathered", step)
        path = self.folder / f"step_{step:08d}"
        problem = distributed.on_main(lambda: self._try_write(engine, step, path, tensors, generators))
        faults.point("save.after", step)
        if problem:
            self.failed_in_row += 1
            self._clean()
            self.event("checkpoint_abandoned", code="QG-IO-001", step=step, reason=problem)
            return None
        self.failed_in_row = 0
        seconds = round(time.monotonic() - started, 3)
        self.event("checkpoint", step=step, path=str(path), seconds=seconds)
        if seconds > SLOW_SECONDS:
            self.event("checkpoint_slow", code="QG-RUN-003", seconds=seconds, reason="SIGTERM leaves 30 s in all")
        return path

    def _try_write(
        self,
        engine: Engine,
        step: int,
        path: Path,
        tensors: Mapping[str, torch.Tensor],
        generators: list[dict[str, torch.Tensor]],
    ) -> str:
        """Empty, or why the disk refused."""
        try:
            self._write(engine, step, path, tensors, generators)
        except (OSError, SafetensorError) as error:
            return str(error) or type(error).__name__
        return ""

    def _write(
        self,
        engine: Engine,
        step: int,
        path: Path,
        tensors: Mapping[str, torch.Tensor],
        generators: list[dict[str, torch.Tensor]],
    ) -> None:
        bad = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise NumericError(f"step {step}: {', '.join(bad[:5])} not finite; no checkpoint written", code="NUM-002")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_space(tensors)
        with _staging(path) as staging:
            save_file(dict(tensors), staging / STATE, metadata={"format": "pt"})
            faults.point("save.writing", step)
            random = {f"{rank}/{kind}": t for rank, own in enumerate(generators) for kind, t in own.items()}
            save_file(random, staging / RNG)
            info = {
                "step": step,
                "applied": engine.applied,
                "skipped": engine.skipped,
                "world_size": engine.world.size,
                "zero_stage": engine.stage,
                "total_steps": engine.total_steps,
            }
            write_json(staging / INFO, info)
            write_atomic(staging / RECIPE, self.recipe_yaml)
            for name in (STATE, RNG):
                _flush(staging / name)
            faults.point("save.manifest", step)
            write_json(staging / MANIFEST, self._manifest(staging, info))
            fsync_folder(staging)
            faults.point("save.rename", step)
        self._retain()

    def _manifest(self, staging: Path, info: Mapping[str, Any]) -> dict[str, Any]:
        files = {
            name: {"size": (staging / name).stat().st_size, "sha256": sha256_file(staging / name)} for name in FILES
        }
        body = {
            "schema": SCHEMA,
            "step": info["step"],
            "identity": self.identity,
            "files": files,
            "torch": torch.__version__,
            "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return {**body, "manifest_sha256": sha256_json(body)}

    def _check_space(self, tensors: Mapping[str, torch.Tensor]) -> None:
        needed = int(SPACE_FACTOR * sum(t.numel() * t.element_size() for t in tensors.values()))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(28, f"needs {needed} bytes, {free} are free", str(self.folder))

    def _retain(self) -> None:
        """Delete all but the newest `keep`. The newest was hashed from disk a moment ago."""
        for _, path in self._candidates()[self.keep :]:
            shutil.rmtree(path)

    # ------------------------------------------------------------------ find and load

    def resume(self, engine: Engine, settings: ResumeSettings) -> int:
        """Load what `settings` asks for; returns the step to continue at (0: from scratch). Collective.

        ArtifactError CKPT-002 if `required` and there is none, CKPT-003/004 if `resume.step` names a bad one,
        CKPT-005 if the run's identity changed; SecurityError SEC-001 for a pickle.
        """
        found = distributed.on_main(lambda: self._choose(settings))
        if found is None:
            self.event("resume", step=0, mode=settings.mode, path="")
            return 0
        info = distributed.on_main(lambda: self._admit(found, settings))
        self._load(engine, found, int(info["applied"]))
        engine.skipped = int(info["skipped"])
        self.event("resume", step=found.step, mode=settings.mode, path=str(found.path))
        return found.step

    def _choose(self, settings: ResumeSettings) -> Found | None:
        self._clean()
        if settings.mode == "never":
            self._set_aside()
            return None
        candidates = self._candidates()
        if settings.step is not None:
            wanted = [item for item in candidates if item[0] == settings.step]
            if not wanted:
                have = ", ".join(str(step) for step, _ in candidates) or "none"
                raise ArtifactError(
                    f"resume.step={settings.step}: not in {self.folder}; present: {have}", code="CKPT-002"
                )
            verify(wanted[0][1])
            return Found(wanted[0][1], wanted[0][0])
        for step, path in candidates:
            try:
                verify(path)
            except ArtifactError as error:
                self._quarantine(path, error)
                continue
            return Found(path, step)
        if settings.mode == "required":
            raise ArtifactError(
                f"resume.mode=required: no intact checkpoint in {self.folder}; use resume.mode=auto to start anew",
                code="CKPT-002",
            )
        return None

    def _quarantine(self, path: Path, error: ArtifactError) -> None:
        target = path.with_name(f"{path.name}.corrupt")
        if target.exists():
            target = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
        os.replace(path, target)
        self.event("checkpoint_corrupt", code=error.code, path=str(target), reason=error.message)

    def _admit(self, found: Found, settings: ResumeSettings) -> dict[str, Any]:
        """Compare the identity of the run; returns state.json."""
        saved = read_json(found.path / MANIFEST)["identity"]
        changed = [
            f"{key} was {saved.get(key)!r}, is {self.identity.get(key)!r}"
            for key in sorted(set(saved) | set(self.identity))
            if saved.get(key) != self.identity.get(key) and key not in settings.allow
        ]
        if changed:
            raise ArtifactError(
                f"{found.path}: made by another run: {'; '.join(changed)}. Set it back, choose another output folder, "
                "or name the key in resume.allow",
                code="CKPT-005",
            )
        return read_json(found.path / INFO)

    def _load(self, engine: Engine, found: Found, applied: int) -> None:
        """Every rank reads the shared file by itself. An error on one rank is an error on all."""
        problem: QuietGooseError | None = None
        try:
            with safe_open(found.path / STATE, framework="pt") as handle:
                state.scatter(engine, {key: handle.get_tensor(key) for key in handle.keys()}, applied)  # noqa: SIM118
            with safe_open(found.path / RNG, framework="pt") as handle:
                own = f"{engine.world.rank}/"
                _restore_generators(
                    {k.removeprefix(own): handle.get_tensor(k) for k in handle.keys() if k.startswith(own)}  # noqa: SIM118
                )
        except (SafetensorError, OSError) as error:
            problem = ArtifactError(f"{found.path}: {error}", code="CKPT-004")
        except ArtifactError as error:
            problem = ArtifactError(f"{found.path}: {error.message}", code="CKPT-004")
        for rank, other in enumerate(distributed.gather(problem.message if problem else "")):
            if other:
                raise problem or ArtifactError(f"rank {rank}: {other}", code="CKPT-004")

    # ------------------------------------------------------------------ folders

    def _candidates(self) -> list[tuple[int, Path]]:
        """Committed folders, newest first."""
        if not self.folder.is_dir():
            return []
        matched = ((NAME.match(path.name), path) for path in self.folder.iterdir() if path.is_dir())
        return sorted(((int(m.group(1)), path) for m, path in matched if m), reverse=True)

    def _clean(self) -> None:
        """Remove staging folders that a kill or a full disk left. Rank 0."""
        if distributed.world().is_main and self.folder.is_dir():
            for left_over in self.folder.glob("step_*.tmp-*"):
                shutil.rmtree(left_over)

    def _set_aside(self) -> None:
        if self._candidates():
            os.replace(self.folder, self.folder.with_name(f"{self.folder.name}.old-{time.time_ns()}"))


def verify(path: Path) -> None:
    """Refuse a checkpoint folder that is torn, changed or could hold code.

    ArtifactError CKPT-003 (hash), CKPT-004 (missing, extra, truncated, unreadable manifest); SecurityError SEC-001.
    """
    for entry in sorted(path.iterdir()):
        if entry.is_symlink() or not entry.is_file():
            raise ArtifactError(f"{entry}: a plain file is wanted", code="CKPT-004")
        with entry.open("rb") as handle:
            start = handle.read(4)
        if start.startswith(PICKLE_STARTS):
            raise SecurityError(f"{entry}: looks like a pickle or a torch archive; nothing was read. Remove it")
    manifest = _read_manifest(path)
    present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    for name in sorted(set(FILES) | set(manifest["files"]) | present):
        if name not in present:
            raise ArtifactError(f"{path / name}: missing", code="CKPT-004")
        if name not in FILES or name not in manifest["files"]:
            raise ArtifactError(f"{path / name}: not a file of a checkpoint", code="CKPT-004")
        _verify_file(path / name, manifest["files"][name])


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = read_json(path / MANIFEST)
        body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
        whole = manifest["manifest_sha256"] == sha256_json(body) and manifest["schema"] == SCHEMA
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path / MANIFEST}: missing or unreadable ({error})", code="CKPT-004") from error
    if not whole:
        raise ArtifactError(f"{path / MANIFEST}: does not have its own hash; changed after saving", code="CKPT-003")
    return manifest


def _verify_file(path: Path, record: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != record["size"]:
        raise ArtifactError(f"{path}: {size} bytes, manifest says {record['size']}", code="CKPT-004")
    digest = sha256_file(path)
    if digest != record["sha256"]:
        raise ArtifactError(
            f"{path}: sha256 {digest[:12]}, manifest says {record['sha256'][:12]}; changed after saving",
            code="CKPT-003",
        )


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A folder that becomes `path` if the block ends well. A failed one is removed by `Checkpoints._clean`."""
    staging = path.with_name(f"{path.name}.tmp-{os.getpid()}-{time.time_ns()}")
    staging.mkdir()
    yield staging
    if path.exists():  # a resume from an older step reached this one again
        replaced = path.with_name(f"{path.name}.tmp-replaced-{time.time_ns()}")
        os.replace(path, replaced)
        os.replace(staging, path)
        shutil.rmtree(replaced)
    else:
        os.replace(staging, path)
    fsync_folder(path.parent)


def _flush(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def _generators() -> dict[str, torch.Tensor]:
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    return own


def _restore_generators(own: Mapping[str, torch.Tensor]) -> None:
    """A rank that did not exist when the checkpoint was made keeps its generators."""
    if "cpu" in own:
        torch.set_rng_state(own["cpu"])
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
