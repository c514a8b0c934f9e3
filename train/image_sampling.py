"""Draws samples of a U-Net over all processes. Called by evaluate_images.py and export_images.py.

Samples are made in batches of one size whose composition does not depend on the number of processes: process r takes batches
r, r + world, ... A last batch that would be smaller is filled up and cut. So sample i has the same bits for any world size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..alignment.judging import as_bytes
from ..alignment.noise import normal
from ..alignment.samplers import Velocity, sample_rows
from ..alignment.settings import SamplerSettings
from ..base import distributed
from ..base.distributed import world
from .data.images import ImageSet

TIME_ORDER = 104_729  # a prime that spreads rows evenly over t


def velocity_of(unet: nn.Module, device: torch.device, *, half: bool, compiled: bool = False) -> Velocity:
    """The U-Net as a function: no gradient, in bf16 autocast if `half` and on a GPU, its result in fp32."""
    called = torch.compile(unet, dynamic=False) if compiled else unet

    @torch.no_grad()
    def velocity(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half and device.type == "cuda"):
            return called(x_BCHW, t_B, labels_B).float()

    return velocity


def draw_samples(
    velocity: Velocity, labels_N: Tensor, shape: tuple[int, int, int], settings: SamplerSettings, num_classes: int,
    seed: int, device: torch.device, decode: Callable[[Tensor], Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:  # fmt: skip
    """uint8 [N, C, H, W] on the CPU of every process. Collective."""
    count, size = len(labels_N), min(settings.batch, len(labels_N))
    starts = list(range(0, count, size))
    me = world()
    mine: list[Tensor] = []
    for done, start in enumerate(starts[me.rank :: me.size], 1):
        index_B = torch.arange(start, start + size, device=device)
        labels_B = labels_N[index_B.cpu().clamp(max=count - 1)].to(device)
        images = sample_rows(velocity, index_B, labels_B, shape, settings, num_classes, seed)
        mine.append(as_bytes(decode(images))[: count - start].cpu())
        if progress is not None:
            progress(min(count, done * me.size * size), count)
    parts = distributed.gather(mine)
    ordered = [parts[number % me.size][number // me.size] for number in range(len(starts))]
    return torch.cat(ordered)


@torch.no_grad()
def held_out_loss(
    velocity: Velocity, images: ImageSet, count: int, batch: int, seed: int, device: torch.device
) -> float:
    """Mean squared error of the velocity on held-out images (whole batches of them): times spread evenly over (0, 1), noise
    and times fixed."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = min(count, len(images))
    count = count // batch * batch or count
    for index_B in torch.arange(count).split(batch):
        clean = images.inputs(index_B, torch.zeros(len(index_B), dtype=torch.bool), seed, index_B, device)
        noise = normal(seed, index_B.to(device), images.shape, 2)
        t_B = (((index_B * TIME_ORDER) % count + 0.5) / count).float().to(device)
        t_B111 = t_B[:, None, None, None]
        guessed = velocity((1 - t_B111) * clean + t_B111 * noise, t_B, images.labels[index_B].to(device))
        total += (guessed - (noise - clean)).square().mean((1, 2, 3)).double().sum()
    return float(total) / count
