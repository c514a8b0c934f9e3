"""The gates stage takes mean activations over the first packed rows of every source, and packs nothing for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from quietgoose.base.distributed import World
from quietgoose.base.errors import DataError
from quietgoose.routing.gates_format import load_gates
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.model import attach, detach
from quietgoose.routing.sites import all_sites
from quietgoose.routing.statistics import average_activation
from quietgoose.train import stages
from quietgoose.train.base_models import LoadedBase
from quietgoose.train.data import build
from quietgoose.train.data.attention import model_inputs
from quietgoose.train.jobs.experts import ExpertJob
from quietgoose.train.mean_activations import ROWS, mean_activations
from quietgoose.train.nano import build_nano
from quietgoose.train.recipe import (
    DataSettings,
    ExpertSettings,
    GateSettings,
    NanoSettings,
    Recipe,
    RowTrainSettings,
    SourceSettings,
    TrainSettings,
)
from quietgoose.train.types import Batch

SEED = 3
FEW, MANY = 40, 400  # documents: fewer than ROWS packed rows, so that a second epoch begins, and more


@pytest.fixture(scope="module")
def base() -> LoadedBase:
    model, tokenizer = build_nano(NanoSettings(layers=2, width=32, heads=2, kv_heads=1, mlp_width=48, context=64), 0)
    model.set_attn_implementation("sdpa")
    return LoadedBase(model.eval(), tokenizer, "nano", "0", (), "sdpa")


@pytest.fixture(scope="module")
def library(base: LoadedBase) -> ExpertLibrary:
    """Two random experts, not in the order of the sources."""
    job = ExpertJob(base.model, "sdpa", ("letters", "digits"), ExpertSettings(rank=2, alpha=4.0), seed=0)
    random = torch.Generator().manual_seed(1)
    found = {n: torch.randn(p.shape, generator=random) * 0.2 for n, p in job.named_parameters() if p.requires_grad}
    experts = ExpertLibrary(job.experts(found))
    detach(base.model)
    return experts


@pytest.fixture
def data(tmp_path: Path) -> DataSettings:
    sources = {
        "digits": SourceSettings(path="skills:digits", limit=MANY),
        "letters": SourceSettings(path="skills:letters", limit=FEW),
    }
    return DataSettings(experts=sources, sequence_length=48, cache=str(tmp_path))


def packed_anew(base: LoadedBase, data: DataSettings, name: str) -> Batch:
    """The slow way: the source read and packed alone, its first ROWS rows in one batch."""
    train = TrainSettings(steps=1, rows_per_expert=ROWS, micro_rows=ROWS)
    made = build.build_step_data({name: data.experts[name]}, base.tokenizer, data, train, SEED)
    batch = made.step(0).micro[0]
    made.close()
    return batch


def slow_means(
    base: LoadedBase, library: ExpertLibrary, data: DataSettings
) -> Mapping[str, Mapping[str, torch.Tensor]]:
    batches = {}
    for name in library.names:
        batch = packed_anew(base, data, name)
        batches[name] = [(model_inputs(batch, base.attention, base.model.dtype), batch.segment_BT > 0)]
    attach(base.model, library, "uniform", 1)
    means = average_activation(base.model, batches)
    detach(base.model)
    return means


@pytest.mark.parametrize("by", ["data", "expert"])
def test_first_rows_are_those_of_the_source_alone(base, data, by) -> None:
    """Whatever rank, world, rows per step: a share of the rows, or all rows of one expert."""
    train = RowTrainSettings(rows_per_expert=3, micro_rows=2, parallel=by)
    shared = build.build_step_data(data.experts, base.tokenizer, data, train, SEED, rank=1, world=2)
    assert shared.experts[1].rows < ROWS < shared.experts[0].rows
    for name in data.experts:
        found, wanted = shared.first_rows(name, ROWS), packed_anew(base, data, name)
        for field in dataclasses.fields(Batch):
            ours, theirs = getattr(found, field.name), getattr(wanted, field.name)
            assert ours is theirs is None or torch.equal(ours, theirs), field.name
    with pytest.raises(DataError, match=r"DATA-003.*'moth'.*digits, letters"):
        shared.first_rows("moth", ROWS)
    with pytest.raises(DataError, match=r"DATA-003.*is 0"):
        shared.first_rows("digits", 0)
    shared.close()


def test_means_are_those_of_rows_packed_anew_bit_for_bit(base, library, data) -> None:
    shared = build.build_step_data(data.experts, base.tokenizer, data, RowTrainSettings(), SEED, rank=1, world=2)
    means, wanted = mean_activations(base, library, shared, torch.device("cpu")), slow_means(base, library, data)
    assert means.keys() == wanted.keys()
    for site, vectors in wanted.items():
        assert vectors.keys() == {"letters", "digits"}
        assert all(torch.equal(means[site][name], mean) for name, mean in vectors.items()), site
    shared.close()


def test_the_gates_stage_packs_every_source_once(base, library, data, monkeypatch, tmp_path) -> None:
    packed: list[str] = []

    def pack(name: str, *rest: Any) -> Any:
        packed.append(name)
        return real(name, *rest)

    def train(stage: str, job: Any, *_: Any) -> Mapping[str, torch.Tensor]:
        return {name: torch.randn_like(p.detach()) for name, p in job.named_parameters() if p.requires_grad}

    wanted = slow_means(base, library, data)
    real = build.pack
    monkeypatch.setattr(build, "pack", pack)
    monkeypatch.setattr(stages, "the_base", lambda *_: base)
    monkeypatch.setattr(stages, "the_library", lambda *_, **__: library)
    recipe = Recipe(seed=SEED, data=data, gates=GateSettings(train=RowTrainSettings(attention="base", compile="off")))
    context: Any = stages.Context(
        recipe, None, torch.device("cpu"), World(0, 1, 0), train, lambda *_, **__: None, None, {}, None
    )  # type: ignore[arg-type]
    stages.run_gates(context)(tmp_path)
    assert sorted(packed) == ["digits", "letters"]
    held = load_gates(tmp_path / "gates.safetensors", library, all_sites(base.model))
    for expert in held:
        assert expert.means
        assert all(torch.equal(mean, wanted[site][expert.name]) for site, mean in expert.means.items())
