"""quietgoose.json of an export: what must stand in it, and that every file the loader opens is the one it names.

    files    path -> sha256 of everything in the folder; a file that is opened and not named there is refused
    kind     absent for a language model, `images` for a U-Net; the rest is in RULES

`read_manifest` is the only way in: train/export.py and the commands call it. Errors are ArtifactError EXP-002 (no export),
EXP-003 (quietgoose.json is damaged or of another format), EXP-004 (a file changed, is missing or is not named).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.errors import ArtifactError
from ..base.files import inside, sha256_file

MANIFEST, FORMAT = "quietgoose.json", 1
LANGUAGE, IMAGES = "language", "images"
GATES, UNET_WEIGHTS, OWN_BASE = "gates.safetensors", "model.safetensors", "base"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
THOUGHT_FILES = ("thoughts/thoughts.json", "thoughts/thoughts.safetensors")
# what AutoTokenizer opens besides the vocabulary files of the class it finds
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "config.json", "processor_config.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
SIZE_LIMIT = 64 * 2**20
SHA256 = re.compile(r"[0-9a-f]{64}\Z")
Rule = tuple[str, Callable[[Any], bool]]


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _texts(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_text(value.get(name)) for name in names)


def _each(holds: Callable[[Any], bool], least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(holds, value))


def _hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(_text(name) and _hash(found) for name, found in value.items())


def _hash(value: Any) -> bool:
    return isinstance(value, str) and bool(SHA256.match(value))


def _dtype(value: Any) -> bool:
    return value in ("float32", "bfloat16", "float16")


def _autoencoder(value: Any) -> bool:
    return value is None or (_texts("folder")(value) and _whole(value.get("channels")))


TEXT: Rule = ("a text", _text)
DTYPE: Rule = ("float32, bfloat16 or float16", _dtype)
FILES: Rule = ("paths with their sha256", _hashes)
RULES: Mapping[str, Mapping[str, Rule]] = {
    LANGUAGE: {
        "files": FILES,
        "base.id": TEXT,
        "base.sha256": TEXT,
        "base.dtype": DTYPE,
        "router.name": TEXT,
        "router.k": ("a whole number from 1", _whole),
        "experts": ("a list of objects with name and folder", _each(_texts("name", "folder"), 0)),
        "thoughts": ("null, or an object with folder and over", lambda v: v is None or _texts("folder", "over")(v)),
    },
    IMAGES: {
        "files": FILES,
        "unet": ("an object", lambda v: isinstance(v, dict)),
        "dtype": DTYPE,
        "vae": ("null, or an object with folder and channels", _autoencoder),
        "samplers": ("a list of objects with a name, at least one", _each(_texts("name"), 1)),
    },
}
OPTIONAL = ("thoughts",)  # absent in exports of runs before there were any


def read_manifest(folder: Path) -> dict[str, Any]:
    """What quietgoose.json says, after its fields and the hash of every file were checked. ArtifactError EXP-002 to EXP-004,
    SecurityError SEC-003 for a path that leaves the folder."""
    manifest = parse_manifest(folder)
    for name, wanted in manifest["files"].items():
        _check_hash(inside(folder, name), wanted)
    for name in _opened(folder, manifest):
        inside(folder, name)
        if name not in manifest["files"]:
            raise _unnamed(folder / name)
    return manifest


def parse_manifest(folder: Path) -> dict[str, Any]:
    """As `read_manifest`, but no other file is looked at."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(why_no_export(folder), code="EXP-002")
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise ValueError(f"{path.stat().st_size} bytes; at most {SIZE_LIMIT} are read")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: no JSON ({error}); restore it or export again", code="EXP-003") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtifactError(f"{path}: format is {found!r}, this version reads {FORMAT}", code="EXP-003")
    for field, (allowed, holds) in RULES[kind_of(manifest, path)].items():
        there, value = _field(manifest, field)
        if holds(value) if there else field in OPTIONAL:
            continue
        shown = f"is {ascii(value)[:120]}" if there else "is missing"
        raise ArtifactError(
            f"{path}: {field} {shown}; it must be {allowed}. Restore it or export again", code="EXP-003"
        )
    return manifest


def kind_of(manifest: Mapping[str, Any], path: Path | str = MANIFEST) -> str:
    """LANGUAGE or IMAGES; ArtifactError EXP-003 for anything else."""
    kind = manifest.get("kind", LANGUAGE)
    if kind not in (LANGUAGE, IMAGES):
        raise ArtifactError(f"{path}: kind is {ascii(kind)[:120]}, which this version does not know", code="EXP-003")
    return kind


def why_no_export(folder: Path) -> str:
    """What to tell somebody who gave `folder` for an export."""
    if not folder.is_dir():
        return f"{folder}: no such folder; give the folder that {MANIFEST} stands in"
    return run_folder_hint(folder) or f"{folder}: no {MANIFEST} in it, so it is no quietgoose export"


def run_folder_hint(folder: Path) -> str:
    """What to tell somebody who gave a run's folder for its export; empty if it is no run's."""
    if (folder / "export" / MANIFEST).is_file():
        return f"{folder}: is the folder of a run; there is an export in {folder / 'export'}, give that"
    if (folder / "recipe.yaml").is_file():
        return f"{folder}: is the folder of a run that has no export yet; let its 'export' stage finish"
    return ""


def check_tokenizer_files(folder: Path, manifest: Mapping[str, Any], vocabulary: Sequence[str]) -> None:
    """ArtifactError EXP-004 if a file that a tokenizer is read from lies in `folder` without being named in the manifest."""
    templates = [f"{TEMPLATES}/{path.name}" for path in sorted((folder / TEMPLATES).glob("*"))]
    for name in dict.fromkeys([*TOKENIZER_FILES, *templates, *vocabulary]):
        if (folder / name).exists() and name not in manifest["files"]:
            raise _unnamed(folder / name)


def _opened(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Paths that the loader opens, or lets a library open, besides the tokenizer's."""
    whole = []  # folders of which a library reads what it finds
    if kind_of(manifest) == IMAGES:
        yield UNET_WEIGHTS
        whole += [manifest["vae"]["folder"]] if manifest["vae"] is not None else []
    else:
        yield from (f"{card['folder']}/{name}" for card in manifest["experts"] for name in ADAPTER_FILES)
        yield from [GATES] if manifest["experts"] else []
        thoughts = manifest.get("thoughts")
        if thoughts is not None:
            yield from (f"{thoughts['folder']}/{name}" for name in THOUGHT_FILES)
            whole.append(thoughts["folder"])
        whole += [OWN_BASE] if manifest["base"]["id"] == OWN_BASE else []
    for place in whole:
        for path in sorted(inside(folder, place).rglob("*")):
            hidden = path.name.startswith(".")  # of file managers and version control; nobody reads them
            if path.is_file() and not hidden:
                yield str(path.relative_to(folder.resolve()))


def _check_hash(file: Path, wanted: str) -> None:
    if not file.is_file():
        raise ArtifactError(f"{file}: named in {MANIFEST} but missing; export again or restore it", code="EXP-004")
    found = sha256_file(file)
    if found != wanted:
        raise ArtifactError(
            f"{file}: sha256 is {found[:12]}.., {MANIFEST} says {wanted[:12]}..; the file changed after the export. "
            "Restore it or export again",
            code="EXP-004",
        )


def _unnamed(file: Path) -> ArtifactError:
    return ArtifactError(
        f"{file}: would be opened, but {MANIFEST} names no sha256 for it; take the file away if it came later, otherwise "
        "export again",
        code="EXP-004",
    )


def _field(manifest: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    """(whether there is such a field, its value) of a dotted name."""
    value: Any = manifest
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value
