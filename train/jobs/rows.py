"""What training experts and training gates share beyond routing/training.py: how fast it runs (train.compile)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...routing.training import FlatBank
from ..capture import CapturedTrunk
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
    _heads: Sequence[nn.Module] = ()  # in a list: not a submodule once more

    def speed_up(self, settings: RowTrainSettings, mode: Mode) -> None:
        recompute_activations(self.model, settings.activation_checkpointing)
        if settings.activation_checkpointing:
            self.stop_sharing()  # type: ignore[attr-defined]
        if mode != "off":
            compile_layers(self.model)
            self.compiled_loss = True
        if mode == "graph":
            groups = self.parameter_groups()  # type: ignore[attr-defined]
            self._trunk = CapturedTrunk(self._run, lambda: [p for group in groups for p in group["params"]])

    def hidden(self, batch: Batch) -> tuple[Tensor, nn.Module]:
        shares = self.shares(batch)
        if self._trunk is None:
            self.context.shares = None if shares is None else shares.unbind()
            return super().hidden(batch)  # type: ignore[misc]
        hidden_TD = self._trunk(batch, shares)
        return hidden_TD, self._heads[0]

    def shares(self, batch: Batch) -> Tensor | None:
        """[sites, B, T, 1] by which adapters count; None: 1."""
        return None

    def _run(self, batch: Batch, shares: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
        self.context.shares = None if shares is None else shares.unbind()
        with self.bank.aliased() as leaves:
            hidden_TD, *self._heads = super().hidden(batch)  # type: ignore[misc]
        return hidden_TD, leaves
