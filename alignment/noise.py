"""Gaussian noise by counting: a number is a hash of (seed, names, element), Box-Muller over base/randomness.py.

So sample number i begins with the same noise whichever process draws it, in whatever batch. Used by samplers.py and by
train/data/latents.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.randomness import uniform


def normal(seed: int, index_B: Tensor, shape: Sequence[int], *names: int) -> Tensor:
    """fp32 [B, *shape] on the device of `index_B` (int64): standard normal numbers of the rows `index_B`. `names` tell
    several draws of one row apart. Sizes stay below 5.7, as the uniform numbers are multiples of 2**-23."""
    count = math.prod(shape)
    pair_P = torch.arange((count + 1) // 2, device=index_B.device)
    place_B1 = index_B[:, None]
    radius_BP = torch.sqrt(-2.0 * torch.log1p(-uniform(seed, *names, 0, place_B1, pair_P)))
    angle_BP = (2.0 * math.pi) * uniform(seed, *names, 1, place_B1, pair_P)
    both_BE = torch.cat([radius_BP * torch.cos(angle_BP), radius_BP * torch.sin(angle_BP)], dim=1)
    return both_BE[:, :count].reshape(len(index_B), *shape)
