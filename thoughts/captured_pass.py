"""The gradient pass as one CUDA graph a chunk, replayed for every chunk of every micro-batch of a shape.

A chunk is thousands of small kernels; launched one by one they take the host longer than the device. A captured chunk (forward,
gradient, sums into totals) reads copies of everything that changes, made once a micro-batch (text, prefix, trained tensors that
come out of a forward) or once a chunk (thoughts and anchors), and the model's own parameters where they lie. All chunks have one
shape: the last is filled up with its last anchor, which then counts nowhere. Chunks leave nothing in the pool they work in.

On a device without graphs the same code runs over the same copies, uncaptured. Called by gradient.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..base.devices import addresses
from . import stats
from .graphs import CannotCapture, GraphPool, Kept, Replayed
from .policy import PolicyTensors
from .terms import ChunkTerms
from .types import TERMS, Anchors, Prefix, Rows, Thoughts


@dataclass(frozen=True)
class StaticRows:
    """types.py `Rows`, where graphs read it."""

    tokens_BT: Tensor
    labels_BT: Tensor
    position_BT: Tensor
    segment_BT: Tensor

    @classmethod
    def like(cls, rows: Rows) -> StaticRows:
        """Memory of its own; the numbers come with `load`."""
        return cls(*(torch.zeros_like(x) for x in row_tensors(rows)))

    def load(self, rows: Rows) -> None:
        for mine, new in zip(row_tensors(self), row_tensors(rows)):
            mine.copy_(new)


def row_tensors(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return rows.tokens_BT, rows.labels_BT, rows.position_BT, rows.segment_BT


@dataclass(frozen=True)
class Micro:
    """What a micro-batch brings to its gradient pass.

    tensors, prefix   the inputs; `wanted`, in the order of tensors.flat() and prefix.flat(): which want a gradient
    weights_M         fp32 [4], of the terms        size  anchors of a row in one chunk
    """

    tensors: PolicyTensors
    prefix: Prefix
    rows: Rows
    thoughts: Thoughts
    reference_BL: Tensor
    weights_M: Tensor
    wanted: tuple[bool, ...]
    size: int

    @property
    def inputs(self) -> list[Tensor]:
        return [*self.tensors.flat(), *self.prefix.flat()]

    @property
    def pieces(self) -> int:
        """Chunks of a micro-batch."""
        return -(-self.thoughts.anchors.count // self.size)

    def chunk(self, number: int) -> Thoughts:
        """The thoughts of a chunk, filled up: more of its last anchor, not valid."""
        anchors, count = self.thoughts.anchors, self.thoughts.anchors.count
        place = torch.arange(number * self.size, (number + 1) * self.size, device=anchors.index_BA.device)
        valid_BA = anchors.valid_BA[:, place.clamp_max(count - 1)] & (place < count)
        place = place.clamp_max(count - 1)
        index, start, key = (x[:, place] for x in (anchors.index_BA, anchors.start_BA, anchors.key_BA))
        return Thoughts(
            self.thoughts.tokens_BAST[:, place], self.thoughts.logprob_BAST[:, place],
            Anchors(index, start, valid_BA, key),
        )  # fmt: skip

    def key(self, terms: ChunkTerms) -> Hashable:
        """What a captured chunk is good for."""
        tensors = (*self.inputs, *row_tensors(self.rows), self.thoughts.tokens_BAST[:, :1], self.reference_BL)
        shapes = tuple((tuple(t.shape), t.dtype) for t in tensors)
        in_place = tuple(id(t) for t in self.tensors.flat() if read_in_place(t))
        many = self.pieces > 1
        return terms.config, terms.recompute, self.size, many, self.wanted, shapes, in_place


@dataclass(frozen=True)
class Found:
    """The result of a pass: value, terms_M [3], stats; a total for every wanted input, in memory that the next pass overwrites."""

    value: Tensor
    terms_M: Tensor
    stats: Tensor
    totals: Sequence[Tensor]


class ChunkPass:
    """The memory of one shape of chunk, and its replay."""

    def __init__(self, terms: ChunkTerms, micro: Micro, pool: GraphPool) -> None:
        self.terms, self.places = terms, addresses(terms.policy.model)
        inputs = micro.inputs
        self.leaves = [static_leaf(x, want) for x, want in zip(inputs, micro.wanted)]
        self.aliases = {id(x): leaf for x, leaf in zip(inputs, self.leaves) if read_in_place(x)}
        self.copied = [not read_in_place(x) for x in inputs]
        own = len(micro.tensors.flat())
        self.tensors = micro.tensors.with_flat(self.leaves[:own])
        self.prefix = replace(micro.prefix.with_flat(self.leaves[own:]), one_document=False)
        self.targets = [leaf for leaf, want in zip(self.leaves, micro.wanted) if want]
        # one chunk alone is no sum: its gradient needs no wider numbers than it has
        self.totals = [
            torch.zeros_like(t, dtype=total_dtype(t, micro.pieces), requires_grad=False) for t in self.targets
        ]
        self.rows = StaticRows.like(micro.rows)
        self.reference_BL = torch.zeros_like(micro.reference_BL)
        self.weights_M = torch.zeros_like(micro.weights_M)
        self.thoughts = _empty(micro.chunk(0))
        device = micro.reference_BL.device
        self.value = micro.reference_BL.new_zeros(())
        self.terms_M = micro.reference_BL.new_zeros(len(TERMS) - 1)
        self.stats = stats.empty(device)
        self.replayed = Replayed(device, pool)

    def __call__(self, micro: Micro) -> Found:
        """All chunks of a micro-batch. CannotCapture from the first call of a model that waits for the device."""
        with torch.no_grad():
            self._load(micro)
            self._load_chunk(micro.chunk(0))
        self.replayed.prepare(self._once)
        torch._foreach_zero_([*self.totals, self.value, self.terms_M, self.stats])
        for number in range(micro.pieces):
            if number:
                self._load_chunk(micro.chunk(number))
            self.replayed.replay(self._once)
        return Found(self.value.clone(), self.terms_M.clone(), self.stats.clone(), self.totals)

    def _load(self, micro: Micro) -> None:
        copy_into(
            [mine for mine, copied in zip(self.leaves, self.copied) if copied],
            [new for new, copied in zip(micro.inputs, self.copied) if copied],
        )
        self.rows.load(micro.rows)
        self.reference_BL.copy_(micro.reference_BL)
        self.weights_M.copy_(micro.weights_M)

    def _load_chunk(self, thoughts: Thoughts) -> None:
        self.thoughts.tokens_BAST.copy_(thoughts.tokens_BAST)
        self.thoughts.logprob_BAST.copy_(thoughts.logprob_BAST)
        for name in ("index_BA", "start_BA", "valid_BA", "key_BA"):
            getattr(self.thoughts.anchors, name).copy_(getattr(thoughts.anchors, name))

    def _once(self) -> None:
        """What is captured: the chunk that is loaded, added to totals and sums."""
        with standing_in(self.terms.policy.model, self.aliases):
            found = self.terms.differentiated(
                self.tensors, self.prefix, self.rows, self.thoughts, self.reference_BL, self.weights_M, self.targets
            )
        accumulate(self.totals, found.gradients)
        self.value += found.value
        self.terms_M += found.terms_M
        self.stats += found.stats


class PassGraphs:
    """Captured chunks by shape, kept from one micro-batch to the next; one object for one policy. What a pass returns is valid
    until the next one of its shape.

    A model that waits for the device, or whose trained leaves are not its own parameters, goes on uncaptured; the former says so.
    """

    def __init__(self, pool: GraphPool | None = None) -> None:
        self.pool = GraphPool() if pool is None else pool
        self._passes: Kept[ChunkPass] = Kept()
        self.refused = False

    def run(self, terms: ChunkTerms, micro: Micro) -> Found | None:
        """The pass; None: it cannot be captured."""
        if self.refused or not all_own(terms.policy.model, micro.tensors):
            return None
        places = addresses(terms.policy.model)
        key = micro.key(terms)
        made = self._passes.get(key, lambda: ChunkPass(terms, micro, self.pool))
        if made.places != places:  # what was captured reads memory that is no longer the model's
            self._passes.clear()
            del made
            made = self._passes.get(key, lambda: ChunkPass(terms, micro, self.pool))
        try:
            return made(micro)
        except CannotCapture as error:
            warnings.warn(str(error), stacklevel=2)
            self.refused = True
            self._passes.clear()
            return None


@contextmanager
def standing_in(model: nn.Module, aliases: Mapping[int, Tensor]) -> Iterator[None]:
    """Within it other tensors stand where these parameters (by id) stood: leaves of one call over the same memory. Of the
    parameters themselves a captured gradient would meet the stream on which hooks first saw them."""
    places: list[tuple[dict[str, Any], str, nn.Parameter]] = [
        (module._parameters, name, parameter)
        for module in (model.modules() if aliases else ())
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in aliases
    ]
    for held, name, parameter in places:
        held[name] = aliases[id(parameter)]
    try:
        yield
    finally:
        for held, name, parameter in places:
            held[name] = parameter


def copy_into(mine: list[Tensor], new: list[Tensor]) -> None:
    """Numbers of `new` into the memory of `mine`, in few launches."""
    if mine:
        torch._foreach_copy_([x.detach() for x in mine], [x.detach() for x in new])


def accumulate(totals: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add what there is."""
    for total, gradient in zip(totals, gradients):
        if gradient is not None:
            total += gradient


def total_dtype(target: Tensor, pieces: int) -> torch.dtype:
    """What a gradient is summed in: at least fp32, unless it is one piece."""
    return target.dtype if pieces == 1 else torch.promote_types(target.dtype, torch.float32)


def read_in_place(tensor: Tensor) -> bool:
    """Whether a trained tensor is a parameter, which stays where it is."""
    return tensor.is_leaf and tensor.requires_grad


def _empty(thoughts: Thoughts) -> Thoughts:
    """Memory for others of this shape."""
    anchors = thoughts.anchors
    index, start, valid, key = (
        torch.zeros_like(x) for x in (anchors.index_BA, anchors.start_BA, anchors.valid_BA, anchors.key_BA)
    )
    tokens, logprob = torch.zeros_like(thoughts.tokens_BAST), torch.zeros_like(thoughts.logprob_BAST)
    return Thoughts(tokens, logprob, Anchors(index, start, valid, key))


def static_leaf(tensor: Tensor, wanted: bool) -> Tensor:
    """A leaf of its own: over a parameter's memory, or over memory that copies go to."""
    plain = tensor.detach()
    return (plain if read_in_place(tensor) else torch.zeros_like(plain)).requires_grad_(wanted)


def all_own(model: nn.Module, tensors: PolicyTensors) -> bool:
    """Whether all trained leaves are parameters of the model."""
    own = {id(p) for p in model.parameters()}
    return all(id(t) in own for t in tensors.flat() if read_in_place(t))
