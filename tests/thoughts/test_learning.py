"""Seconds on one core: a frozen model that can answer only after a worked step learns to think of that step.

The model is pretrained on "x STEP g(x) EQ h(g(x))" alone, so it can not answer "x EQ". START, END and the head train.
"""

from __future__ import annotations

import functools

import pytest
import torch
from quietgoose.thoughts import stats
from quietgoose.thoughts.anchors import term_counts
from quietgoose.thoughts.config import Control, preset
from quietgoose.thoughts.gradient import Stream, thought_loss
from quietgoose.thoughts.parameters import ThoughtParameters
from quietgoose.thoughts.policy import ModelPolicy
from torch.nn import functional

from .naive import TestRows, llama

STATES, EQ, STEP = 8, 8, 9
FIRST = torch.randperm(STATES, generator=torch.Generator().manual_seed(1))
SECOND = torch.randperm(STATES, generator=torch.Generator().manual_seed(2))


@functools.cache
def worked_model():
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.1}
    model = llama(vocab_size=STATES + 3, **shape).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        x = torch.randint(0, STATES, (32,), generator=generator)
        text = torch.stack([x, torch.full_like(x, STEP), FIRST[x], torch.full_like(x, EQ), SECOND[FIRST[x]]], dim=1)
        logits = model(text).logits
        loss = functional.cross_entropy(logits[:, 1], text[:, 2]) + functional.cross_entropy(logits[:, 3], text[:, 4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def questions(step: int) -> TestRows:
    x = torch.randint(0, STATES, (16,), generator=torch.Generator().manual_seed(step))
    tokens = torch.stack([x, torch.full_like(x, EQ), SECOND[FIRST[x]]], dim=1)
    labels = torch.full_like(tokens, -100)
    labels[:, 1] = tokens[:, 2]
    return TestRows(tokens, labels, torch.arange(3).expand(16, -1), torch.ones(16, 3, dtype=torch.int32))


def train(control: Control, steps: int = 40) -> tuple[list[float], list[float]]:
    """(share of thoughts that are the worked step, reward) of every step. START begins near STEP, with noise."""
    config = preset("default", tokens=1, lookahead=1, samples=4, limit=1, control=control, initial_weight=0.5)
    model = worked_model()
    table = model.get_input_embeddings().weight
    noise = torch.randn(32, generator=torch.Generator().manual_seed(5)) * 0.1
    policy = ModelPolicy(model, ThoughtParameters(table[STEP] * 0.3 + noise, table[EQ], config, 0))
    optimizer = torch.optim.AdamW(policy.parameters.parameters(), lr=3e-2, weight_decay=0.0)
    right, reward = [], []
    for step in range(steps):
        rows = questions(step)
        counts = term_counts(config, rows, seed=0, step=step)
        weights = (torch.tensor(config.coefficients()) / counts.clamp_min(1)).float()
        loss = thought_loss(policy, rows, config, weights, Stream(0, step, torch.arange(16) + 16 * step))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        step_tokens = FIRST[rows.tokens_BT[:, 0]][:, None, None]
        right.append((loss.thoughts.tokens_BAST[:, 0] == step_tokens).float().mean().item())
        reward.append(stats.summarise(loss.stats)["reward"])
    return right, reward


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_thoughts_become_the_worked_step_and_the_reward_rises() -> None:
    right, reward = train("none")
    assert mean(right[:3]) < 0.85
    assert mean(right[-10:]) > 0.97
    assert mean(reward[-10:]) > mean(reward[:3]) + 1.0


@pytest.mark.parametrize("control", ["no_policy", "random_thoughts"])
def test_without_the_policy_term_they_do_not(control) -> None:
    right, _ = train(control)
    assert mean(right[-10:]) < 0.85
