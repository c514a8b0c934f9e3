"""All ranks must run the same recipe, code, data and versions; a difference is found before the engine exists.

Row R15 of reliability.md. Called by train/pipeline.py: `check_agreement(own_facts(recipe))`, collective.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..base import distributed
from ..base.errors import RecipeError
from .recipe import Recipe
from .redaction import redact
from .settings import flatten, plain

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "numpy", "safetensors", "tokenizers")
ROOMS = ("base", "kernels", "cache", "routing", "thoughts", "alignment", "evaluation", "train")
MOST_SHOWN = 10


def own_facts(recipe: Recipe) -> dict[str, str]:
    """Every setting, the versions, and a hash of this package's code, by name."""
    facts = {f"recipe {key}": redact(repr(value)) for key, value in flatten(plain(recipe)).items()}
    facts |= {f"version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    return facts | {"version of python": platform.python_version(), "code": code_hash()}


def code_hash() -> str:
    """sha256 over the package's Python files, by room and relative path."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def check_agreement(facts: Mapping[str, str]) -> None:
    """Collective. Raises on every rank RecipeError DIST-004 if the ranks' facts differ."""
    refuse_differences(distributed.gather(dict(facts)))


def refuse_differences(facts_by_rank: Sequence[Mapping[str, str]]) -> None:
    """RecipeError DIST-004 naming what differs and its value on each rank."""
    names = sorted(set().union(*facts_by_rank))
    lines = []
    for name in names:
        values = [facts.get(name, "absent") for facts in facts_by_rank]
        if len(set(values)) > 1:
            by_value = {value: [r for r, v in enumerate(values) if v == value] for value in dict.fromkeys(values)}
            shown = ", ".join(f"{value} on rank {_ranks(ranks)}" for value, ranks in by_value.items())
            lines.append(f"{name}: {shown}")
    if lines:
        more = f"; and {len(lines) - MOST_SHOWN} more" if len(lines) > MOST_SHOWN else ""
        raise RecipeError(
            f"the ranks do not agree: {'; '.join(lines[:MOST_SHOWN])}{more}. "
            "Give every node the same recipe, code, data and packages",
            code="DIST-004",
        )


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown}, ..." if len(ranks) > 8 else shown
