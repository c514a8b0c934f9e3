"""What a recipe says about the U-Net and its alignment. Imports no torch: the recipe's checks read it.

Used by train/recipe_images.py, alignment/ and train/jobs/urepa.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class BackboneSettings:
    """kind sit_down: a one-level U of transformer blocks (alignment/backbone.py); preset B, L, XL as in the paper, tiny for
    32x32 pixels, nano for 8x8; what is set beside it overrides the preset. kind diffusers: UNet2DModel, with the options of
    its constructor in `diffusers` (alignment/diffusers_backbone.py)."""

    kind: Literal["sit_down", "diffusers"] = "sit_down"
    preset: Literal["nano", "tiny", "B", "L", "XL"] = "tiny"
    patch: int | None = None
    width: int | None = None
    heads: int | None = None
    blocks: list[int] | None = None
    extra_merge: Literal["enc_out", "patch_embed", "none"] = "enc_out"
    time_scale: float = 1.0
    diffusers: dict[str, Any] = field(default_factory=dict)


@dataclass
class AlignSettings:
    """L = L_velocity + weight * (L_token + manifold * L_manifold) (alignment/losses.py).

    weight            lambda; 0: no alignment. manifold: w; 0 leaves the term out
    token             weight of L_token itself; 0 leaves the manifold loss alone
    tap               auto (the middle block), a block's number from 1, or a module's name (middle.2, mid_block)
    order             the upsampling to the teacher's grid before, inside or after the projector
    upsample          its mode
    match             student: student tokens are resized to the teacher's grid; teacher: the teacher's to the student's
    scope             manifold over the tokens of an image (intra), over the images of a step (inter), or their mean (both)
    projector         mlp (three layers) or conv (iREPA: one 3x3 convolution); hidden: width of the mlp
    time_aware        scale and shift of the projected tokens from t
    normalise_space   teacher tokens z-scored over space (iREPA)
    schedule          constant, or linear / cosine to 0 over the training
    stop              the share of the steps after which alignment ends (HASTE); 1: never
    over_time         ends: lambda(t) = min(1, max(1.5 - 2t, 2t - 0.5))
    teacher_tap, noise_gap   teacher.kind ema: the average's block, and how much less noise it may see
    inter_over_micro  let scope inter look at one micro-batch at a time
    """

    weight: float = 0.5
    token: float = 1.0
    manifold: float = 3.0
    tap: str = "auto"
    order: Literal["before", "inside", "after"] = "after"
    upsample: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    match: Literal["student", "teacher"] = "student"
    scope: Literal["intra", "inter", "both"] = "intra"
    projector: Literal["mlp", "conv"] = "mlp"
    hidden: int = 2048
    time_aware: bool = False
    normalise_space: bool = False
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    stop: float = 1.0
    over_time: Literal["constant", "ends"] = "constant"
    teacher_tap: str = "last"
    noise_gap: float = 0.2
    inter_over_micro: bool = False


@dataclass
class AverageSettings:
    """Exponential moving average of the backbone's weights; `ramp`: decay min(decay, (1 + step) / (10 + step))."""

    decay: float = 0.9999
    ramp: bool = True
