"""One rank of a tiny training of real experts or gates, for tests/train/test_parallel.py.

Settings: {"out": folder, "cases": [case, ...]}. A case with "benchmark" runs those arms of benchmarks/scaling.py. Any other: name,
kind (experts or gates), strategy, parallel, steps, run (folder of its checkpoints; the same name continues), experts (3), rows
(2), traffic (count the bytes of one step more). Rank 0 leaves NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from quietgoose.base.errors import QuietGooseError
from quietgoose.routing.expert import Expert, ExpertCard, SiteAdapter
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.sites import find_sites
from quietgoose.train.checkpoint import Checkpoints
from quietgoose.train.data.loader import StepData
from quietgoose.train.data.packing import PackedExpert
from quietgoose.train.data.rows import RowReport
from quietgoose.train.engine import Engine, initialize_distributed, shutdown
from quietgoose.train.jobs.experts import ExpertJob
from quietgoose.train.jobs.gates import GateJob
from quietgoose.train.loop import train
from quietgoose.train.parallel import owned
from quietgoose.train.recipe import ExpertSettings, GateSettings, OptimizerSettings, ResumeSettings, RowTrainSettings
from quietgoose.train.stop import StopControl
from quietgoose.train.strategy import load_strategy
from quietgoose.train.traffic import Traffic
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH, VOCABULARY, TOTAL = 16, 32, 6


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.3, attn_implementation="sdpa",
        )
    )  # fmt: skip


def packed(name: str, number: int, rows: int = 5) -> PackedExpert:
    random = np.random.default_rng(number)
    tokens = random.integers(3, VOCABULARY, (rows, LENGTH), dtype=np.int32)
    labels = random.integers(3, VOCABULARY, (rows, LENGTH), dtype=np.int32)
    labels[random.random(labels.shape) < 0.5] = -100
    labels[:, 0] = 5
    segment = np.broadcast_to(np.arange(LENGTH) // 6 + 1, labels.shape).astype(np.int32)
    position = np.broadcast_to(np.arange(LENGTH) % 6, labels.shape).astype(np.int32)
    return PackedExpert(
        name,
        tokens,
        labels,
        position,
        segment,
        (labels != -100).sum(1),
        np.full(rows, LENGTH),
        3 * rows,
        RowReport(rows),
    )


def library(model: LlamaForCausalLM, names: list[str]) -> ExpertLibrary:
    experts = []
    for number, name in enumerate(names):
        g = torch.Generator().manual_seed(number)
        adapters = {
            s.name: SiteAdapter(
                torch.randn(2, s.in_features, generator=g), torch.randn(s.out_features, 2, generator=g), 0.3
            )
            for s in find_sites(model, ["all-linear"])
        }
        experts.append(Expert(ExpertCard(name, 2, 0.6, ("all-linear",), False), adapters))
    return ExpertLibrary(experts)


class Losses:
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[dict[str, float]] = []

    def on_step(self, report) -> None:
        self.losses.append(report.loss)
        self.norms.append(dict(report.gradient_norms))

    def on_save(self, path: Path) -> None: ...

    def on_event(self, kind: str, **fields) -> None: ...


def run_benchmark(case: dict, out: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import scaling

    options = argparse.Namespace(rows=1, strong=False, kind="experts", seconds=0.01, tiny=True)
    worker = scaling.Worker(options)
    found = {"link": worker.link(), **{arm: worker.arm(*arm.split(":")) for arm in case["benchmark"]}}
    if worker.world.is_main:
        (out / f"{case['name']}.json").write_text(json.dumps({"found": found}))


def run_case(case: dict, out: Path) -> None:
    world = initialize_distributed()
    names = [f"e{i}" for i in range(case.get("experts", 3))]
    settings = RowTrainSettings(parallel=case["parallel"], rows_per_expert=case.get("rows", 2), micro_rows=3)
    result: dict = {}
    try:
        own = owned(names, settings, case["strategy"])
    except QuietGooseError as error:
        result["error"] = str(error)
    else:
        _train(case, out, world, names, settings, own, result)
    if world.is_main:
        (out / f"{case['name']}.json").write_text(json.dumps(result))


def _train(case, out, world, names, settings, own, result) -> None:
    model = make_model()
    if case["kind"] == "experts":
        job = ExpertJob(model, "sdpa", names, ExpertSettings(rank=2, alpha=2.0, train=settings), 0, own=own)
    else:
        job = GateJob(model, "sdpa", library(model, names), GateSettings(settings), own=own)
    packs = [packed(name, number) for number, name in enumerate(names)]
    alone = settings.parallel == "expert"
    data = StepData(packs, settings.rows_per_expert, 3, 0, world.rank, world.size, 0, by_expert=alone)
    optimizer = OptimizerSettings(lr=0.05, clip=0.1, weight_decay=0.01, eps=1e-3)
    engine = Engine(
        job, job.parameter_groups(), optimizer, TOTAL, data.micro_count, load_strategy(case["strategy"]), data.names, "cpu",
        micro_rows=data.share.rows,
    )  # fmt: skip
    losses, stop = Losses(), StopControl(out / case["run"])
    try:
        result["start"] = train(
            engine,
            data,
            Checkpoints(out / case["run"]),
            [losses],
            stop,
            case["steps"],
            every=100,
            resume=ResumeSettings(),
        )
        trained = engine.trainable()
        result |= {
            "losses": losses.losses, "norms": losses.norms, "own": list(own or names),
            "here": sum(p.numel() for p in engine.parameters.values()), "entries": sum(t.numel() for t in trained.values()),
            "trained": {name: tensor.double().sum().item() for name, tensor in trained.items()},
            "squares": {name: tensor.double().square().sum().item() for name, tensor in trained.items()},
        }  # fmt: skip
        if case.get("traffic"):
            with Traffic() as traffic:
                engine.step(data.step(case["steps"]))
            result |= {"sent": traffic.sent, "calls": dict(traffic.calls), "payload": dict(traffic.payload)}
            whole = engine.deepspeed.module.parameters()
            result["weights"] = [(getattr(p, "ds_numel", p.numel()), p.element_size()) for p in whole]
            result["micro_batches"], result["zero"] = data.micro_count, engine.config["zero_optimization"]
    finally:
        stop.close()
        data.close()
        engine.destroy()


def main(settings: dict) -> None:
    torch.set_num_threads(1)
    for case in settings["cases"]:
        (run_benchmark if "benchmark" in case else run_case)(case, Path(settings["out"]))
    shutdown()


if __name__ == "__qg_rank__":
    os.environ.update(SETTINGS["environment"])  # type: ignore[name-defined]  # noqa: F821
    main(SETTINGS)  # type: ignore[name-defined]  # noqa: F821
