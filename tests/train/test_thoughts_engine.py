"""Thoughts under DeepSpeed: one curve whatever the ZeRO stage, the number of processes and a kill; nothing frozen moves."""

from __future__ import annotations

import json
import math
import runpy
import signal
from pathlib import Path

import pytest
import torch
from quietgoose.train.schedule import learning_rate
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
STEPS = 4
HERE = Path(__file__)


@pytest.fixture(scope="module")
def tools() -> dict:
    return runpy.run_path(str(HERE.with_name("thought_case.py")))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> str:
    """ZeRO-3 that takes every parameter apart, however small."""
    path = tmp_path_factory.mktemp("strategy") / "all.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    return str(path)


def case(strategy: str, name: str, **more) -> dict:
    return {"run": name, "name": name, "strategy": strategy, "steps": STEPS, "every": 100, "model": "thoughts", **more}


def plain(tools: dict, given: dict) -> tuple[list[dict[str, float]], dict[str, float]]:
    """The same training without DeepSpeed: one process, one micro-batch at a time, a clipped AdamW per group."""
    job, data, _ = tools["build"](given)
    settings, groups = tools["optimizer"](), job.parameter_groups()
    adamw = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
    found = []
    for step in range(STEPS):
        batch = data.step(step)
        weights = torch.where(batch.count_E > 0, 1 / batch.count_E.clamp(min=1), 0.0).float()
        job.begin_step(step, weights)
        sums = torch.zeros(len(job.names), dtype=torch.float64)
        for micro in batch.micro:
            terms = job(micro)
            terms.total.backward()
            sums += terms.sum_E
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group["params"], settings.clip)
            for parameter in group["params"] if group["name"] in job.resting(step) else ():
                parameter.grad = None
        for group in adamw.param_groups:
            group["lr"] = learning_rate(settings, step, 20) * group["lr_scale"]
        adamw.step()
        adamw.zero_grad()
        found.append(dict(zip(job.names, (sums / batch.count_E.clamp(min=1)).tolist())))
    return found, {n: p.detach().double().sum().item() for n, p in job.named_parameters() if p.requires_grad}


def close(result, losses: list[dict[str, float]], trained: dict[str, float], what: str) -> None:
    # a number next to a rounding boundary of the int8 rollout takes the other code when sums are taken in another order; the
    # weights pi / pi_old of the policy term see it
    policy_abs = 1e-5 if what == "int8" else 1e-6
    for step, wanted in enumerate(losses):
        for term, value in wanted.items():
            limit = policy_abs if term == "policy" else 1e-6
            assert result.extra[step][term] == pytest.approx(value, rel=2e-5, abs=limit), (what, step, term)
    assert set(result.trained) == set(trained), what
    for name, value in trained.items():
        assert result.trained[name] == pytest.approx(value, rel=1e-4, abs=1e-4), (what, name)
    assert result.frozen[0] == result.frozen[1], f"{what}: something frozen moved"


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_one_curve_for_every_stage_and_world_size(ranks, tools, sharded, world: int) -> None:
    kinds = {"plain": {}, "routed": {"over": "routed"}}
    strategies = ("zero0", "zero1", "zero2", sharded)
    cases = [case(s, f"{kind}-{n}", **more) for kind, more in kinds.items() for n, s in enumerate(strategies)]
    done = ranks(cases, world)
    assert done.codes == [0] * world
    for kind, more in kinds.items():
        losses, trained = plain(tools, more)
        assert losses[-1]["mixed"] < losses[0]["mixed"]
        for number, strategy in enumerate(strategies):
            close(done.results[f"{kind}-{number}"], losses, trained, f"{kind} {strategy}")


@pytest.mark.slow
def test_what_may_be_trained_and_the_controls(ranks, tools, sharded) -> None:
    kinds = {
        "embeddings": {"trainable": "embeddings", "over": "routed"},
        "full": {"trainable": "full"},
        "one-expert": {"over": "expert:ant", "dtype": "bfloat16"},
        "no-thoughts": {"thoughts": {"control": "no_thoughts"}},
        "no-policy": {"thoughts": {"control": "no_policy"}},
        "curriculum": {"thoughts": {"preset": "curriculum", "curriculum_sizes": [[3, 2], [2, 1]], "tokens": None}},
        "entropy": {"thoughts": {"anchors": "entropy", "share": 0.3}},
        "int8": {"thoughts": {"anchors": "entropy", "share": 0.3, "rollout_cache": "int8"}},
        "rlp": {
            "over": "routed",
            "thoughts": {"preset": "rlp", "head": None, "lookahead": None, "baseline_decay": 0.5},
        },
    }
    strategies = {"embeddings": sharded, "no-thoughts": sharded, "rlp": sharded}
    done = ranks([case(strategies.get(kind, "zero2"), kind, **more) for kind, more in kinds.items()])
    assert done.codes == [0, 0]
    for kind, more in kinds.items():
        losses, trained = plain(tools, more)
        if kind == "one-expert":  # bf16: sums over micro-batches of other sizes differ
            assert done.results[kind].extra[0]["base"] == pytest.approx(losses[0]["base"], rel=1e-2)
            assert done.results[kind].frozen[0] == done.results[kind].frozen[1]
            continue
        close(done.results[kind], losses, trained, kind)


def test_in_the_distillation_start_end_and_head_stand_still(ranks, sharded, tmp_path) -> None:
    """Bit for bit, whatever AdamW remembers of them; the LoRA goes on learning."""
    sizes = {
        "preset": "curriculum",
        "curriculum_sizes": [[2, 1]],
        "tokens": None,
        "limit": 4,
    }  # of 20 steps the last 10 distil
    strategies = {"zero0": "zero0", "offload": "zero2_offload", "sharded": sharded}
    cases = [case(strategy, name, thoughts=sizes) for name, strategy in strategies.items()]
    done = ranks([one | {"every": 10, "steps": 12} for one in cases], 1)
    assert done.codes == [0]
    for name in strategies:
        folder = tmp_path / name / "checkpoints"
        begun, end = (load_file(folder / f"step_000000{step}" / "state.safetensors") for step in (10, 12))
        rest = [key for key in begun if "/parameters_of_thoughts." in key]
        assert len(rest) == 3 * 6, "START and END, five tensors of the head, each with its two moments"
        assert all(torch.equal(begun[key], end[key]) for key in rest), name
        assert not torch.equal(begun["parameter/lora.flat_P"], end["parameter/lora.flat_P"]), name


def test_statistics_do_not_depend_on_the_number_of_processes(ranks) -> None:
    one, two = (ranks([case("zero2", f"w{world}")], world).results[f"w{world}"] for world in (1, 2))
    for mine, other in zip(one.extra, two.extra):
        wanted = {"mixing_weight", "reward_mean", "reward_std", "zero_reward_share", "thought_entropy", "rollout_kl"}
        assert set(mine) >= wanted
        exchanged = {"own_gain", "shuffled_gain", "own_minus_shuffled"}  # between the documents of a micro-batch
        for name in set(mine) - exchanged:
            value = mine[name]
            assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        assert mine["rollout_kl"] == pytest.approx(0, abs=1e-6)
    assert "own_minus_shuffled" in one.extra[0]
    assert "own_minus_shuffled" not in one.extra[1]
    assert all(math.isfinite(value) for value in one.extra[0].values())


@pytest.mark.slow  # test_pipeline.py kills a thoughts stage too; here under every strategy
def test_killed_and_continued_is_the_same_bit_for_bit(ranks, sharded) -> None:
    """kill -9 inside a step and while saving, then the same command again: losses, norms and trained tensors."""
    kills = {"zero2": ("micro", 1, 5), "sharded": ("save.writing", 0, 6), "zero0": ("step", 0, 4)}
    strategies = {"zero2": "zero2", "sharded": sharded, "zero0": "zero0"}
    thoughts = {"baseline_decay": 0.5}  # the moving average is part of a checkpoint
    long = {"steps": 8, "every": 3, "over": "routed", "thoughts": thoughts}
    whole = ranks([case(s, f"whole-{name}", **long) for name, s in strategies.items()])
    assert whole.codes == [0, 0]
    for name, (point, rank, step) in kills.items():
        plan = [{"point": point, "rank": rank, "step": step, "action": "kill"}]
        killed = ranks([case(strategies[name], name, plan=plan, **long)])
        assert killed.codes[rank] == -signal.SIGKILL
    again = ranks([case(s, name, **long) for name, s in strategies.items()])
    assert again.codes == [0, 0]
    for name in strategies:
        result, wanted = again.results[name], whole.results[f"whole-{name}"]
        assert result.start == 3, name
        assert result.losses == wanted.losses[3:], name
        assert result.norms == wanted.norms[3:], name
        assert result.sha256 == wanted.sha256, name
        assert result.extra[-1] == wanted.extra[-1], name
        assert result.frozen[0] == wanted.frozen[0], name


def test_each_group_has_its_own_learning_rate(tools) -> None:
    job, _, _ = tools["build"]({})
    rates = {group["name"]: group["lr_scale"] * tools["OPTIMIZER"].lr for group in job.parameter_groups()}
    assert rates == pytest.approx({"adapter": 1e-2, "meta": 3e-2, "head": 1e-3})
    plain_tuning, _, _ = tools["build"]({"thoughts": {"control": "no_thoughts"}})
    assert [group["name"] for group in plain_tuning.parameter_groups()] == ["adapter"]


def test_chunks_of_the_rollout_bound_what_is_sampled_at_once(tools, monkeypatch) -> None:
    """`rollout_chunk` counts thoughts of a row; neither it nor `capture` changes what is learned."""
    from quietgoose.thoughts import rollout as module

    sizes, totals = [], []
    made = module._Stepper.__init__

    def noted(self, policy, prefix, anchors, *more, **options) -> None:
        sizes.append(anchors.count)
        made(self, policy, prefix, anchors, *more, **options)

    monkeypatch.setattr(module._Stepper, "__init__", noted)
    for changes in ({}, {"rollout_chunk": 5}, {"rollout_chunk": 1, "capture": "never"}):
        job, data, _ = tools["build"]({"thoughts": changes})
        assert (job.graphs is None) == ("capture" in changes)
        job.begin_step(0, torch.tensor([0.7, 1.3, 0.4, 0.0]))
        loss = job(data.step(0).micro[0])
        loss.total.backward()
        totals.append([loss.total.item(), *(float(p.grad.norm()) for p in job.parameters() if p.requires_grad)])
    assert sizes[1:] == [2, 1]
    assert sizes[0] > 2
    assert totals[1] == pytest.approx(totals[0], rel=1e-5)
    assert totals[2] == pytest.approx(totals[0], rel=1e-5)


@pytest.mark.parametrize(
    ("over", "dtype", "tolerance"),
    [("base", "float64", 1e-2), ("expert:bee", "float64", 1e-2), ("routed", "float32", 5e-2)],
)
def test_gradients_by_finite_differences(tools, over: str, dtype: str, tolerance: float) -> None:
    """With random thoughts, which do not depend on what is differentiated: LoRA on top, START and END, head."""
    given = {"over": over, "dtype": dtype, "thoughts": {"control": "random_thoughts", "chunk": 5}}
    job, data, _ = tools["build"](given)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from zero, where B gives no gradient to A and the head's last layer none to the others
        for parameter in (p for p in job.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.05)
    micro = data.step(0).micro[0]
    weights = torch.tensor([0.7, 1.3, 0.0, 0.0])
    step = 1e-3  # the model's norms run in fp32: smaller steps drown in rounding

    def total() -> torch.Tensor:
        job.begin_step(0, weights)
        return job(micro).total

    total().backward()
    for name, parameter in job.named_parameters():
        if not parameter.requires_grad:
            continue
        direction = torch.randn(parameter.shape, generator=random)
        direction /= direction.norm()
        slope = float((parameter.grad * direction).sum())
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * step)
                values.append(float(total()))
                parameter.sub_(direction, alpha=sign * step)
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-2, abs=tolerance), name
