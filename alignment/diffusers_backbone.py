"""diffusers' UNet2DModel as the U-Net: convolutions and attention of the DDPM family, its mid block as the tap.

It is asked for v(x_t, t, label) like SiT-down; t in [0, 1] becomes the timestep 1000 t, labels its class embedding (with one more
row for the null class). Options of its constructor come from the recipe (urepa.backbone.diffusers). The package is optional:
pip install 'quietgoose[images]'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import EnvironmentProblem, RecipeError

TIMESTEPS = 1000.0
DEFAULTS: dict[str, Any] = {
    "block_out_channels": (128, 256, 256), "layers_per_block": 2, "norm_num_groups": 32, "attention_head_dim": 64,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
OWN = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "class_embed_type")


class DiffusersBackbone(nn.Module):
    """v(x_t, t, label) for images (C, H, W) of `num_classes` classes.

    EnvironmentProblem ENV-005 without diffusers; RecipeError CFG-120 for options it refuses or sets itself.
    """

    def __init__(self, image: tuple[int, int, int], num_classes: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.channels, self.image_size, self.num_classes = image[0], image[1:], num_classes
        self.unet = make_unet(image, num_classes, options)
        self._shapes = self._measure(image, num_classes, options)

    # ------------------------------------------------------------------ taps

    def tap_names(self) -> tuple[str, ...]:
        """Down blocks, mid block, up blocks."""
        return tuple(self._shapes)

    def auto_tap(self) -> str:
        return "mid_block"

    def tap_shape(self, name: str) -> tuple[int, tuple[int, int]]:
        """(channels, grid) of what the block gives."""
        return self._shapes[name]

    @property
    def activation_checkpointing(self) -> bool:
        return bool(getattr(self.unet, "is_gradient_checkpointing", False))

    @activation_checkpointing.setter
    def activation_checkpointing(self, wanted: bool) -> None:
        if wanted:
            self.unet.enable_gradient_checkpointing()
        else:
            self.unet.disable_gradient_checkpointing()

    # ------------------------------------------------------------------ forward

    def forward(
        self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor, tap: str | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity, fp32 [B, C, H, W]; with `tap`, also that block's map as tokens [B, n, D]."""
        seen: list[Tensor] = []
        hook = None if tap is None else self._module(tap).register_forward_hook(_keeper(seen))
        try:
            v_BCHW = self.unet(x_BCHW, t_B * TIMESTEPS, class_labels=labels_B, return_dict=False)[0].float()
        finally:
            if hook is not None:
                hook.remove()
        return v_BCHW if tap is None else (v_BCHW, seen[0].flatten(2).mT)

    def _module(self, tap: str) -> nn.Module:
        return self.unet.get_submodule(tap)

    def _measure(
        self, image: tuple[int, int, int], num_classes: int, options: Mapping[str, Any]
    ) -> dict[str, tuple[int, tuple[int, int]]]:
        """Shape of every tap, from a pass without numbers."""
        down, up = range(len(self.unet.down_blocks)), range(len(self.unet.up_blocks))
        names = [*(f"down_blocks.{n}" for n in down), "mid_block", *(f"up_blocks.{n}" for n in up)]
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        with torch.device("meta"), torch.no_grad():
            shadow = make_unet(image, num_classes, options)
            for name in names:
                shadow.get_submodule(name).register_forward_hook(_keeper(seen[name]))
            try:
                shadow(torch.zeros(1, *image), torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.int64))
            except RuntimeError as error:
                raise RecipeError(
                    f"urepa.backbone.diffusers: images of {image[1]}x{image[2]} do not pass this U-Net ({_short(error)}); use fewer "
                    "blocks or another images.size",
                    code="CFG-120",
                ) from error
        return {name: (maps[0].shape[1], (maps[0].shape[2], maps[0].shape[3])) for name, maps in seen.items()}


def make_unet(image: tuple[int, int, int], num_classes: int, options: Mapping[str, Any]) -> Any:
    """UNet2DModel with the recipe's options over ours."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise EnvironmentProblem(
            "urepa.backbone.kind: diffusers needs the package: pip install 'quietgoose[images]'; or set kind: sit_down",
            code="ENV-005",
        ) from error
    taken = sorted(set(options) & set(OWN))
    if taken:
        raise RecipeError(f"urepa.backbone.diffusers.{taken[0]}: comes from the images; leave it out", code="CFG-120")
    merged = {**DEFAULTS, **{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}}
    try:
        return UNet2DModel(
            sample_size=(image[1], image[2]), in_channels=image[0], out_channels=image[0],
            num_class_embeds=num_classes + 1, **merged,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise RecipeError(f"urepa.backbone.diffusers: {_short(error)}", code="CFG-120") from error


def _keeper(seen: list[Tensor]) -> Any:
    """A hook that keeps a block's map (the first of its outputs)."""

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    return keep


def _short(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200]
