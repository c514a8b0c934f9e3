"""Arithmetic of a U-Net, a projector, a teacher: counted by torch on tensors without numbers, attention products included.

A training step costs three forward passes (Kaplan et al. 2020). One multiplication with its addition counts as two. Called by
train/image_cost.py, train/plan_images.py and benchmarks/urepa_throughput.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..alignment.backbone import build_backbone
from ..alignment.model_settings import AlignSettings, BackboneSettings
from ..alignment.projector import Projector
from ..alignment.taps import resolve_tap
from ..alignment.vit import ViT

BACKWARD = 3


def forward_flops(call: Callable[[], Any]) -> int:
    """FLOPs of a call that makes meta tensors."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        call()
    return int(counter.get_total_flops())


def unet_flops(backbone: nn.Module, shape: tuple[int, int, int]) -> int:
    """One image, forward. `backbone` lies on the meta device."""
    arguments = (torch.zeros(1, *shape, device="meta"), torch.zeros(1, device="meta"))
    label = torch.zeros(1, dtype=torch.int64, device="meta")
    return forward_flops(lambda: backbone(*arguments, label))


def meta_backbone(settings: BackboneSettings, shape: tuple[int, int, int], num_classes: int) -> Any:
    with torch.device("meta"):
        return build_backbone(settings, shape, num_classes, 0)


def meta_projector(backbone: Any, align: AlignSettings, dim: int, grid: tuple[int, int]) -> Projector:
    width, own = backbone.tap_shape(resolve_tap(backbone, align.tap))
    with torch.device("meta"):
        return Projector(align, width, own, dim, grid if align.match == "student" else own)


def projector_flops(projector: Projector, width: int) -> int:
    """One image, forward."""
    tokens = torch.zeros(1, projector.grid[0] * projector.grid[1], width, device="meta")
    return forward_flops(lambda: projector(tokens, torch.zeros(1, device="meta")))


def vit_flops(shape: tuple[int, int, int], patch: int, width: int, layers: int, heads: int) -> int:
    """One image through the pipeline's own teacher, forward."""
    with torch.device("meta"):
        vit = ViT(shape, patch, width, layers, heads)
    return forward_flops(lambda: vit(torch.zeros(1, *shape, device="meta")))


def training_flops(
    settings: BackboneSettings, align: AlignSettings | None, shape: tuple[int, int, int], num_classes: int, dim: int,
    grid: tuple[int, int],
) -> int:  # fmt: skip
    """One image, one training step, forward and backward, without the teacher; `align` None: no alignment."""
    backbone = meta_backbone(settings, shape, num_classes)
    flops = unet_flops(backbone, shape)
    if align is not None:
        projector = meta_projector(backbone, align, dim, grid)
        flops += projector_flops(projector, backbone.tap_shape(resolve_tap(backbone, align.tap))[0])
    return BACKWARD * flops
