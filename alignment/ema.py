"""Exponential moving average of weights, sharded like the optimizer: one fp32 tensor beside each that AdamW steps here.

The average of a flat partition is the partition of the average, so nothing is gathered in training, under any ZeRO stage.
Checkpoints hold it whole (train/state.py). Called by train/engine.py after every step that changed the weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .model_settings import AverageSettings


def decay_at(settings: AverageSettings, step: int) -> float:
    """Of 0-based step `step`. 0.9999 averages over 10,000 steps, hence the ramp for shorter runs."""
    return min(settings.decay, (1 + step) / (10 + step)) if settings.ramp else settings.decay


class ShardedAverage:
    """Averages of `masters` (this rank's fp32 tensors), which begin as copies of them."""

    def __init__(self, settings: AverageSettings, masters: Iterable[Tensor]) -> None:
        self.settings = settings
        self._masters = {id(master): master for master in masters}
        self._averages = {key: master.detach().clone() for key, master in self._masters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """a <- decay a + (1 - decay) w after 0-based step `step`."""
        if self._masters:
            masters = [master.detach() for master in self._masters.values()]
            torch._foreach_lerp_(list(self._averages.values()), masters, 1.0 - decay_at(self.settings, step))

    def of(self, master: Tensor) -> Tensor:
        """The average laid out like `master`."""
        return self._averages[id(master)]
