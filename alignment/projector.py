"""From the tapped tokens of the U-Net to the teacher's space and grid; used in training only, never exported.

Default: project, then upsample (U-REPA 3.3): MLP d -> 2048 -> 2048 -> D with SiLU (REPA's) on the middle stage's few tokens, then
resize to the teacher's grid. Upsampling before or inside the MLP (after its first layer) is an option; so are iREPA's 3x3
convolution and scale and shift from t. Called by train/jobs/urepa.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import FREQUENCIES, in_fp32, sinusoids
from .model_settings import AlignSettings

Grid = tuple[int, int]


class Projector(nn.Module):
    """tokens [B, n, d] on `grid` -> [B, N, D] on `target`."""

    def __init__(self, settings: AlignSettings, width: int, grid: Grid, dim: int, target: Grid) -> None:
        super().__init__()
        self.grid, self.target, self.order, self.mode = grid, target, settings.order, settings.upsample
        hidden = settings.hidden
        self.layers = nn.ModuleList(
            [nn.Conv2d(width, dim, 3, padding=1)]
            if settings.projector == "conv"
            else [nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, dim)]
        )
        self.time = TimeModulation(hidden, dim) if settings.time_aware else None

    def forward(self, tokens_BND: Tensor, t_B: Tensor) -> Tensor:
        grid = self.grid
        if self.order == "before":
            tokens_BND, grid = self._resize(tokens_BND, grid), self.target
        for number, layer in enumerate(self.layers):
            tokens_BND = _apply(layer, tokens_BND if number == 0 else F.silu(tokens_BND), grid)
            if number == 0 and self.order == "inside":
                tokens_BND, grid = self._resize(tokens_BND, grid), self.target
        if self.time is not None:
            tokens_BND = self.time(tokens_BND, t_B)
        return self._resize(tokens_BND, grid) if self.order == "after" else tokens_BND

    def _resize(self, tokens_BND: Tensor, grid: Grid) -> Tensor:
        return resize(tokens_BND, grid, self.target, self.mode)


class TimeModulation(nn.Module):
    """p (1 + scale(t)) + shift(t); begins as the identity."""

    def __init__(self, hidden: int, dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(FREQUENCIES, hidden)
        self.second = nn.Linear(hidden, 2 * dim)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, tokens_BND: Tensor, t_B: Tensor) -> Tensor:
        with in_fp32(t_B.device):
            made_B1E = self.second(F.silu(self.first(sinusoids(t_B, FREQUENCIES)))).unsqueeze(1)
        scale, shift = made_B1E.chunk(2, dim=-1)
        return tokens_BND * (1 + scale) + shift


def resize(tokens_BND: Tensor, grid: Grid, target: Grid, mode: str) -> Tensor:
    """Tokens on another grid, fp32 where they change; unchanged if the grids are alike. `area`: averages, for smaller grids."""
    if grid == target:
        return tokens_BND
    image_BDHW = tokens_BND.float().mT.unflatten(-1, grid)
    align = None if mode in ("nearest", "area") else False
    return F.interpolate(image_BDHW, target, mode=mode, align_corners=align).flatten(2).mT


def _apply(layer: nn.Module, tokens_BND: Tensor, grid: Grid) -> Tensor:
    if isinstance(layer, nn.Linear):
        return layer(tokens_BND)
    return layer(tokens_BND.mT.unflatten(-1, grid)).flatten(2).mT
