"""Reading safetensors from outside: the header is checked in full before any tensor is made.

Errors: SEC-003 (the file lies outside its folder), SEC-005 (names the tensor or header fault), EXP-001 (no such file).
Callers: routing/, thoughts/.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import load
from torch import Tensor

from .errors import ArtifactError, SecurityError
from .files import inside

HEADER_LIMIT = 16 * 2**20
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def read_tensors(folder: Path, name: str, dtypes: tuple[str, ...] = ("F32", "F16", "BF16")) -> dict[str, Tensor]:
    """All tensors of `folder/name`: dtypes as listed, no empty tensor, all values finite."""
    path = inside(folder, name)
    if not path.is_file():
        raise ArtifactError(f"{folder / name}: no such file", code="EXP-001")
    data = path.read_bytes()
    header = _header(data, path)
    end = 0
    for key, entry in sorted(header.items(), key=lambda item: _offsets(item[0], item[1], path)):
        end = _check_entry(key, entry, end, dtypes, path)
    if 8 + int.from_bytes(data[:8], "little") + end != len(data):
        raise _refuse(path, "the file is truncated or has bytes that belong to no tensor")
    tensors = load(data)
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise _refuse(path, f"tensor {_show(key)} has NaN or infinite values")
    return tensors


def _header(data: bytes, path: Path) -> Mapping[str, Any]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(HEADER_LIMIT, len(data) - 8):
        raise _refuse(path, f"its header claims {length} bytes; at most {HEADER_LIMIT}, within the file, are allowed")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _refuse(path, f"its header is no plain JSON object ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise _refuse(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    if not header:
        raise _refuse(path, "it holds no tensors")
    return header


def _offsets(key: str, entry: Any, path: Path) -> list[int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise _refuse(path, f"tensor {_show(key)} has no pair of offsets")
    return offsets


def _check_entry(key: str, entry: Mapping[str, Any], end: int, dtypes: tuple[str, ...], path: Path) -> int:
    """Where the tensor ends; it must begin where the one before ended."""
    shape, dtype = entry.get("shape"), entry.get("dtype")
    start, stop = entry["data_offsets"]
    if dtype not in dtypes:
        raise _refuse(path, f"tensor {_show(key)} has dtype {dtype!r}; allowed are {', '.join(dtypes)}")
    if not _whole_numbers(shape) or math.prod(shape) == 0:
        raise _refuse(path, f"tensor {_show(key)} has shape {shape!r}; it must hold at least one value")
    if start != end or stop - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _refuse(path, f"tensor {_show(key)} overlaps another, leaves a gap, or its bytes do not fit its shape")
    return stop


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _show(key: str) -> str:
    return ascii(key)[:120]


def _refuse(path: Path, why: str) -> SecurityError:
    return SecurityError(f"{path}: {why}; fetch the file again from its source", code="SEC-005")
