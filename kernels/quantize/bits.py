"""Tables of one bit per column: bool tensors packed eight to a byte, lowest bit first.

Callers: `append_ranked` in this folder, cache/store.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pack_bits(bits: Tensor) -> Tensor:
    """bool [..., n] -> uint8 [..., ceil(n / 8)]; bits past n are 0."""
    padded = functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (padded.unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """uint8 [..., m] -> bool [..., count], count <= 8 m."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., : -(-count // 8)].unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :count].bool()


def write_bits(table: Tensor, start: int, bits: Tensor) -> None:
    """Put bool [..., n] at columns start .. start + n - 1 of uint8 [..., m], in place; earlier columns stay."""
    first, lead = divmod(start, 8)
    if lead:
        before = unpack_bits(table[..., first : first + 1], lead)
        bits = torch.cat([before, bits], dim=-1)
    packed = pack_bits(bits)
    table[..., first : first + packed.shape[-1]] = packed
