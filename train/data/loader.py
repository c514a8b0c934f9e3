"""The batches of every optimizer step: a pure function of data, seed and step.

Expert e's rows form an endless stream, epoch after epoch, each epoch in an order drawn from (seed, name of
e, epoch). Step s takes the rows s*n .. (s+1)*n - 1 of every stream, n = rows_per_expert. So an expert sees
the same rows in the same steps whether it trains alone or with others, on one process or many, and a run
continues at any step. Called by train/loop.py through `StepData.step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from ...base.errors import DataError
from ...base.files import sha256_json
from ...base.seeding import generator
from ..types import Batch, StepBatch
from .packing import IGNORE, PackedExpert

FIELDS = ("tokens_BT", "labels_BT", "position_BT", "segment_BT")


@dataclass(frozen=True)
class Terms:
    """Loss terms that are not the sources: `count(step, rows)` gives the float64 summands of each over all rows of a
    step, by their labels and documents alone."""

    names: tuple[str, ...]
    count: Callable[[int, Batch], torch.Tensor]


@dataclass(frozen=True)
class Share:
    """How a step's rows are dealt out: every rank has `micros` micro-batches of `rows` rows."""

    micros: int
    rows: int


def share_of(total_rows: int, micro_rows: int, world: int) -> Share:
    """The fewest micro-batches of at most `micro_rows` rows in which `world` ranks hold `total_rows`, evenly
    filled."""
    per_rank = -(-total_rows // world)
    micros = -(-per_rank // micro_rows)
    return Share(micros, -(-per_rank // micros))


class StepData:
    """Batches by step.

    Row j of expert e is number e*n + j of the step; rank r holds the numbers r, r + world, r + 2*world, ...
    and cuts them into micro-batches in that order. What is missing at the end is filled with empty rows
    (segment 0, label -100, expert 0), so every rank has the same number of micro-batches of the same shape.
    `terms`: loss terms of a job whose terms are not the sources. `by_expert`: rank r holds all rows of the experts
    r, r + world, ... instead (train/parallel.py); every rank has as many micro-batches as the fullest.
    """

    def __init__(
        self,
        experts: list[PackedExpert],
        rows_per_expert: int,
        micro_rows: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        pad_id: int = 0,
        terms: Terms | None = None,
        by_expert: bool = False,
    ) -> None:
        _check(experts, rows_per_expert, micro_rows)
        self.experts = experts
        self.rows_per_expert = rows_per_expert
        self.seed = seed
        self.rank = rank
        self.world = world
        self.pad_id = pad_id
        self.terms = terms
        self.length = experts[0].tokens_BT.shape[1]
        self._first_rows = np.cumsum([0, *(packed.rows for packed in experts)])
        self.by_expert = by_expert
        most = -(-len(experts) // world) * world if by_expert else len(experts)
        self.share = share_of(most * rows_per_expert, micro_rows, world)
        self._group_rows = self._equal_runs()
        self._documents = 1 + max(int(packed.segment_BT.max()) for packed in experts)  # and the padding
        self._orders: dict[str, tuple[int, np.ndarray]] = {}
        device = torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        self._pins = device is not None
        self._worker = ThreadPoolExecutor(1, "quietgoose-data", _on_device, (device,))
        self._ahead: tuple[int, Future[StepBatch]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Loss terms, in the order of `count_E` (and of `expert_B`, if the sources are the terms)."""
        return tuple(expert.name for expert in self.experts) if self.terms is None else self.terms.names

    @property
    def micro_count(self) -> int:
        return self.share.micros

    def hashes(self) -> dict[str, str]:
        """Hash of each expert's rows."""
        return {expert.name: expert.hash() for expert in self.experts}

    def hash(self) -> str:
        """Hash of what decides every batch: rows, their order, rows per step. World and micro size do not
        count."""
        return sha256_json([self.hashes(), list(self.names), self.rows_per_expert, self.seed])

    def summary(self) -> dict[str, dict[str, int | float]]:
        return {expert.name: expert.summary() for expert in self.experts}

    def step(self, step: int) -> StepBatch:
        """The batches of 0-based optimizer step `step` on this rank. The next step is made ready in the
        background."""
        ahead, self._ahead = self._ahead, None
        made = (
            ahead[1].result()
            if ahead is not None and ahead[0] == step
            else self._worker.submit(self._make, step).result()
        )
        self._ahead = (step + 1, self._worker.submit(self._make, step + 1))
        return made

    def first_rows(self, name: str, count: int) -> Batch:
        """The first `count` rows of one source's stream as one batch, whatever this rank and its rows per step are.

        `expert_B` is 0 and `row_B` counts from 0, as in the data of that source alone. DataError (DATA-003) if there is
        no such source or count < 1.
        """
        packed = next((packed for packed in self.experts if packed.name == name), None)
        if packed is None:
            names = ", ".join(packed.name for packed in self.experts)
            raise DataError(f"'{name}': no such source of rows; there are {names}", code="DATA-003")
        alone = StepData([packed], count, count, self.seed, pad_id=self.pad_id)
        try:
            return alone.step(0).micro[0]
        finally:
            alone.close()

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def row_numbers(self, expert: int, step: int) -> np.ndarray:
        """[rows_per_expert] indices into the expert's packed rows at `step`."""
        rows = self.experts[expert].rows
        stream = np.arange(step * self.rows_per_expert, (step + 1) * self.rows_per_expert)
        numbers = np.empty_like(stream)
        for epoch in range(int(stream[0]) // rows, int(stream[-1]) // rows + 1):
            here = stream // rows == epoch
            numbers[here] = self._order(expert, epoch)[stream[here] % rows]
        return numbers

    def _order(self, expert: int, epoch: int) -> np.ndarray:
        """The order of one epoch; the last one asked for is kept. Only the worker thread comes here."""
        packed = self.experts[expert]
        kept = self._orders.get(packed.name)
        if kept is None or kept[0] != epoch:
            order = torch.randperm(packed.rows, generator=generator(self.seed, "order", packed.name, epoch)).numpy()
            kept = self._orders[packed.name] = (epoch, order)
        return kept[1]

    def _make(self, step: int) -> StepBatch:
        chosen = [self.row_numbers(e, step) for e in range(len(self.experts))]
        pairs = [(e, int(row)) for e, numbers in enumerate(chosen) for row in numbers]
        made = StepBatch(
            step=step,
            micro=tuple(self._known(self._batch(part, self.share.rows)) for part in self._micro(self._mine(pairs))),
            count_E=self._counts(step, chosen, pairs),
            tokens=int(sum(packed.token_B[rows].sum() for packed, rows in zip(self.experts, chosen))),
        )
        return _pinned(made) if self._pins else made

    def _mine(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """This rank's part of the (expert, row) pairs of a step."""
        if self.by_expert:
            return [pair for pair in pairs if pair[0] % self.world == self.rank]
        return pairs[self.rank :: self.world]

    def _micro(self, mine: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        size = self.share.rows
        return [mine[m * size : (m + 1) * size] for m in range(self.share.micros)]

    def _equal_runs(self) -> int:
        """The largest number of rows of which every run of one expert in this rank's micro-batches is a multiple; the
        same in every step."""
        pairs = [(e, 0) for e in range(len(self.experts)) for _ in range(self.rows_per_expert)]
        runs = []
        for part in self._micro(self._mine(pairs)):
            experts = [e for e, _ in part] + [0] * (self.share.rows - len(part))
            runs += [len(list(same)) for _, same in groupby(experts)]
        return math.gcd(*runs)

    def _counts(self, step: int, chosen: list[np.ndarray], pairs: list[tuple[int, int]]) -> torch.Tensor:
        if self.terms is not None:
            return self.terms.count(step, self._batch(pairs, len(pairs)))
        labels = [float(packed.label_B[rows].sum()) for packed, rows in zip(self.experts, chosen)]
        return torch.tensor(labels, dtype=torch.float64)

    def _batch(self, pairs: list[tuple[int, int]], size: int) -> Batch:
        shape = (size, self.length)
        fill = {"tokens_BT": self.pad_id, "labels_BT": IGNORE, "position_BT": 0, "segment_BT": 0}
        arrays = {name: np.full(shape, fill[name], dtype=np.int64) for name in FIELDS}
        expert_B, row_B = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        for place, (expert, row) in enumerate(pairs):
            expert_B[place] = expert
            row_B[place] = self._first_rows[expert] + row
            for name in FIELDS:
                arrays[name][place] = getattr(self.experts[expert], name)[row]
        segment = torch.from_numpy(arrays.pop("segment_BT").astype(np.int32))
        return Batch(
            **{name: torch.from_numpy(array) for name, array in arrays.items()},
            segment_BT=segment,
            expert_B=torch.from_numpy(expert_B),
            row_B=torch.from_numpy(row_B),
        )

    def _known(self, batch: Batch) -> Batch:
        """A micro-batch with what the device would otherwise have to be waited for."""
        return replace(
            batch,
            label_L=torch.from_numpy(np.flatnonzero(batch.labels_BT.numpy() != IGNORE)),
            group_G=batch.expert_B[:: self._group_rows].clone(),
            border_D=torch.from_numpy(borders(batch.segment_BT.numpy(), self.share.rows * self._documents + 1)),
        )


def borders(segment_BT: np.ndarray, length: int) -> np.ndarray:
    """int32 [length]: where documents begin in the flattened rows (a row's padding is one), then B*T up to the end."""
    starts_BT = np.ones(segment_BT.shape, dtype=bool)
    starts_BT[:, 1:] = segment_BT[:, 1:] != segment_BT[:, :-1]
    starts = np.flatnonzero(starts_BT)
    found = np.full(length, segment_BT.size, dtype=np.int32)
    found[: len(starts)] = starts
    return found


def _on_device(device: int | None) -> None:
    """A new thread works on device 0 unless told otherwise, and page-locked memory belongs to a device's context."""
    if device is not None:
        torch.cuda.set_device(device)


def _check(experts: list[PackedExpert], rows_per_expert: int, micro_rows: int) -> None:
    if not experts:
        raise DataError("no source of rows: set data.collection with data.include, or data.experts", code="DATA-003")
    for name, value in (("rows_per_expert", rows_per_expert), ("micro_rows", micro_rows)):
        if value < 1:
            raise DataError(f"train.{name} is {value}; it must be at least 1", code="DATA-003")
    for packed in experts:
        if packed.rows == 0 or int(packed.label_B.min()) == 0:
            raise DataError(f"'{packed.name}': a packed row has no token to train", code="DATA-004")


def _pinned(batch: StepBatch) -> StepBatch:
    """Page-locked copies, so that Batch.to(cuda) does not wait."""
    micro = tuple(m.map(lambda tensor: tensor.pin_memory()) for m in batch.micro)
    return replace(batch, micro=micro)
