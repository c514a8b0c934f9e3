"""What thoughts are worth, without gradients: losses with and without them, and with another anchor's thought instead.

Used by the dashboard (own minus shuffled), by evaluation and by the viewer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.linear_loss import token_nll
from . import stats
from .branch import language_head, look_ahead
from .config import ThoughtConfig
from .policy import Policy, PolicyTensors
from .types import Prefix, Rows, Thoughts


@dataclass(frozen=True)
class Scores:
    """fp32. base_BAJ and mixed_BASJ: -log p of each lookahead token without and with the thought, 0 where not valid."""

    base_BAJ: Tensor
    mixed_BASJ: Tensor
    weight_BASJ: Tensor
    labels_BAJ: Tensor
    valid_BAJ: Tensor

    @property
    def reward_BAS(self) -> Tensor:
        """Nats saved by each thought."""
        return (self.base_BAJ.unsqueeze(2) - self.mixed_BASJ).sum(-1)


@torch.no_grad()
def score_thoughts(
    policy: Policy,
    tensors: PolicyTensors,
    prefix: Prefix,
    rows: Rows,
    thoughts: Thoughts,
    config: ThoughtConfig,
    *,
    chunk: int | None = None,
) -> Scores:
    """Losses of the next J tokens at every anchor, `chunk` anchors of a row at once (None: all)."""
    size = chunk or thoughts.anchors.count
    parts = [
        _score(policy, tensors, prefix, rows, thoughts.part(first, first + size), config)
        for first in range(0, thoughts.anchors.count, size)
    ]
    return Scores(*(torch.cat([getattr(p, name) for p in parts], dim=1) for name in Scores.__dataclass_fields__))


def shuffled(thoughts: Thoughts) -> Thoughts:
    """Every valid anchor gets the thoughts of another valid one, half of all anchors of the batch away (a control)."""
    valid_N = thoughts.anchors.valid_BA.flatten()
    order_N = torch.argsort((~valid_N).to(torch.int8), stable=True)  # valid ones first
    count = valid_N.sum()
    rank_N = torch.arange(valid_N.numel(), device=valid_N.device)
    other_N = torch.where(rank_N < count, (rank_N + (count // 2).clamp_min(1)) % count.clamp_min(1), rank_N)
    source_N = torch.empty_like(order_N).scatter_(0, order_N, order_N[other_N])
    tokens = thoughts.tokens_BAST.flatten(0, 1)[source_N].view_as(thoughts.tokens_BAST)
    return thoughts.with_tokens(tokens)


def gap_sums(own: Scores, other: Scores) -> Tensor:
    """The sums own_gain, other_gain and gap_scored of stats.py: of the anchors' own thoughts, and of `shuffled` ones."""
    found = {
        "own_gain": own.reward_BAS.double().sum(),
        "other_gain": other.reward_BAS.double().sum(),
        "gap_scored": own.valid_BAJ.double().sum(),
    }
    return stats.collect(found, own.base_BAJ.device)


def _score(
    policy: Policy, tensors: PolicyTensors, prefix: Prefix, rows: Rows, thoughts: Thoughts, config: ThoughtConfig
) -> Scores:
    head = language_head(policy.model)
    with policy.bind(tensors):
        ahead = look_ahead(policy.model, tensors.thought, prefix.detach(), rows, thoughts, config.lookahead)
    mixed_BASJ = ahead.mixed_nll(head, recompute=False)
    base, _ = token_nll(head, ahead.base_BAJD.flatten(0, 2), ahead.labels_BAJ.flatten(), recompute=False)
    base_BAJ = base.view(ahead.labels_BAJ.shape).masked_fill(~ahead.valid_BAJ, 0.0)
    return Scores(base_BAJ, mixed_BASJ, ahead.weight_BASJ, ahead.labels_BAJ, ahead.valid_BAJ)
