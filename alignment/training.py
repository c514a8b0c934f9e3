"""The `teacher` stage's body: trains the ViT of the kinds `self` and `label`, on the training images only.

The result is a folder (model.safetensors, teacher.json) named by a hash of everything it depends on, so that runs and
processes that want the same teacher share one. Called by train/teacher_stage.py.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base.built_once import built_once
from ..base.errors import RecipeError
from ..base.files import sha256_json, sha256_tensors, write_json
from ..base.seeding import derive
from .fitting import Pixels, Progress, augmented, fit, rows_at, silent
from .settings import TRAINED, TeacherSettings
from .vit import Classifier, MaskedAutoencoder, ViT

FACTS, WEIGHTS, STATE = "teacher.json", "model.safetensors", "state.pt"
PROBE_ROWS = 20_000
FORMAT = 1


def teacher_identity(settings: TeacherSettings, images: Pixels) -> dict[str, Any]:
    """Everything the weights depend on: the ViT's shape, its training, the data; not how features are cached."""
    names = ("kind", "patch", "width", "layers", "heads", "mask_ratio", "decoder_width", "decoder_layers", "seed")
    return {
        "format": FORMAT,
        **{name: getattr(settings, name) for name in names},
        "train": dataclasses.asdict(settings.train),
        "images": images.digest,
        "flip": images.flip,
    }


def train_teacher(
    settings: TeacherSettings, images: Pixels, device: torch.device, cache: Path, *,
    held_out: Pixels | None = None, progress: Progress = silent,
) -> Path:  # fmt: skip
    """The folder of the trained teacher below `cache`, found again if it was trained before. `held_out`: its linear probe's
    accuracy on these images stands in teacher.json. A killed training goes on from its last minute."""
    if settings.kind not in TRAINED:
        raise RecipeError(f"teacher.kind: {settings.kind} is not trained; {' and '.join(TRAINED)} are", code="CFG-092")
    identity = teacher_identity(settings, images)
    folder = cache / "teachers" / sha256_json(identity)[:32]
    return built_once(folder, lambda out: _train(settings, identity, images, held_out, device, out, progress))


def build_vit(settings: TeacherSettings, image: tuple[int, int, int]) -> ViT:
    """The teacher's ViT with weights drawn from teacher.seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(settings.seed, "teacher", "weights"))
        return ViT(image, settings.patch, settings.width, settings.layers, settings.heads)


def _train(
    settings: TeacherSettings, identity: Mapping[str, Any], images: Pixels, held_out: Pixels | None,
    device: torch.device, out: Path, progress: Progress,
) -> None:  # fmt: skip
    started = time.perf_counter()
    vit = build_vit(settings, images.pixel_shape)
    seed = derive(settings.seed, "teacher", "training")
    shift = max(1, images.pixel_shape[1] // 8) if settings.kind == "label" else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(settings.seed, "teacher", "head"))
        module = _objective(settings, vit, images).to(device)

    labels = images.labels.to(device)

    def loss_at(step: int) -> Tensor:
        rows_B, random = rows_at(step, len(images), settings.train.batch, seed, device)
        pixels = augmented(images, rows_B, random, device, shift=shift)
        if settings.kind == "label":
            return module(pixels, labels[rows_B])
        count = vit.grid[0] * vit.grid[1]
        order_BN = torch.rand(len(rows_B), count, generator=random, device=device).argsort(1)
        return module(pixels, order_BN)

    loss = fit(module, loss_at, settings.train, device, what="teacher", state=out / STATE, progress=progress)
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in vit.state_dict().items()}
    (out / STATE).unlink(missing_ok=True)
    save_file(weights, out / WEIGHTS)
    facts = {
        "kind": settings.kind,
        "identity": dict(identity),
        "weights_sha256": sha256_tensors(weights),
        "loss": loss,
        "seconds": round(time.perf_counter() - started, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "probe_accuracy": None if held_out is None else round(probe(vit, images, held_out, device), 4),
    }
    write_json(out / FACTS, facts)


def _objective(settings: TeacherSettings, vit: ViT, images: Pixels) -> nn.Module:
    if settings.kind == "label":
        return Classifier(vit, images.num_classes)
    return MaskedAutoencoder(
        vit, images.pixel_shape[0], settings.mask_ratio, settings.decoder_width, settings.decoder_layers
    )


@torch.no_grad()
def probe(module: nn.Module, train: Pixels, test: Pixels, device: torch.device, batch: int = 500) -> float:
    """Share of held-out images whose class a ridge regression on the mean token finds: what the features know of the
    classes. A measurement; nothing is trained on labels."""

    def means(images: Pixels) -> tuple[Tensor, Tensor]:
        rows = torch.arange(min(len(images), PROBE_ROWS))
        parts = []
        for index_B in rows.split(batch):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                parts.append(module(images.pixels(index_B, None, device)).float().mean(1))
        return torch.cat(parts).double(), images.labels[rows].to(device)

    x_ND, labels_N = means(train)
    middle, scale = x_ND.mean(0), x_ND.std(0).clamp_min(1e-6)
    x_ND = (x_ND - middle) / scale
    targets_NC = nn.functional.one_hot(labels_N, train.num_classes).double()
    ridge = x_ND.T @ x_ND + 1e-3 * len(x_ND) * torch.eye(x_ND.shape[1], dtype=x_ND.dtype, device=device)
    weights_DC = torch.linalg.solve(ridge, x_ND.T @ (targets_NC - targets_NC.mean(0)))
    y_ND, wanted_N = means(test)
    guessed_N = (((y_ND - middle) / scale) @ weights_DC + targets_NC.mean(0)).argmax(1)
    return float((guessed_N == wanted_N).double().mean())
