"""Which implementation a kernel call takes: the plain PyTorch reference or Triton. Used by the packages beside this file."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Implementation = Literal["auto", "reference", "triton"]


class UnsupportedShape(ValueError):
    """A shape, dtype or bit width that the kernels do not take; the message says which they take."""


def takes_triton(implementation: Implementation, tensor: Tensor, problem: str | None = None) -> bool:
    """True for Triton, False for the reference; `auto` means Triton on a GPU where it takes the call.

    problem  why Triton does not take this call, or None. Raises UnsupportedShape with it if Triton was asked for.
    """
    if implementation == "reference" or (implementation == "auto" and (problem or not tensor.is_cuda)):
        return False
    if problem:
        raise UnsupportedShape(problem)
    return True
