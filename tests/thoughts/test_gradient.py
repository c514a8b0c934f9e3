"""The loss and every gradient equal plain autograd over one branch at a time; chunks change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from quietgoose.base.errors import QuietGooseError
from quietgoose.kernels.testing import assert_close
from quietgoose.thoughts.anchors import term_counts
from quietgoose.thoughts.config import ThoughtConfig, curriculum, preset
from quietgoose.thoughts.gradient import Stream, thought_loss
from quietgoose.thoughts.policy import ModelPolicy, PolicyTensors
from quietgoose.thoughts.stats import summarise
from torch import Tensor

from .naive import TestRows, llama, naive_loss, packed, policy_of, qwen2

# two documents, one and a padded one, and a row that is all padding
ROWS = [[5, 4], [7], []]
SMALL: dict[str, Any] = {"tokens": 2, "lookahead": 3, "samples": 2}
DISTIL = curriculum(ThoughtConfig(samples=2), ((2, 3),)).stages[-1]
CONFIGS = {
    "default": preset("default", **SMALL),
    "bounded": preset("default", **SMALL, head="bounded", initial_weight=0.3, banned=(0, 1, 7)),
    "one token, one position": preset("default", tokens=1, lookahead=1, samples=3),
    "paper": preset("paper", **SMALL, beta=3.0),
    "int8 rollout": preset("default", **SMALL, rollout_cache="int8"),
    "int4 rollout": preset("default", **SMALL | {"tokens": 4}, rollout_cache="int4", ratio_cap=1.001),
    "rlp off policy": preset("rlp", tokens=4, samples=3, rollout_cache="int4", clip=0.01),
    "rlp": preset("rlp", tokens=2, samples=3),
    "leave one out": preset("default", **SMALL | {"samples": 3}, advantage="leave_one_out", ratio_cap=None),
    "entropy bonus": preset("default", **SMALL, beta=0.5, entropy_bonus=0.7, banned=(0, 1)),
    "entropy bonus, hot": preset("paper", **SMALL, beta=3.0, entropy_bonus=2.0),
    "no policy": preset("default", **SMALL, control="no_policy"),
    "pause": preset("default", **SMALL, control="pause"),
    "random thoughts": preset("default", **SMALL, control="random_thoughts"),
    "every other": preset("default", **SMALL, anchors="every_n", every=2),
    "random anchors": preset("default", **SMALL, anchors="random", share=0.4),
    "entropy anchors": preset("default", **SMALL, anchors="entropy", share=0.6, limit=2),
    "distil": DISTIL,
}  # fmt: skip


def weights_of(config: ThoughtConfig, rows: TestRows) -> Tensor:
    counts = term_counts(config, rows, seed=3, step=0)
    return (torch.tensor(config.coefficients(), dtype=torch.float64) / counts.clamp_min(1)).float()


def gradients(policy: ModelPolicy, total: Tensor) -> dict[str, Tensor]:
    named = [*policy.model.named_parameters(), *policy.parameters.named_parameters()]
    trained = [(name, p) for name, p in named if p.requires_grad]
    found = torch.autograd.grad(total, [p for _, p in trained], allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(trained, found)}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("make", [llama, qwen2])
def test_equals_plain_autograd(name, make) -> None:
    config, rows = CONFIGS[name], packed(ROWS, 10, unlabelled=1)
    policy = policy_of(make(), config, wide=True)
    weights = weights_of(config, rows)
    loss = thought_loss(policy, rows, config, weights, Stream(3, 0), chunk=4)
    want_total, want_sums = naive_loss(policy, rows, config, weights, loss.thoughts)
    for index in range(4):
        wanted = config.coefficients()[index] or index == 1 or index == 0
        if wanted:
            torch.testing.assert_close(loss.sums[index].double(), want_sums[index], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.total.detach().double(), want_total.detach(), rtol=1e-6, atol=1e-6)
    got, want = gradients(policy, loss.total), gradients(policy, want_total)
    scale = max(float(g.norm()) for g in want.values())
    assert scale > 1e-3
    for key, gradient in want.items():
        assert float((got[key] - gradient).norm()) <= 1e-6 * max(float(gradient.norm()), 1e-3 * scale), key


@pytest.mark.parametrize("anchors", [{}, {"anchors": "random", "share": 0.5}, {"limit": 3}])
def test_rows_of_one_document(anchors) -> None:
    """Every position an anchor of one document: the attention takes its stock causal path."""
    config, rows = preset("default", **SMALL, **anchors), packed([[9], [9]], 9)
    policy = policy_of(llama(), config, wide=True)
    weights = weights_of(config, rows)
    for chunk in (None, 4):
        loss = thought_loss(policy, rows, config, weights, Stream(3, 0), chunk=chunk)
        assert (loss.thoughts.anchors.consecutive_from == 0) == (not anchors)
        want_total, _ = naive_loss(policy, rows, config, weights, loss.thoughts)
        got, want = gradients(policy, loss.total), gradients(policy, want_total)
        for key in want:
            assert_close(key, got[key], want[key], limit=1e-6)


@pytest.mark.parametrize("name", ["default", "rlp", "distil", "bounded"])
def test_fp32_within_the_table(name) -> None:
    config, rows = CONFIGS[name], packed(ROWS, 10)
    policy = policy_of(llama(), config)
    weights = weights_of(config, rows)
    loss = thought_loss(policy, rows, config, weights, Stream(3, 0), chunk=3)
    want_total, want_sums = naive_loss(policy, rows, config, weights, loss.thoughts)
    assert_close("sums", loss.sums[:2], want_sums[:2])
    got, want = gradients(policy, loss.total), gradients(policy, want_total)
    scale = max(float(g.norm()) for g in want.values())
    for key, gradient in want.items():
        assert float((got[key] - gradient).norm()) <= 1e-4 * max(float(gradient.norm()), 1e-2 * scale), key


@pytest.mark.parametrize("name", ["default", "paper", "rlp", "distil", "bounded"])
def test_chunks_change_nothing(name) -> None:
    config, rows = CONFIGS[name], packed(ROWS, 10)
    policy = policy_of(llama(), config, wide=True)
    weights = weights_of(config, rows)
    results = []
    for chunk, rollout_chunk in ((None, None), (7, 3), (1, 1)):
        loss = thought_loss(
            policy, rows, config, weights, Stream(3, 0), chunk=chunk, rollout_chunk=rollout_chunk, measure_gap=True
        )
        results.append((loss, gradients(policy, loss.total)))
    first, want = results[0]
    for loss, got in results[1:]:
        assert torch.equal(loss.thoughts.tokens_BAST, first.thoughts.tokens_BAST)
        assert_close("logprob", loss.thoughts.logprob_BAST, first.thoughts.logprob_BAST, limit=1e-6)
        assert_close("sums", loss.sums, first.sums, limit=1e-6)
        assert_close("stats", loss.stats, first.stats, limit=1e-6)
        for key in want:
            assert_close(key, got[key], want[key], limit=1e-6)


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_model_trains_thoughts_only(freeze) -> None:
    config, rows = CONFIGS["default"], packed(ROWS, 10)
    policy = policy_of(llama(), config, wide=True)
    weights = weights_of(config, rows)
    full = thought_loss(policy, rows, config, weights, Stream(3, 0))
    want = gradients(policy, full.total)
    policy.model.requires_grad_(not freeze)
    loss = thought_loss(policy, rows, config, weights, Stream(3, 0), chunk=2)
    got = gradients(policy, loss.total)
    assert len(got) == (6 if freeze else len(want))
    for key in got:
        assert_close(key, got[key], want[key], limit=1e-6)


def test_the_outer_scale_reaches_every_gradient() -> None:
    """DeepSpeed multiplies the loss before backward."""
    config, rows = CONFIGS["default"], packed(ROWS, 10)
    policy = policy_of(llama(), config)
    weights = weights_of(config, rows)
    one = gradients(policy, thought_loss(policy, rows, config, weights, Stream(3, 0)).total)
    many = gradients(policy, thought_loss(policy, rows, config, weights, Stream(3, 0)).total * 8.0)
    for key in one:
        assert_close(key, many[key], 8.0 * one[key], limit=1e-6)


def test_recomputing_activations_keeps_the_prefix() -> None:
    config, rows = CONFIGS["default"], packed(ROWS, 10)
    policy = policy_of(llama(), config, wide=True)
    weights = weights_of(config, rows)
    want = gradients(policy, thought_loss(policy, rows, config, weights, Stream(3, 0)).total)
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.model.train()
    loss = thought_loss(policy, rows, config, weights, Stream(3, 0), chunk=3)
    got = gradients(policy, loss.total)
    for key in want:
        assert_close(key, got[key], want[key], limit=1e-6)


def test_a_bf16_model_gives_fp32_gradients_near_those_of_fp32() -> None:
    """Frozen bf16 weights, fp32 embeddings and head; the same weights in fp32 as yardstick (pause: the same thoughts)."""
    config, rows = CONFIGS["pause"], packed(ROWS, 10)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        policy = policy_of(llama().to(torch.bfloat16).to(dtype), config)
        policy.model.requires_grad_(False)
        loss = thought_loss(policy, rows, config, weights_of(config, rows), Stream(3, 0), chunk=3)
        assert loss.total.dtype == torch.float32
        found.append(gradients(policy, loss.total))
    for key, want in found[1].items():
        assert found[0][key].dtype == torch.float32
        assert_close(
            key, found[0][key], want, limit=0.2
        )  # plain autograd in bf16 is up to 0.10 off here, this up to 0.10


def test_without_gradients_nothing_is_kept() -> None:
    config, rows = CONFIGS["default"], packed(ROWS, 10)
    policy = policy_of(llama(), config)
    weights = weights_of(config, rows)
    with torch.no_grad():
        loss = thought_loss(policy, rows, config, weights, Stream(3, 0))
    assert not loss.total.requires_grad
    again = thought_loss(policy, rows, config, weights, Stream(3, 0))
    torch.testing.assert_close(loss.total, again.total.detach())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_is_computed(mode, monkeypatch) -> None:
    """Parameters that want gradients are inputs of the autograd function all the same."""
    config, rows = CONFIGS["default"], packed(ROWS, 10)
    policy = policy_of(llama(), config)
    weights = weights_of(config, rows)
    want = thought_loss(policy, rows, config, weights, Stream(3, 0), chunk=3)
    monkeypatch.setattr(torch.autograd, "grad", None)
    with mode():
        loss = thought_loss(policy, rows, config, weights, Stream(3, 0), chunk=3)
    torch.testing.assert_close(loss.total.clone(), want.total.detach())
    torch.testing.assert_close(loss.sums.clone(), want.sums)


class BoundPolicy:
    """The model's last gate projection times a vector that `bind` brings, as adapters are brought."""

    def __init__(self, model: Any, parameters: Any) -> None:
        self.model, self.parameters, self.given = model, parameters, None
        width = model.config.intermediate_size
        self.scale = torch.linspace(0.5, 1.5, width, dtype=model.dtype).requires_grad_()
        model.requires_grad_(False)
        model.base_model.layers[-1].mlp.gate_proj.register_forward_hook(lambda m, x, y: y * self.given)

    def tensors(self) -> PolicyTensors:
        return PolicyTensors(self.parameters.tensors(), (self.scale * 1.0,))

    @contextmanager
    def bind(self, tensors: PolicyTensors) -> Iterator[None]:
        before, self.given = self.given, tensors.adapters[0]
        try:
            yield
        finally:
            self.given = before


def test_adapters_are_bound_when_a_chunk_goes_back(monkeypatch) -> None:
    """A chunk's backward pass may run the model again, so it belongs inside `bind`."""
    config, rows = CONFIGS["default"], packed(ROWS, 10)
    plain = policy_of(llama(), config, wide=True)
    policy = BoundPolicy(plain.model, plain.parameters)
    bound, real = [], torch.autograd.grad

    def spy(*args: Any, **options: Any) -> Any:
        bound.append(policy.given is not None)
        return real(*args, **options)

    weights = weights_of(config, rows)
    monkeypatch.setattr(torch.autograd, "grad", spy)
    loss = thought_loss(policy, rows, config, weights, Stream(3, 0), chunk=3)
    assert bound
    assert all(bound)
    loss.total.backward()
    assert float(policy.scale.grad.abs().max()) > 0


def test_bound_adapters_refuse_activation_checkpointing() -> None:
    config, rows = CONFIGS["default"], packed(ROWS, 10)
    plain = policy_of(llama(), config)
    policy = BoundPolicy(plain.model, plain.parameters)
    policy.model.gradient_checkpointing_enable()
    policy.model.train()
    with pytest.raises(QuietGooseError, match="THT-004"):
        thought_loss(policy, rows, config, weights_of(config, rows), Stream(3, 0))
    policy.model.eval()
    assert thought_loss(policy, rows, config, weights_of(config, rows), Stream(3, 0)).total.requires_grad


def test_the_entropy_bonus_has_its_own_coefficient() -> None:
    """d loss / d bonus is minus the mean entropy, whatever beta is; without a policy term there is none."""
    rows = packed(ROWS, 10)
    for changes in ({}, {"beta": 8.0}, {"control": "no_policy"}):
        totals = []
        for bonus in (0.0, 0.25):
            config = preset("default", **SMALL, entropy_bonus=bonus, **changes)
            policy = policy_of(llama(), config, wide=True)
            loss = thought_loss(policy, rows, config, weights_of(config, rows), Stream(3, 0), chunk=3)
            totals.append(loss.total.item())
        entropy = summarise(loss.stats)["thought_entropy"]
        assert totals[0] - totals[1] == pytest.approx(
            0.0 if "control" in changes else 0.25 * entropy, rel=1e-5, abs=1e-9
        )


def test_a_batch_without_labels_is_finite() -> None:
    config, rows = CONFIGS["default"], packed(ROWS, 10)
    rows = dataclasses.replace(rows, labels_BT=torch.full_like(rows.labels_BT, -100))
    policy = policy_of(llama(), config)
    loss = thought_loss(policy, rows, config, torch.ones(4), Stream(3, 0))
    assert loss.sums.tolist() == [0, 0, 0, 0]
    assert all(float(g.abs().max()) == 0 for g in gradients(policy, loss.total).values())


def test_fp16_is_not_trained_but_may_be_scored() -> None:
    """Without loss scaling its small gradients would be zero."""
    config, rows = CONFIGS["default"], packed(ROWS, 10)
    policy = policy_of(llama().half(), config)
    weights = weights_of(config, rows)
    with pytest.raises(QuietGooseError, match=r"QG-THT-006 .*float16.*bfloat16 or float32"):
        thought_loss(policy, rows, config, weights, Stream(3, 0))
    with torch.no_grad():
        assert bool(thought_loss(policy, rows, config, weights, Stream(3, 0)).sums.isfinite().all())
