"""Triton's kernels run under its interpreter where there is no GPU; the switch must be set before triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Files that run for minutes begin first, so that the other worker is not idle at the end (`make test` deals files out in order).
LONGEST = ("test_pipeline", "test_thoughts_engine", "test_thoughts_pipeline", "test_urepa_pipeline", "test_urepa_engine",
           "test_launcher", "test_faults", "test_compare", "test_parallel", "test_tracking")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files, the longest first; the order within a file stays."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
