"""CUDA graphs of thoughts: how a function over memory that stays where it is becomes one, the pool that graphs work in one after
another, and which of them are kept.

On a device without graphs the same objects call the function. Called by rollout.py, captured_pass.py and captured_prefix.py.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from ..base.errors import QuietGooseError
from ..base.waits import refusing_waits

WARM_UPS = 2  # before a capture: library handles, autotuning
KEPT_SHAPES = 2
KEPT_USES = 32

T = TypeVar("T")


class CannotCapture(QuietGooseError):
    """THT-007: what was to be captured waits for the device. Found before the capture, so it can go on uncaptured."""


class Kept(Generic[T]):
    """What was made for a key, from one use to the next: at most `most` of them, none unused for more than `uses` uses."""

    def __init__(self, most: int = KEPT_SHAPES, uses: int = KEPT_USES) -> None:
        self._most, self._longest = most, uses
        self._made: dict[Hashable, tuple[T, int]] = {}
        self._uses = 0

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The one of this key. Those used longest ago make room before a new one takes any."""
        self._uses += 1
        found = self._made.pop(key, None)
        oldest_first = [(other, used) for other, (_, used) in self._made.items()]
        for place, (other, used) in enumerate(oldest_first):
            if self._uses - used > self._longest or len(oldest_first) - place >= self._most:
                del self._made[other]
        made = make() if found is None else found[0]
        self._made[key] = (made, self._uses)
        return made

    def clear(self) -> None:
        """Let go of all."""
        self._made.clear()


_streams: list[torch.cuda.Stream] = []
_captured_on: weakref.WeakKeyDictionary[torch.cuda.CUDAGraph, torch.cuda.Stream] = weakref.WeakKeyDictionary()


def own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for a warm-up and the captures after it, on which nothing was captured that still lives.

    cuBLAS has work space for every stream, whose address graphs keep: one stream for both makes it before the capture, outside the
    pool. With a graph torch >= 2.12 frees that of its stream, whoever else was captured there (pytorch/pytorch#193402).
    """
    taken = {stream.cuda_stream for stream in _captured_on.values()}
    for stream in _streams:
        if stream.device == device and stream.cuda_stream not in taken:
            return stream
    _streams.append(torch.cuda.Stream(device))
    return _streams[-1]


class GraphPool:
    """Memory that graphs share. They must leave nothing in it: what they read and write is made outside, before the capture; then
    any may run after any other. Its size is that of the hungriest."""

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._handle: Any = None

    def capture(self, function: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        """`function` as a graph, captured on its `own_stream`; capturing runs nothing."""
        if not len(self._graphs):  # a pool whose graphs are all gone is no pool any more
            self._handle = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(stream.device), _collecting_no_garbage():
            torch.cuda.synchronize()
            # thread_local: other threads pin memory meanwhile, which a global capture would not survive
            with torch.cuda.graph(graph, pool=self._handle, stream=stream, capture_error_mode="thread_local"):
                function()
        self._graphs.add(graph)
        _captured_on[graph] = stream
        return graph


class Replayed:
    """One function over static memory, as often as `replay` is called. It comes with every call: kept here, it and what it belongs
    to would keep each other, and their memory, alive."""

    def __init__(self, device: torch.device, pool: GraphPool) -> None:
        self._device, self._pool = device, pool
        self.graph: torch.cuda.CUDAGraph | None = None

    def prepare(self, function: Callable[[], None]) -> None:
        """Capture it, where there are graphs and it has not been: what the function writes is void afterwards, what it reads must
        be numbers that may come. CannotCapture for a function that waits for the device."""
        if self.graph is not None or self._device.type != "cuda":
            return
        stream = own_stream(self._device)
        warm_up(function, stream)
        with capturing("the gradient pass"):
            self.graph = self._pool.capture(function, stream)

    def replay(self, function: Callable[[], None]) -> None:
        if self.graph is None:
            function()
        else:
            self.graph.replay()


@contextmanager
def capturing(what: str) -> Iterator[None]:
    """QuietGooseError THT-008 for what a graph refuses other than by waiting: CUDA says it in the middle of the capture, after which
    nothing can be relied on."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise QuietGooseError(
            f"{what} of thoughts cannot be captured in a CUDA graph ({error}). Train without: thoughts.capture: never in a recipe, "
            "passes=None and prefixes=None in a call",
            code="THT-008",
        ) from error


def warm_up(function: Callable[[], Any], stream: torch.cuda.Stream) -> None:
    """Run it on the stream that will capture it; CannotCapture if it waits for the device."""
    with torch.cuda.device(stream.device):
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    function()
                with refusing_waits(_waits):
                    function()
        finally:
            torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def _collecting_no_garbage() -> Iterator[None]:
    """A graph that is destroyed while another is captured spoils it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _waits() -> CannotCapture:
    return CannotCapture(
        "the gradient pass of thoughts waits for the device (a number read on the host, a shape that depends on tokens), which no "
        "CUDA graph can hold; it runs uncaptured. thoughts.capture: never does not try",
        code="THT-007",
    )
