"""The `urepa` job under the engine: one curve for every ZeRO stage and world size, the sharded average, resume, what is off is off."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quietgoose.alignment.ema import decay_at
from quietgoose.base.errors import RecipeError
from quietgoose.train.jobs.urepa import check_job

STAGES = ("zero0", "zero1", "zero2", "zero3")
STEPS = 5


def case(strategy: str, name: str = "", **more: Any) -> dict[str, Any]:
    return {"run": f"{strategy}{name}", "model": "urepa", "strategy": strategy, "steps": STEPS, "every": 100, **more}


def extras(result: SimpleNamespace, name: str) -> list[float]:
    return [step[name] for step in result.extra]


@pytest.fixture(scope="module")
def tools() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).with_name("urepa_case.py")))


def plain(
    tools: dict[str, Any], steps: int = STEPS, **more: Any
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """The same training in plain PyTorch: one process, the averages by hand."""
    job, data, _ = tools["build"](more, 0, 1)
    groups = job.parameter_groups()
    optimizer = tools["OPTIMIZER"]
    adamw = torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=0)
    averages = {f"average/backbone.{n}": p.detach().clone() for n, p in job.backbone.named_parameters()}
    seen: dict[str, list[float]] = {"velocity": [], "token": [], "manifold": [], "total": []}
    for step in range(steps):
        batch = data.step(step)
        job.begin_step(step, 1.0 / batch.count_E.float())
        sums = torch.zeros(len(job.names))
        total = 0.0
        for micro in batch.micro:
            terms = job(micro)
            terms.total.backward()
            sums, total = sums + terms.sum_E, total + float(terms.total.detach())
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group["params"], optimizer.clip)
        adamw.step()
        adamw.zero_grad()
        for name, value in zip(job.names, (sums / batch.count_E).tolist()):
            seen[name].append(value)
        seen["total"].append(total)
        decay = float(decay_at(job.settings.average, torch.tensor(float(step), dtype=torch.float64)))
        for name, parameter in job.backbone.named_parameters():
            mine = averages[f"average/backbone.{name}"]
            mine.mul_(decay).add_(parameter.detach(), alpha=1 - decay)
    data.close()
    return seen, {n: p.detach() for n, p in job.named_parameters()} | averages


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_one_curve_and_one_average_for_every_stage_and_world_size(ranks, tools, world: int) -> None:
    """Scope `both` compares all images of a step, on whichever rank they are."""
    align = {"scope": "both"}
    done = ranks([case(stage, align=align) for stage in STAGES], world)
    assert done.codes == [0] * world
    seen, trained = plain(tools, align=align)
    for stage in STAGES:
        result = done.results[stage]
        for name, values in seen.items():
            assert extras(result, name) == pytest.approx(values, rel=1e-5), (stage, name)
        assert set(result.trained) == set(trained)
        for name, tensor in trained.items():
            assert result.trained[name] == pytest.approx(float(tensor.double().sum()), rel=1e-4, abs=2e-5), (
                stage,
                name,
            )


@pytest.mark.distributed
def test_a_cut_run_goes_on_to_the_bit_under_every_stage(ranks, tools) -> None:
    """Weights, moments, average (which teaches), rows, times, noise: two ranks, cut after step 2 of 5. Alignment ends after step 4."""
    teacher = {"teacher": "own", "align": {"stop": 0.2}}
    cut = {stage: case(stage, "-cut", every=2, **teacher) for stage in STAGES}
    cases = [
        one for stage in STAGES
        for one in (case(stage, "-whole", **teacher), {**cut[stage], "steps": 2, "name": f"{stage}-begun"}, cut[stage])
    ]  # fmt: skip
    done = ranks(cases, 2)
    assert done.codes == [0, 0]
    unet, data, _ = tools["build"](teacher, 0, 1)
    data.close()
    averages = {f"average/backbone.{name}" for name, _ in unet.backbone.named_parameters()}
    for stage in STAGES:
        whole, begun, resumed = (done.results[f"{stage}{name}"] for name in ("-whole", "-begun", "-cut"))
        assert (whole.start, begun.start, resumed.start) == (0, 0, 2), stage
        assert averages <= set(resumed.trained), stage
        for name, total in whole.trained.items():
            assert resumed.trained[name] == total, (stage, name)
        assert resumed.sha256 == whole.sha256, stage  # every tensor of `trained`, averages and all
        for kind in ("velocity", "token", "total"):
            assert extras(begun, kind) + extras(resumed, kind) == extras(whole, kind), (stage, kind)
        moved = [name for name in averages if whole.trained[name] not in (begun.trained[name], whole.trained[name[8:]])]
        assert len(moved) > len(averages) / 2, f"{stage}: an average is neither the weights nor at rest"


@pytest.mark.slow
@pytest.mark.distributed
def test_accumulation_resume_and_what_is_off(ranks, tools) -> None:
    """One start of two ranks runs all cases, since a start costs seconds."""
    other = case("zero3", "-other", every=2)
    off, stop = {"align": {"weight": 0.0}}, {"align": {"stop": 0.1}}  # of 20 steps: two
    cases = [
        case("zero2", "-micro", micro_rows=3), case("zero3", "-micro", micro_rows=2),
        {**other, "steps": 2, "name": "two"},
        *(case(stage, name, steps=3, **more) for stage in ("zero0", "zero2", "zero3")
          for name, more in (("-off", off), ("-none", {"teacher": "none"}))),
        case("zero2", "-stop", **stop), case("zero2", "-first", steps=2, **stop),
        *(case(stage, "-unet2d", steps=2, backbone="diffusers") for stage in (("zero0", "zero3") if find_spec("diffusers") else ())),
    ]  # fmt: skip
    done = ranks(cases, 2)
    assert done.codes == [0, 0]
    results = done.results

    # micro-batches: within images nothing depends on them
    seen, trained = plain(tools)
    for stage in ("zero2", "zero3"):
        for name, values in seen.items():
            assert extras(results[f"{stage}-micro"], name) == pytest.approx(values, rel=1e-5), name

    # begun as ZeRO-3 on two ranks, ended as ZeRO-0 on one
    alone = ranks([{**other, "strategy": "zero0", "name": "one"}], 1).results["one"]
    assert alone.start == 2
    for name, tensor in trained.items():
        assert alone.trained[name] == pytest.approx(float(tensor.double().sum()), rel=1e-4, abs=2e-5), name

    # lambda = 0 is plain training bit for bit, and leaves the projector as it began
    job, data, _ = tools["build"](off, 0, 1)
    data.close()
    for stage in ("zero0", "zero2", "zero3"):
        without, none = results[f"{stage}-off"], results[f"{stage}-none"]
        for name, value in none.trained.items():
            assert without.trained[name] == value, (stage, name)
        assert extras(without, "velocity") == extras(none, "velocity")
        assert "token_cosine" not in without.extra[0]
        for name, parameter in job.projector.named_parameters():
            begun = float(parameter.detach().double().sum())
            assert without.trained[f"projector.{name}"] == pytest.approx(begun, abs=1e-12)

    # diffusers' U-Net under ZeRO-3
    if find_spec("diffusers"):
        for name, value in results["zero0-unet2d"].trained.items():
            assert results["zero3-unet2d"].trained[name] == pytest.approx(value, rel=1e-4, abs=5e-5), name

    # after the stop the projector rests, moments and all
    assert [step["lambda"] for step in results["zero2-stop"].extra] == [0.5, 0.5, 0.0, 0.0, 0.0]
    for name, value in results["zero2-first"].trained.items():
        assert (results["zero2-stop"].trained[name] == value) == name.startswith("projector."), name


def test_settings_that_contradict_each_other(tools) -> None:
    align = tools["settings_of"]({"align": {"scope": "inter"}}).align
    with pytest.raises(RecipeError, match=r"QG-CFG-122.*3 micro-batches"):
        check_job(align, False, 2, 3)
    check_job(align, False, 2, 1)
    align.inter_over_micro = True
    check_job(align, False, 2, 3)
    with pytest.raises(RecipeError, match=r"QG-CFG-122.*ZeRO-3"):
        check_job(align, True, 3, 1)
