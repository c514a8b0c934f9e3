"""Save and restore a ZipCache: one safetensors file with every tensor, and what they mean as JSON in its metadata.

    layers.<i>.<name>          tensors of LayerState.tensors(), or keys and values of a sliding-window layer
    metadata["quietgoose"]     {"format": "zipcache", "version": 1, policy, capacity, layers: [{kind, ...}]}

Nothing is unpickled; a file is checked against the model before any tensor is taken over. Called by `ZipCache.save`
and `ZipCache.load`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..base.errors import ArtifactError, QuietGooseError, RecipeError, StorageError
from .hf_layer import ZipLayer
from .policy import Policy
from .state import LayerState

KEY = "quietgoose"
FORMAT = "zipcache"
VERSION = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def save(cache: Any, path: Path) -> Path:
    """Write `cache` whole or not at all; the folder must exist. Raises StorageError."""
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(cache.layers):
        meta, found = _describe(layer)
        layers.append(meta)
        tensors |= {f"layers.{index}.{name}": value.detach().contiguous() for name, value in found.items()}
    text = json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "policy": cache.policy.to_dict(),
            "capacity": cache.capacity,
            "layers": layers,
        }
    )
    if not path.parent.is_dir():
        raise StorageError(f"{path}: no folder {path.parent}; make it first", code="IO-010")
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(_apart(tensors), str(partial), metadata={KEY: text})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path}: could not be written ({error})", code="IO-010") from error
    return path


def load(kind: type, path: Path, config: Any, device: torch.device) -> Any:
    """A ZipCache of class `kind` with the file's contents, on `device`."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file", code="CKPT-030")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as handle:
            meta = _read_meta(path, handle.metadata())
            cache = kind(config, Policy.from_dict(meta["policy"]), meta["capacity"])
            _check_model(path, meta["layers"], cache, config.get_text_config(decoder=True))
            names = list(handle.keys())
            for index, (layer, saved) in enumerate(zip(cache.layers, meta["layers"], strict=True)):
                start = f"layers.{index}."
                tensors = {n.removeprefix(start): handle.get_tensor(n) for n in names if n.startswith(start)}
                _restore(layer, saved, tensors, device)
    except RecipeError as error:
        if error.code != "QG-CFG-050":
            raise
        raise ArtifactError(f"{path}: its policy is not one for this model ({error})", code="CKPT-034") from error
    except QuietGooseError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}: not a whole ZipCache file ({type(error).__name__}: {error}); save it again", code="CKPT-031"
        ) from error
    return cache


def _describe(layer: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a layer is, JSON-able, and its tensors."""
    if isinstance(layer, ZipLayer):
        if layer.waiting:
            raise RecipeError("a ZipCache was saved in the middle of a forward; save it between two", code="CFG-074")
        if layer.state is None:
            return {"kind": "zip", "empty": True}, {}
        tensors, state = layer.state.tensors(), layer.state
        _, kv_heads, _, head_dim = state.tail.key.shape
        shape = {"batch": state.batch, "kv_heads": kv_heads, "head_dim": head_dim}
        dtype = str(layer.dtype).removeprefix("torch.")
        return {
            "kind": "zip",
            "empty": False,
            "blind": layer.blind,
            "hidden": layer.hidden,
            "dtype": dtype,
            "state": state.meta(),
        } | shape, tensors
    if type(layer) is not DynamicSlidingWindowLayer:
        raise RecipeError(
            f"a {type(layer).__name__} cannot be saved; packed and sliding-window layers can", code="CFG-074"
        )
    if not layer.is_initialized:
        return {"kind": "sliding", "empty": True}, {}
    meta = {"kind": "sliding", "empty": False, "cumulative_length": layer.cumulative_length}
    tensors: dict[str, Any] = {"keys": layer.keys, "values": layer.values}
    return meta | {"window": layer.sliding_window}, tensors


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share storage (forks do) are copied: safetensors stores each one whole."""
    seen: set[int] = set()
    made = {}
    for name, value in tensors.items():
        address = value.untyped_storage().data_ptr()
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        made[name] = value if whole and address not in seen else value.clone()
        seen.add(address)
    return made


def _read_meta(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(KEY)
    if text is None:
        raise ArtifactError(f"{path}: a safetensors file, but not of a ZipCache; use ZipCache.save", code="CKPT-032")
    meta = json.loads(text)
    if meta.get("format") != FORMAT or meta.get("version") != VERSION:
        raise ArtifactError(
            f"{path}: format {meta.get('format')!r} version {meta.get('version')!r}; this version reads {FORMAT!r} "
            f"version {VERSION}; save it again",
            code="CKPT-033",
        )
    return meta


def _check_model(path: Path, layers: list[dict[str, Any]], cache: Any, config: Any) -> None:
    """Refuse a cache of a model of another shape, saying which and what this model's is."""
    kinds = ["zip" if isinstance(layer, ZipLayer) else "sliding" for layer in cache.layers]
    found = [layer["kind"] for layer in layers]
    if found != kinds:
        raise ArtifactError(
            f"{path}: {len(found)} layers ({found.count('zip')} packed), this model has {len(kinds)} "
            f"({kinds.count('zip')} packed)",
            code="CKPT-034",
        )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index, layer in enumerate(layers):
        if layer["kind"] == "zip" and not layer["empty"] and (layer["kv_heads"], layer["head_dim"]) != (heads, width):
            raise ArtifactError(
                f"{path}: layer {index} has {layer['kv_heads']} KV heads of size {layer['head_dim']}, this model has "
                f"{heads} of size {width}",
                code="CKPT-034",
            )


def _restore(layer: Any, saved: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    if saved["empty"]:
        return
    if isinstance(layer, ZipLayer):
        state = LayerState.from_tensors(layer.policy, tensors, saved["state"])
        layer.adopt(state, DTYPES[saved["dtype"]], device)
        layer.blind, layer.hidden = bool(saved["blind"]), bool(saved["hidden"])
        return
    if saved["window"] != layer.sliding_window:
        raise ArtifactError(
            f"saved with a sliding window of {saved['window']}, this model has {layer.sliding_window}", code="CKPT-034"
        )
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    layer.keys, layer.values = tensors["keys"], tensors["values"]
    layer.cumulative_length = int(saved["cumulative_length"])
