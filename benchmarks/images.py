"""Seconds that images cost around the U-Net's training: reading, teacher, kept features, judge, sampling, scoring.

    python benchmarks/images.py --source train.parquet --test test.parquet --out benchmarks/results/images.json
    python benchmarks/images.py --parts sampling --count 10000          # the U-Net is untrained: its speed does not depend on that
    python benchmarks/images.py --parts masks                           # linear probe of teachers by mask ratio
    python benchmarks/images.py --source digits --tiny                  # small, on a CPU

Parts:
    read       decode, find again in the same process                     teacher    train `self` and `label` by the recipe's settings
    features   fill the file, load it, serve a batch      judge      train, accuracy on held-out images
    sampling   --count images, 50 Euler steps: eager and compiled, without and with guidance; bits by batch and order
    scoring    references with floors, and one scoring    masks      probe accuracy of `self` by mask ratio

Settings are those of launch/recipes/urepa_cifar.yaml. Every line is printed and written as it comes; one failing part leaves
the others alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import about, elapsed
from quietgoose.alignment.backbone import build_backbone
from quietgoose.alignment.features import CachedTeacher
from quietgoose.alignment.judge import open_judge
from quietgoose.alignment.judging import Reference
from quietgoose.alignment.settings import FitSettings, JudgeSettings, SamplerSettings, TeacherSettings
from quietgoose.alignment.teachers import Teacher, open_teacher
from quietgoose.alignment.training import train_teacher
from quietgoose.base.files import read_json
from quietgoose.train.data.images import ImageLoader, ImageSet, open_both
from quietgoose.train.image_sampling import draw_samples, velocity_of
from quietgoose.train.settings import load_recipe

PARTS = ("read", "teacher", "features", "judge", "sampling", "scoring", "masks")
DEFAULT = PARTS[:-1]
RECIPE = Path(__file__).resolve().parents[1] / "launch" / "recipes" / "urepa_cifar.yaml"


class Bench:
    """Parts of the pipeline, each timed by itself."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.begin = options, time.perf_counter()
        self.device = torch.device(options.device)
        self.recipe = load_recipe(
            ["--config", str(RECIPE), "--images.source", options.source, "--images.cache", options.cache]
        )
        self.recipe.images.test = options.test
        if options.tiny:
            shrink(self.recipe, options)
        self.record: dict[str, Any] = {**about(self.device), "lines": []}
        self._sets: tuple[ImageSet, ImageSet] | None = None

    def run(self) -> int:
        for part in self.options.parts:
            if time.perf_counter() - self.begin > self.options.budget_seconds:
                self.put(part=part, skipped="the budget is spent")
                continue
            try:
                getattr(self, part)()
            except Exception as error:
                traceback.print_exc(limit=8)
                self.put(part=part, failed=f"{type(error).__name__}: {str(error)[:300]}")
        return int(any("failed" in line for line in self.record["lines"]))

    def put(self, **line: Any) -> None:
        print(json.dumps(line), flush=True)
        self.record["lines"].append(line)
        if self.options.out:
            self.options.out.parent.mkdir(parents=True, exist_ok=True)
            self.options.out.write_text(json.dumps(self.record, indent=1) + "\n")

    def sets(self) -> tuple[ImageSet, ImageSet]:
        if self._sets is None:
            self._sets = open_both(self.recipe.images)
        return self._sets

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """(seconds, result)."""
        milliseconds, made = elapsed(work, self.device)
        return round(milliseconds / 1e3, 3), made

    # ------------------------------------------------------------------ parts

    def read(self) -> None:
        first, (train, test) = self.timed(self.sets)
        again, _ = self.timed(lambda: open_both(self.recipe.images))
        self.put(
            part="read", seconds=first, again_seconds=again, train=len(train), test=len(test), shape=list(train.shape)
        )
        loader = ImageLoader(train, 256, 0, device=self.device)
        loader.at(0)
        seconds, _ = self.timed(lambda: [loader.at(step) for step in range(1, 101)])
        self.put(part="read", what="a batch of 256", milliseconds=round(10 * seconds, 3))

    def teacher(self) -> None:
        for kind in ("self", "label"):
            settings = dataclasses.replace(self.recipe.teacher, kind=kind)
            seconds, facts = self.timed(lambda settings=settings: self.train(settings))
            self.put(part="teacher", kind=kind, seconds=seconds, **facts)

    def train(self, settings: TeacherSettings) -> dict[str, Any]:
        train, test = self.sets()
        with tempfile.TemporaryDirectory() as fresh:
            folder = train_teacher(settings, train, self.device, Path(fresh), held_out=test)
            facts = read_json(folder / "teacher.json")
        images = settings.train.steps * settings.train.batch
        return {"loss": facts["loss"], "probe_accuracy": facts["probe_accuracy"], "images": images,
                "images_per_second": round(images / facts["seconds"])}  # fmt: skip

    def masks(self) -> None:
        for ratio in (0.4, 0.5, 0.6, 0.75, 0.85):
            self.put(
                part="masks", mask_ratio=ratio, **self.train(dataclasses.replace(self.recipe.teacher, mask_ratio=ratio))
            )
        self.put(part="masks", mask_ratio=None, what="random weights", probe_accuracy=self.probe_random())

    def probe_random(self) -> float:
        from quietgoose.alignment.training import probe

        train, test = self.sets()
        return round(probe(self.random_teacher().module, train, test, self.device), 4)

    def random_teacher(self) -> Teacher:
        teacher = open_teacher(dataclasses.replace(self.recipe.teacher, kind="random"), self.sets()[0], self.device)
        assert teacher is not None
        return teacher

    def features(self) -> None:
        train, _ = self.sets()
        teacher = self.random_teacher()
        with tempfile.TemporaryDirectory(dir=self.options.cache) as fresh:
            seconds, kept = self.timed(lambda: CachedTeacher(teacher, train, Path(fresh)))
            load, _ = self.timed(lambda: CachedTeacher(teacher, train, Path(fresh)))
            batch = ImageLoader(train, 256, 0, device=self.device).at(0)
            kept.features_for(batch)
            serve, _ = self.timed(lambda: [kept.features_for(batch) for _ in range(50)])
        online, _ = self.timed(lambda: [teacher.features(batch.images_BCHW) for _ in range(50)])
        self.put(
            part="features", fill_seconds=seconds, open_seconds=load, gib=round(kept.nbytes / 2**30, 2), on_gpu=kept.resident,
            kept_milliseconds=round(20 * serve, 3), online_milliseconds=round(20 * online, 3),
        )  # fmt: skip

    def judge(self) -> None:
        train, test = self.sets()
        with tempfile.TemporaryDirectory() as fresh:
            settings = self.recipe.evaluate.images.judge
            seconds, judge = self.timed(lambda: open_judge(settings, train, test, self.device, Path(fresh)))
        self.put(part="judge", seconds=seconds, accuracy=judge.accuracy, features=judge.network.dim)

    def sampling(self) -> None:
        train, _ = self.sets()
        unet = build_backbone(self.recipe.urepa.backbone, train.shape, train.num_classes, 0)
        for parameter in unet.parameters():  # as built, its last layer is zero
            parameter.data += 0.01 * torch.randn_like(parameter)
        unet.to(self.device).eval().requires_grad_(False)
        plain = SamplerSettings(steps=self.options.steps, batch=self.options.batch)
        guided = dataclasses.replace(plain, guidance=1.8, guidance_high=0.7)
        for compiled in (False, True) if self.device.type == "cuda" else (False,):
            velocity = velocity_of(unet, self.device, half=True, compiled=compiled)
            warm, _ = self.timed(lambda velocity=velocity: self.draw(velocity, dataclasses.replace(plain, steps=1), 1))
            for name, sampler in (("plain", plain), ("guided", guided)):
                seconds, images = self.timed(lambda velocity=velocity, sampler=sampler: self.draw(velocity, sampler))
                self.put(part="sampling", compiled=compiled, sampler=name, count=len(images), steps=sampler.steps,
                         batch=sampler.batch, seconds=seconds, warm_seconds=warm,
                         images_per_second=round(len(images) / seconds, 1))  # fmt: skip
                if name == "plain":
                    again = self.draw(velocity, sampler)
                    self.put(part="sampling", compiled=compiled, same_bits_again=bool(torch.equal(images, again)))

    def draw(self, velocity: Any, sampler: SamplerSettings, count: int | None = None) -> torch.Tensor:
        train, _ = self.sets()
        labels = train.labels_for(self.options.count if count is None else sampler.batch, 0)
        return draw_samples(velocity, labels, train.shape, sampler, train.num_classes, 0, self.device, train.decode)

    def scoring(self) -> None:
        train, test = self.sets()
        settings = self.recipe.evaluate.images
        judge = open_judge(settings.judge, train, test, self.device, Path(self.options.cache))
        seconds, reference = self.timed(lambda: Reference.of(judge, train, test, settings, self.options.count))
        self.put(
            part="scoring",
            what="reference with floors",
            seconds=seconds,
            count=reference.count,
            floors=reference.floors,
        )
        noise = torch.randint(256, (reference.count, *train.pixel_shape), dtype=torch.uint8)
        seconds, _ = self.timed(lambda: reference.score(noise, train.labels[: reference.count]))
        self.put(part="scoring", what="one set of samples", seconds=seconds)


def shrink(recipe: Any, options: argparse.Namespace) -> None:
    """Everything small enough for a CPU."""
    few = FitSettings(steps=20, batch=32)
    options.count, options.steps, options.batch = min(options.count, 64), min(options.steps, 4), min(options.batch, 32)
    recipe.images.limit = 512
    recipe.urepa.backbone.preset, recipe.urepa.backbone.patch = "nano", 4
    recipe.teacher = TeacherSettings(
        patch=2, width=32, layers=1, heads=1, decoder_width=32, decoder_layers=1, train=few
    )
    recipe.evaluate.images.judge = JudgeSettings(width=8, train=few)
    recipe.evaluate.images.subset_size, recipe.evaluate.images.subsets = 50, 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="uoft-cs/cifar10")
    parser.add_argument("--test")
    parser.add_argument("--cache", default=str(Path.home() / ".cache" / "quietgoose"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(DEFAULT))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget-seconds", type=float, default=560.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="few images, small networks: whether it runs")
    options = parser.parse_args()
    Path(options.cache).mkdir(parents=True, exist_ok=True)
    return Bench(options).run()


if __name__ == "__main__":
    raise SystemExit(main())
