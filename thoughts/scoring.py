"""What thoughts are worth, without gradients: losses with and without them, and with another anchor's thought instead.

Used by the dashboard (own minus shuffled), by evaluation and by the viewer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.linear_loss import token_nll
from . import stats
from .branch import head_pieces, language_head, look_ahead
from .config import ThoughtConfig
from .policy import Policy, PolicyTensors
from .types import Anchors, Prefix, Rows, Thoughts


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


def shuffled(thoughts: Thoughts, slot_BA: Tensor | None = None, group_BA: Tensor | None = None) -> Thoughts:
    """A control: every anchor gets the thought of an anchor of the same slot in the next group, never one of its own group.

    slot_BA   int64, what is exchanged with what; None: the anchor's number in its document
    group_BA  int64, from 0, texts that must not hand each other thoughts; None: the documents

    An anchor whose slot no other group has keeps its thought and is no longer valid: nothing of it is scored. So is all of a
    batch of one document. Nothing here waits for the device.
    """
    anchors = thoughts.anchors
    document_BA = _documents(anchors)
    slot_BA = _numbers(document_BA, anchors.valid_BA) if slot_BA is None else slot_BA
    group_N = (document_BA if group_BA is None else group_BA).flatten()
    valid_N = anchors.valid_BA.flatten()
    slot_N = torch.where(valid_N, slot_BA.flatten(), -1)
    pairs, order_N = torch.sort(slot_N * (group_N.amax() + 1) + group_N, stable=True)
    slots, groups = slot_N[order_N], group_N[order_N]
    behind_N = torch.searchsorted(pairs, pairs, right=True)  # the first of the next group
    first_N, last_N = (torch.searchsorted(slots, slots, right=right) for right in (False, True))
    donor_N = torch.where(behind_N < last_N, behind_N, first_N)
    able_N = torch.empty_like(valid_N).scatter_(0, order_N, groups[donor_N] != groups) & valid_N
    source_N = torch.empty_like(order_N).scatter_(0, order_N, order_N[donor_N])
    source_N = torch.where(able_N, source_N, torch.arange(len(source_N), device=source_N.device))
    tokens = thoughts.tokens_BAST.flatten(0, 1)[source_N].view_as(thoughts.tokens_BAST)
    anchors = replace(anchors, valid_BA=able_N.view_as(anchors.valid_BA))
    return replace(thoughts.with_tokens(tokens), anchors=anchors)


def gap_sums(own: Scores, other: Scores) -> Tensor:
    """The sums own_gain, other_gain and gap_scored of stats.py: of the anchors' own thoughts and of `shuffled` ones, both over
    the anchors that had an exchange."""
    there_BASJ = other.valid_BAJ.unsqueeze(2)
    found = {
        f"{name}_gain": ((scores.base_BAJ.unsqueeze(2) - scores.mixed_BASJ) * there_BASJ).double().sum()
        for name, scores in (("own", own), ("other", other))
    }
    return stats.collect(found | {"gap_scored": other.valid_BAJ.double().sum()}, own.base_BAJ.device)


def _documents(anchors: Anchors) -> Tensor:
    """int64 [B, A]: a number for the document of every anchor, ascending over the batch."""
    rows_B1 = torch.arange(anchors.start_BA.shape[0], device=anchors.start_BA.device)[:, None]
    start_BA = torch.where(anchors.valid_BA, anchors.start_BA, 0).cummax(1).values
    return rows_B1 * (start_BA.amax() + 1) + start_BA


def _numbers(document_BA: Tensor, valid_BA: Tensor) -> Tensor:
    """int64 [B, A]: of every valid anchor, how many valid ones of its document come before it."""
    before_BA = valid_BA.cumsum(1) - valid_BA.long()
    begins_BA = torch.ones_like(valid_BA)
    begins_BA[:, 1:] = document_BA[:, 1:] != document_BA[:, :-1]
    return before_BA - torch.where(begins_BA, before_BA, 0).cummax(1).values


def _score(
    policy: Policy, tensors: PolicyTensors, prefix: Prefix, rows: Rows, thoughts: Thoughts, config: ThoughtConfig
) -> Scores:
    head = language_head(policy.model)
    with policy.bind(tensors):
        ahead = look_ahead(policy.model, tensors.thought, prefix.detach(), rows, thoughts, config.lookahead)
    mixed_BASJ = ahead.mixed_nll(head, recompute=False)
    labels = ahead.labels_BAJ.flatten()
    pieces = head_pieces(len(labels), head)
    base, _ = token_nll(head, ahead.base_BAJD.flatten(0, 2), labels, recompute=False, pieces=pieces)
    base_BAJ = base.view(ahead.labels_BAJ.shape).masked_fill(~ahead.valid_BAJ, 0.0)
    return Scores(base_BAJ, mixed_BASJ, ahead.weight_BASJ, ahead.labels_BAJ, ahead.valid_BAJ)
