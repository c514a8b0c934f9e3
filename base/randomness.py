"""Random numbers by counting: a uniform number is a hash of (seed, names), whatever the layout of the batch.

So what a row draws does not depend on which rows share a batch, on chunks, or on the number of ranks; nothing needs to
be saved to resume; and a captured CUDA graph draws afresh because its step counter is an input. Callers: thoughts/
(tokens of thoughts, anchors), train/jobs/experts.py (misrouting). base/seeding.py has the seeds and torch generators.
The hash is a 32-bit integer mixer (two multiplications, xor-shifts), applied after each name.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 2**32 - 1
BITS = 23


def draw_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """int64 [1] on `device`: one number from `generator` (None: torch's own)."""
    source = torch.device("cpu") if generator is None else generator.device
    return torch.randint(2**62, (1,), generator=generator, device=source).to(device, non_blocking=True)


def hashed(seed: Tensor | int, *names: Tensor | int) -> Tensor:
    """int64 below 2**32 from int64 names that broadcast against each other; at least one name is a tensor."""
    state: Tensor | int = 0x9E3779B9
    for name in (seed, *names):
        state = _scramble(state ^ (name & MASK))
        state = _scramble(state ^ ((name >> 32) & MASK))
    assert isinstance(state, Tensor)
    return state


def uniform(seed: Tensor | int, *names: Tensor | int) -> Tensor:
    """fp32 in [0, 1), multiples of 2**-23, from int64 names that broadcast against each other."""
    return (hashed(seed, *names) >> (32 - BITS)).float() * 2.0**-BITS


def _scramble(x: Tensor | int) -> Tensor | int:
    # both constants are below 2**31, so that products of 32-bit numbers fit a signed 64-bit integer
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & MASK
    return x ^ (x >> 15)
