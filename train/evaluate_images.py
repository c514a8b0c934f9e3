"""The `evaluate` stage of an image run: samples of the trained U-Net before a judge that is no teacher, beside the floors.

    panel = open_panel(recipe.evaluate.images, train, test, device, cache)      # judge and references, made once, on rank 0
    found = evaluate_images(velocity, panel_or_none, ...)                       # on all ranks

Points: the moving average at every kept step by the first sampler; at the last step by every sampler, and the raw weights by the
first. All points and all runs of one seed start from the same noise and labels. Writes image_results.* and samples/*.png.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.inception import open_inception
from ..alignment.judge import Judge, open_judge
from ..alignment.judging import Reference
from ..alignment.samplers import Velocity
from ..alignment.settings import SamplerSettings
from ..base import distributed
from ..base.seeding import derive
from ..base.tensor_file import read_tensors
from .data.images import ImageSet, cache_folder, open_both
from .image_grid import by_class, grid_image, save_png
from .image_results import FORMAT, write_image_results
from .image_sampling import draw_samples, held_out_loss, velocity_of
from .image_settings import ImageEvaluation
from .recipe import Recipe
from .stages import Context, Writer
from .stages_images import urepa_settings
from .unet_folder import UNetCard, Weights, fill, kept_steps, load_unet, read_card, step_folder

GRID_COLUMNS = 10
SAMPLES = "samples"


@dataclass
class Panel:
    """The judge with its references by count. Only rank 0 has one."""

    judge: Judge
    make: Callable[[int], Reference]
    references: dict[int, Reference] = field(default_factory=dict)

    def reference(self, count: int) -> Reference:
        """Real images in this count (or as many as there are), with their floors."""
        if count not in self.references:
            self.references[count] = self.make(count)
        return self.references[count]


@dataclass(frozen=True)
class Point:
    """One set of samples. `step` None: the last one's."""

    step: int | None
    weights: Weights
    sampler: str
    count: int


def evaluate_settings(recipe: Recipe) -> Mapping[str, Any]:
    """Everything the table depends on."""
    own = json.loads(json.dumps(dataclasses.asdict(recipe.evaluate.images)))
    return {"urepa": urepa_settings(recipe), "images": own, "order": list(recipe.evaluate.images.samplers)}


def open_panel(
    settings: ImageEvaluation, train: ImageSet, test: ImageSet, device: torch.device, cache: Path,
    progress: Callable[[str, int, int], None],
) -> Panel:  # fmt: skip
    """The judge, trained unless it is found below `cache`."""
    judge = open_judge(settings.judge, train, test, device, cache, progress)
    inception = None
    if settings.inception is not None:
        inception = open_inception(Path(settings.inception).expanduser(), device)
    return Panel(judge, lambda count: Reference.of(judge, train, test, settings, count, inception))


def evaluate_images(
    velocity: Velocity, panel: Panel | None, count: int, labels_N: Tensor, shape: tuple[int, int, int],
    sampler: SamplerSettings, num_classes: int, seed: int, device: torch.device, decode: Callable[[Tensor], Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, float], Tensor]:  # fmt: skip
    """(scores, uint8 samples); scores are empty where there is no panel, that is on other ranks than 0. Collective."""
    samples = draw_samples(velocity, labels_N, shape, sampler, num_classes, seed, device, decode, progress)
    scores = {} if panel is None else panel.reference(count).score(samples, labels_N)
    return scores, samples


def points(settings: ImageEvaluation, kept: list[int]) -> list[Point]:
    """What is judged, in order."""
    names = list(settings.samplers)
    curve = [Point(step, "average", names[0], settings.at_count or settings.count) for step in kept]
    last = [Point(None, "average", name, settings.count) for name in names]
    raw = [Point(None, "raw", names[0], settings.count)] if settings.raw else []
    ends_curve = [Point(None, "average", names[0], settings.at_count)] if curve and settings.at_count else []
    return list(dict.fromkeys([*curve, *ends_curve, *last, *raw]))


def run_evaluate(context: Context) -> Writer:
    """Scores of all points, and a grid of samples for each."""
    recipe, settings = context.recipe, context.recipe.evaluate.images
    folder = context.folder.require("urepa", "evaluate")
    card = read_card(folder)
    train, test = open_both(recipe.images, context.device)
    box: list[Panel] = []

    def prepare() -> dict[int, int]:
        box.append(open_panel(settings, train, test, context.device, cache_folder(recipe.images), context.progress))
        wanted = {point.count for point in points(settings, kept_steps(folder))}
        return {count: box[0].reference(count).count for count in wanted}

    counts = distributed.on_main_patiently(prepare)
    panel = box[0] if box else None
    unet = load_unet(folder, "average", context.device)
    velocity = velocity_of(unet, context.device, half=recipe.urepa.dtype == "bfloat16", compiled=recipe.urepa.compile)
    found: list[dict[str, Any]] = []
    pictures: dict[str, Tensor] = {}
    losses: dict[tuple[int | None, str], float] = {}
    placed: tuple[int | None, str] = (None, "average")  # the weights that stand in `unet`
    for point in points(settings, kept_steps(folder)):
        key = (point.step, point.weights)
        if key != placed:
            _put(unet, folder, point)
            placed = key
        started = time.perf_counter()
        count, sampler = counts[point.count], settings.samplers[point.sampler]
        labels_N = train.labels_for(count, recipe.seed)
        step, name = point.step or card.steps, f"{point.weights} {point.sampler}"
        scores, samples = evaluate_images(
            velocity, panel, point.count, labels_N, card.shape, sampler, card.num_classes,
            derive(recipe.seed, "samples"), context.device, train.decode,
            lambda done, total, name=name, step=step: context.progress(f"step {step} {name}", done, total),
        )  # fmt: skip
        if key not in losses:
            losses[key] = held_out_loss(
                velocity, test, settings.count, sampler.batch, derive(0, "held out"), context.device
            )
        scores = {**scores, "velocity_loss": losses[key]}
        seconds = round(time.perf_counter() - started, 2)
        context.event("samples", step=step, **{f"{name.replace(' ', '.')}.{count}": scores}, seconds=seconds)
        found.append(
            {"step": step, "weights": point.weights, "sampler": point.sampler, "count": count, "scores": scores,
             "seconds": seconds}
        )  # fmt: skip
        pictures[f"{step:08d}_{point.weights}_{point.sampler}"] = _chosen(samples, labels_N, card.num_classes)

    def write(out: Path) -> None:
        assert panel is not None
        results = _results(settings, panel, found, card)
        write_image_results(results, out, recipe.name, context.facts)
        for name, images in pictures.items():
            save_png(grid_image(images, GRID_COLUMNS), out / SAMPLES / f"{name}.png")

    return write


def _put(unet: nn.Module, folder: Path, point: Point) -> None:
    """The point's weights into the one U-Net, so that it is compiled once."""
    place = folder if point.step is None else step_folder(folder, point.step)
    fill(unet, read_tensors(place, f"{point.weights}.safetensors"), place)


def _chosen(samples: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    return samples[by_class(labels_N, num_classes, GRID_COLUMNS)].clone()


def _results(settings: ImageEvaluation, panel: Panel, found: list[dict[str, Any]], card: UNetCard) -> dict[str, Any]:
    judge = panel.judge
    used = {reference.count: reference.floors for reference in panel.references.values()}
    return {
        "format": FORMAT,
        "judge": {
            "accuracy": judge.accuracy, "task": judge.task, "digest": judge.digest, "dim": judge.network.dim,
            "device": judge.device.type,
        },
        "unet": card.plain(),
        "classes": list(card.classes),
        "order": list(settings.samplers),
        "samplers": {name: dataclasses.asdict(sampler) for name, sampler in settings.samplers.items()},
        "floors": {str(count): dict(floors) for count, floors in used.items()},
        "points": found,
    }  # fmt: skip
