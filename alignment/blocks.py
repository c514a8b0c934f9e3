"""Parts of SiT-down: the transformer block with adaLN-zero, RoPE and SwiGLU, embeddings, the last layer.

SiT (Ma et al. 2024) after DiT (Peebles and Xie 2023), with U-REPA's RoPE (Su et al. 2021) and SwiGLU (Shazeer 2020).
Norms have no weights and run in fp32 under autocast. Called by alignment/backbone.py.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 256
HIDDEN_MULTIPLE = 256
EPS = 1e-6


def hidden_width(width: int) -> int:
    """Of SwiGLU: 8d/3, rounded up to a multiple of 256."""
    return HIDDEN_MULTIPLE * -(-(8 * width // 3) // HIDDEN_MULTIPLE)


class Block(nn.Module):
    """Attention and SwiGLU, each scaled, shifted and gated by the condition; gates begin at zero, so the block as identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        hidden = hidden_width(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.gate_up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)
        self.condition = nn.Linear(width, 6 * width)
        for linear in (self.qkv, self.out, self.gate_up, self.down):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def forward(self, h_BND: Tensor, c_BD: Tensor, rope_2NR: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(F.silu(c_BD)).unsqueeze(1).chunk(6, dim=-1)
        h_BND = h_BND + gate1 * self._attend(modulate(h_BND, shift1, scale1), rope_2NR)
        gate_BNH, up_BNH = self.gate_up(modulate(h_BND, shift2, scale2)).chunk(2, dim=-1)
        return h_BND + gate2 * self.down(F.silu(gate_BNH) * up_BNH)

    def _attend(self, h_BND: Tensor, rope_2NR: Tensor) -> Tensor:
        rows, tokens, width = h_BND.shape
        q, k, v = self.qkv(h_BND).reshape(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q, rope_2NR), rotate(k, rope_2NR), v)
        return self.out(mixed.transpose(1, 2).reshape(rows, tokens, width))


class TimeEmbedding(nn.Module):
    """256 sinusoids of t (times `scale`; REPA leaves it at 1), then two linears with SiLU between. fp32 under autocast as well: the
    sinusoids of t in [0, 1] differ by less than bf16 resolves."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.first = nn.Linear(FREQUENCIES, width)
        self.second = nn.Linear(width, width)
        for linear in (self.first, self.second):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, t_B: Tensor) -> Tensor:
        with in_fp32(t_B.device):
            return self.second(F.silu(self.first(sinusoids(t_B * self.scale, FREQUENCIES))))


class LabelEmbedding(nn.Module):
    """A row per class and one for the null class, which is the last."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels_B: Tensor) -> Tensor:
        return self.table(labels_B)


class FinalLayer(nn.Module):
    """adaLN and a linear, both zero at the start: the first velocity is zero."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.condition = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, out)
        for linear in (self.condition, self.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, h_BND: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.condition(F.silu(c_BD)).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(modulate(h_BND, shift, scale))


def modulate(h_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """LayerNorm without weights, scaled and shifted."""
    return F.layer_norm(h_BND, h_BND.shape[-1:], eps=EPS) * (1 + scale_B1D) + shift_B1D


def in_fp32(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast switched off; there is none for tensors without numbers."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def sinusoids(t_B: Tensor, count: int) -> Tensor:
    """cos and sin of t at `count` / 2 frequencies from 1 down to 1/10000, fp32 [B, count]."""
    half = count // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=t_B.device))
    angles_BF = t_B.float()[:, None] * frequencies
    return torch.cat([angles_BF.cos(), angles_BF.sin()], dim=-1)


def sin_cos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D positions, fp32 [h * w, D]: a half of the channels by row, a half by column."""
    rows, columns = (torch.arange(side, dtype=torch.float32) for side in grid)
    by_row, by_column = sinusoids(rows, width // 2), sinusoids(columns, width // 2)
    height, length = grid
    whole = torch.cat([by_row[:, None].expand(-1, length, -1), by_column[None].expand(height, -1, -1)], dim=-1)
    return whole.reshape(height * length, width)


def axial_rope(head: int, grid: tuple[int, int]) -> Tensor:
    """cos and sin, fp32 [2, h * w, head / 2]: the first half of a head's pairs turns with the row, the second with the column."""
    quarter = head // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    rows, columns = (torch.arange(side, dtype=torch.float32)[:, None] * frequencies for side in grid)
    height, length = grid
    angles = torch.cat([rows[:, None].expand(-1, length, -1), columns[None].expand(height, -1, -1)], dim=-1)
    angles_NR = angles.reshape(height * length, head // 2)
    return torch.stack([angles_NR.cos(), angles_NR.sin()])


def rotate(x_BHND: Tensor, rope_2NR: Tensor) -> Tensor:
    """Turn the pairs (i, i + head / 2) of every head, in fp32."""
    cos_NR, sin_NR = rope_2NR[0], rope_2NR[1]
    first, second = x_BHND.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos_NR - second * sin_NR, second * cos_NR + first * sin_NR], dim=-1)
    return turned.to(x_BHND.dtype)
