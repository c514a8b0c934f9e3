"""What the ranks agree on after a step's last backward, and who reads it when.

One float64 vector per step: the loss sums, the squared gradient norm of every group, the caller's flags, the job's
statistics, all summed over ranks. Where the verdict can be acted on by the device (clipping, and a fused AdamW that leaves
everything alone if told `found_inf`), the host does not wait for it: it reads the vector of a step while the device works on
the next one. Elsewhere (CPU, offload, ZeRO-3, moving averages) the host reads it at once.

Called by train/engine.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .types import StepBatch, StepReport


@dataclass(frozen=True)
class Reading:
    """A step's vector on the host. `bad`: a loss or a gradient is not finite."""

    losses: Mapping[str, float]
    norms: Mapping[str, float]
    flags: tuple[float, ...]
    extra: Mapping[str, float]

    @property
    def bad(self) -> bool:
        return not all(math.isfinite(value) for value in (*self.losses.values(), *self.norms.values()))


@dataclass(frozen=True)
class Layout:
    """Where things lie in the vector: terms, groups, flags, statistics."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    extra_names: tuple[str, ...]

    def read(self, vector: Tensor, count_E: Tensor) -> Reading:
        """`vector` summed over ranks, on the CPU."""
        terms, groups = len(self.names), len(self.groups)
        end = len(vector) - len(self.extra_names)
        return Reading(
            dict(zip(self.names, (vector[:terms] / count_E.clamp(min=1)).tolist())),
            dict(zip(self.groups, vector[terms : terms + groups].sqrt().tolist())),
            tuple(vector[terms + groups : end].tolist()),
            dict(zip(self.extra_names, vector[end:].tolist())),
        )

    def on_device(self, vector: Tensor, limit: float) -> tuple[Tensor, dict[str, Tensor]]:
        """(1.0 if a loss or gradient is not finite, else 0.0, fp32; the clip coefficient of every group, fp32), where
        `vector` is. The same numbers as `coefficients`."""
        terms, groups = len(self.names), len(self.groups)
        finite = torch.isfinite(vector[: terms + groups]).all()
        norms_G = vector[terms : terms + groups].sqrt()
        found_G = (limit / (norms_G + 1e-6)).clamp(max=1.0) if limit > 0 else torch.ones_like(norms_G)
        return (~finite).float(), dict(zip(self.groups, found_G.float().unbind()))


def coefficients(norms: Mapping[str, float], limit: float) -> dict[str, float]:
    """What the gradients of every group are multiplied with: never more than 1; `limit` 0 turns clipping off."""
    return {name: min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0 for name, norm in norms.items()}


class Pending:
    """A submitted step: its vector, on its way to the host, and what the report needs besides. `empty`: no rank has a label
    token, so nothing was computed."""

    def __init__(self, batch: StepBatch, started: float, rate: float) -> None:
        self.step, self.count_E, self.tokens, self.unit = batch.step, batch.count_E, batch.tokens, batch.unit
        self.started, self.rate, self.empty = started, rate, False
        self.reading: Reading | None = None
        self.local: Tensor | None = None
        self._vector: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def hold(self, vector: Tensor) -> None:
        """Keep the vector; from a device it is copied while the host goes on."""
        if not vector.is_cuda:
            self._vector = vector
            return
        self._vector = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
        self._vector.copy_(vector, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def report(self, main_terms: Sequence[str], seconds: float, extra: Mapping[str, float]) -> StepReport:
        """Of a step that was read; the loss is the mean of `main_terms`."""
        assert self.reading is not None
        losses = self.reading.losses
        finite = bool(losses) and all(math.isfinite(value) for value in losses.values())
        return StepReport(
            step=self.step,
            loss=sum(losses[name] for name in main_terms) / len(main_terms) if finite else math.nan,
            losses=losses,
            gradient_norms=self.reading.norms,
            learning_rate=self.rate,
            tokens=self.tokens,
            unit=self.unit,
            seconds=seconds,
            skipped=self.empty or self.reading.bad,
            empty=self.empty,
            extra=extra,
        )

    def read(self, layout: Layout) -> Reading:
        """Waits until the device has made the vector, not for what was submitted after it."""
        if self.reading is None:
            assert self._vector is not None
            if self._event is not None:
                self._event.synchronize()
            self.reading = layout.read(self._vector, self.count_E)
        return self.reading


def blame(layout: Layout, local: Tensor, gathered: Any) -> Sequence[Sequence[str]]:
    """By rank, the labels of what is not finite in its own vector; `gathered(labels)` collects a list over ranks."""
    labels = [f"loss of {n}" for n in layout.names] + [f"gradient of {n}" for n in layout.groups]
    found = gathered([label for label, value in zip(labels, local.tolist()) if not math.isfinite(value)])
    # a bad loss makes gradients bad on all ranks: name the loss alone
    if any(label.startswith("loss") for labels in found for label in labels):
        found = [[label for label in labels if label.startswith("loss")] for labels in found]
    return found
