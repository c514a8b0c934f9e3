"""Draw images from the export of a U-Net:

    python launch/sample.py --model runs/urepa_digits/export --count 64 --out grid.png
    python launch/sample.py --model runs/urepa_cifar/export --labels cat,dog --count 32 --guidance 2 --out animals.npz

--out ending in .png is a grid, in .npz the arrays `images` (uint8, N C H W) and `labels`; anything else is a folder with a
PNG for every image. Only safetensors are read. Called as `quietgoose sample` too.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from quietgoose.base.errors import RecipeError
from quietgoose.base.files import check_writable, storing, write_atomic
from quietgoose.launch.command import run_command

Method = Literal["euler", "heun", "sde"]


def sample(
    model: str,
    out: str = "samples.png",
    count: int = 64,
    labels: str | None = None,
    seed: int = 0,
    sampler: str | None = None,
    method: Method | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int | None = None,
    columns: int = 8,
    device: str = "auto",
) -> None:
    """Draw images.

    Args:
        model: an exported folder (quietgoose.json stands in it)
        out: FILE.png (a grid), FILE.npz (arrays), or a folder (a PNG for every image)
        count: images
        labels: classes by number or name, comma-separated, taken in turn; default: all in turn
        seed: image i depends on seed, i and its label
        sampler: one of the export's samplers by name; default: its first
        method: euler, heun or sde, instead of the sampler's
        steps: instead of the sampler's
        guidance: classifier-free; 1 is none
        batch: images at once
        columns: of the grid
        device: auto, cpu, cuda, cuda:1, ...
    """
    if count < 1 or columns < 1:
        raise RecipeError(f"--count {count}, --columns {columns}: at least 1", code="CFG-094")
    target = Path(out).expanduser()
    if target.suffix not in ("", ".png", ".npz"):
        raise RecipeError(f"--out {out}: FILE.png, FILE.npz or a folder", code="CFG-094")
    check_writable(target, f"--out {out}", folder=not target.suffix)
    from quietgoose.base.devices import usable_device
    from quietgoose.train.export import load
    from quietgoose.train.export_manifest import IMAGES, MANIFEST, kind_of, parse_manifest, why_no_export

    folder = Path(model).expanduser()
    if not (folder / MANIFEST).is_file():
        raise RecipeError(f"--model {why_no_export(folder)}", code="CFG-083")
    if kind_of(parse_manifest(folder)) != IMAGES:
        raise RecipeError(f"--model {model}: exports a language model; use launch/generate.py", code="CFG-083")
    drawing = load(folder, device=usable_device(device, "--device"))
    if sampler is not None:
        if sampler not in drawing.samplers:
            raise RecipeError(f"--sampler {sampler}: the export has {', '.join(drawing.samplers)}", code="CFG-094")
        drawing.settings = drawing.samplers[sampler]
    names = None if labels is None else [name.strip() for name in labels.split(",") if name.strip()]
    wanted = None if not names else [names[i % len(names)] for i in range(count)]
    started = time.perf_counter()
    images = drawing.sample(count, wanted, seed=seed, guidance=guidance, steps=steps, method=method, batch=batch)
    seconds = time.perf_counter() - started
    with storing(f"--out {out}"):
        _write(target, drawing, images, drawing.labels(count, wanted), columns)
    print(f"{out}: {count} images in {seconds:.1f} s ({count / seconds:.1f} a second)", file=sys.stderr)


def _write(out: Path, drawing: Any, images: Any, labels: Any, columns: int) -> None:
    if out.suffix == ".npz":
        import numpy as np

        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=images.numpy(), labels=labels.numpy(), classes=np.array(drawing.classes))
        write_atomic(out, buffer.getvalue())
    elif out.suffix == ".png":
        from quietgoose.train.image_grid import save_png

        save_png(drawing.grid(images, columns), out)
    else:
        from quietgoose.train.image_grid import save_image

        for number, (image, label) in enumerate(zip(images, labels.tolist())):
            save_image(image, out / f"{number:06d}_{label}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of the error, whose text goes to stderr."""
    return run_command(sample, argv)


if __name__ == "__main__":
    sys.exit(main())
