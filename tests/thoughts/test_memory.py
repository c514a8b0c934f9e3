"""Phase 2 keeps one chunk of activations, whatever the number of anchors and samples (invariant 11)."""

from __future__ import annotations

from typing import Any

import torch
from quietgoose.thoughts.config import preset
from quietgoose.thoughts.gradient import Stream, thought_loss
from torch import Tensor

from .naive import llama, packed, policy_of


class _Kept:
    """Counts the bytes that autograd keeps for its backward passes, and their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> Any:
        return _Held(self, tensor)

    @staticmethod
    def unpack(held: Any) -> Tensor:
        return held.tensor


class _Held:
    def __init__(self, count: _Kept, tensor: Tensor) -> None:
        self.count, self.tensor, self.size = count, tensor, tensor.numel() * tensor.element_size()
        count.now += self.size
        count.peak = max(count.peak, count.now)

    def __del__(self) -> None:
        self.count.now -= self.size


def peak(width: int, limit: int, chunk: int | None, samples: int = 2) -> int:
    config = preset("default", tokens=4, lookahead=2, samples=samples, limit=limit, banned=(0,))
    policy = policy_of(llama(), config)
    policy.model.requires_grad_(False)
    rows, kept = packed([[width]], width), _Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        loss = thought_loss(policy, rows, config, torch.ones(4), Stream(0, 0), chunk=chunk)
        loss.total.backward()
    assert int(loss.thoughts.anchors.valid_BA.sum()) == min(limit, width - 1)
    return kept.peak


def test_peak_does_not_grow_with_anchors() -> None:
    few, many = peak(48, limit=4, chunk=4), peak(48, limit=47, chunk=4)
    assert many <= 1.1 * few
    assert peak(48, limit=47, chunk=None) > 5 * many


def test_peak_does_not_grow_with_samples_of_smaller_chunks() -> None:
    assert peak(48, limit=40, chunk=1, samples=8) <= 1.1 * peak(48, limit=40, chunk=4, samples=2)


def test_the_prefix_is_kept_once() -> None:
    """A longer row with as many anchors costs its own activations, not anchors times prefix."""
    short, long = peak(24, limit=8, chunk=2), peak(48, limit=8, chunk=2)
    assert long < 2.2 * short
