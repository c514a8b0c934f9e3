"""Where a thoughts benchmark ran, the memory a piece of work takes, and the JSON it leaves: shared by thought*.py here."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from kv_cache_measure import wait

PACKAGES = ("torch", "triton", "transformers")


def about(device: torch.device) -> dict[str, Any]:
    """Date, hardware and versions, as every result carries them."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware,
        "versions": ", ".join(f"{name} {version}" for name, version in found.items()),
    }


def tidy(device: torch.device) -> None:
    """Give back what nobody holds, so that the next reading starts clean."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def held(device: torch.device) -> int | None:
    """Bytes of all live tensors; no reading without a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def idle(device: torch.device) -> int:
    """Bytes that nobody uses and nobody else can have: the private pools of captured graphs."""
    tidy(device)
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def peak_of(work: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """(result, bytes at the peak beyond what was held before); no reading without a GPU."""
    tidy(device)
    if device.type != "cuda":
        return work(), None
    wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    wait(device)
    return result, torch.cuda.max_memory_allocated(device) - before


def attempt(work: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What `work` finds, or the text of what stopped it: a peer may fail in any way and the table goes on."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).split(". ")[0][:200]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:400]}
    finally:
        tidy(device)


def why_not(row: dict[str, Any]) -> str | None:
    """The text of a row without a measurement."""
    for key in ("not_available", "out_of_memory", "error"):
        if key in row:
            return f"{key.replace('_', ' ')}: {row[key]}"
    return None


def write(report: dict[str, Any], out: Path) -> None:
    """The whole report so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1))


def mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f}"
