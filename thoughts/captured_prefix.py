"""The ordinary pass over a micro-batch's rows as two CUDA graphs, forward and backward, kept from one micro-batch to the next.

To autograd it is one function from the trained tensors to hidden states, keys and values. Those lie where the next forward writes
them, so a loss goes backward before the next one is made. The graphs have a pool of their own: between forward and backward, which
read what the forward left in it, run rollout and gradient pass.

On a device without graphs the same code runs uncaptured over the same copies. Called by gradient.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..base.devices import addresses
from .captured_pass import StaticRows, all_own, copy_into, read_in_place, standing_in, static_leaf
from .graphs import KEPT_SHAPES, CannotCapture, GraphPool, Kept, capturing, own_stream, warm_up
from .policy import Policy, PolicyTensors
from .prefix import check_prefix, document_mask, masked_prefix
from .types import Prefix, Rows


class PrefixPass:
    """The memory of one shape of rows, forward and backward."""

    def __init__(
        self, policy: Policy, tensors: PolicyTensors, rows: Rows, mask_B1LL: Tensor | None, pool: GraphPool, number: Tensor
    ) -> None:  # fmt: skip
        """`number`, of the last forward in the pool: what an earlier one left there for its backward is void."""
        self.policy, self.pool, self.places, self.number = policy, pool, addresses(policy.model), number
        inputs = tensors.flat()
        self.wanted = [t.requires_grad for t in inputs]
        self.leaves = [static_leaf(t, want) for t, want in zip(inputs, self.wanted)]
        self.copied = [not read_in_place(t) for t in inputs]
        self.aliases = {id(t): leaf for t, leaf in zip(inputs, self.leaves) if read_in_place(t)}
        self.tensors = tensors.with_flat(self.leaves)
        self.targets = [leaf for leaf, want in zip(self.leaves, self.wanted) if want]
        self.rows = StaticRows.like(rows)
        self.mask_B1LL = None if mask_B1LL is None else torch.zeros_like(mask_B1LL)
        self.graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph | None] | None = None
        self.found: Prefix | None = None
        self.outputs: list[Tensor] = []  # those that a gradient comes to
        self.slopes: list[Tensor] = []
        self.gradients: Sequence[Tensor | None] = ()

    def load(self, tensors: PolicyTensors, rows: Rows, mask_B1LL: Tensor | None) -> None:
        """Copy what a micro-batch brings."""
        copy_into(
            [mine for mine, copied in zip(self.leaves, self.copied) if copied],
            [new for new, copied in zip(tensors.flat(), self.copied) if copied],
        )
        self.rows.load(rows)
        if self.mask_B1LL is not None and mask_B1LL is not None:
            self.mask_B1LL.copy_(mask_B1LL)
        self.number += 1

    def prepare(self) -> None:
        """Capture both, where there are graphs and it has not been done. CannotCapture for a model that waits for the device."""
        device = self.rows.tokens_BT.device
        if self.graphs is not None or device.type != "cuda":
            return
        stream = own_stream(device)
        warm_up(self._both, stream)
        # with the warm-up's tensors go its autograd nodes: a capture that met them would wait for their stream
        self.found, self.outputs, self.slopes, self.gradients = None, [], [], ()
        backward = None
        with capturing("the pass over the text"):
            forward = self.pool.capture(self._forward, stream)
            if self.outputs:
                self.slopes = [torch.zeros_like(x) for x in self.outputs]
                backward = self.pool.capture(self._backward, stream)
        self.graphs = forward, backward

    def forward(self) -> Prefix:
        """The prefix of what is loaded, without its graph."""
        if self.graphs is None:
            self._forward()
        else:
            self.graphs[0].replay()
        assert self.found is not None
        return self.found.detach()

    def backward(self, slopes: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of all trained tensors, of those outputs that have one, from the last forward; in memory that stays."""
        if not self.slopes:
            self.slopes = [torch.zeros_like(x) for x in self.outputs]
        copy_into(self.slopes, list(slopes))
        if self.graphs is None or self.graphs[1] is None:
            self._backward()
        else:
            self.graphs[1].replay()
        found = iter(self.gradients)
        return [next(found) if want else None for want in self.wanted]

    def _both(self) -> None:
        self._forward()
        if self.outputs:
            self.slopes = [torch.zeros_like(x) for x in self.outputs]
            self._backward()

    def _forward(self) -> None:
        model = self.policy.model
        with torch.enable_grad(), self.policy.bind(self.tensors), standing_in(model, self.aliases):
            self.found = masked_prefix(model, self.rows, self.mask_B1LL)
        self.outputs = [x for x in self.found.flat() if x.requires_grad]

    def _backward(self) -> None:
        model = self.policy.model
        with self.policy.bind(self.tensors), standing_in(model, self.aliases):
            self.gradients = torch.autograd.grad(self.outputs, self.targets, self.slopes, allow_unused=True)


class _Taken(torch.autograd.Function):
    """The prefix's tensors, flat, from the trained ones."""

    @staticmethod
    def forward(ctx: Any, work: PrefixPass, *inputs: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        found = work.forward().flat()
        assert work.found is not None
        ctx.work, ctx.differentiable = work, [x.requires_grad for x in work.found.flat()]
        ctx.save_for_backward(work.number)  # whose change autograd notices
        ctx.mark_non_differentiable(*(x for x, has in zip(found, ctx.differentiable) if not has))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _ = ctx.saved_tensors
        return None, *ctx.work.backward([x for x, has in zip(slopes, ctx.differentiable) if has])


class PrefixGraphs:
    """Captured prefix passes by shape; one object for one policy. A model that waits for the device says so once and goes on
    uncaptured, one whose trained leaves are not its own parameters goes on without a word."""

    def __init__(self) -> None:
        self._pool, self._number = GraphPool(), torch.zeros((), dtype=torch.int64)
        self._passes: Kept[PrefixPass] = Kept(2 * KEPT_SHAPES)  # with a mask and without
        self.refused = False

    def run(self, policy: Policy, tensors: PolicyTensors, rows: Rows) -> Prefix | None:
        """As run_prefix, with a graph to the trained tensors; None: it cannot be captured, or there is no gradient outside."""
        if self.refused or not torch.is_grad_enabled() or not all_own(policy.model, tensors):
            return None
        check_prefix(policy.model)
        mask_B1LL = document_mask(rows.segment_BT)
        key = _key(tensors, rows, mask_B1LL)

        def make() -> PrefixPass:
            return PrefixPass(policy, tensors, rows, mask_B1LL, self._pool, self._number)

        made = self._passes.get(key, make)
        if made.places != addresses(policy.model):
            del made
            self._passes.clear()
            made = self._passes.get(key, make)
        made.load(tensors, rows, mask_B1LL)
        try:
            made.prepare()
        except CannotCapture as error:
            warnings.warn(str(error), stacklevel=2)
            self.refused = True
            self._passes.clear()
            return None
        flat = _Taken.apply(made, *tensors.flat())
        assert made.found is not None
        return made.found.with_flat(flat)  # type: ignore[arg-type]


def _key(tensors: PolicyTensors, rows: Rows, mask_B1LL: Tensor | None) -> Hashable:
    shapes = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in (*tensors.flat(), rows.tokens_BT))
    return shapes, mask_B1LL is None, tuple(id(t) for t in tensors.flat() if read_in_place(t))
