"""Teachers: frozen networks that turn clean images into tokens; the U-Net is aligned with them. They live outside the engine.

    teacher = open_teacher(settings, images, device, folder)       # folder: of the `teacher` stage, for self and label
    teacher.features(images_BCHW)                                  # fp32 [B, N, D]; images in [-1, 1]

Kinds: alignment/settings.py. A `file` teacher is any ViT of transformers whose last hidden state ends with the patch tokens
(ViT, DINOv2 with or without registers, DINOv3, MAE's encoder without masking); images are resized bicubically and
normalised as its preprocessor says (REPA train.py:48-51). features.py keeps features on disk. Called by train/jobs/urepa.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.errors import ArtifactError, RecipeError
from ..base.files import read_json, sha256_file, sha256_json, sha256_tensors
from ..base.tensor_file import read_tensors
from .fitting import Pixels
from .settings import TRAINED, TeacherSettings
from .training import FACTS, WEIGHTS, build_vit, teacher_identity

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NONE = ("none", "ema")
"""Kinds without a network from outside."""


@dataclass(frozen=True)
class Teacher:
    """A frozen network. `own_grid`: its tokens' rows and columns; `grid`: after teacher.grid; `digest` names weights and
    preparation, so that features can be kept under it."""

    kind: str
    module: nn.Module
    tokens: Callable[[Tensor], Tensor]
    dim: int
    own_grid: tuple[int, int]
    grid: tuple[int, int]
    digest: str
    device: torch.device

    @torch.no_grad()
    def features(self, images_BCHW: Tensor) -> Tensor:
        """fp32 [B, N, D] of clean images in [-1, 1]; N = grid rows * columns. bf16 inside on a GPU."""
        images = images_BCHW.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            tokens_BND = self.tokens(images)
        return resize_tokens(tokens_BND.float(), self.own_grid, self.grid)


def open_teacher(
    settings: TeacherSettings, images: Pixels, device: torch.device, folder: Path | None = None
) -> Teacher | None:
    """The recipe's teacher, frozen, on `device`; None for the kinds without one. `folder`: where train_teacher put it.

    Raises ArtifactError EXP-002, EXP-004 (folder not there, or of another teacher), RecipeError CFG-092.
    """
    if settings.kind in NONE:
        return None
    if settings.kind == "file":
        module, tokens, dim, grid, digest = _from_file(settings, images, device)
    else:
        vit = build_vit(settings, images.pixel_shape)
        if settings.kind in TRAINED:
            vit.load_state_dict(_trained(settings, images, folder))
        module, tokens, dim, grid = vit, vit, vit.width, vit.grid
        digest = sha256_json(
            [sha256_tensors(vit.state_dict()), settings.heads]
        )  # no weight tells how many heads there are
    module.to(device).eval().requires_grad_(False)
    wanted = grid if settings.grid is None else (settings.grid, settings.grid)
    digest = sha256_json([digest, grid, wanted])
    return Teacher(settings.kind, module, tokens, dim, grid, wanted, digest, device)


def resize_tokens(tokens_BND: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Tokens of one grid on another: bilinear (align_corners false), by area where both sides shrink."""
    if grid == wanted:
        return tokens_BND
    maps = tokens_BND.mT.reshape(len(tokens_BND), -1, *grid)
    if wanted[0] <= grid[0] and wanted[1] <= grid[1]:
        return F.adaptive_avg_pool2d(maps, wanted).flatten(2).mT
    return F.interpolate(maps, wanted, mode="bilinear", align_corners=False).flatten(2).mT


def _trained(settings: TeacherSettings, images: Pixels, folder: Path | None) -> dict[str, Tensor]:
    if folder is None or not (folder / FACTS).is_file():
        raise ArtifactError(
            f"teacher.kind {settings.kind}: its folder {folder or ''} has no {FACTS}; put 'teacher' before 'urepa' in stages",
            code="EXP-002",
        )
    facts = read_json(folder / FACTS)
    identity = teacher_identity(settings, images)
    changed = sorted(name for name in identity if facts["identity"].get(name) != identity[name])
    if changed:
        raise ArtifactError(
            f"{folder}: this teacher was trained with other {', '.join(changed)}; train it again", code="EXP-004"
        )
    weights = read_tensors(folder, WEIGHTS)
    if sha256_tensors(weights) != facts["weights_sha256"]:
        raise ArtifactError(f"{folder / WEIGHTS}: is not what was trained; delete {folder} to redo it", code="EXP-004")
    return weights


def _from_file(
    settings: TeacherSettings, images: Pixels, device: torch.device
) -> tuple[nn.Module, Callable[[Tensor], Tensor], int, tuple[int, int], str]:
    """(module, images -> tokens, width, grid, digest) of a transformers folder."""
    from transformers import AutoModel

    folder = Path(settings.path or "").expanduser()
    weights = sorted(folder.glob("*.safetensors"))
    if settings.path is None or not (folder / "config.json").is_file() or not weights:
        raise RecipeError(
            f"teacher.path: {settings.path}: needs a folder with config.json and *.safetensors of a ViT or DINOv2",
            code="CFG-092",
        )
    try:
        model: Any = AutoModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise RecipeError(f"teacher.path: {folder}: cannot be opened ({error})", code="CFG-092") from error
    patch = getattr(model.config, "patch_size", None)
    if not isinstance(patch, int) or not hasattr(model.config, "hidden_size"):
        raise RecipeError(f"teacher.path: {folder}: {type(model).__name__} is no ViT of square patches", code="CFG-092")
    if settings.resize % patch:
        low = settings.resize // patch * patch
        raise RecipeError(
            f"teacher.resize: {settings.resize} is no multiple of the patch, {patch}; {low} or {low + patch} are",
            code="CFG-092",
        )
    side = settings.resize // patch
    prepare = _preparation(folder, settings.resize, device)
    options = _interpolating(model)

    def tokens(images_BCHW: Tensor) -> Tensor:
        hidden_BND = model(pixel_values=prepare(images_BCHW), **options).last_hidden_state
        if hidden_BND.shape[1] < side * side:
            raise RecipeError(
                f"teacher.path: {folder}: {type(model).__name__} gives {hidden_BND.shape[1]} tokens for {side}x{side} patches",
                code="CFG-092",
            )
        return hidden_BND[:, -side * side :]  # before them: the class token and registers

    extra = [path for path in (folder / "config.json", folder / "preprocessor_config.json") if path.is_file()]
    digest = sha256_json([settings.resize, *(sha256_file(path) for path in [*extra, *weights])])
    return model, tokens, int(model.config.hidden_size), (side, side), digest


def _preparation(folder: Path, side: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """[-1, 1] -> what the network was trained on."""
    file = folder / "preprocessor_config.json"
    known = read_json(file) if file.is_file() else {}
    mean = torch.tensor(known.get("image_mean") or IMAGENET_MEAN, device=device).view(1, -1, 1, 1)
    std = torch.tensor(known.get("image_std") or IMAGENET_STD, device=device).view(1, -1, 1, 1)

    def prepare(images_BCHW: Tensor) -> Tensor:
        unit = (images_BCHW.float() + 1.0) / 2.0
        unit = unit.expand(-1, 3, -1, -1) if unit.shape[1] == 1 else unit
        unit = F.interpolate(unit, (side, side), mode="bicubic", align_corners=False, antialias=True)
        return (unit - mean) / std

    return prepare


def _interpolating(model: Any) -> dict[str, bool]:
    """Options that let a model take another size than it was trained on; DINOv2 does so by itself."""
    names = inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in names else {}
