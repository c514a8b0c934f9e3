"""A model's forward and backward over packed rows, from the trained vectors to hidden states, as two CUDA graphs.

The host then launches two graphs a micro-batch instead of thousands of kernels. Head and loss stay outside: the number of
labels changes. To DeepSpeed it is one autograd function with the trained parameters as inputs; gradients are copied out, so
that accumulation never meets a buffer which the next replay overwrites.

Called by the jobs in mode `graph`. What torch.cuda.make_graphed_callables does, for a function of parameters and a batch
rather than a module of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import QuietGooseError
from ..base.waits import refusing_waits
from .types import Batch

WARM_UPS = 2

Run = Callable[[Batch, Tensor | None], tuple[Tensor, Sequence[Tensor]]]
"""Hidden states of a batch, and the leaves of this one call that stand for the trained parameters. They must not be the
parameters themselves: autograd would bring a gradient to the stream on which DeepSpeed's hooks first saw its parameter."""


class CannotCapture(QuietGooseError):
    """RUN-006: the forward or backward waits for the device, found before anything is captured: it can go on uncaptured."""


def _waits() -> CannotCapture:
    return CannotCapture(
        "train.compile: graph: this model's forward or backward waits for the device (a number read on the host, a shape "
        "that depends on tokens), which no graph can hold; set train.compile: layers",
        code="RUN-006",
    )


class Capture:
    """Both graphs of one batch shape, with the memory they read and write."""

    def __init__(self, run: Run, batch: Batch, shares: Tensor | None, pool: Any) -> None:
        self.batch = batch.map(torch.clone)
        self.shares = None if shares is None else shares.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._once(run)
            with refusing_waits(_waits):
                self._once(run)
        torch.cuda.current_stream().wait_stream(stream)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: the data thread pins memory meanwhile, which a global capture would not survive
        with torch.cuda.graph(self.forward_graph, pool=pool, capture_error_mode="thread_local"):
            hidden, leaves = run(self.batch, self.shares)
        self.grad_hidden = torch.zeros_like(hidden)
        with torch.cuda.graph(self.backward_graph, pool=pool, capture_error_mode="thread_local"):
            self.gradients = torch.autograd.grad(hidden, leaves, self.grad_hidden)
        self.hidden = hidden.detach()

    def _once(self, run: Run) -> None:
        hidden, leaves = run(self.batch, self.shares)
        torch.autograd.grad(hidden, leaves, torch.zeros_like(hidden))

    def load(self, batch: Batch, shares: Tensor | None) -> None:
        for own, given in zip(vars(self.batch).values(), vars(batch).values()):
            if own is not None:
                own.copy_(given, non_blocking=True)
        if self.shares is not None and shares is not None:
            self.shares.copy_(shares, non_blocking=True)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, capture: Capture, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.capture = capture
        capture.forward_graph.replay()
        return capture.hidden.view_as(capture.hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        capture: Capture = ctx.capture
        capture.grad_hidden.copy_(grads[0])
        capture.backward_graph.replay()
        return None, *(gradient.clone() for gradient in capture.gradients)


class CapturedTrunk:
    """Hidden states as `run` makes them from `parameters`; calls with a shape seen before are replayed. CannotCapture from
    the first call of a model that waits for the device.

    What a graph reads must stay where it is: parameters that moved since (QuietGooseError RUN-005) were replaced by somebody.
    """

    def __init__(self, run: Run, parameters: Callable[[], Sequence[nn.Parameter]]) -> None:
        self._run, self._parameters = run, parameters
        self._captures: dict[Any, Capture] = {}
        self._addresses: list[int] = []
        self._pool: Any = None

    def __call__(self, batch: Batch, shares: Tensor | None) -> Tensor:
        """Hidden states; valid until the next call."""
        parameters = list(self._parameters())
        still = _without_labels(batch)
        key = tuple(None if t is None else tuple(t.shape) for t in vars(still).values())
        capture = self._captures.get(key)
        if capture is None:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._addresses = [p.data_ptr() for p in parameters]
            capture = self._captures[key] = Capture(self._run, still, shares, self._pool)
        if self._addresses != [p.data_ptr() for p in parameters]:
            raise QuietGooseError("train.compile: graph: a trained parameter moved after the capture", code="RUN-005")
        capture.load(still, shares)
        return _Replay.apply(capture, *parameters)  # type: ignore[return-value]


def _without_labels(batch: Batch) -> Batch:
    """The batch without the places of labels, whose number changes."""
    return Batch(**{**vars(batch), "label_L": None})
