"""What a step of the `thoughts` stage holds at its peak, found by taking that step with tensors that have shapes and no numbers.

    held    what stays from step to step beside weights and optimizer: the rollout's static buffers (keys and values of the
            thoughts; a captured step's copies of the prefix and of the LoRA)
    peak    the most that lives at once: `held`, the prefix with its graph, and one chunk of branches with its graph, its
            logits and its gradients
    pool    what one captured step of the rollout works in. Its memory belongs to the CUDA graph and serves nothing else:
            reserved beside `peak`, free inside (torch.cuda.max_memory_reserved knows it, max_memory_allocated does not)

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
from torch import nn

from ..routing.expert import Expert, ExpertCard, SiteAdapter
from ..routing.library import ExpertLibrary
from ..routing.sites import Site, find_sites
from ..thoughts.anchors import anchors_in_row
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
    """What grows by the layer: the store, a captured step's copies, the prefix's graph, the captured step's work space, and the
    gradient pass with prefix and backward pass."""

    stored: int
    copied: int
    prefix: int
    pool: int
    step: int


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
    captured = recipe.thoughts.capture == "auto"
    held = found.stored + found.copied if captured else 0
    peak = max(found.step + held, found.prefix + found.stored + found.copied + found.pool)
    return ThoughtBytes(found.stored, held, peak, found.pool if captured else 0)


def chunk_of(recipe: Recipe, config: ThoughtConfig) -> int:
    """Anchors of a row in one piece of the gradient pass."""
    count = anchors_in_row(config, recipe.data.sequence_length)
    return min(count, recipe.thoughts.chunk or count)


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
    sampled = _sampling(policy, batch, recipe, config, living)
    part = _thoughts(config, rows, chunk_of(recipe, config))

    def step() -> None:
        weights_M = torch.ones(len(TERMS))
        thought_loss(policy, batch, config, weights_M, Stream(0, 0), thoughts=part).total.backward()

    return replace(sampled, step=living.most(step))


def _sampling(policy: Policy, batch: Batch, recipe: Recipe, config: ThoughtConfig, living: Answered) -> _Parts:
    """What one rollout holds, over a prefix with its graph."""
    before, tensors = living.now, policy.tensors()
    with policy.bind(tensors):
        prefix = run_prefix(policy.model, batch)
    graph = living.now - before
    if config.control in NOT_SAMPLED:
        return _Parts(0, 0, graph, 0, 0)
    together = _thoughts(config, len(batch.tokens_BT), rolled_out(recipe, config))
    stored = ThoughtStore.over(prefix, config, together.anchors.count).nbytes()
    once = replace(config, tokens=1)
    pool = (
        living.most(lambda: rollout(policy, tensors, prefix, batch, together.anchors, once)) - stored // config.tokens
    )
    copied = sum(t.numel() * t.element_size() for t in (*prefix.flat(), *tensors.flat()))
    return _Parts(stored, copied if recipe.thoughts.capture == "auto" else 0, graph, pool, 0)


def _thoughts(config: ThoughtConfig, rows: int, count: int) -> Thoughts:
    """Shapes of the thoughts of `count` anchors a row."""
    index_BA = torch.zeros(rows, count, dtype=torch.int64)
    anchors = Anchors(index_BA, index_BA.clone(), index_BA.bool(), index_BA.clone())
    tokens_BAST = torch.zeros(rows, count, config.samples, config.tokens, dtype=torch.int64)
    return Thoughts(tokens_BAST, tokens_BAST.float(), anchors)
