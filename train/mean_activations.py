"""Mean activations of every expert, taken once when gates are trained: what the routers `average_activation` and
`phatgoose_mean` score with. Called by train/stages.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..routing.library import ExpertLibrary
from ..routing.model import attach, detach
from ..routing.routers import SiteVectors
from ..routing.statistics import average_activation
from .base_models import LoadedBase
from .data.attention import model_inputs
from .data.loader import StepData

ROWS = 32
"""Packed rows of each expert's training text that are read."""


def mean_activations(base: LoadedBase, library: ExpertLibrary, data: StepData, device: torch.device) -> SiteVectors:
    """Site -> expert -> fp32 [d_in]: the mean input of the site over the expert's own packed training rows (prompt and
    completion), that expert active on every token. Leaves the base plain.

    `data`: the gates' own, of whatever rank and rows per step, with a source for every expert of the library; the first
    ROWS rows of each source's stream are read.
    """
    attach(base.model, library, "uniform", 1)
    batches: dict[str, list[tuple[Mapping[str, Any], torch.Tensor]]] = {}
    for name in library.names:
        batch = data.first_rows(name, ROWS).to(device)
        batches[name] = [(model_inputs(batch, base.attention, base.model.dtype), batch.segment_BT > 0)]
    means = average_activation(base.model, batches)
    detach(base.model)
    return means
