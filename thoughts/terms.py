"""The loss terms of a chunk of anchors, and their gradient: what the gradient pass does again and again.

Nothing here waits for the device, and every shape depends on shapes alone, so a chunk can be captured (captured_pass.py).
Called by gradient.py too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.linear_loss import token_divergence, token_nll
from . import objective, stats
from .branch import Lookahead, head_pieces, language_head, look_ahead, lookahead_of, trains
from .config import ThoughtConfig
from .parameters import ThoughtTensors
from .policy import Policy, PolicyTensors
from .recompute import recomputed
from .types import Prefix, Rows, Thoughts


@dataclass(frozen=True)
class ChunkGradient:
    """Of one chunk: value = sum of weight * term; terms_M fp32 [3], of mixed, policy and distil; stats, see stats.py; a gradient
    for every target, None where it has none."""

    value: Tensor
    terms_M: Tensor
    stats: Tensor
    gradients: Sequence[Tensor | None]


@dataclass(frozen=True)
class ChunkTerms:
    """The terms of `config` over chunks of anchors.

    banned     int64 ids that no thought holds, on the device; None: there are none
    recompute  every layer of the branches runs again in the backward pass instead of keeping what it computed
    """

    policy: Policy
    config: ThoughtConfig
    banned: Tensor | None
    recompute: bool = False

    def differentiated(
        self, tensors: PolicyTensors, prefix: Prefix, rows: Rows, thoughts: Thoughts, reference_BL: Tensor, weights_M: Tensor,
        targets: Sequence[Tensor],
    ) -> ChunkGradient:  # fmt: skip
        """Value and gradient of some anchors; weights_M of all four terms."""
        model, gradients = self.policy.model, [None] * len(targets)
        with torch.set_grad_enabled(bool(targets)), self.policy.bind(tensors), recomputed(model, self.recompute):
            terms_M, found = self(tensors.thought, prefix, rows, thoughts, reference_BL)
            value = (weights_M[1:] * terms_M).sum()
            if value.requires_grad:  # inside `bind`: what is recomputed on the way back runs the model again
                gradients = torch.autograd.grad(value, targets, allow_unused=True)
        return ChunkGradient(value.detach(), terms_M.detach(), found, gradients)

    def __call__(
        self, thought: ThoughtTensors, prefix: Prefix, rows: Rows, thoughts: Thoughts, reference_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(sums of the terms mixed, policy, distil over some anchors, fp32 [3]; stats)."""
        config, model = self.config, self.policy.model
        head = language_head(model)
        _, mixed_weight, _, distil_weight = config.coefficients()
        with _gradient_if(mixed_weight != 0 or config.has_policy):
            ahead = look_ahead(model, thought, prefix, rows, thoughts, config.lookahead)
        with _gradient_if(mixed_weight != 0):
            mixed_BASJ = ahead.mixed_nll(head, trains(head))
        reward_BAS = objective.rewards(
            lookahead_of(reference_BL, thoughts.anchors, config.lookahead), mixed_BASJ.detach(), ahead.valid_BAJ
        )
        advantage_BAS = objective.advantages(reward_BAS, config.advantage)
        found = stats.mixing_sums(ahead.weight_BASJ.detach(), reward_BAS, advantage_BAS, ahead.valid_BAJ)
        policy = mixed_BASJ.new_zeros(())
        if config.watches_policy:
            policy, more = self._policy_term(head, ahead, thoughts, advantage_BAS)
            found |= more
        distil = _distillation(head, ahead, prefix, thoughts) if distil_weight else mixed_BASJ.new_zeros(())
        return torch.stack([mixed_BASJ.sum(), policy, distil]), stats.collect(found, reference_BL.device)

    def _policy_term(
        self, head: Any, ahead: Lookahead, thoughts: Thoughts, advantage_BAS: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over thought tokens of anchors that are scored, and what the dashboard shows of them."""
        config, shape = self.config, thoughts.tokens_BAST.shape
        hidden = ahead.branch_BASMD[..., : shape[-1], :].flatten(0, 3)
        scored = partial(
            token_nll,
            head,
            labels_T=thoughts.tokens_BAST.flatten(),
            banned=self.banned,
            pieces=head_pieces(len(hidden), head),
        )
        with _gradient_if(config.has_policy):
            nll, entropy = scored(
                hidden,
                temperature=config.policy_temperature,
                recompute=trains(head),
                entropy_gradient=config.has_entropy_bonus,
            )
        logprob_BAST, old_BAST = -nll.view(shape), thoughts.logprob_BAST
        loss_BAST = policy_loss(config, logprob_BAST, old_BAST, advantage_BAS)
        if config.has_entropy_bonus:  # beta multiplies the whole term, and the bonus is no part of it
            loss_BAST = loss_BAST - config.entropy_bonus / config.beta * entropy.view(shape)
        valid_BA = ahead.valid_BAJ.any(-1)
        cap = config.ratio_cap if config.ratio_cap is not None else 1.0 + (config.clip or 1.0)
        if config.temperature != config.policy_temperature:  # what is shown is of the temperature that drew
            nll, entropy = scored(hidden.detach(), temperature=config.temperature, recompute=False)
        found = stats.policy_sums(-nll.detach().view(shape), old_BAST, entropy.view(shape), valid_BA, cap)
        return loss_BAST.masked_fill(~valid_BA[:, :, None, None], 0.0).sum(), found


def policy_loss(config: ThoughtConfig, logprob_BAST: Tensor, old_BAST: Tensor, advantage_BAS: Tensor) -> Tensor:
    """The policy term of every thought token, as `config` has it (objective.py)."""
    if config.clip is not None:
        return objective.clipped(logprob_BAST, old_BAST, advantage_BAS, config.clip)
    weight = None
    if config.ratio_cap is not None:
        weight = objective.truncated_weights(logprob_BAST, old_BAST, config.ratio_cap)
    return objective.reinforce(logprob_BAST, advantage_BAS, weight)


def _gradient_if(wanted: bool) -> torch.set_grad_enabled:
    """A gradient inside only if `wanted` and there is one outside."""
    return torch.set_grad_enabled(wanted and torch.is_grad_enabled())


def _distillation(head: Any, ahead: Lookahead, prefix: Prefix, thoughts: Thoughts) -> Tensor:
    """Sum over scored tokens of KL(p_mixed || p_base), the mixed distribution detached."""
    shape = ahead.mixed_BASJD.shape
    student = lookahead_of(prefix.hidden_BLD, thoughts.anchors, shape[3]).unsqueeze(2).expand(shape).flatten(0, 3)
    divergence = token_divergence(head, ahead.mixed_BASJD.flatten(0, 3), student, recompute=trains(head))
    return divergence.view(shape[:-1]).masked_fill(~ahead.valid_BAJ.unsqueeze(2), 0.0).sum()
