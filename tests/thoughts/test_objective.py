"""The objective as mathematics: no model, small vocabularies enumerated exactly."""

from __future__ import annotations

import itertools

import pytest
import torch
from quietgoose.thoughts import objective
from quietgoose.thoughts.config import Advantage, ThoughtConfig, preset
from quietgoose.thoughts.terms import policy_loss
from torch import Tensor

KINDS: tuple[Advantage, ...] = ("two_sided", "one_sided", "leave_one_out")


def test_rewards_are_nats_saved_on_what_is_valid() -> None:
    base = torch.tensor([[[2.0, 1.0, 5.0]]])
    mixed = torch.tensor([[[[1.5, 1.5, 9.0], [2.0, 0.0, torch.nan]]]])
    valid = torch.tensor([[[True, True, False]]])
    torch.testing.assert_close(objective.rewards(base, mixed, valid), torch.tensor([[[0.0, 1.0]]]))


@pytest.mark.parametrize("kind", KINDS)
def test_constant_rewards_give_exactly_nothing(kind) -> None:
    reward = torch.full((2, 3, 5), 0.1) * torch.tensor([1.0, 7.3, -3.7])[:, None]
    assert bool((objective.advantages(reward, kind) == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_gives_no_advantage(kind) -> None:
    assert bool((objective.advantages(torch.randn(2, 3, 1), kind) == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_base_losses_cancel(kind) -> None:
    torch.manual_seed(0)
    mixed, valid = torch.rand(2, 3, 4, 5).double() * 3, torch.rand(2, 3, 5) < 0.7
    found = [
        objective.advantages(objective.rewards(base, mixed, valid), kind)
        for base in (torch.rand(2, 3, 5).double(), torch.full((2, 3, 5), 7.0).double())
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_kinds_of_advantage() -> None:
    reward = torch.tensor([[[1.0, 2.0, 6.0]]])
    want = {"two_sided": [-2.0, -1.0, 3.0], "one_sided": [0.0, 0.0, 3.0], "leave_one_out": [-3.0, -1.5, 4.5]}
    for kind in KINDS:
        torch.testing.assert_close(objective.advantages(reward, kind), torch.tensor([[want[kind]]]))


def test_advantages_carry_no_gradient() -> None:
    reward = torch.randn(1, 1, 3, requires_grad=True)
    assert not objective.advantages(reward, "two_sided").requires_grad


def test_truncation_caps_and_detaches() -> None:
    new, old = torch.tensor([0.0, -1.0, -5.0], requires_grad=True), torch.tensor([0.0, -3.0, -4.0])
    weight = objective.truncated_weights(new, old, 2.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 2.0, torch.e**-1]))
    assert not weight.requires_grad


def test_clipping_stops_the_gradient_beyond_the_range() -> None:
    """PPO's surrogate: no gradient where the ratio has already moved the way the advantage pulls."""
    old = torch.zeros(1, 1, 4, 1)
    new = torch.tensor([0.5, -0.5, 0.5, -0.5]).view(1, 1, 4, 1).requires_grad_()
    advantage = torch.tensor([[[1.0, 1.0, -1.0, -1.0]]])
    objective.clipped(new, old, advantage, 0.2).sum().backward()
    grad = new.grad.flatten()
    assert grad[0] == 0
    assert grad[3] == 0
    torch.testing.assert_close(grad[1], -torch.tensor(-0.5).exp())
    torch.testing.assert_close(grad[2], torch.tensor(0.5).exp())


def test_divergence_estimate_is_unbiased_and_never_negative() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(6).double().log_softmax(-1), torch.randn(6).double().log_softmax(-1)
    estimate = objective.policy_divergence(q, p)
    assert bool((estimate >= 0).all())
    torch.testing.assert_close((p.exp() * estimate).sum(), (p.exp() * (p - q)).sum())


# ---- invariant 6: with a reward that does not depend on the thought, the expected policy gradient is 0 ----------------


def expected_gradient(config: ThoughtConfig, logits_V: Tensor, noise: list[float]) -> Tensor:
    """E over S draws from softmax(logits / temperature), by enumeration, of d loss / d logits; the reward of sample s is
    noise[s], whatever was drawn, in every order (so that it is independent of the action)."""
    z = logits_V.clone().requires_grad_()
    p = (logits_V / config.temperature).softmax(-1)
    logprob = (z / config.policy_temperature).log_softmax(-1)
    old = (logits_V / config.temperature).log_softmax(-1)
    total = torch.zeros((), dtype=logits_V.dtype)
    for actions in itertools.product(range(len(logits_V)), repeat=config.samples):
        chance = p[list(actions)].prod()
        reward = torch.tensor(noise, dtype=logits_V.dtype).view(1, 1, -1)
        loss = policy_loss(
            config, logprob[list(actions)].view(1, 1, -1, 1), old[list(actions)].view(1, 1, -1, 1),
            objective.advantages(reward, config.advantage),
        )  # fmt: skip
        total = total + chance * loss.sum()
    return torch.autograd.grad(total, z)[0]


LOGITS = torch.tensor([1.7, -0.3, 0.4, 0.0], dtype=torch.float64)
NOISE = [0.3, -1.1, 0.9]


@pytest.mark.parametrize(
    "config",
    [
        preset("default", samples=3),
        preset("default", samples=3, ratio_cap=None),
        preset("default", samples=3, advantage="leave_one_out"),
        preset("rlp", samples=3),
    ],
)
def test_action_independent_rewards_do_not_move_the_policy(config) -> None:
    assert float(expected_gradient(config, LOGITS, NOISE).norm()) < 1e-12


def test_the_authors_objective_moves_it() -> None:
    """One-sided advantages with log pi at temperature 3 sharpen the policy for pure noise: the invariant can fail."""
    gradient = expected_gradient(preset("paper", samples=3), LOGITS, NOISE)
    assert float(gradient.norm()) > 1e-2
    assert int((-gradient).argmax()) == int(LOGITS.argmax())  # descent makes the likeliest token likelier


def test_the_drift_needs_one_side_and_unmatched_temperatures() -> None:
    """Either alone leaves the expected gradient at 0."""
    matched = preset("default", samples=3, advantage="one_sided", ratio_cap=None)
    unmatched = preset("default", samples=3, policy_temperature=3.0, ratio_cap=None)
    assert float(expected_gradient(matched, LOGITS, NOISE).norm()) < 1e-12
    assert float(expected_gradient(unmatched, LOGITS, NOISE).norm()) < 1e-12


@pytest.mark.parametrize("name", ["default", "rlp"])
def test_the_expected_gradient_follows_a_reward_of_the_action(name) -> None:
    """d E[r] / d logits = p (r - E[r]), scaled by (S - 1) / S for the plain mean and by 1 for leave-one-out."""
    config = preset(name, samples=3)
    reward_V = torch.tensor([0.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    z = LOGITS.clone().requires_grad_()
    p, logprob = LOGITS.softmax(-1), z.log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for actions in itertools.product(range(4), repeat=3):
        index = list(actions)
        advantage = objective.advantages(reward_V[index].view(1, 1, 3), config.advantage)
        old = LOGITS.log_softmax(-1)[index].view(1, 1, 3, 1)
        loss = policy_loss(config, logprob[index].view(1, 1, 3, 1), old, advantage)
        total = total + p[index].prod() * loss.sum() / 3
    got = -torch.autograd.grad(total, z)[0]
    want = p * (reward_V - (p * reward_V).sum())
    torch.testing.assert_close(got, want * (2 / 3 if name == "default" else 1.0), rtol=1e-10, atol=1e-12)
