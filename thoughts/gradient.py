"""The loss of one micro-batch and its whole gradient, in memory that does not grow with anchors times samples.

    phase 1, no gradient   rollout over the detached prefix                                     (rollout.py)
    phase 2                chunks of anchors over leaves of the prefix; each chunk's gradient is taken at once
    backward               one pass, from the sums of phase 2 through the prefix to the parameters

Phase 2 is one autograd function whose inputs are the trainable tensors and the prefix (hidden states, all keys and
values); it calls torch.autograd.grad for every chunk, so DeepSpeed sees one backward and ZeRO reduces once. Exact:
chunk sizes change rounding only. Gradients are summed in fp32. quiet-star.md 1.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..base.errors import QuietGooseError
from ..base.seeding import generator
from . import stats
from .anchors import choose_anchors, chunk_size
from .branch import base_losses, language_head
from .captured_pass import Found, Micro, PassGraphs, accumulate, total_dtype
from .captured_prefix import PrefixGraphs
from .config import ThoughtConfig
from .flips import Choices, flip_sums
from .policy import Policy, PolicyTensors
from .prefix import run_prefix
from .rollout import RolloutGraphs, banned_tokens, rollout
from .scoring import gap_sums, score_thoughts, shuffled
from .terms import ChunkTerms
from .types import TERMS, Prefix, Rows, ThoughtLoss, Thoughts


@dataclass(frozen=True)
class Stream:
    """Names the random choices of one micro-batch: the run's seed, the step, the rows' numbers in the data [B].

    Ranks and micro-batches of a step share seed and step, so that the curve does not depend on their number.
    """

    seed: int
    step: int
    row_ids: Tensor | None = None

    def generator(self) -> torch.Generator:
        """What the step's rollouts draw from, alike on every rank and for every micro-batch."""
        return generator(self.seed, "thoughts", self.step)


def thought_loss(
    policy: Policy,
    rows: Rows,
    config: ThoughtConfig,
    weights_M: Tensor,
    stream: Stream,
    *,
    chunk: int | None = None,
    rollout_chunk: int | None = None,
    baseline_BL: Tensor | None = None,
    graphs: RolloutGraphs | None = None,
    passes: PassGraphs | None = None,
    prefixes: PrefixGraphs | None = None,
    recompute: bool = False,
    measure_gap: bool = False,
    choices: Choices | None = None,
    thoughts: Thoughts | None = None,
) -> ThoughtLoss:
    """sum over TERMS of weights_M * sum of the term, with the whole gradient behind one backward.

    weights_M      fp32 [4], coefficient / count (times what the engine averages away); see anchors.term_counts
    chunk          anchors of a row in one piece of phase 2 (None: all)
    rollout_chunk  anchors of a row that are sampled together (None: all)
    baseline_BL    fp32 [B, L], -log p of each label by another model (rlp: an EMA that does not think); rewards are
                   measured against it instead of against this model without a thought
    graphs         captured rollout steps, kept by the caller; None: uncaptured
    passes, prefixes  captured chunks of phase 2 and captured prefix passes, kept by the caller: a loss goes backward before the
                   next one is made. None: uncaptured
    recompute      the branches' layers keep their input alone and run again in the backward pass: a quarter of phase 2's memory
                   a branch position, a third more of its time
    measure_gap    also score every anchor's first thought at an anchor of another document (own minus shuffled): two branch
                   passes more; nothing comes of it where the rows are one document

    choices        records the experts that sites choose: how many of the first chunk's choices differ between rollout and
                   gradient pass is measured then, by two branch passes more (flips.py); None: not
    thoughts       what was sampled before, and where; None: it is sampled here

    Without gradients outside (no_grad, inference_mode) only the numbers are made. Raises QuietGooseError THT-002 for a
    model that drops out, THT-004 for one that checkpoints activations while `bind` replaces its adapters, THT-006 for one in
    fp16.
    """
    tensors = policy.tensors()
    _check_checkpointing(policy.model, tensors)
    _check_dtype(policy.model)
    coefficients = config.coefficients()
    with policy.bind(tensors):
        prefix = None if prefixes is None else prefixes.run(policy, tensors, rows)
        if prefix is None:
            prefix = run_prefix(policy.model, rows)
        with torch.set_grad_enabled(torch.is_grad_enabled() and coefficients[0] != 0):
            base_BL, entropy_BL = base_losses(policy.model, prefix.hidden_BLD, rows.labels_BT)
    base = base_BL.sum()
    if not config.thinks:
        sums_M = torch.cat([base.detach().view(1), base.new_zeros(len(TERMS) - 1)])
        return ThoughtLoss(weights_M[0] * base, sums_M, stats.empty(base.device))
    if thoughts is None:
        anchors = choose_anchors(
            config, rows, seed=stream.seed, step=stream.step, row_ids=stream.row_ids, entropy_BL=entropy_BL.detach(),
            one_document=prefix.one_document,
        )  # fmt: skip
        thoughts = rollout(
            policy, tensors, prefix, rows, anchors, config, stream.generator(), at_once=rollout_chunk, graphs=graphs
        )
    reference_BL = base_BL.detach() if baseline_BL is None else baseline_BL
    banned = banned_tokens(config, language_head(policy.model), reference_BL.device)
    work = _PhaseTwo(
        ChunkTerms(policy, config, banned, recompute), tensors, prefix, rows, thoughts, weights_M, reference_BL,
        chunk_size(thoughts.anchors.count, chunk), passes,
    )  # fmt: skip
    value = _TakenAtOnce.apply(work, *tensors.flat(), *prefix.flat())
    if measure_gap:
        first = thoughts.first_sample()
        own, other = (
            score_thoughts(policy, tensors, prefix, rows, scored, config, chunk=work.chunk)
            for scored in (first, shuffled(first))
        )
        work.stats += gap_sums(own, other)
    if choices is not None:
        work.stats += flip_sums(policy, tensors, prefix, rows, thoughts.part(0, work.chunk), config, choices)
    sums_M = torch.cat([base.detach().view(1), work.sums])
    return ThoughtLoss(weights_M[0] * base + value, sums_M, work.stats, thoughts)


class _PhaseTwo:
    """The gradient pass of one micro-batch: the terms of every chunk of anchors, differentiated as they come.

    sums   [3], of the terms mixed, policy, distil      stats  see stats.py; both complete after the call
    """

    def __init__(
        self,
        terms: ChunkTerms,
        tensors: PolicyTensors,
        prefix: Prefix,
        rows: Rows,
        thoughts: Thoughts,
        weights_M: Tensor,
        reference_BL: Tensor,
        chunk: int,
        passes: PassGraphs | None,
    ) -> None:
        self.terms, self.rows, self.thoughts, self.passes = terms, rows, thoughts, passes
        self.tensors, self.prefix = tensors, prefix
        self.weights_M, self.reference_BL, self.chunk = weights_M.detach(), reference_BL, chunk
        self.differentiates = torch.is_grad_enabled()
        self.sums = reference_BL.new_zeros(len(TERMS) - 1)
        self.stats = stats.empty(reference_BL.device)

    def __call__(self, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """(value, total gradient of every wanted input). `inputs` are tensors.flat() and prefix.flat()."""
        wanted = [want and self.differentiates for want in wanted]  # autograd asks whatever the mode outside
        found = (self._captured(inputs, wanted) if any(wanted) else None) or self._eager(inputs, wanted)
        self.sums, self.stats = self.sums + found.terms_M, self.stats + found.stats
        totals = iter(found.totals)
        return found.value, [next(totals) if want else None for want in wanted]

    def _captured(self, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> Found | None:
        if self.passes is None:
            return None
        own = len(self.tensors.flat())
        micro = Micro(
            self.tensors.with_flat(inputs[:own]), self.prefix.with_flat(inputs[own:]), self.rows, self.thoughts,
            self.reference_BL, self.weights_M, tuple(wanted), self.chunk,
        )  # fmt: skip
        return self.passes.run(self.terms, micro)

    def _eager(self, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> Found:
        leaves = [_leaf(x) if want else x.detach() for x, want in zip(inputs, wanted)]
        targets = [leaf for leaf, want in zip(leaves, wanted) if want]
        own, count = len(self.tensors.flat()), self.thoughts.anchors.count
        tensors, prefix = self.tensors.with_flat(leaves[:own]), self.prefix.with_flat(leaves[own:])
        pieces = -(-count // self.chunk)
        totals = [torch.zeros_like(t, dtype=total_dtype(t, pieces), requires_grad=False) for t in targets]
        value, terms_M, sums = self.sums.new_zeros(()), torch.zeros_like(self.sums), torch.zeros_like(self.stats)
        for first in range(0, count, self.chunk):
            part = self.thoughts.part(first, first + self.chunk)
            found = self.terms.differentiated(
                tensors, prefix, self.rows, part, self.reference_BL, self.weights_M, targets
            )
            accumulate(totals, found.gradients)
            value, terms_M, sums = value + found.value, terms_M + found.terms_M, sums + found.stats
        return Found(value, terms_M, sums, totals)


class _TakenAtOnce(torch.autograd.Function):
    """The value of phase 2, with its gradients made in the forward pass and only scaled in the backward pass. Autograd refuses
    them where a later captured pass has overwritten them."""

    @staticmethod
    def forward(ctx: Any, work: _PhaseTwo, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        value, gradients = work(inputs, ctx.needs_input_grad[1:])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x.dtype for x in inputs]
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled = (None if g is None else (g * scale.to(g.dtype)).to(to) for g, to in zip(ctx.saved_tensors, ctx.dtypes))
        return (None, *scaled)


def _check_checkpointing(model: Any, tensors: PolicyTensors) -> None:
    """The prefix's backward runs after `thought_loss`, outside `bind`: what it computes again must not need it."""
    checkpoints = model.training and getattr(model, "is_gradient_checkpointing", False)
    if checkpoints and torch.is_grad_enabled() and not all(tensor.is_leaf for tensor in tensors.adapters):
        raise QuietGooseError(
            "thoughts with adapters that are bound from outside cannot checkpoint activations: put the model in eval mode; "
            "`chunk` bounds the memory of the gradient pass",
            code="THT-004",
        )


def _check_dtype(model: Any) -> None:
    """Gradients of keys and values are handed on in their dtype, unscaled: below 6e-8 fp16 would make them zero."""
    if torch.is_grad_enabled() and model.dtype == torch.float16:
        raise QuietGooseError(
            f"{type(model).__name__} is in float16, whose small gradients vanish without loss scaling: train thoughts over a "
            "bfloat16 or float32 model (base.dtype); sampling and generating in float16 are fine",
            code="THT-006",
        )


def _leaf(tensor: Tensor) -> Tensor:
    """A parameter as it stands; anything else cut from its graph, as a leaf of its own."""
    return tensor if tensor.is_leaf else tensor.detach().requires_grad_()
