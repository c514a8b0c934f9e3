"""Rewards and log pi of a bf16 model come from logits that are not rounded to bf16, in rollout and gradient pass alike."""

from __future__ import annotations

import pytest
import torch
from quietgoose.kernels.wide_head import WideHead
from quietgoose.thoughts import objective
from quietgoose.thoughts.anchors import choose_anchors
from quietgoose.thoughts.branch import look_ahead
from quietgoose.thoughts.config import preset
from quietgoose.thoughts.gradient import Stream, thought_loss
from quietgoose.thoughts.parameters import ThoughtParameters
from quietgoose.thoughts.policy import ModelPolicy
from quietgoose.thoughts.prefix import run_prefix
from quietgoose.thoughts.rollout import rollout
from quietgoose.thoughts.scoring import score_thoughts
from quietgoose.thoughts.stats import summarise

from .naive import TestRows, llama, packed

ROWS = packed([[12], [12]], 12)


def bf16_policy(weight: float) -> tuple[ModelPolicy, object]:
    """Logits of the size that trained models have."""
    config = preset("default", tokens=3, lookahead=1, samples=4, initial_weight=weight)
    model = llama().to(torch.bfloat16).requires_grad_(False)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(8 / float(head.weight.float().std()) / model.config.hidden_size**0.5)
    return ModelPolicy(model, ThoughtParameters.from_token(model, 5, config, seed=0).requires_grad_(False)), config


def rewards(policy: ModelPolicy, config, rows: TestRows = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """(rewards as they are made, in fp64 from the same hidden states) [N, S] of anchors with a label."""
    tensors = policy.tensors()
    prefix = run_prefix(policy.model, rows)
    anchors = choose_anchors(config, rows, seed=0, step=0)
    thoughts = rollout(policy, tensors, prefix, rows, anchors, config, torch.Generator().manual_seed(0))
    scores = score_thoughts(policy, tensors, prefix, rows, thoughts, config)
    ahead = look_ahead(policy.model, tensors.thought, prefix, rows, thoughts, config.lookahead)
    weight_VD = policy.model.get_output_embeddings().weight.double()
    base, talk = ahead.base_BAJD.unsqueeze(2).double(), ahead.branch_BASMD[..., config.tokens + 1 :, :].double()
    w = ahead.weight_BASJ.unsqueeze(-1).double()
    label = ahead.labels_BAJ[:, :, None, :, None]
    losses = [
        -(h @ weight_VD.t()).log_softmax(-1).gather(-1, label.expand(*h.shape[:-1], 1)).squeeze(-1)
        for h in (base, (1 - w) * base + w * talk)
    ]
    valid = ahead.valid_BAJ.any(-1)
    return scores.reward_BAS[valid].double(), (losses[0] - losses[1]).sum(-1)[valid]


def correlation(one: torch.Tensor, two: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1])


@pytest.mark.parametrize(("weight", "worst"), [(0.003, 0.9), (0.01, 0.98)])
def test_rewards_are_those_of_unrounded_logits(weight, worst, monkeypatch) -> None:
    """The mutation `rewards in bf16`, planted here, must show: with it small weights' rewards are noise."""
    policy, config = bf16_policy(weight)
    with torch.no_grad():
        found, want = rewards(policy, config)
        assert correlation(found, want) > 0.9999
        advantages = [objective.advantages(x, "two_sided") for x in (found, want)]
        assert float((advantages[0].sign() == advantages[1].sign()).double().mean()) > 0.99
        monkeypatch.setattr(WideHead, "__call__", lambda self, hidden: self.module(hidden.bfloat16()))
        rounded, want = rewards(policy, config)
    assert correlation(rounded, want) < worst


def test_rollout_records_the_policy_that_the_gradient_pass_differentiates(monkeypatch) -> None:
    """log pi_old, and log pi of the same tokens, against fp64 from the gradient pass's hidden states."""
    policy, config = bf16_policy(0.1)

    def errors() -> list[float]:
        loss = thought_loss(policy, ROWS, config, torch.tensor([0.5, 0.5, 1.0, 0.0]), Stream(0, 0))
        thoughts = loss.thoughts
        assert thoughts is not None
        prefix, tensors = run_prefix(policy.model, ROWS), policy.tensors()
        ahead = look_ahead(policy.model, tensors.thought, prefix, ROWS, thoughts, config.lookahead)
        logits = ahead.branch_BASMD[..., : config.tokens, :].double() @ policy.model.lm_head.weight.double().t()
        want = logits.log_softmax(-1).gather(-1, thoughts.tokens_BAST.unsqueeze(-1)).squeeze(-1)
        valid = ahead.valid_BAJ.any(-1)
        mean = float((want * valid[:, :, None, None]).sum() / valid.sum() / want[0, 0].numel())
        recorded = float((thoughts.logprob_BAST.double() - want)[valid].abs().max())
        return [recorded, abs(summarise(loss.stats)["thought_logprob"] - mean)]

    with torch.no_grad():
        assert max(errors()) < 1e-5
        monkeypatch.setattr(WideHead, "__call__", lambda self, hidden: self.module(hidden.bfloat16()))
        assert min(errors()) > 1e-4
