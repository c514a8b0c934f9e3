"""The nouns of thoughts. A branch is one sampled thought of one anchor (quiet-star: Zelikman et al. 2024, section 4).

Axes of this room, beside base/axes.py:
    B  rows                     S  sampled thoughts of an anchor      L  positions of a row
    A  anchors of a row         T  sampled tokens of a thought        J  scored true tokens (the lookahead)
    D  model width              M  positions of a branch, T + 2 + J - 1 in the gradient pass, 1 in a rollout step
    K  KV heads                 V  vocabulary                         C  channels of a head

A branch holds at m = 0 START, at 1..T the thought, at T + 1 END, then the true tokens x[i+1] .. x[i+J-1]. Its RoPE
position is that of the anchor i plus 1 + m. It sees the anchor's document up to and with the anchor, and itself.
The hidden state at T + 1 + j, mixed with the ordinary one at i + j, predicts x[i+j+1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

TERMS = ("base", "mixed", "policy", "distil")
"""The loss terms, in the order of every vector that has one entry a term."""

PAUSE = -1
"""The thought token that stands for the START embedding instead of a vocabulary row (pause control, first step)."""


class Rows(Protocol):
    """The part of a batch that thoughts read (train/types.py `Batch` has it).

    tokens_BT int64; labels_BT int64, already shifted, -100 where nothing is predicted; position_BT int64, from 0 in
    every document; segment_BT, 1, 2, ... number the documents of a row, 0 is padding.
    """

    @property
    def tokens_BT(self) -> Tensor: ...
    @property
    def labels_BT(self) -> Tensor: ...
    @property
    def position_BT(self) -> Tensor: ...
    @property
    def segment_BT(self) -> Tensor: ...


@dataclass(frozen=True)
class TextRows:
    """`Rows` of one document a row, made from its tokens int64 [B, L]; places int64 [B, L]: its positions, if not 0, 1, ..."""

    tokens_BT: Tensor
    places_BT: Tensor | None = None

    @property
    def labels_BT(self) -> Tensor:
        return torch.cat([self.tokens_BT[:, 1:], torch.full_like(self.tokens_BT[:, :1], -100)], dim=1)

    @property
    def position_BT(self) -> Tensor:
        if self.places_BT is not None:
            return self.places_BT
        return torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device).expand_as(self.tokens_BT)

    @property
    def segment_BT(self) -> Tensor:
        return torch.ones_like(self.tokens_BT)


@dataclass(frozen=True)
class Anchors:
    """Where thoughts begin; the same number A in every row, padded.

    index_BA    int64, position of the anchor in its row, -1 at padding; ascending
    start_BA    int64, first position of the anchor's document
    valid_BA    bool, False at padding
    key_BA      int64, names the anchor's stream of random numbers: a function of the row's number in the data and the
                position, so that neither the batch layout nor the number of ranks changes what is sampled
    consecutive_from  not None: a promise that every row's anchors are this, this + 1, ... of one document, no padding
    """

    index_BA: Tensor
    start_BA: Tensor
    valid_BA: Tensor
    key_BA: Tensor
    consecutive_from: int | None = None

    @property
    def count(self) -> int:
        """A, anchors of a row with padding."""
        return self.index_BA.shape[1]

    def part(self, start: int, stop: int) -> Anchors:
        """Anchors start .. stop - 1 of every row."""
        first = None if self.consecutive_from is None else self.consecutive_from + start
        index, begin, valid, key = (
            x[:, start:stop] for x in (self.index_BA, self.start_BA, self.valid_BA, self.key_BA)
        )
        return Anchors(index, begin, valid, key, first)


@dataclass(frozen=True)
class Thoughts:
    """What was sampled, and under which probability.

    tokens_BAST   int64 token ids, or PAUSE
    logprob_BAST  fp32, log of the probability each token was drawn with: temperature and banned tokens included
    """

    tokens_BAST: Tensor
    logprob_BAST: Tensor
    anchors: Anchors

    def part(self, start: int, stop: int) -> Thoughts:
        """The thoughts of anchors start .. stop - 1."""
        return Thoughts(
            self.tokens_BAST[:, start:stop], self.logprob_BAST[:, start:stop], self.anchors.part(start, stop)
        )

    def first_sample(self) -> Thoughts:
        """The first thought of every anchor."""
        return Thoughts(self.tokens_BAST[:, :, :1], self.logprob_BAST[:, :, :1], self.anchors)

    def with_tokens(self, tokens_BAST: Tensor) -> Thoughts:
        """Other tokens at the same anchors (for example those of other anchors, a control)."""
        return replace(self, tokens_BAST=tokens_BAST)


@dataclass(frozen=True)
class Prefix:
    """The ordinary causal pass over the rows.

    hidden_BLD   last hidden state, after the final norm: what the head takes
    keys, values one tensor [B, K, L, C] a layer, keys after RoPE
    one_document every row is one document from its first position to its last
    """

    hidden_BLD: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    one_document: bool = False

    def detach(self) -> Prefix:
        """The same numbers without their graph."""
        return self.with_flat([t.detach() for t in self.flat()])

    def flat(self) -> list[Tensor]:
        """hidden, then all keys, then all values."""
        return [self.hidden_BLD, *self.keys, *self.values]

    def with_flat(self, tensors: Sequence[Tensor]) -> Prefix:
        """The inverse of `flat`, over other tensors."""
        layers = len(self.keys)
        return replace(
            self, hidden_BLD=tensors[0], keys=tuple(tensors[1 : 1 + layers]), values=tuple(tensors[1 + layers :])
        )


@dataclass(frozen=True)
class ThoughtLoss:
    """The result of one micro-batch.

    total     fp32 scalar with a graph: sum over terms of weight * sum; one backward through it is the whole gradient
    sums      fp32 [4], detached, the unweighted sum of every term of TERMS
    stats     float64 vector of additive sums on the device; add over micro-batches and ranks, then stats.summarise
    """

    total: Tensor
    sums: Tensor
    stats: Tensor
    thoughts: Thoughts | None = None
