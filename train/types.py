"""The nouns that flow between data, jobs, engine and tracking. Axes: base/axes.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Batch:
    """One micro-batch of packed rows on one rank.

    tokens_BT    int64, token ids; padding holds the pad id
    labels_BT    int64, already shifted: labels[b, t] is the token that position t must predict, -100 if none
    position_BT  int64, restarts at 0 with every document
    segment_BT   int32, 1, 2, ... numbers the documents of a row; 0 is padding
    expert_B     int64, the expert (loss term) every row belongs to
    row_B        int64, the number of every row in the whole data, 0 for rows that only fill up; None if nobody asks

    What the host knows and the device would have to be waited for, None if nobody said it (train/data/loader.py):
    label_L      int64, the places of the labels in the flattened rows
    group_G      int64, the rows are G equal groups, one after another, of rows of one expert: the expert of each
    border_D     int32, where documents begin in the flattened rows, filled up with B*T to one length for all steps
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    position_BT: torch.Tensor
    segment_BT: torch.Tensor
    expert_B: torch.Tensor
    row_B: torch.Tensor | None = None
    label_L: torch.Tensor | None = None
    group_G: torch.Tensor | None = None
    border_D: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The same batch with every tensor changed."""
        return Batch(*(None if t is None else change(t) for t in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class StepBatch:
    """What one rank needs for one optimizer step.

    micro      this rank's micro-batches (Batch, or a job's own kind), the same number on every rank
    count_E    float64 on the CPU: label tokens of each loss term over ALL ranks and micro-batches of the step;
               known without communication, because the order of rows is a pure function of seed and step
    step       0-based optimizer step
    tokens     non-padding tokens of the step over all ranks, or what `unit` names
    """

    step: int
    micro: tuple[Any, ...]
    count_E: torch.Tensor
    tokens: int
    unit: str = "tokens"


class LossTerms(NamedTuple):
    """A job's result on one micro-batch: per term (an expert, or the one term `loss`) a differentiable fp32 sum.

    The engine's loss is sum_e sum_E[e] / count_E[e] over the whole step, hence independent of world size,
    accumulation and ZeRO stage.

    total    a job that was told the step's weights (`begin_step`) may hand in the weighted sum itself, differentiable; the
             engine then goes backward from it, and sum_E is for the record
    extra_X  float64, sums of further statistics, named by the job's `extra_names`

    A named tuple, because ZeRO-3's hooks see the tensors of tuples only and warn of anything else.
    """

    sum_E: torch.Tensor
    total: torch.Tensor | None = None
    extra_X: torch.Tensor | None = None


@dataclass(frozen=True)
class StepReport:
    """What the engine says of one optimizer step; the same on every rank. `skipped`: nothing changed, because something was not
    finite or (`empty`) because no row of any rank has a label token."""

    step: int
    loss: float
    losses: Mapping[str, float]
    gradient_norms: Mapping[str, float]
    learning_rate: float
    tokens: int
    seconds: float
    skipped: bool = False
    empty: bool = False
    extra: Mapping[str, float] = field(default_factory=dict)
    unit: str = "tokens"
