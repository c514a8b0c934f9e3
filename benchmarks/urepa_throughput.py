"""Images per second of the `urepa` stage's real training step, beside the arithmetic limit measured in the same run.

    python benchmarks/urepa_throughput.py [--preset tiny --rows 256] [--budget-seconds 300] [--out FILE.json]
    python benchmarks/urepa_throughput.py --tiny        # whether it runs, on a CPU

Every case is the pipeline's own step (Engine, job, optimizer, moving average, data) on random 32x32 images in bf16: without a teacher,
with its features from a table on the device, with the teacher run at every step; eager and compiled. `limit` is what a large bf16
matrix product reaches here, now; the share of it counts a training step's products only (forward and backward, attention included).
The teacher alone and sampling stand apart. JSON is written after every case; a case that fails is a line, not the end.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Times, elapsed_ms, gib, matmul_limit, peak, reset_peak, time_calls, time_steps
from quietgoose.alignment.backbone import build_backbone
from quietgoose.alignment.model_settings import AlignSettings, BackboneSettings
from quietgoose.alignment.samplers import sample_rows
from quietgoose.alignment.settings import SamplerSettings, TeacherSettings
from quietgoose.alignment.teachers import Teacher, open_teacher
from quietgoose.train.data.image_steps import ImageSteps
from quietgoose.train.data.images import ImageBatch, ImageLoader, ImageSet
from quietgoose.train.engine import Engine, initialize_distributed, shutdown
from quietgoose.train.image_flops import meta_backbone, training_flops, unet_flops, vit_flops
from quietgoose.train.image_sampling import velocity_of
from quietgoose.train.jobs.urepa import TeacherShape, UrepaJob
from quietgoose.train.recipe import OptimizerSettings, TrainSettings
from quietgoose.train.recipe_images import UrepaSettings
from quietgoose.train.strategy import load_strategy
from quietgoose.train.verdict import Pending

CLASSES, SHAPE, SIDE = 10, (3, 32, 32), 8192
WARM = 8


def images_of(count: int) -> ImageSet:
    random = np.random.default_rng(0)
    rows = random.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    return ImageSet(rows, random.integers(0, CLASSES, count), tuple(map(str, range(CLASSES))), "random", flip=True)


class Bench:
    """What the cases share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self.images = images_of(options.images)
        settings = TeacherSettings(kind="random")
        teacher = open_teacher(settings, self.images, self.device)
        assert teacher is not None
        self.teacher: Teacher = teacher
        self.teacher_flops = vit_flops(SHAPE, settings.patch, settings.width, settings.layers, settings.heads)
        self.backbone = BackboneSettings(preset=options.preset, patch=4 if options.tiny else None)
        self.limit = matmul_limit(self.device, options.side)

    def settings(self, compiled: bool, aligned: bool) -> UrepaSettings:
        rows, optimizer = self.options.rows, OptimizerSettings(lr=1e-4, warmup=0.0)
        train = TrainSettings(steps=1_000_000, rows_per_expert=rows, micro_rows=rows, optimizer=optimizer)
        align = AlignSettings(weight=0.5 if aligned else 0.0)
        return UrepaSettings(backbone=self.backbone, align=align, dtype="bfloat16", compile=compiled, train=train)

    def table(self) -> torch.Tensor:
        """The teacher's tokens of all images and their mirror images, fp16."""
        every = torch.arange(len(self.images))
        parts = [
            torch.cat(
                [
                    self.teacher.features(self.images.pixels(i, torch.full(i.shape, m), self.device)).half()
                    for i in every.split(512)
                ]
            )
            for m in (False, True)
        ]
        return torch.stack(parts)

    def step(self, compiled: bool, source: str) -> dict[str, Any]:
        """The training step of the pipeline."""
        settings = self.settings(compiled, source != "none")
        shape = None if source == "none" else TeacherShape(self.teacher.dim, self.teacher.grid)
        features: Callable[[ImageBatch], torch.Tensor] | None = None
        if source == "table":
            table = self.table()
            features = lambda batch: table[batch.flipped_B.long(), batch.index_B].float()  # noqa: E731
        elif source == "online":
            features = lambda batch: self.teacher.features(batch.images_BCHW)  # noqa: E731
        unet = build_backbone(settings.backbone, SHAPE, CLASSES, 0)
        job = UrepaJob(unet, settings, settings.train.steps, 0, shape).to(self.device)
        data = ImageSteps(
            ImageLoader(self.images, settings.train.rows_per_expert, 0, device=self.device),
            job.names,
            1 << 20,
            features,
        )
        engine = Engine(
            job, job.parameter_groups(), settings.train.optimizer, settings.train.steps, 1, load_strategy(self.options.strategy),
            job.names, self.device, micro_rows=data.share.rows,
        )  # fmt: skip
        number = iter(range(1_000_000))
        waiting: deque[Pending] = deque()

        def step(keep: int = engine.lag) -> None:
            """As the training loop: where the device decides, the host is one step ahead of it."""
            waiting.append(engine.submit(data.step(next(number))))
            while len(waiting) > keep:
                assert not engine.report(waiting.popleft()).skipped

        warm = elapsed_ms(lambda: [step() for _ in range(WARM)], self.device)
        reset_peak(self.device)
        times = time_steps(step, self.device, 100_000, self.options.seconds)
        step(0)
        most = peak(self.device)
        engine.destroy()
        data.close()
        align = settings.align if shape is not None else None
        flops = training_flops(settings.backbone, align, SHAPE, CLASSES, self.teacher.dim, self.teacher.grid)
        return {
            **self._rates(times, self.options.rows, flops),
            "warm_seconds": round(warm / 1e3, 1),
            "peak_gib": gib(most),
        }

    def teacher_alone(self) -> dict[str, Any]:
        """Features of a batch, no training."""
        pixels = self.images.pixels(torch.arange(self.options.rows), None, self.device)
        time_calls(lambda: self.teacher.features(pixels), self.device, 0.3)
        times = time_steps(lambda: self.teacher.features(pixels), self.device, 100_000, 1.0)
        return self._rates(times, self.options.rows, self.teacher_flops)

    def sampling(self, compiled: bool) -> dict[str, Any]:
        """50 Euler steps without guidance, in batches of 1,000."""
        rows, sampler = self.options.sample_rows, SamplerSettings(steps=50)
        unet = build_backbone(self.backbone, SHAPE, CLASSES, 0).to(self.device).eval()
        velocity = velocity_of(unet, self.device, half=True, compiled=compiled)
        index_B = torch.arange(rows, device=self.device)

        def draw() -> None:
            sample_rows(velocity, index_B, index_B % CLASSES, SHAPE, sampler, CLASSES, 0)

        draw()
        flops = 50 * unet_flops(meta_backbone(self.backbone, SHAPE, CLASSES), SHAPE)
        return self._rates(time_calls(draw, self.device, 1.0), rows, flops)

    def _rates(self, times: Times, rows: int, flops: int) -> dict[str, Any]:
        rate = 1e3 * rows / times.median
        return {
            **times.short(3), "calls": times.count, "images_per_second": round(rate), "gflop_per_image": round(flops / 1e9, 2),
            "tflop_per_second": round(rate * flops / 1e12, 1), "share_of_limit": round(rate * flops / self.limit, 3),
        }  # fmt: skip


def shrink(options: argparse.Namespace) -> None:
    """Everything small enough for a CPU."""
    options.preset, options.rows, options.images, options.sample_rows = "nano", 4, 32, 4
    options.seconds, options.side = 0.1, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=["nano", "tiny", "B", "L", "XL"])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--cases", nargs="*", help="words that the titles of the wanted cases contain; none: all")
    parser.add_argument("--sample-rows", type=int, default=1000)
    parser.add_argument("--strategy", default="zero0")
    parser.add_argument("--seconds", type=float, default=4.0, help="of every case, after warming up")
    parser.add_argument("--side", type=int, default=SIDE, help="of the matrix product that sets the limit")
    parser.add_argument("--budget-seconds", type=float, default=300.0, help="no case begins later")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="few small images of everything")
    options = parser.parse_args()
    if options.tiny:
        shrink(options)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    initialize_distributed()
    bench = Bench(options)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    found: dict[str, Any] = {
        "device": name, "torch": torch.__version__, "preset": options.preset, "rows": options.rows, "strategy": options.strategy,
        "limit_tflop_per_second": round(bench.limit / 1e12, 1), "cases": {},
    }  # fmt: skip
    print(json.dumps({k: v for k, v in found.items() if k != "cases"}), flush=True)
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "urepa, compiled, features from a table": lambda: bench.step(True, "table"),
        "plain U-Net, compiled": lambda: bench.step(True, "none"),
        "teacher alone": bench.teacher_alone,
        "urepa, compiled, teacher at every step": lambda: bench.step(True, "online"),
        "urepa, eager, features from a table": lambda: bench.step(False, "table"),
        "plain U-Net, eager": lambda: bench.step(False, "none"),
        "sampling, compiled": lambda: bench.sampling(True),
        "sampling, eager": lambda: bench.sampling(False),
    }
    for title, case in cases.items():
        if options.cases and not any(word in title for word in options.cases):
            continue
        if time.perf_counter() - started > options.budget_seconds:
            found["cases"][title] = {"left_out": "budget"}
        else:
            try:
                found["cases"][title] = case()
            except Exception as error:  # one case must not end the others
                traceback.print_exc()
                found["cases"][title] = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps({title: found["cases"][title]}), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    shutdown()


if __name__ == "__main__":
    main()
