"""The `thoughts` stage: START, END, the mixing head and a LoRA on top learn to think over a frozen model; or all weights do.

The frozen model is no submodule: DeepSpeed never sees it, so at every ZeRO stage it is whole on every process (a rollout would
gather it T times otherwise, and whoever gathers once holds it whole as well). Everything that trains is read through module
forwards. The step's weights come before the first forward, because the loss takes its gradient by chunks of anchors inside
one autograd function (thoughts/gradient.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...base.seeding import derive
from ...routing.choices import recorded_choices, scoring_sites
from ...routing.on_top import FlatLora, TopLora
from ...thoughts import stats
from ...thoughts.baseline import MovingBaseline
from ...thoughts.captured_pass import PassGraphs
from ...thoughts.captured_prefix import PrefixGraphs
from ...thoughts.config import Curriculum, ThoughtConfig
from ...thoughts.gradient import Stream, thought_loss
from ...thoughts.parameters import ThoughtParameters
from ...thoughts.policy import ModelPolicy, PolicyTensors
from ...thoughts.rollout import RolloutGraphs
from ...thoughts.types import TERMS
from ..recipe import ThoughtSettings
from ..thought_settings import rollout_anchors
from ..types import Batch, LossTerms

FLIPS_EVERY = 50
"""Steps between two counts of routing choices that differ between rollout and gradient pass: two branch passes more of a chunk."""

GAP_EVERY = 10
"""Steps between two measurements of an anchor's own thought against another's, which cost one more branch pass."""

RENAMED = {"reward": "reward_mean", "reward_zero_share": "zero_reward_share"}


class TopPolicy:
    """A frozen model with a LoRA on top (or nothing but START, END and head), as thoughts/policy.py wants it."""

    def __init__(
        self, model: nn.Module, parameters: ThoughtParameters, top: TopLora | None = None, lora: FlatLora | None = None
    ) -> None:
        self.model = model
        self.parameters, self.top, self.lora = parameters, top, lora

    def tensors(self) -> PolicyTensors:
        return PolicyTensors(self.parameters.tensors(), () if self.lora is None else (self.lora(),))

    @contextmanager
    def bind(self, tensors: PolicyTensors) -> Iterator[None]:
        if self.top is None or not tensors.adapters:
            yield
            return
        with self.top.bound(tensors.adapters[0]):
            yield


class ThoughtJob(nn.Module):
    """Loss terms base, mixed, policy and distil; StepReport.loss is the mean of those that are likelihoods.

    `top`: where the LoRA goes (None: no LoRA); its numbers are the parameter `lora.flat_P`. A control without thoughts trains
    the LoRA (or the weights) alone.
    """

    names = TERMS
    extra_names = stats.SUMS

    def __init__(
        self,
        model: nn.Module,
        settings: ThoughtSettings,
        plan: Curriculum,
        total_steps: int,
        parameters: ThoughtParameters,
        top: TopLora | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.settings, self.plan, self.total_steps = settings, plan, total_steps
        self.thinks = plan.stages[0].thinks
        self.main_terms = ("base", "mixed") if self.thinks else ("base",)
        self.parameters_of_thoughts = parameters.requires_grad_(self.thinks)
        self.lora = None if top is None else FlatLora(top.layout, "thoughts", seed)
        if settings.trainable == "full":
            self.model = model.requires_grad_(True)
            self.policy: TopPolicy | ModelPolicy = ModelPolicy(model, parameters)
        else:
            self.policy = TopPolicy(model.requires_grad_(False), parameters, top, self.lora)
        decay = plan.stages[0].baseline_decay
        self.baseline = (
            None if decay is None or not self.thinks else MovingBaseline(self.policy.tensors().adapters, decay)
        )
        self.routed = self.thinks and bool(scoring_sites(model))
        self.seed = derive(seed, "thoughts")
        captures = settings.capture == "auto"
        self.graphs = RolloutGraphs() if captures else None
        self.passes = None if self.graphs is None else PassGraphs(self.graphs.pool)
        self.prefixes = PrefixGraphs() if captures else None
        self._step, self._first = 0, True
        self._weights_M: Tensor | None = None

    def config(self, step: int) -> ThoughtConfig:
        return self.plan.at(step, self.total_steps)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adapter (or weights), meta tokens and head, each with its own learning rate and its own clipping."""
        rate = self.settings.train.optimizer.lr
        thought = self.parameters_of_thoughts
        head = [p for name, p in thought.named_parameters() if name != "meta_2D"]
        whole = list(self.model.parameters()) if self.settings.trainable == "full" else []
        groups: list[tuple[str, list[nn.Parameter], float]] = [
            ("model", whole, rate),
            ("adapter", [] if self.lora is None else list(self.lora.parameters()), rate),
            ("meta", [thought.meta_2D] if self.thinks else [], self.settings.lr_meta),
            ("head", head if self.thinks else [], self.settings.lr_head),
        ]
        return [{"name": name, "params": params, "lr_scale": own / rate} for name, params, own in groups if params]

    def resting(self, step: int) -> tuple[str, ...]:
        """Groups that no term of this step's loss trains: they stay as they are, whatever AdamW remembers of them."""
        return () if self.config(step).trains_thoughts else ("meta", "head")

    def begin_step(self, step: int, weights_M: Tensor) -> None:
        """The engine's weights (world / count) of a step, before its first forward."""
        self._step, self._first = step, True
        self._weights_M = weights_M * weights_M.new_tensor(self.config(step).coefficients())

    def forward(self, batch: Batch) -> LossTerms:
        """Sums over this micro-batch, and their weighted total with the whole gradient behind it."""
        assert self._weights_M is not None, "begin_step comes first"
        model = self.policy.model
        if model.training:
            model.eval()  # no dropout: rollout and gradient pass must be one policy
        config = self.config(self._step)
        loss = thought_loss(
            self.policy,
            batch,
            config,
            self._weights_M,
            Stream(self.seed, self._step, batch.row_B),
            chunk=self.settings.chunk or None,
            rollout_chunk=rollout_anchors(self.settings, config),
            baseline_BL=self._baseline(batch),
            graphs=self.graphs,
            passes=self.passes,
            prefixes=self.prefixes,
            recompute=self.settings.train.activation_checkpointing,
            measure_gap=self.thinks and self._step % GAP_EVERY == 0,
            choices=self._choices if self.routed and self._step % FLIPS_EVERY == 0 else None,
        )
        return LossTerms(loss.sums, loss.total, loss.stats)

    def _choices(self) -> AbstractContextManager[list[Tensor]]:
        return recorded_choices(self.policy.model)

    def _baseline(self, batch: Batch) -> Tensor | None:
        """What rewards are measured against, if that is the moving average; it moves at a step's first micro-batch."""
        if self.baseline is None:
            return None
        with torch.no_grad():
            now = self.policy.tensors()
            if self._first:
                self.baseline.update(now)
                self._first = False
            return self.baseline.losses(self.policy, now, batch)

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the trained tensors: the moving average, alike on all ranks."""
        return {} if self.baseline is None else dict(self.baseline.named_buffers())

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means by the dashboard's names, from sums over micro-batches and ranks."""
        found = stats.summarise(torch.tensor([sums[name] for name in stats.SUMS], dtype=torch.float64))
        return {RENAMED.get(name, name): value for name, value in found.items()} if self.thinks else {}


def thought_tensors(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of ThoughtParameters out of trained tensors by parameter name; empty if none of it trained."""
    prefix = "parameters_of_thoughts."
    return {name.removeprefix(prefix): tensor for name, tensor in trained.items() if name.startswith(prefix)}


def adapter_vector(trained: Mapping[str, Tensor]) -> Tensor | None:
    """The LoRA's flat vector, if one trained."""
    return trained.get("lora.flat_P")


def model_tensors(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights, if all of them trained."""
    return {name.removeprefix("model."): tensor for name, tensor in trained.items() if name.startswith("model.")}
