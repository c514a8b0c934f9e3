"""Draw images from the export of a U-Net:

    python launch/sample.py --model runs/urepa_digits/export --count 64 --out grid.png
    python launch/sample.py --model runs/urepa_cifar/export --labels cat,dog --count 32 --guidance 2 --out animals.npz

--out ending in .png is a grid, in .npz the arrays `images` (uint8, N C H W) and `labels`; anything else is a folder with a
PNG for every image. Only safetensors are read. Called as `quietgoose sample` too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from quietgoose.base.errors import QuietGooseError, RecipeError

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
    if not (Path(model).expanduser() / "quietgoose.json").is_file():
        raise RecipeError(f"--model {model}: no quietgoose.json there; give an exported folder", code="CFG-083")
    from quietgoose.launch.generate import _device
    from quietgoose.train.export import load

    drawing = load(Path(model).expanduser(), device=_device(device))
    if not hasattr(drawing, "sample"):
        raise RecipeError(f"--model {model}: exports a language model; use launch/generate.py", code="CFG-083")
    if sampler is not None:
        if sampler not in drawing.samplers:
            raise RecipeError(f"--sampler {sampler}: the export has {', '.join(drawing.samplers)}", code="CFG-094")
        drawing.settings = drawing.samplers[sampler]
    names = None if labels is None else [name.strip() for name in labels.split(",") if name.strip()]
    wanted = None if not names else [names[i % len(names)] for i in range(count)]
    started = time.perf_counter()
    images = drawing.sample(count, wanted, seed=seed, guidance=guidance, steps=steps, method=method, batch=batch)
    seconds = time.perf_counter() - started
    _write(Path(out).expanduser(), drawing, images, drawing.labels(count, wanted), columns)
    print(f"{out}: {count} images in {seconds:.1f} s ({count / seconds:.1f} a second)", file=sys.stderr)


def _write(out: Path, drawing: Any, images: Any, labels: Any, columns: int) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        import numpy as np

        np.savez_compressed(out, images=images.numpy(), labels=labels.numpy(), classes=np.array(drawing.classes))
    elif out.suffix == ".png":
        from quietgoose.train.image_grid import save_png

        save_png(drawing.grid(images, columns), out)
    elif out.suffix:
        raise RecipeError(f"--out {out}: FILE.png, FILE.npz or a folder", code="CFG-094")
    else:
        from quietgoose.train.image_grid import save_image

        for number, (image, label) in enumerate(zip(images, labels.tolist())):
            save_image(image, out / f"{number:06d}_{label}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of the error, whose text goes to stderr."""
    arguments = [
        word.replace("-", "_").replace("__", "--", 1) if word.startswith("--") and "=" not in word else word
        for word in (sys.argv[1:] if argv is None else argv)
    ]
    try:
        auto_cli(sample, args=arguments, as_positional=False)
    except QuietGooseError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
