"""The `base` stage: all weights of a causal LM learn the next token (used for the embedded nano model)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..types import Batch, LossTerms


class LanguageModelJob(nn.Module):
    """Next-token loss over all weights of `model`; one loss term named `loss`."""

    names = ("loss",)

    def __init__(self, model: nn.Module, inputs: Callable[[Batch], dict[str, Any]]) -> None:
        super().__init__()
        self.model = model
        self._inputs = inputs

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"name": "loss", "params": [p for p in self.model.parameters() if p.requires_grad]}]

    def forward(self, batch: Batch) -> LossTerms:
        """Sum over label tokens of -log p(label | document so far), fp32, shape [1]."""
        logits = self.model(**self._inputs(batch), use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits.float().flatten(0, -2), batch.labels_BT.flatten(), ignore_index=-100, reduction="sum"
        )
        return LossTerms(torch.atleast_1d(loss))
