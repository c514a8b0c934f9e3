"""START, END and the mixing head in one safetensors file, fp32, bit for bit. Loading never makes up a tensor.

meta [2, D]      head.0 .. head.4 (none for the head "thought")
metadata         format, head kind, w0: what the numbers mean without a recipe; as JSON under one key, because safetensors
                 writes several in random order and equal files are to have equal hashes
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..base.errors import ArtifactError, RecipeError, SecurityError
from ..base.files import write_atomic
from ..base.tensor_file import read_tensors
from .config import ThoughtConfig
from .parameters import ThoughtParameters, ThoughtTensors

FORMAT = "quietgoose-thoughts-1"
KEY = "quietgoose"
KINDS = ("paper", "bounded", "thought")


def save_thoughts(tensors: ThoughtTensors, path: Path) -> None:
    """Write whole fp32 tensors (under ZeRO-3: gathered ones). ArtifactError EXP-003 for empty or non-finite ones."""
    named = _named(tensors)
    for name, tensor in named.items():
        if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"thoughts: {name} is empty or not finite; nothing was written", code="EXP-003")
    meaning = {"format": FORMAT, "head": tensors.kind, "initial_weight": float(tensors.initial_weight)}
    write_atomic(path, save(named, metadata={KEY: json.dumps(meaning, sort_keys=True)}))


def load_thoughts(path: Path, width: int) -> ThoughtParameters:
    """The parameters of a model of width D as they were saved. Raises EXP-001 (no file), SEC-005 (a bad file),
    EXP-003 (a file of another kind, version or model)."""
    found = read_tensors(path.parent, path.name, ("F32",))
    metadata = _metadata(path)
    kind, weight = metadata.get("head"), _number(metadata.get("initial_weight"))
    if metadata.get("format") != FORMAT or kind not in KINDS or weight is None:
        raise ArtifactError(f"{path}: no {FORMAT} file of a known head; export the run again", code="EXP-003")
    try:
        config = ThoughtConfig(head=kind, initial_weight=weight)  # type: ignore[arg-type]
    except RecipeError as error:
        raise ArtifactError(f"{path}: {error.message}", code="EXP-003") from error
    made = ThoughtParameters(torch.zeros(width), torch.zeros(width), config, seed=0)
    wanted = {name: tuple(tensor.shape) for name, tensor in _named(made.tensors()).items()}
    if {name: tuple(tensor.shape) for name, tensor in found.items()} != wanted:
        raise ArtifactError(f"{path}: its tensors are not those of a {kind} head of width {width}", code="EXP-003")
    with torch.no_grad():
        for parameter, name in zip(made.parameters(), wanted):
            parameter.copy_(found[name])
    return made


def _named(tensors: ThoughtTensors) -> dict[str, Tensor]:
    head = {f"head.{index}": tensor for index, tensor in enumerate(tensors.head)}
    return {
        name: tensor.detach().float().cpu().contiguous() for name, tensor in {"meta": tensors.meta_2D, **head}.items()
    }


def _metadata(path: Path) -> dict[str, Any]:
    """What the file says of itself; its tensors have been checked."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    found = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    try:
        meaning = json.loads(found[KEY]) if isinstance(found, dict) and KEY in found else {}
    except (TypeError, ValueError) as error:
        raise SecurityError(f"{path}: its metadata is no JSON object", code="SEC-005") from error
    return meaning if isinstance(meaning, dict) else {}


def _number(value: object) -> float | None:
    right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if right else None  # type: ignore[arg-type]
