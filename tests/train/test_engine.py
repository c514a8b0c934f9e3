"""One loss curve whatever the ZeRO stage, world size and dtype of the base; gradients against plain PyTorch."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.train.recipe import OptimizerSettings
from quietgoose.train.schedule import learning_rate
from quietgoose.train.types import LossTerms

STRATEGIES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
STEPS = 6


def case(strategy: str, **more) -> dict:
    name = "-".join([strategy, *(str(v) for v in more.values())])
    return {"run": name, "strategy": strategy, "steps": STEPS, "every": 100, **more}


@pytest.fixture(scope="module")
def worker() -> dict:
    return runpy.run_path(str(Path(__file__).with_name("rank_worker.py")))


def plain(worker: dict, model: str, clip: float = 0.05) -> tuple[list[float], dict[str, float]]:
    """The same training in plain PyTorch: one process, one backward a step, clip_grad_norm_ per group."""
    job = worker["BankJob" if model == "bank" else "PlainJob"](torch.float32)
    settings = OptimizerSettings(**worker["OPTIMIZER"])
    groups = job.parameter_groups()
    adamw = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
    data = worker["TinyData"](0, 1, len(job.names), 0.0)
    losses = []
    for step in range(STEPS):
        batch = data.step(step)
        sums = torch.stack([job(micro).sum_E for micro in batch.micro]).sum(0)
        terms = sums / batch.count_E.clamp(min=1)
        terms.sum().backward()
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group["params"], clip)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(settings, step, 20)
        adamw.step()
        adamw.zero_grad()
        losses.append(terms.mean().item())
    return losses, {n: p.detach().double().sum().item() for n, p in job.named_parameters() if p.requires_grad}


def curve(result) -> list[float]:
    return [float.fromhex(loss) for _, loss, _ in result.losses]


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_one_curve_for_every_stage_and_world_size(ranks, worker, world: int) -> None:
    cases = [case(s) for s in STRATEGIES] + [case(s, model="plain") for s in STRATEGIES]
    done = ranks(cases, world)
    assert done.codes == [0] * world
    for model in ("bank", "plain"):
        losses, trained = plain(worker, model)
        for strategy in STRATEGIES:
            result = done.results[strategy if model == "bank" else f"{strategy}-plain"]
            assert curve(result) == pytest.approx(losses, rel=1e-5), (strategy, model)
            assert set(result.trained) == set(trained)
            for name, value in trained.items():
                assert result.trained[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (strategy, name)


@pytest.mark.distributed
def test_fp32_experts_over_a_bf16_base_at_every_stage(ranks) -> None:
    strategies = ("zero0", "zero2", "zero3", "zero3_offload")
    done = ranks([case(s, dtype="bfloat16") for s in strategies])
    results = [done.results[f"{s}-bfloat16"] for s in strategies]
    assert {tuple(r.base_dtype) for r in results} == {("torch.bfloat16",)}
    for result in results:
        assert curve(result) == pytest.approx(curve(results[0]), rel=1e-5)


@pytest.mark.distributed
def test_clipping_is_per_group_and_can_be_off(ranks, worker) -> None:
    done = ranks([case("zero2", clip=0.0)])
    losses, _ = plain(worker, "bank", clip=1e9)
    assert curve(done.results["zero2-0.0"]) == pytest.approx(losses, rel=1e-5)
    clipped, _ = plain(worker, "bank")
    assert losses[-1] != pytest.approx(clipped[-1], rel=1e-3)


def test_groups_must_be_the_trainables_in_fp32(worker) -> None:
    from quietgoose.train.groups import check_groups

    job = worker["BankJob"](torch.float32)
    assert list(check_groups(job, job.parameter_groups())) == ["bank.flat_a", "bank.flat_b", "bank.flat_c"]
    with pytest.raises(RecipeError, match="3 parameters need gradients, 2 are in groups"):
        check_groups(job, job.parameter_groups()[:2])
    job.bank.flat_b.data = job.bank.flat_b.data.bfloat16()
    with pytest.raises(RecipeError, match=r"flat_b is torch\.bfloat16"):
        check_groups(job, job.parameter_groups())


def test_zero3_sees_the_tensors_of_loss_terms() -> None:
    """Its hooks look into tuples; of another kind of output DeepSpeed says that it cannot detect the tensors."""
    from deepspeed.runtime.zero.utils import apply_to_tensors_only

    unknown: list[object] = []
    terms = LossTerms(torch.zeros(2), torch.ones(()))
    seen = apply_to_tensors_only(lambda tensor: tensor + 1, terms, unknown.append)
    assert isinstance(seen, LossTerms)
    assert (seen.sum_E.tolist(), float(seen.total), seen.extra_X) == ([1.0, 1.0], 2.0, None)
    assert unknown == []


def test_learning_rate() -> None:
    constant = OptimizerSettings(lr=1.0, warmup=0.06)
    assert [learning_rate(constant, s, 100) for s in (0, 5, 6, 99)] == pytest.approx([1 / 6, 1, 1, 1])
    linear = OptimizerSettings(lr=2.0, warmup=0.0, schedule="linear", min_lr_ratio=0.5)
    assert [learning_rate(linear, s, 4) for s in (0, 2, 4)] == pytest.approx([2.0, 1.5, 1.0])
    cosine = OptimizerSettings(lr=1.0, warmup=0.5, schedule="cosine")
    assert [learning_rate(cosine, s, 8) for s in (3, 4, 6)] == pytest.approx([1.0, 1.0, 0.5])
