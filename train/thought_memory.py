"""What a step of the `thoughts` stage holds at its peak, found by taking that step with tensors that have shapes and no numbers.

    held    what stays from step to step beside weights and optimizer, if steps are captured: keys and values of the thoughts while
            they are sampled, and what graphs read and write (copies of the prefix and of the LoRA, totals of the gradient)
    peak    the most that lives at once. Uncaptured: the prefix with its graph, and one chunk of branches with its graph, its
            logits and its gradients. Captured: `held` and what is done between the graphs
    pool    what captured graphs work in: the prefix's activations, and the hungrier one of a chunk and of a step of the rollout.
            It serves nothing else: reserved beside `peak`, free inside (torch.cuda.max_memory_reserved knows it,
            max_memory_allocated does not)
            On an H100 0.3 to 1.1 GiB more are reserved, in sixteen cells of SmolLM2's shape: what pools cannot hand out again, and
            libraries' work spaces (benchmarks/results/2026-11-27_thoughts_memory_captured_h100.json)

The loss is the stage's own (thoughts/gradient.py), over the model as the stage finds it: experts, router and LoRA attached, in
their dtypes. All rows hold several documents and a label everywhere, which is the most there can be. On torch's fake CPU tensors,
so that no GPU is needed: attention's and the head's work space are those of their plain paths, a little larger than the kernels'.
Called by train/plan.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..routing.expert import Expert, ExpertCard, SiteAdapter
from ..routing.library import ExpertLibrary
from ..routing.sites import Site, find_sites
from ..thoughts.anchors import anchors_in_row, chunk_size
from ..thoughts.branch import base_losses
from ..thoughts.captured_pass import read_in_place, total_dtype
from ..thoughts.config import Curriculum, ThoughtConfig
from ..thoughts.gradient import Stream, thought_loss
from ..thoughts.parameters import ThoughtParameters
from ..thoughts.policy import Policy
from ..thoughts.prefix import run_prefix
from ..thoughts.rollout import rollout
from ..thoughts.storage import ThoughtStore
from ..thoughts.types import TERMS, Anchors, Thoughts
from .jobs.thoughts import ThoughtJob
from .living_bytes import drop_gradients
from .recipe import Recipe
from .stages_thoughts import lora_on_top
from .text_memory import Answered, over_layers, shapes_of_batch
from .thought_model import attach_below, hidden_size
from .thought_settings import BASE, ONE, ROUTED, final_config, rollout_anchors
from .types import Batch

NOT_SAMPLED = ("pause", "random_thoughts")


@dataclass(frozen=True)
class ThoughtBytes:
    """See the head of this file; bytes of one process. `stored`: the part of `held` that keys and values of thoughts are."""

    stored: int
    held: int
    peak: int
    pool: int

    @property
    def whole(self) -> int:
        """What the device must have for it."""
        return self.peak + self.pool


@dataclass(frozen=True)
class _Parts:
    """What grows by the layer, each in bytes.

    stored, prefix, copied, trained   the store; the prefix's tensors; trained tensors that are copied, and all of them
    totals    of the gradient pass                       graph  the prefix with its graph
    sampling  what a step of the rollout works in        losses  what the losses without a thought work in
    step      gradient pass with prefix and backward pass
    """

    stored: int
    prefix: int
    copied: int
    trained: int
    totals: int
    graph: int
    sampling: int
    losses: int
    step: int

    def uncaptured(self) -> ThoughtBytes:
        return ThoughtBytes(self.stored, 0, max(self.step, self.graph + self.stored + self.sampling), 0)

    def captured(self) -> ThoughtBytes:
        # copies of rollout, chunk and prefix pass; the latter's gradients, those that come to it
        held = self.stored + 3 * (self.prefix + self.copied) + self.totals + self.trained
        chunk = max(0, self.step - self.graph - self.totals)
        peak = held + max(self.losses, self.trained + self.prefix)
        return ThoughtBytes(self.stored, held, peak, self.graph + max(chunk, self.sampling))


def thought_bytes(recipe: Recipe, model: nn.Module, plan: Curriculum, rows: int, experts: int) -> ThoughtBytes:
    """Memory of a step of the plan's hungriest part, of `rows` rows in one process, without weights, gradients and optimizer.

    `model`, the base, is on the meta device and stays as it is; `experts` may lie over it.
    """
    config = max(plan.stages, key=lambda one: chunk_of(recipe, one) * one.samples * one.branch_length)

    def measure(fake: Any, living: Answered) -> tuple[int, ...]:
        living.answer = True  # gates are finite
        job = _job(recipe, fake, plan, experts)
        living.answer = False  # a row is several documents
        return dataclasses.astuple(_measure(job, recipe, config, rows, living))

    found = _Parts(*over_layers(model, measure))
    return found.captured() if recipe.thoughts.capture == "auto" else found.uncaptured()


def chunk_of(recipe: Recipe, config: ThoughtConfig) -> int:
    """Anchors of a row in one piece of the gradient pass."""
    return chunk_size(anchors_in_row(config, recipe.data.sequence_length), recipe.thoughts.chunk or None)


def rolled_out(recipe: Recipe, config: ThoughtConfig) -> int:
    """Anchors of a row that are sampled together."""
    return min(anchors_in_row(config, recipe.data.sequence_length), rollout_anchors(recipe.thoughts, config))


def _job(recipe: Recipe, model: Any, plan: Curriculum, experts: int) -> ThoughtJob:
    """The stage's job over what it is trained over (stages_thoughts.py)."""
    settings = recipe.thoughts
    if settings.over != BASE:
        library = _library(recipe, find_sites(model, recipe.experts.targets), experts)
        over = settings.over if settings.over == ROUTED else f"{ONE}{library.names[0]}"
        attach_below(model, library, over, recipe.router.name, recipe.router.k, recipe.seed)
    start_D = torch.empty(hidden_size(model))
    parameters = ThoughtParameters(start_D, start_D, final_config(plan), recipe.seed)
    top = lora_on_top(model, settings)[0] if settings.trainable == "lora" else None
    return ThoughtJob(model, settings, plan, settings.train.steps, parameters, top, recipe.seed)


def _library(recipe: Recipe, sites: Sequence[Site], experts: int) -> ExpertLibrary:
    """As many experts as the recipe has, alike but for their names. Loaded ones may have other ranks."""
    rank = recipe.experts.rank
    adapters = {
        s.name: SiteAdapter(torch.empty(rank, s.in_features), torch.empty(s.out_features, rank), 1.0) for s in sites
    }
    vectors = {s.name: torch.empty(s.in_features) for s in sites}
    cards = (ExpertCard(f"expert{n}", rank, 1.0, ("all-linear",)) for n in range(experts))
    return ExpertLibrary(Expert(card, adapters, vectors, vectors) for card in cards)


def _measure(job: ThoughtJob, recipe: Recipe, config: ThoughtConfig, rows: int, living: Answered) -> _Parts:
    policy, batch = job.policy, shapes_of_batch(rows, recipe.data.sequence_length)
    policy.model.eval()
    drop_gradients(job)
    found = _sampling(policy, batch, recipe, config, living)
    size = chunk_of(recipe, config)
    part = _thoughts(config, rows, size)
    pieces = -(-anchors_in_row(config, recipe.data.sequence_length) // size)

    def step() -> None:
        recompute = recipe.thoughts.train.activation_checkpointing
        loss = thought_loss(
            policy, batch, config, torch.ones(len(TERMS)), Stream(0, 0), thoughts=part, recompute=recompute
        )
        loss.total.backward()

    # the part that is traced is one piece, whose totals are no wider than what they sum
    wanted = [t for t in policy.tensors().flat() if t.requires_grad]
    dtype: torch.dtype = policy.model.dtype  # type: ignore[assignment]
    wide = total_dtype(torch.empty(0, dtype=dtype), pieces)
    totals = found.prefix * wide.itemsize // dtype.itemsize
    totals += sum(t.numel() * total_dtype(t, pieces).itemsize for t in wanted)
    wider = totals - _bytes(wanted) - found.prefix
    return replace(found, totals=totals, trained=_bytes(wanted), step=living.most(step) + wider)


def _sampling(policy: Policy, batch: Batch, recipe: Recipe, config: ThoughtConfig, living: Answered) -> _Parts:
    """What one rollout holds, over a prefix with its graph, and what the losses without a thought work in."""
    before, tensors = living.now, policy.tensors()
    with policy.bind(tensors):
        prefix = run_prefix(policy.model, batch)
    graph = living.now - before
    losses = living.most(
        lambda: base_losses(policy.model, prefix.hidden_BLD, batch.labels_BT)[0].sum().backward(retain_graph=True)
    )
    copied = _bytes([t for t in tensors.flat() if not read_in_place(t)])
    found = _Parts(0, _bytes(prefix.flat()), copied, 0, 0, graph, 0, losses, 0)
    if config.control in NOT_SAMPLED:
        return found
    together = _thoughts(config, len(batch.tokens_BT), rolled_out(recipe, config))
    stored = ThoughtStore.over(prefix, config, together.anchors.count).nbytes()
    once = replace(config, tokens=1)
    sampling = (
        living.most(lambda: rollout(policy, tensors, prefix, batch, together.anchors, once)) - stored // config.tokens
    )
    return replace(found, stored=stored, sampling=sampling)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _thoughts(config: ThoughtConfig, rows: int, count: int) -> Thoughts:
    """Shapes of the thoughts of `count` anchors a row."""
    index_BA = torch.zeros(rows, count, dtype=torch.int64)
    anchors = Anchors(index_BA, index_BA.clone(), index_BA.bool(), index_BA.clone())
    tokens_BAST = torch.zeros(rows, count, config.samples, config.tokens, dtype=torch.int64)
    return Thoughts(tokens_BAST, tokens_BAST.float(), anchors)
