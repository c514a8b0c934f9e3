"""What training experts and training gates share beyond routing/training.py: how fast it runs (train.compile)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...routing.training import FlatBank
from ..capture import CannotCapture, CapturedTrunk
from ..compiled import Mode, compile_layers
from ..recipe import RowTrainSettings
from ..types import Batch
from .checkpointing import recompute_activations


class FastRows:
    """Mixed into a job before the class that trains. Its `hidden` goes through compiled layers or replayed graphs."""

    model: nn.Module
    context: Any
    bank: FlatBank
    compiled_loss: bool
    _trunk: CapturedTrunk | None = None
    _may_go_without = False
    _heads: Sequence[nn.Module] = ()  # in a list: not a submodule once more

    def speed_up(self, settings: RowTrainSettings, mode: Mode) -> None:
        recompute_activations(self.model, settings.activation_checkpointing)
        if settings.activation_checkpointing:
            self.stop_sharing()  # type: ignore[attr-defined]
        if mode != "off":
            compile_layers(self.model)
            self.compiled_loss = True
        self._may_go_without = settings.compile == "auto"
        if mode == "graph":
            groups = self.parameter_groups()  # type: ignore[attr-defined]
            self._trunk = CapturedTrunk(self._run, lambda: [p for group in groups for p in group["params"]])

    def hidden(self, batch: Batch) -> tuple[Tensor, nn.Module]:
        shares = self.shares(batch)
        if self._trunk is not None:
            try:
                return self._trunk(batch, shares), self._heads[0]
            except CannotCapture as error:
                if not self._may_go_without:
                    raise
                warnings.warn(f"train.compile: auto goes on with layers: {error}", stacklevel=2)
                self._trunk = None
        self.context.shares = None if shares is None else shares.unbind()
        return super().hidden(batch)  # type: ignore[misc]

    def shares(self, batch: Batch) -> Tensor | None:
        """[sites, B, T, 1] by which adapters count; None: 1."""
        return None

    def _run(self, batch: Batch, shares: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
        self.context.shares = None if shares is None else shares.unbind()
        with self.bank.aliased() as leaves:
            hidden_TD, *self._heads = super().hidden(batch)  # type: ignore[misc]
        return hidden_TD, leaves
