"""What thinking means in one run: every number of the method in one frozen record, and the presets of the papers.

    preset("default", tokens=5, lookahead=1)

quiet-star.md 1.3 holds the sources of each preset's numbers. Read by train/ and by everything in this room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ..base.errors import RecipeError, suggest

HeadKind = Literal["paper", "bounded", "thought"]
Advantage = Literal["two_sided", "one_sided", "leave_one_out"]
AnchorKind = Literal["every", "every_n", "random", "entropy"]
RolloutCache = Literal["exact", "int8", "int4"]
Control = Literal["none", "no_thoughts", "pause", "random_thoughts", "no_policy"]
PresetName = Literal["default", "paper", "rlp"]
CHOICES: dict[str, tuple[str, ...]] = {
    "advantage": get_args(Advantage), "head": get_args(HeadKind), "anchors": get_args(AnchorKind),
    "rollout_cache": get_args(RolloutCache), "control": get_args(Control),
}  # fmt: skip


@dataclass(frozen=True)
class ThoughtConfig:
    """Sizes, sampling, objective and controls of thoughts.

    tokens              T, sampled tokens of a thought; START and END come on top
    lookahead           J, true tokens scored after each thought
    samples             S, thoughts of an anchor; advantages need at least 2
    temperature         of sampling; log pi_old is recorded under it
    policy_temperature  of log pi in the policy term (the authors' code: 3, sampling at 1)
    advantage           reward minus the mean over S (two_sided), that clamped at 0 (one_sided, the authors' code), or minus
                        the mean of the other samples (leave_one_out)
    ratio_cap           c of the truncated importance weight min(c, pi / pi_old); None: REINFORCE without a weight
    clip                epsilon of the clipped per-token ratio (PPO's surrogate, rlp); excludes ratio_cap
    base_weight, mixed_weight, beta, distil_weight   coefficients of the terms base, mixed, policy, distil
    entropy_bonus       coefficient of the mean entropy of what thought tokens are drawn from (temperature policy_temperature,
                        without banned tokens), taken off the loss inside the term policy; a remedy where thoughts collapse
                        (1e-3 is usual). Without a policy term there is none
    head                paper: w = w0 + MLP; bounded: w = sigmoid(logit(w0) + MLP); thought: w = 1, no head (rlp)
    initial_weight      w0, the mixing weight at the first step
    anchors             every position | every_n: each `every`-th | random: a `share` of them | entropy: the `share` of a
                        row with the highest entropy of the next token (needs a label at each token of the lookahead)
    limit               most anchors of a row; a row with more candidates keeps random ones. None: as many as there are
                        positions. Set it where few tokens have labels: all rows are padded to this number
    baseline_decay      decay per step of the moving average that rewards are measured against (baseline.py; rlp); None: rewards
                        are measured against this model without a thought
    rollout_cache       how thought keys and values are kept while sampling; the gradient pass is always exact
    control             none, or the control experiment that this run is
    banned              token ids that are never sampled (eos, pad, bos)
    """

    tokens: int = 8
    lookahead: int = 4
    samples: int = 4
    temperature: float = 1.0
    policy_temperature: float = 1.0
    advantage: Advantage = "two_sided"
    ratio_cap: float | None = 2.0
    clip: float | None = None
    base_weight: float = 0.5
    mixed_weight: float = 0.5
    beta: float = 1.0
    distil_weight: float = 0.0
    entropy_bonus: float = 0.0
    head: HeadKind = "paper"
    initial_weight: float = 0.1
    anchors: AnchorKind = "every"
    every: int = 1
    share: float = 1.0
    limit: int | None = None
    baseline_decay: float | None = None
    rollout_cache: RolloutCache = "exact"
    control: Control = "none"
    banned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "banned", tuple(self.banned))  # a config names captured steps, so it must hash
        for name in ("tokens", "lookahead", "samples", "every"):
            if getattr(self, name) < 1:
                raise RecipeError(f"thoughts.{name} is {getattr(self, name)}; it must be at least 1", code="CFG-100")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise RecipeError(
                    f"thoughts.{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}."
                    + suggest(str(getattr(self, name)), allowed),
                    code="CFG-100",
                )
        for name in ("base_weight", "mixed_weight", "beta", "distil_weight", "entropy_bonus"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RecipeError(f"thoughts.{name} is {getattr(self, name)}; it must be at least 0", code="CFG-100")
        for name in ("temperature", "policy_temperature"):
            if not getattr(self, name) > 0 or not math.isfinite(getattr(self, name)):
                raise RecipeError(f"thoughts.{name} is {getattr(self, name)}; it must be above 0", code="CFG-100")
        if self.limit is not None and self.limit < 1:
            raise RecipeError(f"thoughts.limit is {self.limit}; it must be at least 1, or null", code="CFG-100")
        if not 0 < self.share <= 1:
            raise RecipeError(f"thoughts.share is {self.share}; it must be above 0 and at most 1", code="CFG-100")
        if self.baseline_decay is not None and not 0 <= self.baseline_decay < 1:
            raise RecipeError(
                f"thoughts.baseline_decay is {self.baseline_decay}; it must be at least 0 and below 1, or null",
                code="CFG-100",
            )
        if not math.isfinite(self.initial_weight):
            raise RecipeError(f"thoughts.initial_weight is {self.initial_weight}; it must be finite", code="CFG-100")
        if self.head == "bounded" and not 0 < self.initial_weight < 1:
            raise RecipeError(
                f"thoughts.initial_weight is {self.initial_weight}; the bounded head needs it strictly between 0 and 1",
                code="CFG-100",
            )
        self._check_policy()

    def _check_policy(self) -> None:
        weighted = self.ratio_cap is not None or self.clip is not None
        if self.ratio_cap is not None and self.clip is not None:
            raise RecipeError(
                "thoughts.ratio_cap and thoughts.clip exclude each other; set one to null", code="CFG-101"
            )
        if weighted and self.temperature != self.policy_temperature:
            raise RecipeError(
                f"thoughts.temperature is {self.temperature}, policy_temperature {self.policy_temperature}: importance "
                "weights compare probabilities at one temperature; make them equal or set ratio_cap and clip to null",
                code="CFG-101",
            )
        if (self.ratio_cap is not None and self.ratio_cap < 1) or (self.clip is not None and not 0 < self.clip < 1):
            raise RecipeError(
                f"thoughts.ratio_cap is {self.ratio_cap} (at least 1), thoughts.clip {self.clip} (between 0 and 1)",
                code="CFG-101",
            )

    @property
    def thinks(self) -> bool:
        """False where the run is plain fine-tuning (control no_thoughts)."""
        return self.control != "no_thoughts"

    @property
    def has_policy(self) -> bool:
        """Whether the policy term is part of the loss."""
        return self.control == "none" and self.beta != 0

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the policy term holds the entropy bonus."""
        return self.has_policy and self.entropy_bonus != 0

    @property
    def watches_policy(self) -> bool:
        """Whether log pi of the thoughts is computed again: for the policy term, or only to be shown (no_policy)."""
        return self.has_policy or self.control == "no_policy"

    @property
    def trains_thoughts(self) -> bool:
        """Whether a term of the loss has a gradient for START, END and the mixing head."""
        return self.thinks and (self.mixed_weight != 0 or self.has_policy)

    @property
    def branch_length(self) -> int:
        """M of the gradient pass: START, T tokens, END and J - 1 true tokens."""
        return self.tokens + 2 + self.lookahead - 1

    def coefficients(self) -> tuple[float, float, float, float]:
        """Coefficient of each term of types.TERMS; the loss is sum over terms of coefficient * sum / count."""
        if not self.thinks:
            return (1.0, 0.0, 0.0, 0.0)
        return (self.base_weight, self.mixed_weight, self.beta if self.has_policy else 0.0, self.distil_weight)


PRESETS: dict[str, ThoughtConfig] = {
    "default": ThoughtConfig(),
    "paper": ThoughtConfig(
        tokens=9, lookahead=4, samples=2, advantage="one_sided", policy_temperature=3.0, ratio_cap=None, beta=1e6,
        initial_weight=0.0,
    ),
    "rlp": ThoughtConfig(
        lookahead=1, samples=4, advantage="leave_one_out", ratio_cap=None, clip=0.2, base_weight=0.0, mixed_weight=0.0,
        head="thought", initial_weight=1.0, baseline_decay=0.999,
    ),
}  # fmt: skip


def preset(name: str, **changes: Any) -> ThoughtConfig:
    """A preset with some fields changed. RecipeError CFG-102 for an unknown name, CFG-100/101 for bad values.

    Why `default` starts at w0 = 0.1 (the pilot of docs/log.md, 2026-11-26, whose script was not kept;
    benchmarks/thoughts_pilot.py does it again from its description, `python benchmarks/thoughts_pilot.py --seeds 0 1 2`, about
    a quarter of an hour on one core; it has reproduced the near START only). Steps until 99 % are right, three seeds, -: not in
    300). With START far from the data, where a thought has to be found first: w0 = 0 100 / - / -, 0.1 100 / - / 250, 0.3
    250 / - / -, 0.5 300 / - / -; bounded head 100 / - / - at 0.1, - / - / - at 0.3 and 0.5: a large weight on bad thoughts
    teaches the head to close. With START near the token before worked steps (two seeds) all reach it: in 50 steps at
    w0 = 0, in 25 from 0.1 on (bounded: 50 at 0.1). So START matters more than w0; near the data a larger w0 is safe too.
    """
    if name not in PRESETS:
        raise RecipeError(
            f"thoughts.preset is {name!r}; allowed are {', '.join(PRESETS)} (and curriculum, see `curriculum`)."
            + suggest(name, tuple(PRESETS)),
            code="CFG-102",
        )
    return replace(PRESETS[name], **changes)


LENGTH_DEPENDENT = ("dynamic", "longrope")


def length_dependent(config: Mapping[str, Any]) -> str:
    """The kind of a model's rotary positions if their frequencies depend on how long the sequence is, else an empty string:
    the keys of a prefix would have others than the branches behind it. `config`: a model's, as a mapping."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parts = rope.values() if isinstance(rope, Mapping) else ()
    for one in (rope, *parts):  # some models have one for each kind of layer
        if not isinstance(one, Mapping):
            continue
        kind = str(one.get("rope_type") or one.get("type") or "")
        if any(name in kind for name in LENGTH_DEPENDENT):
            return kind
    return ""


@dataclass(frozen=True)
class Curriculum:
    """Configs one after another: stage k runs until the share `until[k]` of all steps. Parameters carry over."""

    until: tuple[float, ...]
    stages: tuple[ThoughtConfig, ...]

    def at(self, step: int, total_steps: int) -> ThoughtConfig:
        """The config of a 0-based step."""
        index = sum(step >= round(end * total_steps) for end in self.until[:-1])
        return self.stages[index]


CURRICULUM_SIZES = ((13, 8), (9, 4), (5, 4))
"""(T, J) of Fast-Quiet-STaR's stages: its n_ahead counts START, END and one more, n_ahead = T + 3 -> 16, 12, 8."""


def curriculum(base: ThoughtConfig, sizes: tuple[tuple[int, int], ...] = CURRICULUM_SIZES) -> Curriculum:
    """Shorter and shorter thoughts in equal shares of the steps; in the last share the base path learns the detached
    mixed distribution by KL divergence (term `distil`), while thoughts, head and embeddings rest.

    Deviation: the released no-thought stage of Fast-Quiet-STaR rewards what does not depend on the sampled action.
    """
    stages = [replace(base, tokens=tokens, lookahead=lookahead) for tokens, lookahead in sizes]
    last = replace(stages[-1], base_weight=0.5, mixed_weight=0.0, beta=0.0, distil_weight=0.5)
    count = len(stages) + 1
    return Curriculum(tuple((k + 1) / count for k in range(count)), (*stages, last))
