"""RLP's yardstick: the same model without a thought, its trainable tensors averaged over the steps.

    average <- decay * average + (1 - decay) * now;   r = log p_thinking(x) - log p_average(x)

An advantage that subtracts the mean over samples cancels the yardstick, so it changes the reward that is shown and not
the gradient (quiet-star.md 1.2). RLP's own decay is unknown to us.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from .branch import base_losses
from .policy import Policy, PolicyTensors
from .prefix import run_prefix
from .types import Rows


class MovingBaseline(nn.Module):
    """fp32 averages of a policy's adapters, as buffers: checkpoints hold them."""

    def __init__(self, adapters: Sequence[Tensor], decay: float) -> None:
        """`adapters`: what the average starts from, PolicyTensors.adapters before the first step."""
        super().__init__()
        self.decay = decay
        for index, tensor in enumerate(adapters):
            self.register_buffer(f"average_{index}", tensor.detach().float().clone())

    @torch.no_grad()
    def update(self, tensors: PolicyTensors) -> None:
        """One step of the average."""
        for average, now in zip(self.buffers(), tensors.adapters, strict=True):
            average.lerp_(now.detach().to(average), 1 - self.decay)

    @torch.no_grad()
    def losses(self, policy: Policy, tensors: PolicyTensors, rows: Rows) -> Tensor:
        """-log p of every label under the averaged model without a thought, fp32 [B, L], for thought_loss."""
        averaged = [average.to(now.dtype) for average, now in zip(self.buffers(), tensors.adapters, strict=True)]
        with _in_place(tensors.adapters, averaged), policy.bind(replace(tensors, adapters=tuple(averaged))):
            prefix = run_prefix(policy.model, rows)
            return base_losses(policy.model, prefix.hidden_BLD, rows.labels_BT)[0]


@contextmanager
def _in_place(adapters: Sequence[Tensor], averaged: Sequence[Tensor]) -> Iterator[None]:
    """Parameters that are leaves hold the averages meanwhile: `bind` leaves them where they are (policy.py)."""
    kept = [(tensor, tensor.data) for tensor in adapters if tensor.is_leaf]
    try:
        for tensor, average in zip(adapters, averaged):
            if tensor.is_leaf:
                tensor.data = average
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
