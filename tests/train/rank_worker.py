"""One rank of a tiny training run, for tests: run by tests/train/conftest.py in a forked process, or as
`deepspeed tests/train/rank_worker.py SETTINGS.json`. It uses the engine, the loop and the checkpoints as the pipeline
does; only the model and the data are tiny.

Settings: {"out": folder, "cases": [case, ...]}. A case: run (folder below out), strategy, steps, and optionally every,
resume, allow, file_limit, resume_step, dtype, model ("bank", "plain", "thoughts" or "urepa"), clip, keep, plan (faults), step_seconds,
hang_seconds, key_press_seconds, empty_steps, slow ({"rank", "section", "seconds"}); more for "thoughts" and
"urepa", see thought_case.py and urepa_case.py.
Rank 0 leaves `CASE.json` with losses (as hex, so that equal means bitwise) and hashes.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from quietgoose.base.files import sha256_tensors
from quietgoose.train import faults
from quietgoose.train import stop as stopping
from quietgoose.train.checkpoint import Checkpoints
from quietgoose.train.engine import Engine, initialize_distributed, shutdown
from quietgoose.train.loop import train
from quietgoose.train.recipe import OptimizerSettings, ResumeSettings
from quietgoose.train.stop import Progress, StopControl, leave, run_guarded
from quietgoose.train.strategy import load_strategy
from quietgoose.train.types import Batch, LossTerms, StepBatch
from torch import nn

NAMES = ("a", "b", "c")
OPTIMIZER = {"lr": 0.1, "clip": 0.05, "weight_decay": 0.1, "schedule": "cosine", "eps": 1e-2}  # eps: clipping shows
ROWS, LENGTH, VOCABULARY, WIDTH = 12, 8, 16, 32


class Bank(nn.Module):
    """Flat vectors of odd length, so that ZeRO has to pad."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        for name in NAMES:
            self.register_parameter(f"flat_{name}", nn.Parameter(torch.randn(67, generator=generator) * 0.1))

    def forward(self, expert_B: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.get_parameter(f"flat_{name}") for name in NAMES])[expert_B]


class BankJob(nn.Module):
    """A frozen base and three experts of one flat fp32 vector each: a group per expert."""

    names = NAMES

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.seconds = 0.0
        generator = torch.Generator().manual_seed(0)
        self.embedding, self.linear = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        self.to(dtype).requires_grad_(False)
        self.bank = Bank(generator)

    def parameter_groups(self) -> list[dict]:
        return [{"name": name, "params": [self.bank.get_parameter(f"flat_{name}")]} for name in NAMES]

    def forward(self, batch: Batch) -> LossTerms:
        time.sleep(self.seconds)
        x = self.linear(self.embedding(batch.tokens_BT))
        flat = self.bank(batch.expert_B).to(x.dtype)[:, None]
        x = x * (1 + flat[..., :WIDTH]) + flat[..., WIDTH : 2 * WIDTH]
        return LossTerms(_sums(self.head(x), batch, len(NAMES)))


class PlainJob(nn.Module):
    """All weights of a small network, with one tied pair, in one group."""

    names = ("loss",)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.head.weight = self.embedding.weight

    def parameter_groups(self) -> list[dict]:
        return [{"name": "loss", "params": list(self.parameters())}]

    def forward(self, batch: Batch) -> LossTerms:
        x = self.embedding(batch.tokens_BT)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return LossTerms(_sums(self.head(self.norm(x)), batch, 1))


def _sums(logits: torch.Tensor, batch: Batch, terms: int) -> torch.Tensor:
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch.labels_BT.flatten(), ignore_index=-100, reduction="none"
    )
    rows = losses.view(batch.labels_BT.shape).sum(1)
    return torch.zeros(terms).index_add(0, batch.expert_B if terms > 1 else torch.zeros_like(batch.expert_B), rows)


class TinyData:
    """12 rows a step, drawn from the step alone; expert b has few labels, and none in step 4."""

    micro_count = 2

    def __init__(self, rank: int, world: int, terms: int, seconds: float, empty: Sequence[int] = ()) -> None:
        self.rank, self.world, self.terms, self.seconds, self.empty = rank, world, terms, seconds, empty

    def step(self, step: int) -> StepBatch:
        time.sleep(self.seconds)
        generator = torch.Generator().manual_seed(100 + step)
        tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
        labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
        expert = torch.arange(ROWS) % 3
        labels[expert == 1, (0 if step == 4 else 3) :] = -100
        if step in self.empty:
            labels[:] = -100
        wanted = labels != -100
        count_E = torch.stack([wanted[expert == e].sum() for e in range(3)]).double()
        share = ROWS // self.world // self.micro_count
        mine = torch.arange(ROWS)[self.rank :: self.world].split(share)
        position = torch.arange(LENGTH).expand(share, LENGTH)
        segment = torch.ones(share, LENGTH, dtype=torch.int32)
        micro = tuple(Batch(tokens[i], labels[i], position, segment, expert[i]) for i in mine)
        return StepBatch(step, micro, count_E if self.terms > 1 else count_E.sum().reshape(1), ROWS * LENGTH)


class Recorder:
    """Keeps what the loop reports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[list] = []
        self.norms: list[list] = []
        self.events: list[dict] = []
        self.extra: list[dict] = []

    def on_step(self, report) -> None:
        if not self.losses:
            (self.folder / "first_step").touch()
        self.losses.append([report.step, report.loss.hex(), report.skipped])
        self.norms.append([value.hex() for value in report.gradient_norms.values()])
        self.extra.append({**report.losses, **report.extra})

    def on_save(self, path: Path) -> None:
        self.events.append({"kind": "save", "name": path.name})

    def on_event(self, kind: str, **fields) -> None:
        self.events.append({"kind": kind, **fields})


def build(case: dict, rank: int, world: int) -> tuple:
    """(job, data, optimizer settings, a function that hashes what must not change)."""
    if case.get("model") in ("thoughts", "urepa"):
        file = {"thoughts": "thought_case.py", "urepa": "urepa_case.py"}[case["model"]]
        tools = runpy.run_path(str(Path(__file__).with_name(file)))
        job, data, frozen = tools["build"](case, rank, world)
        return job, data, tools["optimizer"](), frozen
    job = (PlainJob if case.get("model") == "plain" else BankJob)(getattr(torch, case.get("dtype", "float32")))
    slow = case.get("slow", {"rank": None})
    seconds = slow["seconds"] if slow["rank"] == rank else 0.0
    if seconds and slow["section"] == "forward":
        job.seconds, seconds = seconds, 0.0
    seconds += case.get("step_seconds", 0.0)
    data = TinyData(rank, world, len(job.names), seconds, case.get("empty_steps", ()))
    return job, data, OptimizerSettings(**{**OPTIMIZER, "clip": case.get("clip", OPTIMIZER["clip"])}), lambda: ""


def run_case(case: dict, out: Path) -> int:
    """Train one case; returns the exit code the pipeline would leave with."""
    os.environ["QG_FAULT_TESTS"], os.environ["QG_FAULT_PLAN"] = "1", json.dumps(case.get("plan", []))
    faults._plan.cache_clear()
    world = initialize_distributed()
    folder = out / case["run"]
    recorder, result = Recorder(folder), {"world": world.size}
    progress = Progress()
    stop = StopControl(
        folder,
        hang_seconds=case.get("hang_seconds", 120),
        grace_seconds=case.get("grace_seconds", 28),
        progress=progress,
    )
    stopping.SAME_KEY_PRESS_SECONDS = case.get("key_press_seconds", 1.0)
    if "file_limit" in case and world.is_main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["file_limit"], resource.RLIM_INFINITY))

    def main() -> None:
        stop.install()
        torch.manual_seed(0)
        job, data, settings, frozen = build(case, world.rank, world.size)
        before = frozen()
        engine = Engine(
            job, job.parameter_groups(), settings, 20, data.micro_count, load_strategy(case["strategy"]), job.names, "cpu"
        )  # fmt: skip
        checkpoints = Checkpoints(
            folder / "checkpoints", keep=case.get("keep", 2), identity={"recipe": case.get("recipe", "r")},
            recipe_yaml="name: tiny\n", event=recorder.on_event,
        )  # fmt: skip
        resume = ResumeSettings(case.get("resume", "auto"), case.get("resume_step"), case.get("allow", []))
        try:
            result["start"] = train(
                engine, data, checkpoints, [recorder], stop, case["steps"], every=case.get("every", 3), resume=resume
            )
            trained = engine.trainable()
            result["sha256"] = sha256_tensors(trained)
            result["trained"] = {name: tensor.double().sum().item() for name, tensor in trained.items()}
            result["frozen"] = [before, frozen()]
            result["base_dtype"] = sorted({str(p.dtype) for p in job.parameters() if not p.requires_grad})
        finally:
            stop.close()
            result["applied"], result["skipped"] = engine.applied, engine.skipped
            engine.destroy()

    code = run_guarded(folder, main, progress)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if world.is_main:
        result.update(
            code=code, losses=recorder.losses, norms=recorder.norms, events=recorder.events, extra=recorder.extra
        )  # fmt: skip
        (out / f"{case.get('name', case['run'])}.json").write_text(json.dumps(result))
    return code


def main(settings: dict) -> None:
    torch.set_num_threads(1)
    code = 0
    for case in settings["cases"]:
        code = run_case(case, Path(settings["out"]))
    if code:
        leave(code)
    shutdown()


if __name__ == "__qg_rank__":
    os.environ.update(SETTINGS["environment"])  # type: ignore[name-defined]  # noqa: F821
    main(SETTINGS)  # type: ignore[name-defined]  # noqa: F821
elif __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    main(json.loads(Path(arguments[0]).read_text()))
