"""Exponential moving average of weights, sharded like the optimizer: one fp32 tensor beside each that AdamW steps here.

The average of a flat partition is the partition of the average, so nothing is gathered in training, under any ZeRO stage.
Checkpoints hold it whole (train/state.py). Called by train/engine.py after every step; whether the step changed the weights may
be known to the device alone, so the number of steps that did is counted there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .model_settings import AverageSettings


def decay_at(settings: AverageSettings, step: Tensor) -> Tensor:
    """Of 0-based step `step`, float64. 0.9999 averages over 10,000 steps, hence the ramp for shorter runs."""
    constant = torch.full_like(step, settings.decay)
    return torch.minimum(constant, (1 + step) / (10 + step)) if settings.ramp else constant


class ShardedAverage:
    """Averages of `masters` (this rank's fp32 tensors), which begin as copies of them."""

    def __init__(self, settings: AverageSettings, masters: Iterable[Tensor]) -> None:
        self.settings = settings
        self._masters = {id(master): master for master in masters}
        self._averages = {key: master.detach().clone() for key, master in self._masters.items()}
        device = next((master.device for master in self._masters.values()), torch.device("cpu"))
        self._step = torch.zeros((), dtype=torch.float64, device=device)

    def resume(self, applied: int) -> None:
        """Go on after `applied` steps that changed the weights."""
        self._step.fill_(float(applied))

    @torch.no_grad()
    def update(self, bad: Tensor | float = 0.0) -> None:
        """a <- decay a + (1 - decay) w after a step; nothing where `bad` is 1 (a device tensor, or known here)."""
        if not self._masters:
            return
        good = 1.0 - (bad.to(self._step) if isinstance(bad, Tensor) else bad)
        share = (1.0 - decay_at(self.settings, self._step)) * good
        averages = list(self._averages.values())
        differences = torch._foreach_sub([master.detach() for master in self._masters.values()], averages)
        torch._foreach_mul_(differences, share.float())
        torch._foreach_add_(averages, differences)
        self._step += good

    def of(self, master: Tensor) -> Tensor:
        """The average laid out like `master`."""
        return self._averages[id(master)]
