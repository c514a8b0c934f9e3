"""Packs documents into rows of fixed length: best fit, longest first, the same for the same seed and name.

A document of n+1 token ids is n inputs and n targets (the target of an input is the id after it), so the
closing end-of-text is a target and never an input. Called by build.py; read by loader.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from ...base.seeding import generator
from .rows import RowReport
from .tokens import TokenSet

IGNORE = -100


@dataclass(frozen=True)
class PackedExpert:
    """The rows of one loss term. Axes: B all rows of the expert, T positions of a row.

    tokens_BT    int32, the pad id where segment is 0
    labels_BT    int32, the target of every position, -100 where the loss counts nothing
    position_BT  int32, restarts at 0 with every document
    segment_BT   int32, 1, 2, ... by document, 0 for padding
    label_B      int64, targets the loss counts, per row
    token_B      int64, positions that are no padding, per row
    """

    name: str
    tokens_BT: np.ndarray
    labels_BT: np.ndarray
    position_BT: np.ndarray
    segment_BT: np.ndarray
    label_B: np.ndarray
    token_B: np.ndarray
    documents: int
    report: RowReport

    @property
    def rows(self) -> int:
        return len(self.tokens_BT)

    def hash(self) -> str:
        """Hash of everything the loss depends on."""
        digest = hashlib.sha256(f"{self.name}|{self.tokens_BT.shape}".encode())
        for array in (self.tokens_BT, self.labels_BT, self.position_BT, self.segment_BT):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def summary(self) -> dict[str, int | float]:
        """Numbers for the console, the event log and the tracker."""
        return {
            "rows_taken": self.report.taken,
            "rows_skipped": self.report.skipped,
            "documents": self.documents,
            "packed_rows": self.rows,
            "tokens": int(self.token_B.sum()),
            "label_tokens": int(self.label_B.sum()),
            "fill": float(self.token_B.sum() / max(self.tokens_BT.size, 1)),
        }


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Item indices per bin: items from longest to shortest, ties in order of index, each into the fullest
    bin it fits.

    `free` has bit s set if some bin has exactly s places left, so the fullest fitting bin is one bit search
    away.
    """
    bins: list[list[int]] = []
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]  # places left -> bins
    free = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[item])
        fitting = free >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            index = waiting[left].pop()
            if not waiting[left]:
                free &= ~(1 << left)
        else:
            left, index = capacity, len(bins)
            bins.append([])
        bins[index].append(item)
        left -= size
        if left:
            waiting[left].append(index)
            free |= 1 << left
    return bins


def pack(name: str, documents: TokenSet, length: int, pad_id: int, seed: int) -> PackedExpert:
    """Rows of `length` positions. Documents of equal length are placed in an order drawn from seed and name.

    No document may have more than length + 1 ids: tokens.py has cut or refused longer ones.
    """
    shuffle = torch.randperm(len(documents), generator=generator(seed, "packing", name)).numpy()
    lengths = np.diff(documents.ends, prepend=0) - 1
    bins = best_fit(lengths[shuffle], length)
    shape = (len(bins), length)
    tokens = np.full(shape, pad_id, dtype=np.int32)
    labels = np.full(shape, IGNORE, dtype=np.int32)
    position = np.zeros(shape, dtype=np.int32)
    segment = np.zeros(shape, dtype=np.int32)
    for row, items in enumerate(bins):
        at = 0
        for number, item in enumerate(items, start=1):
            ids, trained = documents.document(int(shuffle[item]))
            part = slice(at, at + len(ids) - 1)
            tokens[row, part] = ids[:-1]
            labels[row, part] = np.where(trained[1:], ids[1:], IGNORE)
            position[row, part] = np.arange(len(ids) - 1)
            segment[row, part] = number
            at = part.stop
    return PackedExpert(
        name, tokens, labels, position, segment,
        label_B=(labels != IGNORE).sum(1), token_B=(segment > 0).sum(1),
        documents=len(documents), report=documents.report,
    )  # fmt: skip
