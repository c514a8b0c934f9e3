"""All packed tokens of a layer: read-only segments first, then the own store that flushes go to.

A segment is a store of other rows (the parent of a fork: query row r reads its row r // share) or one that a crop inside
a flush has limited. Most layers have none. Callers: cache/state.py, cache/reading.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .policy import Policy
from .store import PackedStore, Shape


@dataclass(frozen=True)
class Segment:
    """A store that is only read; `share` rows of the layer read one row of it."""

    store: PackedStore
    share: int = 1


class History:
    """Segments and the own store of B rows."""

    def __init__(
        self, policy: Policy, shape: Shape, batch: int, device: torch.device, capacity: int | None, expected: int = 0
    ) -> None:
        self.policy, self.shape, self.capacity = policy, shape, capacity
        self.segments: list[Segment] = []
        skip = torch.full((batch,), policy.sink_tokens, dtype=torch.int32, device=device)
        self.store = PackedStore(policy, shape, skip, capacity=capacity, expected=expected)

    @property
    def parts(self) -> list[Segment]:
        """Segments and the own store, in column order."""
        return [*self.segments, Segment(self.store)]

    @property
    def columns(self) -> int:
        own = self.store.columns
        return own + sum(part.store.columns for part in self.segments) if self.segments else own

    @property
    def batch(self) -> int:
        return self.store.batch

    def valid(self) -> Tensor:
        """bool [B, columns]."""
        return torch.cat([part.store.valid().repeat_interleave(part.share, 0) for part in self.parts], dim=1)

    def valid_count(self) -> Tensor:
        """Valid columns of each row, int64 [B]."""
        if self.columns == 0:
            return torch.zeros(self.batch, dtype=torch.int64, device=self.store.skip.device)
        return self.valid().sum(1)

    def crop(self, columns: int) -> bool:
        """Keep the first `columns`; in place where heads agree on what is left. True if the layout changed."""
        base = self.columns - self.store.columns
        if columns >= base and self.store.truncates(columns - base):
            self.store.truncate(columns - base)
            return False
        kept, start = [], 0
        for part in self.parts:
            size = min(part.store.columns, columns - start)
            if size > 0:
                kept.append(Segment(part.store.view(size), part.share))
            start += part.store.columns
        self.segments = kept
        self._open()
        return True

    def select(self, index: Tensor) -> None:
        """Row i becomes row index[i]; segments are copied, rows of a fork become independent."""
        self.segments = [Segment(part.store.selected(index // part.share)) for part in self.segments]
        self.store.select(index)

    def repeat(self, times: int, index: Tensor) -> None:
        """Rows beside their copies; segments are shared. index = row numbers, each `times` times."""
        self.segments = [Segment(part.store, part.share * times) for part in self.segments]
        self.store.select(index)

    def fork_from(self, parent: History, times: int, reader: Any) -> None:
        """Become `times` readers of every row of the parent; `reader` keeps the parent's stores frozen while it lives."""
        self.segments = [
            Segment(part.store.view(part.store.columns), part.share * times)
            for part in parent.parts
            if part.store.columns
        ]
        for part in parent.parts:
            part.store.readers.add(reader)
        self._open()

    def clear(self) -> None:
        if self.segments:  # a store behind segments had other sinks to wait for
            self.store.skip.fill_(self.policy.sink_tokens)
        self.segments = []
        self.store.clear()

    def to(self, device: torch.device) -> None:
        self.segments = [Segment(part.store.to(device), part.share) for part in self.segments]
        self.store = self.store.to(device)

    def _open(self) -> None:
        """A new own store behind the segments: arenas of its own, and sinks that are still to come."""
        count = torch.zeros(self.batch, dtype=torch.int64, device=self.store.skip.device)
        for part in self.segments:
            count += part.store.valid().sum(1).repeat_interleave(part.share, 0)
        skip = (self.policy.sink_tokens - count).clamp(min=0).to(torch.int32)
        kept = sum(part.store.columns for part in self.segments)
        capacity = None if self.capacity is None else max(1, self.capacity - kept)
        self.store = PackedStore(self.policy, self.shape, skip, capacity=capacity)
