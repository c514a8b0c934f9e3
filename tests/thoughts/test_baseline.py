"""The moving average that rlp's rewards are measured against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from quietgoose.thoughts import stats
from quietgoose.thoughts.anchors import term_counts
from quietgoose.thoughts.baseline import MovingBaseline
from quietgoose.thoughts.branch import base_losses
from quietgoose.thoughts.config import preset
from quietgoose.thoughts.gradient import Stream, thought_loss
from quietgoose.thoughts.parameters import ThoughtParameters
from quietgoose.thoughts.policy import PolicyTensors
from quietgoose.thoughts.prefix import run_prefix
from torch import nn
from torch.nn import functional

from .naive import llama, packed, policy_of

CONFIG = preset("rlp", tokens=2, samples=3)
ROWS = packed([[6, 5], [9]], 12)


class _Shifted(nn.Module):
    """A linear plus an offset that a context sets: the smallest adapter there is."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.offset = base, None

    def forward(self, x):
        y = self.base(x)
        return y if self.offset is None else y + self.offset


class OffsetPolicy:
    """A frozen model with one trainable offset at a linear, bound as LoRA is: tensors, not parameters."""

    def __init__(self, config) -> None:
        self.model: Any = llama().requires_grad_(False)
        self.parameters = ThoughtParameters.from_token(self.model, 5, config, 0)
        attention = self.model.base_model.layers[0].self_attn
        self.place = attention.o_proj = _Shifted(attention.o_proj)
        self.offset = nn.Parameter(torch.randn(24) * 0.1)

    def tensors(self) -> PolicyTensors:
        return PolicyTensors(self.parameters.tensors(), (self.offset * 1.0,))

    @contextmanager
    def bind(self, tensors: PolicyTensors) -> Iterator[None]:
        before, self.place.offset = self.place.offset, tensors.adapters[0]
        try:
            yield
        finally:
            self.place.offset = before


def no_think(policy, tensors) -> torch.Tensor:
    with torch.no_grad(), policy.bind(tensors):
        return base_losses(policy.model, run_prefix(policy.model, ROWS).hidden_BLD, ROWS.labels_BT)[0]


def test_it_is_the_model_at_first_and_follows_slowly() -> None:
    policy = OffsetPolicy(CONFIG)
    baseline = MovingBaseline(policy.tensors().adapters, decay=0.75)
    tensors = policy.tensors()
    torch.testing.assert_close(baseline.losses(policy, tensors, ROWS), no_think(policy, tensors))
    first = policy.offset.detach().clone()
    with torch.no_grad():
        policy.offset += 1
    baseline.update(policy.tensors())
    torch.testing.assert_close(baseline.average_0, first + 0.25)
    assert not torch.allclose(baseline.losses(policy, policy.tensors(), ROWS), no_think(policy, policy.tensors()))
    loaded = MovingBaseline(policy.tensors().adapters, decay=0.75)
    loaded.load_state_dict(baseline.state_dict())
    assert torch.equal(loaded.average_0, baseline.average_0)


def test_whole_models_are_averaged_in_place_and_put_back() -> None:
    policy = policy_of(llama(), CONFIG)
    baseline = MovingBaseline(policy.tensors().adapters, decay=0.5)
    want = no_think(policy, policy.tensors())
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter *= 1.1
    moved = no_think(policy, policy.tensors())
    torch.testing.assert_close(baseline.losses(policy, policy.tensors(), ROWS), want)
    assert torch.equal(no_think(policy, policy.tensors()), moved)


def test_rewards_are_measured_against_it_and_the_gradient_is_not() -> None:
    policy = OffsetPolicy(CONFIG)
    weights = (1 / term_counts(CONFIG, ROWS, seed=0, step=0)).float()
    shift = functional.pad(torch.full((2, 11), 0.5), (0, 1))
    own = no_think(policy, policy.tensors())
    plain = thought_loss(policy, ROWS, CONFIG, weights, Stream(0, 0))
    other = thought_loss(policy, ROWS, CONFIG, weights, Stream(0, 0), baseline_BL=own + shift)
    rewards = [stats.summarise(loss.stats)["reward"] for loss in (plain, other)]
    assert rewards[1] - rewards[0] == pytest.approx(0.5, abs=1e-5)
    one, two = (torch.autograd.grad(loss.total, policy.offset)[0] for loss in (plain, other))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert float(one.norm()) > 0


def test_bound_tensors_reach_rollout_and_gradient_pass_alike() -> None:
    """Ratio 1: the rollout ran under the same offset as the gradient pass."""
    policy = OffsetPolicy(CONFIG)
    config = preset("default", tokens=2, lookahead=2, samples=2)
    loss = thought_loss(policy, ROWS, config, torch.ones(4), Stream(0, 0), chunk=2)
    assert stats.summarise(loss.stats)["rollout_dlogp"] < 1e-5


def test_the_gradient_of_what_is_bound_is_that_of_finite_differences() -> None:
    """Through base and mixed loss, prefix and branches; random thoughts, so that all differences see the same ones."""
    config = preset("default", tokens=2, lookahead=2, samples=2, control="random_thoughts", initial_weight=0.5)
    policy = OffsetPolicy(config)
    policy.model.double()
    policy.parameters.double()
    policy.offset.data = policy.offset.data.double()

    def total() -> torch.Tensor:
        return thought_loss(
            policy, ROWS, config, torch.tensor([1.0, 1.0, 0.0, 0.0]).double(), Stream(0, 0), chunk=2
        ).total

    got = torch.autograd.grad(total(), policy.offset)[0]
    for index in (0, 3, 17):
        ends = []
        for move in (1e-2, -1e-2):  # well above the noise of the norms, which compute in fp32
            with torch.no_grad():
                policy.offset[index] += move
                ends.append(total().item())
                policy.offset[index] -= move
        assert float(got[index]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-3, abs=1e-3)
