"""The `gates` stage: one PHATGOOSE gate per expert and site, all in one pass; base and LoRA stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...routing.library import ExpertLibrary
from ...routing.training import TrainableGates
from ..compiled import Mode
from ..data.attention import model_inputs
from ..recipe import GateSettings
from ..types import Batch, LossTerms
from .rows import FastRows


class GateJob(FastRows, TrainableGates):
    """One loss term per expert of the library, in its order (= `Batch.expert_B`)."""

    def __init__(
        self,
        model: nn.Module,
        attention: str,
        library: ExpertLibrary,
        settings: GateSettings,
        mode: Mode = "off",
        own: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, library, lambda batch: model_inputs(batch, attention, self._compute_dtype()), own)
        self.speed_up(settings.train, mode)

    def forward(self, batch: Batch) -> LossTerms:
        return LossTerms(self.loss_sums(batch))
