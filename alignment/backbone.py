"""SiT-down: a one-level U of SiT transformer blocks (U-REPA section 3; u-repa.md 1.1). The width is the same everywhere.

    patches -> encoder on h x w tokens -> Conv3x3, PixelUnshuffle -> middle on h/2 x w/2 -> Conv3x3, PixelShuffle -> merge with
    the encoder's output -> decoder, whose every block first joins the encoder block's output on its level -> velocity

Where the paper is silent: SwiGLU's hidden width is 8d/3 rounded up to 256, RoPE is axial on the stage's own grid, the merge
after the upsampling is a linear on both inputs (`extra_merge`), all chosen so that its parameter counts come out within 0.5 %.
`build_backbone` makes it from the recipe. Modules are called one by one from `forward`, which is what ZeRO-3 needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..base.errors import RecipeError
from .blocks import Block, FinalLayer, LabelEmbedding, TimeEmbedding, axial_rope, sin_cos_positions
from .model_settings import BackboneSettings


@dataclass(frozen=True)
class Shape:
    """patch, width, heads, and blocks of encoder, middle, decoder."""

    patch: int
    width: int
    heads: int
    blocks: tuple[int, int, int]


PRESETS = {
    "nano": Shape(1, 64, 2, (1, 2, 1)),
    "tiny": Shape(2, 256, 4, (3, 6, 3)),
    "B": Shape(2, 768, 12, (5, 5, 5)),
    "L": Shape(2, 1024, 16, (9, 14, 9)),
    "XL": Shape(2, 1152, 16, (10, 16, 10)),
}


def shape_of(settings: BackboneSettings) -> Shape:
    """The preset with what is set beside it. RecipeError CFG-120 for a shape that cannot be."""
    shape = PRESETS[settings.preset]
    changes = {k: getattr(settings, k) for k in ("patch", "width", "heads") if getattr(settings, k) is not None}
    if settings.blocks is not None:
        changes["blocks"] = tuple(settings.blocks)
    shape = replace(shape, **changes)
    if len(shape.blocks) != 3 or min(shape.blocks) < 1 or shape.blocks[0] != shape.blocks[2]:
        raise RecipeError(
            f"urepa.backbone.blocks: {list(shape.blocks)}; wanted are [encoder, middle, decoder], each at least 1, encoder and "
            "decoder alike (every decoder block joins an encoder block)",
            code="CFG-120",
        )
    if shape.width % (4 * shape.heads) or shape.width % 4:
        raise RecipeError(
            f"urepa.backbone.width: {shape.width}; must be urepa.backbone.heads ({shape.heads}) times a multiple of 4 (axial "
            "RoPE turns pairs of two axes)",
            code="CFG-120",
        )
    return shape


def check_grid(image: tuple[int, int, int], patch: int) -> tuple[int, int]:
    """The token grid of images (C, H, W). RecipeError CFG-120 unless the patches fit and the grid is even."""
    _, height, width = image
    if height % (2 * patch) or width % (2 * patch):
        raise RecipeError(
            f"images are {height}x{width}; both sides must be multiples of {2 * patch} (urepa.backbone.patch {patch}, and the "
            "middle stage halves the grid); set images.size",
            code="CFG-120",
        )
    return height // patch, width // patch


class SiTDown(nn.Module):
    """v(x_t, t, label) for images (C, H, W) of `num_classes` classes; label `num_classes` is the null class.

    `activation_checkpointing` (attribute) recomputes blocks in the backward pass.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        num_classes: int,
        shape: Shape,
        extra_merge: str = "enc_out",
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.channels, self.image_size, self.num_classes = image[0], image[1:], num_classes
        self.shape, self.extra_merge = shape, extra_merge
        self.activation_checkpointing = False
        self.grid = check_grid(image, shape.patch)
        self.inner_grid = (self.grid[0] // 2, self.grid[1] // 2)
        width, (enc, mid, dec) = shape.width, shape.blocks
        self.patches = nn.Linear(self.channels * shape.patch**2, width)
        self.time = TimeEmbedding(width, time_scale)
        self.label = LabelEmbedding(num_classes, width)
        self.encoder = nn.ModuleList(Block(width, shape.heads) for _ in range(enc))
        self.down = nn.Conv2d(width, width // 4, 3, padding=1, bias=False)
        self.middle = nn.ModuleList(Block(width, shape.heads) for _ in range(mid))
        self.up = nn.Conv2d(width, 4 * width, 3, padding=1, bias=False)
        self.merge = None if extra_merge == "none" else nn.Linear(2 * width, width)
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(dec))
        self.decoder = nn.ModuleList(Block(width, shape.heads) for _ in range(dec))
        self.final = FinalLayer(width, self.channels * shape.patch**2)
        for name, grid in (("outer", self.grid), ("inner", self.inner_grid)):
            self.register_buffer(f"{name}_positions_ND", sin_cos_positions(width, grid), persistent=False)
            self.register_buffer(f"{name}_rope_2NR", axial_rope(width // shape.heads, grid), persistent=False)

    # ------------------------------------------------------------------ taps

    def tap_names(self) -> tuple[str, ...]:
        """Blocks in the order of the paper's numbering, which begins at 1 with the encoder."""
        stages = ("encoder", "middle", "decoder")
        return tuple(f"{stage}.{n}" for stage, count in zip(stages, self.shape.blocks) for n in range(count))

    def auto_tap(self) -> str:
        """The middle block of the middle stage: number e + ceil(m / 2), 18 of 36 for XL."""
        return f"middle.{-(-self.shape.blocks[1] // 2) - 1}"

    def tap_shape(self, name: str) -> tuple[int, tuple[int, int]]:
        """(width, token grid) of what the block gives."""
        return self.shape.width, self.inner_grid if name.startswith("middle.") else self.grid

    # ------------------------------------------------------------------ forward

    def forward(
        self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, tap: str | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity, fp32 [B, C, H, W]; with `tap`, also that block's tokens [B, n, D]."""
        c_BD = self.time(t_B) + self.label(labels_B)
        outer, inner = self.get_buffer("outer_rope_2NR"), self.get_buffer("inner_rope_2NR")
        tapped: dict[str, Tensor] = {}
        first_BND = self.patches(self._patchify(x_BCHW)) + self.get_buffer("outer_positions_ND").to(x_BCHW.dtype)
        h_BND, stack = first_BND, []
        for number, block in enumerate(self.encoder):
            h_BND = self._block(block, h_BND, c_BD, outer)
            stack.append(h_BND)
            tapped[f"encoder.{number}"] = h_BND
        u_BND = self._down(h_BND) + self.get_buffer("inner_positions_ND").to(h_BND.dtype)
        for number, block in enumerate(self.middle):
            u_BND = self._block(block, u_BND, c_BD, inner)
            tapped[f"middle.{number}"] = u_BND
        h_BND = self._up(u_BND)
        if self.merge is not None:
            other_BND = stack[-1] if self.extra_merge == "enc_out" else first_BND
            h_BND = self.merge(torch.cat([h_BND, other_BND], dim=-1))
        for number, (skip, block) in enumerate(zip(self.skips, self.decoder)):
            h_BND = skip(torch.cat([h_BND, stack.pop()], dim=-1))
            h_BND = self._block(block, h_BND, c_BD, outer)
            tapped[f"decoder.{number}"] = h_BND
        v_BCHW = self._unpatchify(self.final(h_BND, c_BD)).float()
        return v_BCHW if tap is None else (v_BCHW, tapped[tap])

    def _block(self, block: nn.Module, h_BND: Tensor, c_BD: Tensor, rope_2NR: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            # shapes under ZeRO-3 are those of partitioned weights, which the determinism check refuses
            made = checkpoint(block, h_BND, c_BD, rope_2NR, use_reentrant=False, determinism_check="none")
            assert isinstance(made, Tensor)
            return made
        return block(h_BND, c_BD, rope_2NR)

    def _patchify(self, x_BCHW: Tensor) -> Tensor:
        p, (h, w) = self.shape.patch, self.grid
        x = x_BCHW.reshape(-1, self.channels, h, p, w, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, h * w, self.channels * p * p)

    def _unpatchify(self, x_BNO: Tensor) -> Tensor:
        p, (h, w) = self.shape.patch, self.grid
        x = x_BNO.reshape(-1, h, w, self.channels, p, p).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(-1, self.channels, h * p, w * p)

    def _down(self, h_BND: Tensor) -> Tensor:
        image_BDHW = h_BND.mT.reshape(-1, self.shape.width, *self.grid)
        return nn.functional.pixel_unshuffle(self.down(image_BDHW), 2).flatten(2).mT

    def _up(self, u_BND: Tensor) -> Tensor:
        image_BDHW = u_BND.mT.reshape(-1, self.shape.width, *self.inner_grid)
        return nn.functional.pixel_shuffle(self.up(image_BDHW), 2).flatten(2).mT


def build_backbone(settings: BackboneSettings, image: tuple[int, int, int], num_classes: int, seed: int) -> nn.Module:
    """The recipe's U-Net with weights drawn from `seed` alone (on the CPU; under a meta-device context, no weights).

    RecipeError CFG-120 for a shape that cannot be; EnvironmentProblem ENV-005 if diffusers is wanted and missing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.kind == "diffusers":
            from .diffusers_backbone import DiffusersBackbone

            return DiffusersBackbone(image, num_classes, settings.diffusers)
        return SiTDown(image, num_classes, shape_of(settings), settings.extra_merge, settings.time_scale)
