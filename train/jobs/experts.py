"""The `experts` stage: all N LoRA experts of a recipe in one pass over one frozen base."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...routing.sites import find_sites
from ...routing.training import TrainableExperts
from ..data.attention import model_inputs
from ..recipe import ExpertSettings
from ..types import Batch, LossTerms
from .checkpointing import recompute_activations


class ExpertJob(TrainableExperts):
    """One loss term per expert, named like it, in the order of `names` (= `Batch.expert_B`)."""

    def __init__(
        self, model: nn.Module, attention: str, names: Sequence[str], settings: ExpertSettings, seed: int
    ) -> None:
        super().__init__(
            model,
            find_sites(model, settings.targets),
            names,
            settings.rank,
            settings.alpha,
            settings.rslora,
            seed,
            lambda batch: model_inputs(batch, attention, self._compute_dtype()),
        )
        recompute_activations(model, settings.train.activation_checkpointing)

    def forward(self, batch: Batch) -> LossTerms:
        return LossTerms(self.loss_sums(batch))
