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
from ..kernels.linear_loss import token_divergence, token_nll
from . import objective, stats
from .anchors import choose_anchors
from .branch import Lookahead, base_losses, language_head, look_ahead, lookahead_of, trains
from .config import ThoughtConfig
from .flips import Choices, flip_sums
from .parameters import ThoughtTensors
from .policy import Policy, PolicyTensors
from .prefix import run_prefix
from .rollout import RolloutGraphs, banned_tokens, rollout
from .scoring import gap_sums, score_thoughts, shuffled
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
    work = _PhaseTwo(
        policy, tensors, prefix, rows, thoughts, config, weights_M, reference_BL, chunk or thoughts.anchors.count
    )
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
    """The gradient pass of one micro-batch: `terms` of every chunk of anchors, differentiated as they come.

    sums   [3], of the terms mixed, policy, distil      stats  see stats.py; both complete after the call
    """

    def __init__(
        self,
        policy: Policy,
        tensors: PolicyTensors,
        prefix: Prefix,
        rows: Rows,
        thoughts: Thoughts,
        config: ThoughtConfig,
        weights_M: Tensor,
        reference_BL: Tensor,
        chunk: int,
    ) -> None:
        self.policy, self.rows, self.thoughts, self.config = policy, rows, thoughts, config
        self.tensors, self.prefix = tensors, prefix
        self.weights_M, self.reference_BL, self.chunk = weights_M.detach(), reference_BL, chunk
        self.differentiates = torch.is_grad_enabled()
        self.sums = reference_BL.new_zeros(len(TERMS) - 1)
        self.stats = stats.empty(reference_BL.device)
        self.banned = banned_tokens(config, language_head(policy.model), reference_BL.device)

    def __call__(self, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """(value, gradient of every wanted input). `inputs` are tensors.flat() and prefix.flat()."""
        wanted = [want and self.differentiates for want in wanted]  # autograd asks whatever the mode outside
        leaves = [_leaf(x) if want else x.detach() for x, want in zip(inputs, wanted)]
        targets = [leaf for leaf, want in zip(leaves, wanted) if want]
        own = len(self.tensors.flat())
        tensors, prefix = self.tensors.with_flat(leaves[:own]), self.prefix.with_flat(leaves[own:])
        totals = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in targets]
        value = self.sums.new_zeros(())
        for first in range(0, self.thoughts.anchors.count, self.chunk):
            part = self.thoughts.part(first, first + self.chunk)
            with torch.set_grad_enabled(bool(targets)), self.policy.bind(tensors):
                terms_M = self.terms(tensors.thought, prefix, part)
                chunk_value = (self.weights_M[1:] * terms_M).sum()
                if chunk_value.requires_grad:  # inside `bind`: what is recomputed on the way back runs the model again
                    _accumulate(totals, torch.autograd.grad(chunk_value, targets, allow_unused=True))
            value, self.sums = value + chunk_value.detach(), self.sums + terms_M.detach()
        found = iter(total.to(target.dtype) for total, target in zip(totals, targets))
        return value, [next(found) if want else None for want in wanted]

    def terms(self, thought: ThoughtTensors, prefix: Prefix, thoughts: Thoughts) -> Tensor:
        """Sums of the terms mixed, policy, distil over some anchors, fp32 [3]; adds to `stats`."""
        config, model = self.config, self.policy.model
        head = language_head(model)
        _, mixed_weight, _, distil_weight = config.coefficients()
        with _gradient_if(mixed_weight != 0 or config.has_policy):
            ahead = look_ahead(model, thought, prefix, self.rows, thoughts, config.lookahead)
        with _gradient_if(mixed_weight != 0):
            mixed_BASJ = ahead.mixed_nll(head, trains(head))
        reward_BAS = objective.rewards(
            lookahead_of(self.reference_BL, thoughts.anchors, config.lookahead), mixed_BASJ.detach(), ahead.valid_BAJ
        )
        advantage_BAS = objective.advantages(reward_BAS, config.advantage)
        found = stats.mixing_sums(ahead.weight_BASJ.detach(), reward_BAS, advantage_BAS, ahead.valid_BAJ)
        policy = mixed_BASJ.new_zeros(())
        if config.watches_policy:
            policy, more = self._policy_term(head, ahead, thoughts, advantage_BAS)
            found |= more
        distil = _distillation(head, ahead, prefix, thoughts) if distil_weight else mixed_BASJ.new_zeros(())
        self.stats += stats.collect(found, self.stats.device)
        return torch.stack([mixed_BASJ.sum(), policy, distil])

    def _policy_term(
        self, head: Any, ahead: Lookahead, thoughts: Thoughts, advantage_BAS: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over thought tokens of anchors that are scored, and what the dashboard shows of them."""
        config, shape = self.config, thoughts.tokens_BAST.shape
        hidden = ahead.branch_BASMD[..., : shape[-1], :].flatten(0, 3)
        with _gradient_if(config.has_policy):
            nll, entropy = token_nll(
                head, hidden, thoughts.tokens_BAST.flatten(), temperature=config.policy_temperature, banned=self.banned,
                recompute=trains(head), entropy_gradient=config.has_entropy_bonus,
            )  # fmt: skip
        logprob_BAST, old_BAST = -nll.view(shape), thoughts.logprob_BAST
        loss_BAST = policy_loss(config, logprob_BAST, old_BAST, advantage_BAS)
        if config.has_entropy_bonus:  # beta multiplies the whole term, and the bonus is no part of it
            loss_BAST = loss_BAST - config.entropy_bonus / config.beta * entropy.view(shape)
        valid_BA = ahead.valid_BAJ.any(-1)
        comparable = config.temperature == config.policy_temperature
        cap = config.ratio_cap if config.ratio_cap is not None else 1.0 + (config.clip or 1.0)
        found = stats.policy_sums(logprob_BAST, old_BAST if comparable else None, entropy.view(shape), valid_BA, cap)
        return loss_BAST.masked_fill(~valid_BA[:, :, None, None], 0.0).sum(), found


def policy_loss(config: ThoughtConfig, logprob_BAST: Tensor, old_BAST: Tensor, advantage_BAS: Tensor) -> Tensor:
    """The policy term of every thought token, as `config` has it (objective.py)."""
    if config.clip is not None:
        return objective.clipped(logprob_BAST, old_BAST, advantage_BAS, config.clip)
    weight = None
    if config.ratio_cap is not None:
        weight = objective.truncated_weights(logprob_BAST, old_BAST, config.ratio_cap)
    return objective.reinforce(logprob_BAST, advantage_BAS, weight)


class _TakenAtOnce(torch.autograd.Function):
    """The value of phase 2, with its gradients made in the forward pass and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, work: _PhaseTwo, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        value, gradients = work(inputs, ctx.needs_input_grad[1:])
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (None, *(None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors))


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


def _accumulate(totals: list[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for total, gradient in zip(totals, gradients):
        if gradient is not None:
            total += gradient


def _gradient_if(wanted: bool) -> torch.set_grad_enabled:
    """A gradient inside only if `wanted` and there is one outside."""
    return torch.set_grad_enabled(wanted and torch.is_grad_enabled())


def _distillation(head: Any, ahead: Lookahead, prefix: Prefix, thoughts: Thoughts) -> Tensor:
    """Sum over scored tokens of KL(p_mixed || p_base), the mixed distribution detached."""
    shape = ahead.mixed_BASJD.shape
    student = lookahead_of(prefix.hidden_BLD, thoughts.anchors, shape[3]).unsqueeze(2).expand(shape).flatten(0, 3)
    divergence = token_divergence(head, ahead.mixed_BASJD.flatten(0, 3), student, recompute=trains(head))
    return divergence.view(shape[:-1]).masked_fill(~ahead.valid_BAJ.unsqueeze(2), 0.0).sum()
