"""The judge: a small residual convolutional network in whose features samples are compared with images.

It has another architecture, task and seed than any teacher, and is trained before any arm. It learns the classes; where there
is one class only, which quarter turn an image was given. Distances in its features are called JFD and KID-J, not FID, which
belongs to one set of Inception weights. Its folder (model.safetensors, judge.json) is named by a hash of everything it
depends on, so that arms and processes share one. Called by judging.py.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base.built_once import built_once
from ..base.errors import ArtifactError
from ..base.files import read_json, sha256_json, sha256_tensors, write_json
from ..base.seeding import derive
from ..base.tensor_file import read_tensors
from .fitting import Pixels, Progress, augmented, fit, rows_at, silent
from .settings import JudgeSettings

FACTS, WEIGHTS, STATE = "judge.json", "model.safetensors", "state.pt"
TURNS = 4
PORTION = 1000
FORMAT = 1


class Residual(nn.Module):
    """x + two convolutions of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(width, width), _convolution(width, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.second(self.first(x_BCHW))


class JudgeNetwork(nn.Module):
    """(logits [B, classes], features [B, 4 * width]) of images [B, C, H, W]; halves the sides while they are above 4."""

    def __init__(self, image: tuple[int, int, int], num_classes: int, width: int) -> None:
        super().__init__()
        channels, height, length = image
        self.dim = 4 * width
        stages: list[nn.Module] = [_convolution(channels, width)]
        held = width
        for grown in (2 * width, 4 * width, 4 * width):
            stages.append(_convolution(held, grown))
            if min(height, length) > 4:
                stages.append(nn.MaxPool2d(2))
                height, length = height // 2, length // 2
            stages.append(Residual(grown))
            held = grown
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(self.dim, num_classes)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        features_BD = self.stages(images_BCHW.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        return self.head(features_BD), features_BD


@dataclass(frozen=True)
class Judge:
    """A trained judge. `accuracy`: on held-out images, at `task` (classes or turns)."""

    network: JudgeNetwork
    digest: str
    accuracy: float
    task: str
    device: torch.device

    @torch.no_grad()
    def look(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, features), fp32, of images in [-1, 1], in portions."""
        found = []
        for part in images_BCHW.split(PORTION):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                found.append(self.network(part.to(self.device)))
        return torch.cat([f[0].float() for f in found]), torch.cat([f[1].float() for f in found])


def open_judge(
    settings: JudgeSettings, train: Pixels, held_out: Pixels, device: torch.device, cache: Path,
    progress: Progress = silent,
) -> Judge:  # fmt: skip
    """The judge of these images, trained at the first call (about 770,000 images by default; processes that come meanwhile
    wait; a killed training goes on). ArtifactError EXP-004 if its file changed."""
    identity = {
        "format": FORMAT, **dataclasses.asdict(settings), "train": train.digest, "test": held_out.digest,
        "fit": dataclasses.asdict(settings.train), "flip": train.flip,
    }  # fmt: skip
    folder = cache / "judges" / sha256_json(identity)[:32]
    built_once(folder, lambda out: _train(settings, identity, train, held_out, device, out, progress))
    facts = read_json(folder / FACTS)
    network, task = _network(settings, train)
    weights = read_tensors(folder, WEIGHTS)
    if sha256_tensors(weights) != facts["weights_sha256"]:
        raise ArtifactError(f"{folder / WEIGHTS}: is not what was trained; delete {folder} to redo it", code="EXP-004")
    network.load_state_dict(weights, strict=False)  # batch counters of the norms are not kept
    network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    return Judge(network, facts["weights_sha256"], facts["accuracy"], task, device)


def _network(settings: JudgeSettings, images: Pixels) -> tuple[JudgeNetwork, str]:
    task = "classes" if images.num_classes > 1 else "turns"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(settings.seed, "judge", "weights"))
        outputs = images.num_classes if task == "classes" else TURNS
        return JudgeNetwork(images.pixel_shape, outputs, settings.width), task


def _train(
    settings: JudgeSettings, identity: Mapping[str, Any], train: Pixels, held_out: Pixels, device: torch.device,
    out: Path, progress: Progress,
) -> None:  # fmt: skip
    started = time.perf_counter()
    network, task = _network(settings, train)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    labels = train.labels.to(device)
    seed = derive(settings.seed, "judge", "training")
    shift = max(1, train.pixel_shape[1] // 8)

    def loss_at(step: int) -> Tensor:
        rows_B, random = rows_at(step, len(train), settings.train.batch, seed, device)
        pixels = augmented(train, rows_B, random, device, shift=shift)
        if task == "classes":
            return F.cross_entropy(network(pixels)[0].float(), labels[rows_B], label_smoothing=0.1)
        turned, turn_B = _turned(pixels)
        return F.cross_entropy(network(turned)[0].float(), turn_B)

    fit(network, loss_at, settings.train, device, what="judge", state=out / STATE, progress=progress)
    judge = Judge(network, "", 0.0, task, device)
    kept = {k: v.detach().float().cpu().contiguous() for k, v in network.state_dict().items() if v.is_floating_point()}
    (out / STATE).unlink(missing_ok=True)
    save_file(kept, out / WEIGHTS)
    write_json(
        out / FACTS,
        {
            "identity": dict(identity),
            "task": task,
            "accuracy": round(_accuracy(judge, held_out), 4),
            "weights_sha256": sha256_tensors(kept),
            "seconds": round(time.perf_counter() - started, 1),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
    )


def _accuracy(judge: Judge, images: Pixels) -> float:
    right = total = 0
    for index_B in torch.arange(len(images)).split(PORTION):
        pixels, wanted_B = images.pixels(index_B, None, judge.device), images.labels[index_B].to(judge.device)
        if judge.task == "turns":
            pixels, wanted_B = _turned(pixels)
        right += int((judge.look(pixels)[0].argmax(1) == wanted_B).sum())
        total += len(wanted_B)
    return right / total


def _turned(pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """All four quarter turns of every image (cut to a square), and which."""
    side = min(pixels_BCHW.shape[2:])
    square = pixels_BCHW[:, :, :side, :side]
    turned = torch.cat([torch.rot90(square, turn, (2, 3)) for turn in range(TURNS)])
    return turned, torch.arange(TURNS, device=pixels_BCHW.device).repeat_interleave(len(pixels_BCHW))


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.GELU(approximate="tanh")
    )
