"""The pipeline's own teacher: a small ViT, trained by masked autoencoding (no labels) or to classify.

ViT: Dosovitskiy et al. 2021, with fixed sin-cos positions and no class token. Masked autoencoding: He et al. 2022; here the
target is the patch's pixels as they are, since the variance of a patch of 2x2 pixels says little. Called by training.py
(which trains it) and teachers.py (which runs it).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.errors import RecipeError
from .blocks import sin_cos_positions


class ViTBlock(nn.Module):
    """Attention and a feed-forward of four times the width, each after a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h_BND: Tensor) -> Tensor:
        batch, tokens, width = h_BND.shape
        q, k, v = self.qkv(self.norm1(h_BND)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed_BND = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        h_BND = h_BND + self.out(mixed_BND)
        return h_BND + self.down(F.gelu(self.up(self.norm2(h_BND)), approximate="tanh"))


class ViT(nn.Module):
    """Tokens [B, N, D] of images [B, C, H, W]; N = (H / patch) * (W / patch)."""

    def __init__(self, image: tuple[int, int, int], patch: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        channels, height, length = image
        if height % patch or length % patch:
            raise RecipeError(f"teacher.patch: {patch} does not divide images of {height}x{length}", code="CFG-092")
        if width % heads or width % 4:
            raise RecipeError(
                f"teacher.width: {width} must be a multiple of 4 and of teacher.heads ({heads})", code="CFG-092"
            )
        self.patch, self.width = patch, width
        self.grid = (height // patch, length // patch)
        self.embed = nn.Linear(channels * patch * patch, width)
        self.blocks = nn.ModuleList(ViTBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("position_ND", sin_cos_positions(width, self.grid), persistent=False)
        _initialise(self)

    def patches(self, images_BCHW: Tensor) -> Tensor:
        """[B, N, C * patch * patch]"""
        batch, channels = images_BCHW.shape[:2]
        rows, columns = self.grid
        parts = images_BCHW.reshape(batch, channels, rows, self.patch, columns, self.patch)
        return parts.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)

    def forward(self, images_BCHW: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        """Tokens after the last norm; with `keep_BK`, of these patches only."""
        h_BND = self.embed(self.patches(images_BCHW)) + self.get_buffer("position_ND")
        if keep_BK is not None:
            h_BND = h_BND.gather(1, keep_BK[..., None].expand(-1, -1, self.width))
        for block in self.blocks:
            h_BND = block(h_BND)
        return self.norm(h_BND)


class MaskedAutoencoder(nn.Module):
    """Mean squared error of the pixels of masked patches, predicted from the tokens of the others."""

    def __init__(self, vit: ViT, channels: int, mask_ratio: float, width: int, layers: int) -> None:
        super().__init__()
        self.vit = vit
        count = vit.grid[0] * vit.grid[1]
        self.kept = min(count - 1, max(1, round((1.0 - mask_ratio) * count)))
        self.enter = nn.Linear(vit.width, width)
        self.mask = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(ViTBlock(width, max(1, width // 64)) for _ in range(layers))
        self.norm, self.leave = nn.LayerNorm(width), nn.Linear(width, channels * vit.patch**2)
        self.register_buffer("position_ND", sin_cos_positions(width, vit.grid), persistent=False)
        for part in (self.enter, self.blocks, self.leave):
            _initialise(part)
        nn.init.normal_(self.mask, std=0.02)

    def forward(self, images_BCHW: Tensor, order_BN: Tensor) -> Tensor:
        """fp32 scalar. order_BN: a permutation of the patches for every image; the first are kept, the rest predicted."""
        keep_BK, hidden_BM = order_BN[:, : self.kept], order_BN[:, self.kept :]
        seen_BKD = self.enter(self.vit(images_BCHW, keep_BK))
        position_ND = self.get_buffer("position_ND")
        filler = self.mask.to(seen_BKD.dtype).expand(len(images_BCHW), hidden_BM.shape[1], -1)
        h_BND = torch.cat([seen_BKD, filler], dim=1) + position_ND[order_BN].to(seen_BKD.dtype)
        for block in self.blocks:
            h_BND = block(h_BND)
        predicted_BMP = self.leave(self.norm(h_BND[:, self.kept :]))
        target_BNP = self.vit.patches(images_BCHW)
        target_BMP = target_BNP.gather(1, hidden_BM[..., None].expand(-1, -1, target_BNP.shape[-1]))
        return (predicted_BMP.float() - target_BMP.float()).square().mean()


class Classifier(nn.Module):
    """Cross entropy of the classes from the mean token."""

    def __init__(self, vit: ViT, num_classes: int) -> None:
        super().__init__()
        self.vit, self.head = vit, nn.Linear(vit.width, num_classes)
        _initialise(self.head)

    def forward(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.vit(images_BCHW).mean(1)).float(), labels_B, label_smoothing=0.1)


def _initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
