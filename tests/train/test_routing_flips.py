"""Thoughts over routed experts: rollout and gradient pass route alike, and where they do not, it is counted."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import pytest
import torch
from quietgoose.routing.choices import recorded_choices, scoring_sites
from quietgoose.routing.model import set_router, state
from quietgoose.thoughts import flips
from quietgoose.thoughts.flips import flip_sums
from quietgoose.thoughts.stats import SUMS, summarise

TOOLS = runpy.run_path(str(Path(__file__).with_name("thought_case.py")))
SITES = 14  # two layers of seven linears
STEPS = 3


def sums_at(job, data, step: int, device: str = "cpu") -> dict[str, float]:
    """What the first micro-batch of a step adds to the dashboard."""
    batch = data.step(step)
    job.begin_step(step, torch.where(batch.count_E > 0, 1 / batch.count_E.clamp(min=1), 0.0).float().to(device))
    return job.summarise(dict(zip(SUMS, job(batch.micro[0].to(device)).extra_X.tolist())))


def built(**case):
    job, data, _ = TOOLS["build"]({"over": "routed", **case})
    return job, data


def test_recorded_choices_are_those_of_the_sites_and_change_nothing() -> None:
    job, _ = built()
    model, tokens = job.policy.model, torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        before = model(tokens).logits
        with recorded_choices(model) as calls:
            assert torch.equal(model(tokens).logits, before)
        assert torch.equal(model(tokens).logits, before)
    assert len(calls) == len(scoring_sites(model)) == SITES
    first = next(iter(state(model).modules.values()))
    x = model.base_model.layers[0].input_layernorm(model.get_input_embeddings()(tokens))
    assert torch.equal(calls[0], first.route(x).index_TK.sort(1).values)
    set_router(model, "uniform")
    assert not scoring_sites(model), "nobody chooses"


def test_the_count_is_on_the_dashboard_at_some_steps() -> None:
    job, data = built()
    set_router(job.policy.model, "phatgoose", 1)
    found = sums_at(job, data, 0)
    assert found["routing_flip_share"] == 0.0, "fp32: the two passes agree"
    assert "routing_flip_share" not in sums_at(job, data, 1)
    assert sums_at(job, data, 50)["routing_flip_share"] == 0.0
    unrouted, data = built(over="base")
    assert "routing_flip_share" not in sums_at(unrouted, data, 0)


def counted(job, data, monkeypatch, **changes) -> dict[str, float]:
    """(routed, flips) of the first micro-batch, the rollout's settings changed for the replay alone."""
    found = {}

    def spy(policy, tensors, prefix, rows, thoughts, config, choices):
        sums = flip_sums(policy, tensors, prefix, rows, thoughts, dataclasses.replace(config, **changes), choices)
        found.update(zip(SUMS, sums.tolist()), thoughts=thoughts, share=summarise(sums)["routing_flip_share"])
        return sums

    monkeypatch.setattr("quietgoose.thoughts.gradient.flip_sums", spy)
    sums_at(job, data, 0)
    return found


def test_every_site_of_every_thought_token_of_the_first_chunk_is_compared(monkeypatch) -> None:
    job, data = built()
    found = counted(job, data, monkeypatch)
    thoughts = found["thoughts"]
    assert thoughts.anchors.count == 6, "twelve in chunks of at most seven"
    assert found["routed"] == int(thoughts.anchors.valid_BA.sum()) * 2 * STEPS * SITES
    assert found["flips"] == 0


@pytest.mark.parametrize("planted", ["other tokens", "a coarse cache"])
def test_a_difference_is_counted(planted, monkeypatch) -> None:
    """Two experts of two are always chosen: k = 1 of them."""
    job, data = built()
    set_router(job.policy.model, "phatgoose", 1)
    assert counted(job, data, monkeypatch)["flips"] == 0
    if planted == "a coarse cache":
        found = counted(job, data, monkeypatch, rollout_cache="int4")
        assert 0 < found["share"] < 0.1, "the rollout really is replayed as it was made"
        return
    replay = flips._replay

    def wrong(policy, tensors, prefix, rows, thoughts, store):
        replay(policy, tensors, prefix, rows, thoughts.with_tokens(thoughts.tokens_BAST.roll(1, -1)), store)

    monkeypatch.setattr(flips, "_replay", wrong)
    assert counted(job, data, monkeypatch)["share"] > 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_few_choices_flip(dtype: str, capsys) -> None:
    """The rollout's kernels and the gradient pass's formulation differ; near ties may go either way, no more than that."""
    job, data = built(dtype=dtype)
    job.policy.model.cuda()
    job.cuda()
    set_router(job.policy.model, "phatgoose", 1)
    share = sums_at(job, data, 0, "cuda")["routing_flip_share"]
    with capsys.disabled():
        print(f"\nrouting flips, {dtype}: {share:.2e} of the choices")
    assert share < (1e-4 if dtype == "float32" else 0.02)
