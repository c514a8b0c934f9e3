"""Export a U-Net as a folder of data, and draw from it.

    export/quietgoose.json      kind `images`; the U-Net's shape, classes, samplers, scores beside their floors, hash of every file
    export/model.safetensors    the moving average, fp32; no projector, no optimizer
    export/vae/                 the autoencoder, where the U-Net works on its latents
    export/samples.png, README.md

Called by the `export` stage and, through `quietgoose.load(path)`, by users:

    sampler = quietgoose.load("runs/urepa_digits/export")
    images = sampler.sample(16, labels="3", seed=0, guidance=1.5)       # uint8 [16, C, H, W]
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import numbers
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..alignment.backbone import build_backbone
from ..alignment.model_settings import BackboneSettings
from ..alignment.settings import SamplerSettings, check_sampler
from ..base.errors import ArtifactError, RecipeError, suggest
from ..base.files import inside, sha256_file, write_atomic, write_json
from ..base.tensor_file import read_tensors
from .data.images import open_images
from .data.latents import Autoencoder, decode_latents, load_vae
from .evaluate_images import SAMPLES
from .export_manifest import FORMAT, IMAGES, MANIFEST, UNET_WEIGHTS
from .image_grid import grid_image
from .image_results import NAME, final_point, read_image_results, table
from .image_sampling import draw_samples, velocity_of
from .recipe import Recipe
from .settings import plain
from .stages import Context, Writer
from .stages_images import urepa_settings
from .unet_folder import UNetCard, fill, read_card

VAE, PICTURE = "vae", "samples.png"


class ImageSampler:
    """A trained U-Net that draws images. `classes`: names of the labels; `settings`: how it samples unless told otherwise."""

    def __init__(
        self, unet: nn.Module, card: UNetCard, settings: SamplerSettings, samplers: Mapping[str, SamplerSettings],
        device: torch.device, *, half: bool, vae: Autoencoder | None = None, channels: int = 3,
    ) -> None:  # fmt: skip
        self.unet, self.card, self.settings, self.samplers = unet, card, settings, dict(samplers)
        self.device, self.classes, self.vae = device, card.classes, vae
        self._channels = channels
        self._velocity = velocity_of(unet, device, half=half)

    def sample(
        self, n: int, labels: int | str | Sequence[int | str] | Tensor | None = None, seed: int = 0,
        guidance: float | None = None, steps: int | None = None, method: str | None = None, batch: int | None = None,
    ) -> Tensor:  # fmt: skip
        """uint8 [n, C, H, W] on the CPU. Image i depends on seed, i and its label only (to the last bit also on the batch).

        labels     a class for all, by number or name, or one for each; None: the classes in turn
        guidance   classifier-free; 1 is none          steps, method (euler, heun, sde), batch: of the sampler

        RecipeError CFG-094 for what cannot be.
        """
        for name, value in (("n", n), ("seed", seed), ("steps", steps), ("batch", batch)):
            if value is not None and not _is_whole(value):
                raise RecipeError(f"{name}: {value!r}; a whole number", code="CFG-094")
        if guidance is not None and not isinstance(guidance, numbers.Real):
            raise RecipeError(f"guidance: {guidance!r}; a number", code="CFG-094")
        changes = {"guidance": guidance, "steps": steps, "method": method, "batch": batch}
        settings = dataclasses.replace(self.settings, **{k: v for k, v in changes.items() if v is not None})
        problems = check_sampler(settings, "sample")
        if n < 1:
            problems.append(f"n: {n}; at least 1")
        if settings.method not in ("euler", "heun", "sde"):
            problems.append(f"method: {settings.method!r}; allowed are euler, heun, sde")
        if problems:
            raise RecipeError("; ".join(problems), code="CFG-094")
        return draw_samples(
            self._velocity, self.labels(n, labels), self.card.shape, settings, self.card.num_classes, seed, self.device,
            self._decode,
        )  # fmt: skip

    def labels(self, n: int, labels: int | str | Sequence[int | str] | Tensor | None = None) -> Tensor:
        """int64 [n]: what `sample` makes of its argument `labels`. RecipeError CFG-094 for what is no class."""
        if labels is None:
            return torch.arange(n) % self.card.num_classes
        given: Any = labels.tolist() if isinstance(labels, Tensor) else labels
        several = isinstance(given, Iterable) and not isinstance(given, str)
        wanted = list(given) if several else [given] * n
        if len(wanted) != n:
            raise RecipeError(
                f"labels: {len(wanted)} for {n} images; give one for all, or one for each", code="CFG-094"
            )
        return torch.tensor([self._number(label) for label in wanted])

    def grid(self, images: Tensor, columns: int = 8) -> Image.Image:
        """The images side by side, as a Pillow image. RecipeError CFG-094 for fewer than one column or image."""
        if not _is_whole(columns) or columns < 1 or len(images) < 1:
            raise RecipeError(f"columns: {columns!r} for {len(images)} images; at least 1 of each", code="CFG-094")
        return grid_image(images, columns)

    def _number(self, label: Any) -> int:
        if isinstance(label, str) and label in self.classes:
            return self.classes.index(label)
        if _is_whole(label) or (isinstance(label, str) and label.isdecimal()):
            number = int(label)
            if 0 <= number < len(self.classes):
                return number
        names = list(self.classes)
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise RecipeError(
            f"label {label!r}: allowed are 0 to {len(names) - 1} or a class ({shown}).{suggest(str(label), names)}",
            code="CFG-094",
        )

    def _decode(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW if self.vae is None else decode_latents(self.vae, images_BCHW, self._channels)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def export_settings(recipe: Recipe) -> Mapping[str, Any]:
    """Everything the export depends on."""
    samplers = [[name, dataclasses.asdict(sampler)] for name, sampler in recipe.evaluate.images.samplers.items()]
    return {"urepa": urepa_settings(recipe), "samplers": samplers}


def run_export(context: Context) -> Writer:
    source = context.folder.require("urepa", "export")
    evaluated = context.folder.result("evaluate")
    pixels = open_images(dataclasses.replace(context.recipe.images, vae=None))
    channels = pixels.pixel_shape[0]
    return lambda folder: export_sampler(folder, source, context.recipe, evaluated, channels)


def export_sampler(folder: Path, source: Path, recipe: Recipe, evaluated: Path, channels: int) -> None:
    """Write the export into `folder` (empty; the caller renames it into place) from the `urepa` stage's result. `channels`: of
    the images, which latents do not tell."""
    card = read_card(source)
    shutil.copyfile(source / "average.safetensors", folder / UNET_WEIGHTS)
    vae = None
    if recipe.images.vae is not None:
        origin = Path(recipe.images.vae).expanduser()
        (folder / VAE).mkdir()
        for path in (origin / "config.json", *sorted(origin.glob("*.safetensors"))):
            shutil.copyfile(path, folder / VAE / path.name)
        vae = {"folder": VAE, "channels": channels}
    results = read_image_results(evaluated) if (evaluated / f"{NAME}.json").is_file() else None
    picture = _picture(evaluated, results)
    if picture is not None:
        shutil.copyfile(picture, folder / PICTURE)
    write_atomic(folder / "README.md", _card(card, recipe, results, shown=picture is not None))
    files = {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {
        "format": FORMAT,
        "kind": IMAGES,
        "unet": card.plain(),
        "dtype": recipe.urepa.dtype,
        "vae": vae,
        # a list, as the first is what `sample` does by itself
        "samplers": [{"name": name, **dataclasses.asdict(one)} for name, one in recipe.evaluate.images.samplers.items()],
        "results": None if results is None else {"judge": results["judge"], "final": dict(final_point(results)),
                                                 "floors": results["floors"]},
        "recipe": plain(recipe),
        "versions": {name: importlib.metadata.version(name) for name in ("quietgoose", "torch")},
        "files": files,
    }  # fmt: skip
    write_json(folder / MANIFEST, manifest)


def open_sampler(folder: Path, manifest: Mapping[str, Any], device: torch.device) -> ImageSampler:
    """From a manifest that was checked with its files (export_manifest.py). ArtifactError EXP-003 if what it says is no U-Net,
    EXP-004 if the tensors are of another."""
    try:
        card, samplers = _unet_card(manifest["unet"]), _samplers_of(manifest["samplers"])
        unet = build_backbone(card.backbone, card.shape, card.num_classes, seed=0)
    except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
        raise ArtifactError(
            f"{folder / MANIFEST}: describes no U-Net ({type(error).__name__}: {error}). Restore it or export again",
            code="EXP-003",
        ) from error
    fill(unet, read_tensors(folder, UNET_WEIGHTS), folder)
    unet.to(device).eval().requires_grad_(False)
    vae, channels = None, card.shape[0]
    if manifest["vae"] is not None:
        vae, _ = load_vae(inside(folder, manifest["vae"]["folder"]), device)
        channels = manifest["vae"]["channels"]
    first, half = next(iter(samplers.values())), manifest["dtype"] == "bfloat16"
    return ImageSampler(unet, card, first, samplers, device, half=half, vae=vae, channels=channels)


def _unet_card(facts: Mapping[str, Any]) -> UNetCard:
    """From JSON; KeyError, TypeError or ValueError if something is missing, surplus or of another kind."""
    facts = dict(facts)
    facts.pop("format")
    backbone, shape, classes = BackboneSettings(**facts.pop("backbone")), facts.pop("shape"), facts.pop("classes")
    if len(shape) != 3 or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f"shape {shape!r}")
    if not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError("classes are no names")
    return UNetCard(backbone, tuple(shape), tuple(classes), **facts)  # type: ignore[arg-type]


def _samplers_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, SamplerSettings]:
    """By name, in order; TypeError or ValueError as above."""
    found = {}
    for entry in entries:
        settings = SamplerSettings(**{name: value for name, value in entry.items() if name != "name"})
        problems = check_sampler(settings, f"samplers.{entry['name']}")
        if problems:
            raise ValueError("; ".join(problems))
        found[entry["name"]] = settings
    return found


def _picture(evaluated: Path, results: Mapping[str, Any] | None) -> Path | None:
    if results is None:
        return None
    point = final_point(results)
    path = evaluated / SAMPLES / f"{point['step']:08d}_{point['weights']}_{point['sampler']}.png"
    return path if path.is_file() else None


def _card(card: UNetCard, recipe: Recipe, results: Mapping[str, Any] | None, *, shown: bool) -> str:
    aligned = recipe.teacher.kind != "none" and recipe.urepa.align.weight > 0
    how = (
        f"aligned with a frozen teacher (`{recipe.teacher.kind}`) at `{card.tap}`"
        if aligned
        else "trained without a teacher"
    )
    sizes = f"{card.shape[0]}x{card.shape[1]}x{card.shape[2]}"
    return f"""---
library_name: quietgoose
tags: [diffusion, unconditional-image-generation, class-conditional{", u-repa" if aligned else ""}]
---
# A diffusion U-Net of {card.num_classes} classes

It draws {sizes} {"latents" if recipe.images.vae else "images"}, {how}, for {card.steps} steps on `{recipe.images.source}`. These are
the moving average's weights; what the alignment was trained with is not part of it.

```python
import quietgoose
sampler = quietgoose.load("this folder")
images = sampler.sample(16, seed=0)          # uint8 [16, C, H, W]
sampler.grid(images).save("grid.png")
```
{"![samples](samples.png)" if shown else ""}

Classes: {", ".join(card.classes[:50])}{", ..." if len(card.classes) > 50 else ""}.

{_table(results)}
"""


def _table(results: Mapping[str, Any] | None) -> str:
    if results is None:
        return ""
    header, rows = table(results)
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{text}\n\nDistances in the features of this run's judge; comparable only at one count, and never with FID."
