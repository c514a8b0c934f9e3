"""The dry run of an image recipe: sizes, taps, grids, arithmetic, memory, and for a comparison the commands. No GPU, no weights, no
image decoded but the first.

    python launch/train.py --config launch/recipes/urepa_cifar.yaml --dry_run

Memory: weights, gradients, moments as train/state_memory.py, the moving average 4 bytes a parameter of the backbone (divided over the
processes above ZeRO-0), and the peak of a micro-batch as train/image_memory.py finds it. The teacher is not counted where its tokens
come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..alignment.taps import describe_tap, resolve_tap
from ..base.errors import DataError
from ..base.files import read_json
from .compare_settings import launch_lines, run_names
from .data.image_sources import open_source, to_array
from .data.image_steps import image_share
from .image_flops import meta_backbone, meta_projector, training_flops
from .image_memory import step_bytes
from .jobs.urepa import TeacherShape
from .plan import CHECKPOINT_BYTES, ZERO_STAGES, size
from .recipe import Recipe
from .state_memory import Trained, held
from .strategy import load_strategy, zero_stage

AVERAGE_BYTES = 4
SHOWN_GPUS = 4


@dataclass(frozen=True)
class ImagePlan:
    """`shape`: what the U-Net sees. `flops`: of one image in one training step, forward and backward, without the teacher.
    `memory`: bytes of one process by ZeRO stage, `activations` of them only while a micro-batch is computed."""

    shape: tuple[int, int, int]
    num_classes: int
    images: int
    backbone: int
    projector: int
    tap: str
    teacher: str
    flops: int
    steps: int
    rows: int
    micro_batches: int
    activations: int
    memory: dict[int, int]
    chosen: int
    checkpoint: int


def make_image_plan(recipe: Recipe, world: int = 1) -> ImagePlan:
    """Everything the dry run shows. Raises what opening the source and building the U-Net on the meta device raise."""
    settings, train = recipe.urepa, recipe.urepa.train
    pixels, classes, images = look(recipe)
    shape = latent_shape(recipe.images.vae, pixels)
    unet = meta_backbone(settings.backbone, shape, classes)
    backbone = sum(p.numel() for p in unet.parameters())
    dim, grid = teacher_tokens(recipe, pixels, unet)
    tap, projector = "none", 0
    if recipe.teacher.kind != "none":
        tap = describe_tap(unet, resolve_tap(unet, settings.align.tap))
        projector = sum(p.numel() for p in meta_projector(unet, settings.align, dim, grid).parameters())
    share = image_share(train.rows_per_expert, train.micro_rows, world)
    align = settings.align if recipe.teacher.kind != "none" else None
    shown = TeacherShape(dim, grid, own=recipe.teacher.kind == "ema") if align is not None else None
    activations = step_bytes(settings, shape, classes, shown, share.rows)
    teaches = AVERAGE_BYTES * backbone if shown is not None and shown.own else 0
    strategy = train.strategy or recipe.strategy
    chosen, trained = zero_stage(strategy), Trained(backbone + projector, micros=share.micros)
    by_stage = {z: held(trained, load_strategy(strategy if z == chosen else f"zero{z}"), world) for z in ZERO_STAGES}
    return ImagePlan(
        shape, classes, images, backbone, projector, tap, f"{recipe.teacher.kind}, {grid[0]}x{grid[1]} tokens of width {dim}",
        flops=training_flops(settings.backbone, align, shape, classes, dim, grid), steps=train.steps,
        rows=train.rows_per_expert, micro_batches=share.micros, activations=activations,
        memory={z: one.peak(activations) + average_bytes(backbone, z, world) + teaches for z, one in by_stage.items()},
        chosen=chosen,
        checkpoint=(backbone + projector) * CHECKPOINT_BYTES + backbone * AVERAGE_BYTES,
    )  # fmt: skip


def average_bytes(backbone: int, zero: int, world: int) -> int:
    return AVERAGE_BYTES * backbone // (world if zero else 1)


def look(recipe: Recipe) -> tuple[tuple[int, int, int], int, int]:
    """(shape of the images, classes, rows of the training split), from the first image."""
    images = recipe.images
    source = open_source(images, images.source, images.split)
    assert source is not None
    first = source.image(0)
    colour = images.colour
    if colour == "auto":
        colour = "grey" if first.mode in ("L", "1", "LA") or first.mode.startswith("I") else "rgb"
    channels, height, width = to_array(first, colour, images.size, "the first image").shape
    return (channels, height, width), len(source.classes), len(range(len(source))[: images.limit])


def latent_shape(vae: str | None, pixels: tuple[int, int, int]) -> tuple[int, int, int]:
    """What the U-Net sees of such images. DataError DATA-044 if the autoencoder's folder does not say what it makes of them."""
    if vae is None:
        return pixels
    path = Path(vae).expanduser() / "config.json"
    try:
        config = read_json(path)
        shrinks = 2 ** (len(config["block_out_channels"]) - 1)  # a level halves the sides, but for the last
        return int(config["latent_channels"]), pixels[1] // shrinks, pixels[2] // shrinks
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"images.vae: {path}: not that of an AutoencoderKL ({error})", code="DATA-044") from error


def teacher_tokens(recipe: Recipe, pixels: tuple[int, int, int], unet: Any) -> tuple[int, tuple[int, int]]:
    """(width, grid) of the teacher's tokens. A teacher sees images, also where the U-Net sees latents."""
    teacher = recipe.teacher
    if teacher.kind == "none":
        return 0, (0, 0)
    if teacher.kind == "ema":
        return unet.tap_shape(resolve_tap(unet, recipe.urepa.align.teacher_tap, "urepa.align.teacher_tap"))
    if teacher.kind == "file":
        config = read_json(Path(teacher.path or "").expanduser() / "config.json")
        dim, side = int(config["hidden_size"]), teacher.resize // int(config["patch_size"])
        grid = (side, side)
    else:
        dim, grid = teacher.width, (pixels[1] // teacher.patch, pixels[2] // teacher.patch)
    return dim, grid if teacher.grid is None else (teacher.grid, teacher.grid)


def _compiled(recipe: Recipe) -> str:
    return ", less when compiled" if recipe.urepa.compile else ""


def show_image_plan(recipe: Recipe, world: int = 1, arguments: Sequence[str] = ()) -> ImagePlan:
    """Print the plan as tables on stdout; returns it. `arguments`: the command line, for the commands of a comparison."""
    import sys

    from rich.console import Console
    from rich.table import Table

    plan = make_image_plan(recipe, world)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(title=f"{recipe.name}: {', '.join(recipe.stages)} -> {recipe.output}", show_header=False)
    channels, height, width = plan.shape
    table.add_row("images", f"{plan.images:,} of {height}x{width}x{channels}, {plan.num_classes} classes")
    table.add_row("U-Net", f"{recipe.urepa.backbone.kind}, {plan.backbone:,} parameters, {recipe.urepa.dtype}")
    table.add_row("teacher", plan.teacher if recipe.teacher.kind != "none" else "none")
    table.add_row("tap", plan.tap)
    table.add_row("projector", f"{plan.projector:,} parameters, in training only")
    seen = plan.steps * plan.rows
    table.add_row(
        "training",
        f"{plan.steps:,} steps of {plan.rows} images in {plan.micro_batches} micro-batches: {seen / plan.images:.1f} epochs",
    )
    table.add_row(
        "arithmetic",
        f"{plan.flops / 1e9:.1f} GFLOP an image and step, {plan.flops * seen / 1e15:.2f} PFLOP in all, teacher apart",
    )
    table.add_row("checkpoint", size(plan.checkpoint))
    table.add_row("processes", str(world))
    table.add_row("a micro-batch", f"{size(plan.activations)} of activations and work space{_compiled(recipe)}")
    console.print(table)
    memory = Table("", *(f"ZeRO-{z}" for z in ZERO_STAGES), title="memory of one process, estimated")
    memory.add_row("urepa", *(size(plan.memory[z]) + (" *" if z == plan.chosen else "") for z in ZERO_STAGES))
    console.print(memory)
    if "compare" in recipe.stages:
        print(f"runs: {', '.join(run_names(recipe))}")
        console.print(f"on {SHOWN_GPUS} GPUs:")
        for line in launch_lines(recipe, arguments, SHOWN_GPUS):
            print(line)  # whole, to be copied
    console.print("* the strategy of the recipe. Nothing was trained or written.")
    return plan
