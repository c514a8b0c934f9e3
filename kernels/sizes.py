"""Lengths that Triton's axes can have. Imports no Triton: the shapes of operators are told by them too."""

from __future__ import annotations


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two, itself at least `least` (one too), that is not below count. Triton's own takes a dozen calls."""
    return max(least, 1 << max(count - 1, 0).bit_length())
