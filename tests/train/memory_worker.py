"""One rank that measures what DeepSpeed holds beside activations, for tests/train/test_state_memory.py: run in a forked process.

Settings: {"out": folder, "cases": [{"name", "strategy", "kind", "micros"}, ...], "environment"}. Rank 0 leaves `CASE.json`: bytes held
between steps, and how much more the backward pass and the optimizer's step took.
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import torch
from quietgoose.train.engine import Engine, initialize_distributed, shutdown
from quietgoose.train.living_bytes import LivingBytes
from quietgoose.train.recipe import OptimizerSettings
from quietgoose.train.types import Batch, LossTerms, StepBatch
from torch import Tensor, nn

LAYERS, WIDTH = 8, 192
NUMBERS = LAYERS * WIDTH * WIDTH


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(NUMBERS) * 0.01)

    def forward(self) -> Tensor:
        return self.flat.sum()


class Job(nn.Module):
    """As many trained fp32 numbers (`many` weights, or one `long` vector) as frozen bf16 ones, and next to no activations."""

    names = ("loss",)

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.frozen = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
        self.frozen.to(torch.bfloat16).requires_grad_(False)
        self.long = kind == "long"
        several = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
        self.trained = Flat() if self.long else nn.ModuleList(several)

    def forward(self, batch: Batch) -> LossTerms:
        x = torch.ones(2, WIDTH)
        for number, layer in enumerate(self.frozen):
            x = layer(x.bfloat16()).float()
            x = x if self.long else self.trained[number](x)  # type: ignore[index]
        return LossTerms((x.sum() + (self.trained() if self.long else 0.0)).reshape(1))


def live_bytes() -> int:
    """All storages that a tensor of Python holds."""
    gc.collect()
    found = {}
    for one in gc.get_objects():
        if issubclass(type(one), Tensor) and one.device.type == "cpu":
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def measure(case: dict, world: int) -> dict[str, int]:
    before = live_bytes()
    one = torch.ones(1, 1, dtype=torch.int64)
    batch = Batch(one, one, one, one, one[0])
    with LivingBytes() as living:
        job = Job(case["kind"])
        groups = [{"name": "loss", "params": list(job.trained.parameters())}]
        engine = Engine(job, groups, OptimizerSettings(), 10, case["micros"], case["strategy"], job.names, "cpu")
        apply, seen = engine._apply, {}

        def watched(rate: float) -> None:
            seen["backward"], living.peak = living.peak, living.now
            apply(rate)
            seen["step"] = living.peak

        engine._apply = watched
        steps = []
        for step in range(6):
            start = living.peak = living.now
            engine.step(StepBatch(step, (batch,) * case["micros"], torch.ones(1).double() * case["micros"] * world, 1))
            steps.append({name: value - start for name, value in seen.items()})
        # moments come with the first step, what ZeRO-3 keeps gathered with the second; of those that follow the least, since on a
        # machine with other work gloo's thread lets go of a bucket later
        found = {name: min(one[name] for one in steps[2:]) for name in seen} | {"always": live_bytes() - before}
        del engine._apply
        engine.destroy()
    return found


def main(settings: dict) -> None:
    os.environ.update(settings["environment"])
    torch.set_num_threads(1)
    world = initialize_distributed()
    for case in settings["cases"]:
        found = measure(case, world.size)
        if world.is_main:
            (Path(settings["out"]) / f"{case['name']}.json").write_text(json.dumps(found))
    shutdown()


if __name__ == "__qg_rank__":
    main(SETTINGS)  # type: ignore[name-defined]  # noqa: F821
