"""Randomness is a generator made from a seed and names, so that adding one consumer never shifts another.

Imports torch only when a generator is made: recipes are checked without it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed from a seed and names: first 8 bytes of sha256 over their text."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device`, seeded by `derive`."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(seed, *names))
