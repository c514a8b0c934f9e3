"""The result of the `urepa` stage on disk, read again by evaluation, export and comparison.

    unet.json               how to build the U-Net: backbone, image shape, classes, data, tap, steps
    average.safetensors     its moving average, fp32          raw.safetensors   the weights as trained, fp32
    projector.safetensors   what the alignment was trained with; not exported
    steps/00000500/         the same weights at the steps of evaluate.images.at (average, raw)

Called by train/stages_images.py (save) and by whoever wants the model: `load_unet(folder, "average")`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..alignment.backbone import build_backbone
from ..alignment.model_settings import BackboneSettings
from ..base.errors import ArtifactError
from ..base.files import read_json, write_json
from ..base.tensor_file import read_tensors
from .jobs.urepa import BACKBONE, PROJECTOR
from .state import AVERAGE

FACTS = "unet.json"
STEPS = "steps"
FORMAT = 1
Weights = Literal["average", "raw"]
WEIGHTS: tuple[Weights, ...] = ("average", "raw")


@dataclass(frozen=True)
class UNetCard:
    """What unet.json says. `shape`: (C, H, W) that the U-Net sees; `classes`: names in the order of their numbers."""

    backbone: BackboneSettings
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    data: str
    steps: int
    tap: str = ""
    teacher: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def split_trained(trained: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`average`, `raw`, `projector` -> tensors by their own names, from what the engine hands out."""
    prefixes = {AVERAGE: f"{AVERAGE}/{BACKBONE}.", "raw": f"{BACKBONE}.", PROJECTOR: f"{PROJECTOR}."}
    return {
        kind: {name.removeprefix(prefix): tensor for name, tensor in trained.items() if name.startswith(prefix)}
        for kind, prefix in prefixes.items()
    }


def save_weights(trained: Mapping[str, Tensor], folder: Path, kinds: Sequence[str] = WEIGHTS) -> None:
    """A safetensors file for each kind that has tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, tensors in split_trained(trained).items():
        if kind in kinds and tensors:
            whole = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(whole, folder / f"{kind}.safetensors")


def save_unet(card: UNetCard, trained: Mapping[str, Tensor], folder: Path) -> None:
    save_weights(trained, folder, (*WEIGHTS, PROJECTOR))
    write_json(folder / FACTS, card.plain())


def read_card(folder: Path) -> UNetCard:
    """ArtifactError EXP-001 if there is none, EXP-004 if it is of another format."""
    path = folder / FACTS
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file", code="EXP-001")
    return card_of(read_json(path), path)


def card_of(plain: Mapping[str, Any], path: Path) -> UNetCard:
    """From what `UNetCard.plain` made, read from `path`. ArtifactError EXP-004 if it is something else."""
    facts = dict(plain)
    try:
        known = facts.pop("format")
        if known != FORMAT:
            raise ArtifactError(f"{path}: format {known}; this release reads {FORMAT}", code="EXP-004")
        settings = BackboneSettings(**facts.pop("backbone"))
        shape, classes = tuple(facts.pop("shape")), tuple(facts.pop("classes"))
        return UNetCard(settings, shape, classes, **facts)  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not the card of a U-Net ({error})", code="EXP-004") from error


def load_unet(
    folder: Path, weights: Weights = "average", device: torch.device | str = "cpu", step: int | None = None
) -> nn.Module:
    """The U-Net, frozen and in evaluation mode; `step`: as it was after that many steps.

    ArtifactError EXP-001 if a file is not there, EXP-004 if the tensors are not this U-Net's.
    """
    card = read_card(folder)
    model = build_backbone(card.backbone, card.shape, card.num_classes, seed=0)
    place = folder if step is None else step_folder(folder, step)
    fill(model, read_tensors(place, f"{weights}.safetensors"), place)
    return model.to(device).eval().requires_grad_(False)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], place: Path) -> None:
    """Put the tensors into the model; ArtifactError EXP-004 unless names and shapes are exactly its own."""
    own = {name: parameter.shape for name, parameter in model.named_parameters()}
    wrong = sorted(set(own) ^ set(tensors)) or [n for n, shape in own.items() if tensors[n].shape != shape]
    if wrong:
        raise ArtifactError(f"{place}: tensors of another U-Net: {', '.join(wrong[:5])}", code="EXP-004")
    model.load_state_dict(dict(tensors), strict=False)


def step_folder(folder: Path, step: int) -> Path:
    return folder / STEPS / f"{step:08d}"


def kept_steps(folder: Path) -> list[int]:
    """Steps whose weights are kept, in order."""
    return sorted(int(path.name) for path in (folder / STEPS).glob("[0-9]*") if path.is_dir())
