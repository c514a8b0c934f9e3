"""What a run ran on: shown in every table, logged with every run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from typing import Any

import torch

from ..base.distributed import world

PACKAGES = ("torch", "deepspeed", "transformers", "peft")


def facts() -> dict[str, Any]:
    """Date, hardware, number of processes, versions."""
    if torch.cuda.is_available():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": hardware,
        "processes": world().size,
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
    }
