"""What all layers of one forward have in common: validity, ranks and probe rows of its columns, made by the first layer.

Every layer of a cache holds the same columns. So whatever follows from validity, from how many columns came before, from
the rows' ids and from the policy is made once a forward and handed down (`SharedTables`); a layer on its own (`shared` is
None) makes its own. Nothing here waits for the device. Caller: cache/state.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..kernels.saliency import choose_probes

if TYPE_CHECKING:
    from .state import LayerState

_CHUNK_STRIDE = 1_000_003  # tells the draws of a row's chunks apart
T = TypeVar("T")


class SharedTables:
    """Things made by the first layer of a forward that asks for them, handed down to those behind it.

    A layer that is not behind the last one, or that asks for the same thing again, begins another forward.
    """

    def __init__(self) -> None:
        self._layer = -1
        self._asked: set[Hashable] = set()  # by the last layer
        self._made: dict[Hashable, Any] = {}

    def of(self, layer: int, what: Hashable, make: Callable[[], T]) -> T:
        """`what` tells apart that which may differ between layers (device, policy)."""
        if layer < self._layer or (layer == self._layer and what in self._asked):
            self._made.clear()
            self._asked.clear()
        elif layer > self._layer:
            self._asked.clear()
        self._layer = layer
        self._asked.add(what)
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]


def shared_validity(
    shared: SharedTables | None, layer: int, mask: Tensor, make: Callable[[], Tensor], *what: Hashable
) -> Tensor:
    """Validity of a forward's new tokens, bool [B,n], made once for the layers that are given this very mask."""
    if shared is None:
        return make()
    made_for, found = shared.of(layer, ("validity", *what), lambda: (weakref.ref(mask), make()))
    return found if made_for() is mask else make()


@dataclass(frozen=True)
class Columns:
    """m columns of B rows, the first `old` of which were in the 16-bit window before; the first `leaving` are packed."""

    valid: Tensor  # bool [B,m]
    before: Tensor  # int64 [B]: valid columns ahead of the first
    old: int
    leaving: int
    sinks: int
    probes: Tensor | None = None  # int64 [B,P]: column of each probe row, -1 = none

    @cached_property
    def rank(self) -> Tensor:
        """int64 [B,m]: place among the row's valid columns since the beginning."""
        return self.before.unsqueeze(1) + self.valid.long().cumsum(1) - 1

    @cached_property
    def leaving_valid(self) -> Tensor:
        """bool [B, leaving]."""
        return self.valid[:, : self.leaving]

    @cached_property
    def stored(self) -> Tensor:
        """bool [B, leaving]: tokens for the arenas; a row's first `sinks` have slots of their own."""
        if not self.sinks:
            return self.leaving_valid
        return self.leaving_valid & (self.rank[:, : self.leaving] >= self.sinks)

    @cached_property
    def first(self) -> Tensor:
        """int64 [B]: the first valid column of each row, 0 where there is none."""
        return self.valid.view(torch.uint8).argmax(1)

    @cached_property
    def query_rows(self) -> Tensor:
        """int64 [B,1,P,1]: which of the new queries each probe is."""
        assert self.probes is not None
        return (self.probes - self.old).clamp(min=0)[:, None, :, None]

    @cached_property
    def seen_by(self) -> Tensor:
        """fp32 [B,m]: probes at or after each column."""
        assert self.probes is not None
        marks = torch.zeros(self.probes.shape[0], self.valid.shape[1] + 1, device=self.probes.device)
        marks.scatter_add_(1, self.probes + 1, (self.probes >= 0).float())
        return marks[:, 1:].flip(1).cumsum(1).flip(1)


def columns_of_chunk(state: LayerState, valid: Tensor | None, new: int, shared: SharedTables | None) -> Columns:
    """The columns of a prefill: those of the window, then `new` ones (valid bool [B,new]; None: all are)."""
    if shared is None:
        return _chunk(state, valid, new)
    what = (state.policy, state.batch, new, state.window.columns, state.packed_length, state.device)
    made_for, found = shared.of(state.layer_index, what, lambda: (valid, _chunk(state, valid, new)))
    return found if made_for is valid else _chunk(state, valid, new)


def columns_of_window(state: LayerState, leaving: int) -> Columns:
    """The columns of the window at a flush."""
    window = state.window
    valid = window.tail.valid[:, window.window].bool()
    return Columns(valid, state.history.valid_count(), window.columns, leaving, state.policy.sink_tokens)


def _chunk(state: LayerState, valid: Tensor | None, new: int) -> Columns:
    policy, window, old = state.policy, state.window, state.window.columns
    if valid is None:
        valid = torch.ones(state.batch, new, dtype=torch.bool, device=state.device)
    fresh = valid = valid.to(state.device, torch.bool)
    before = at = state.history.valid_count()  # ahead of the window, ahead of the new columns
    if old:
        kept = window.tail.valid[:, window.window].bool()
        valid, at = torch.cat([kept, fresh], dim=1), before + kept.sum(1)
    probes = None
    if policy.uses_attention:
        probes = choose_probes(
            fresh, recent_fraction=policy.probe_recent, random_fraction=policy.probe_random, cap=policy.probe_cap,
            seed=policy.seed, sequence_id=state.sequence_id + at * _CHUNK_STRIDE, mode=policy.saliency,
        )  # fmt: skip
        if old:
            probes = torch.where(probes >= 0, probes + old, -1)
    leaving = old + new - min(policy.recent_tokens, old + new)
    return Columns(valid.contiguous(), before, old, leaving, policy.sink_tokens, probes)
