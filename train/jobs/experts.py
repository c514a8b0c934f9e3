"""The `experts` stage: all N LoRA experts of a recipe in one pass over one frozen base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...base.randomness import uniform
from ...base.seeding import derive
from ...routing.sites import find_sites
from ...routing.training import TrainableExperts
from ..compiled import Mode
from ..data.attention import model_inputs
from ..recipe import ExpertSettings
from ..types import Batch, LossTerms
from .rows import FastRows


class ExpertJob(FastRows, TrainableExperts):
    """One loss term per expert, named like it, in the order of `names` (= `Batch.expert_B`)."""

    def __init__(
        self,
        model: nn.Module,
        attention: str,
        names: Sequence[str],
        settings: ExpertSettings,
        seed: int,
        mode: Mode = "off",
        own: Sequence[str] | None = None,
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
            own,
        )
        self.misrouting, self._seed, self._step = settings.misrouting, derive(seed, "misrouting"), 0
        self.speed_up(settings.train, mode)

    def begin_step(self, step: int, weights_E: Tensor) -> None:
        """Called by the engine before a step's first forward."""
        self._step = step

    def forward(self, batch: Batch) -> LossTerms:
        return LossTerms(self.loss_sums(batch))

    def shares(self, batch: Batch) -> Tensor | None:
        return self._shares(batch).to(self._compute_dtype()) if self.misrouting > 0 else None

    def _shares(self, batch: Batch) -> Tensor:
        """fp32 [sites, B, T, 1]: 1, or uniform in [0, 1) with probability `misrouting`. A pure function of seed, step, the
        row's number, position and site, hence the same for any number of processes and after a resume."""
        assert batch.row_B is not None, "StepData numbers its rows"
        device, length = batch.tokens_BT.device, batch.tokens_BT.shape[1]
        site_S111 = torch.arange(len(self.sites), device=device)[:, None, None, None]
        place_BT1 = ((batch.row_B[:, None] << 24) + torch.arange(length, device=device))[..., None]
        draw_SBT1 = uniform(self._seed, self._step, place_BT1, site_S111)
        return torch.where(draw_SBT1 < self.misrouting, draw_SBT1 / max(self.misrouting, 1e-9), 1.0)
