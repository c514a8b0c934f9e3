"""From the recipe's `thoughts:` to what the room thoughts/ calls a config. Imports no torch: the recipe's checks ask it.

Called by train/checks.py, train/plan.py, train/stages_thoughts.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from ..base.errors import RecipeError, suggest
from ..base.files import read_json
from ..thoughts.config import CURRICULUM_SIZES, Curriculum, ThoughtConfig, curriculum, length_dependent, preset
from .recipe import Recipe, RouterName, ThoughtEvaluation, ThoughtSettings

BASE, ROUTED, ONE = "base", "routed", "expert:"
ROUTERS = tuple(name for name in get_args(RouterName) if name != "oracle")
"""Those that an export can hold: the oracle is told each row's expert."""

OWN_FIELDS = (
    "tokens", "lookahead", "samples", "temperature", "policy_temperature", "advantage", "base_weight", "mixed_weight",
    "beta", "entropy_bonus", "head", "initial_weight", "anchors", "every", "share", "limit",
)  # fmt: skip
SPLITS = ("train", "validation", "test")
OFF_AT_ZERO = ("ratio_cap", "clip", "baseline_decay")
PRESET_FIELDS = (
    "temperature", "policy_temperature", "advantage", "base_weight", "mixed_weight", "beta", "entropy_bonus", "head",
    "initial_weight", *OFF_AT_ZERO,
)  # fmt: skip
"""What a preset is: sizes, anchors and limits are the task's. Named in a later file or in an option, it takes back what files before
it set of these (train/settings.py)."""
GENERATING = ("base", "no_thought", "thought")
"""Arms of the table of thoughts that can also generate."""
PLAIN = ("no_thoughts", "same_compute")
"""Controls that think nothing."""


def thought_plan(settings: ThoughtSettings, banned: tuple[int, ...] = ()) -> Curriculum:
    """The config of every step; one config, unless the preset is a curriculum. RecipeError as thoughts/config.py."""
    changes: dict[str, Any] = {
        name: getattr(settings, name) for name in OWN_FIELDS if getattr(settings, name) is not None
    }
    for name in OFF_AT_ZERO:
        value = getattr(settings, name)
        if value is not None:
            changes[name] = value or None
    control = "no_thoughts" if settings.control in PLAIN else settings.control
    changes |= {"rollout_cache": settings.rollout_cache, "control": control, "banned": banned}
    if settings.preset != "curriculum":
        return Curriculum((1.0,), (preset(settings.preset, **changes),))
    sizes = tuple((int(pair[0]), int(pair[1])) for pair in settings.curriculum_sizes)
    return curriculum(preset("default", **changes), sizes or CURRICULUM_SIZES)


def rollout_anchors(settings: ThoughtSettings, config: ThoughtConfig) -> int:
    """Most anchors of a row that are sampled together; more than there are if thoughts.rollout_chunk is 0."""
    return max(1, (settings.rollout_chunk or 1 << 30) // config.samples)


def final_config(plan: Curriculum) -> ThoughtConfig:
    """The config a trained model thinks by: of a curriculum the last stage before distillation."""
    return plan.stages[-1] if len(plan.stages) == 1 else plan.stages[-2]


def training_steps(settings: ThoughtSettings, length: int) -> int:
    """Optimizer steps; the control same_compute takes plain steps as many as cost what the thoughts would."""
    if settings.control != "same_compute":
        return settings.train.steps
    plan = thought_plan(dataclasses.replace(settings, control="none"))
    ratio = sum(compute_ratio(config, length) for config in plan.stages) / len(plan.stages)
    return math.ceil(settings.train.steps * ratio)


def compute_ratio(config: ThoughtConfig, length: int) -> float:
    """Cost of a step with thoughts over that of plain training, in forward tokens (quiet-star.md section 4, "FLOPs"):
    rollout S A (T + 1), gradient 3 (L + S A M), against 3 L."""
    if not config.thinks:
        return 1.0
    share = {"every": 1.0, "every_n": 1.0 / config.every}.get(config.anchors, config.share)
    anchors = math.ceil(length * share)
    branches = config.samples * (anchors if config.limit is None else min(anchors, config.limit))
    rollout = branches * (config.tokens + 1) if config.control in ("none", "no_policy") else 0
    return (rollout + 3 * (length + branches * config.branch_length)) / (3 * length)


def has_experts(recipe: Recipe) -> bool:
    """Whether the run has experts to route between."""
    return bool(recipe.data.collection or recipe.data.experts or recipe.experts.load)


def has_thoughts(recipe: Recipe) -> bool:
    """Whether the run trains thoughts, or has trained them before."""
    return "thoughts" in recipe.stages or (Path(recipe.output) / "stages" / "thoughts" / "DONE.json").is_file()


def thinks_over_experts(recipe: Recipe) -> bool:
    return recipe.thoughts.over != BASE


def thought_ranges(recipe: Recipe) -> list[tuple[str, float, float, float]]:
    """(setting, value, lowest, highest) of the numbers that thoughts/config.py does not check."""
    thoughts = recipe.thoughts
    return [
        ("thoughts.rank", thoughts.rank, 1, 1024),
        ("thoughts.alpha", thoughts.alpha, 1e-6, 1e6),
        ("thoughts.lr_meta", thoughts.lr_meta, 0.0, 10.0),
        ("thoughts.lr_head", thoughts.lr_head, 0.0, 10.0),
        ("thoughts.chunk", thoughts.chunk, 0, 1 << 20),
        ("thoughts.rollout_chunk", thoughts.rollout_chunk, 0, 1 << 24),
        ("evaluate.thoughts.rows", recipe.evaluate.thoughts.rows, 1, 1 << 20),
    ]


def check_table(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(code, message) of tables of thoughts that would have no row, and of a misspelt split."""
    yield from _check_arms(recipe)
    yield from _check_temperature_split(recipe.evaluate.thoughts)


def _check_temperature_split(settings: ThoughtEvaluation) -> Iterator[tuple[str, str]]:
    """(code, message) of a `temperature_split` that no task has and that is no usual name either: a misspelt one. That tasks
    lack a usual one is no error: the arm leaves them out (evaluate_thoughts.py)."""
    from .tasks import with_split

    split = settings.temperature_split
    asked = "temperature" in settings.arms and bool(settings.tasks)
    if asked and split not in SPLITS and not with_split(settings.tasks, split):
        yield (
            "DATA-002",
            f"evaluate.thoughts.temperature_split: '{split}' is a split of none of evaluate.thoughts.tasks; usual are "
            f"{', '.join(SPLITS)}.{suggest(split, SPLITS)}",
        )


def check_thoughts(recipe: Recipe, context: int | None, experts: list[str]) -> Iterator[tuple[str, str]]:
    """(code, message) of what is wrong with the `thoughts` stage. `context`: the base's longest sequence."""
    settings = recipe.thoughts
    yield from _check_over(settings, experts)
    yield from _check_rotary(recipe.base.model)
    for name in ("start_like", "end_like"):
        if not getattr(settings, name):
            yield "CFG-112", f"thoughts.{name}: is empty; give a text whose first token the embedding begins as"
    if recipe.data.thoughts is None:
        yield "CFG-011", "data.thoughts: is not set, and the stage 'thoughts' trains on it; name its source"
    for pair in settings.curriculum_sizes:
        if len(pair) != 2 or min(pair) < 1:
            yield "CFG-113", f"thoughts.curriculum_sizes: {pair}; each is [tokens, lookahead], at least 1"
            return
    if settings.curriculum_sizes and settings.preset != "curriculum":
        yield (
            "CFG-113",
            f"thoughts.curriculum_sizes: is set while thoughts.preset is {settings.preset}; set it to curriculum",
        )
    stages = thought_plan(settings).stages
    longest = recipe.data.sequence_length + max(config.branch_length for config in stages)
    if context is not None and longest > context:
        yield (
            "CFG-008",
            f"data.sequence_length: {recipe.data.sequence_length} and a thought with its lookahead reach position {longest}, "
            f"over the base's context {context}; lower data.sequence_length or thoughts.tokens",
        )
    if not settings.targets and settings.trainable == "lora":
        yield "CFG-003", "thoughts.targets: is empty; name linears (for example q_proj) or all-linear"
    if settings.over == ROUTED and recipe.router.name not in ROUTERS:
        yield (
            "CFG-110",
            f"thoughts.over: routed with router.name {recipe.router.name}; thoughts need a router that an export can hold: "
            f"{', '.join(ROUTERS)}",
        )
    yield from _check_anchors(settings, stages[0].anchors)
    yield from _check_trains(settings, stages)
    if settings.trainable == "full":
        yield from _check_full(recipe)


def _check_anchors(settings: ThoughtSettings, anchors: str) -> Iterator[tuple[str, str]]:
    """Numbers of another kind of anchors than the run has: every position would think while the recipe says fewer."""
    for name, kinds in (("every", ("every_n",)), ("share", ("random", "entropy"))):
        value = getattr(settings, name)
        if value is not None and anchors not in kinds:
            yield (
                "CFG-113",
                f"thoughts.{name}: is {value} while thoughts.anchors is {anchors}, which does not read it; set thoughts.anchors to "
                f"{' or '.join(kinds)}, or leave it out",
            )


def _check_trains(settings: ThoughtSettings, stages: Sequence[ThoughtConfig]) -> Iterator[tuple[str, str]]:
    """Stages of the run whose loss has a gradient for nothing: they would pass in silence."""
    for config in stages:
        base, mixed, policy, distil = config.coefficients()
        if policy and config.samples == 1 and not config.has_entropy_bonus:
            yield (
                "CFG-114",
                "thoughts.samples: 1; a thought is rewarded against the other thoughts of its anchor, so the policy term would "
                "always be 0; set at least 2, or thoughts.control: no_policy",
            )
            return
        if settings.trainable == "embeddings" and not (config.thinks and (mixed or policy)):
            where = f"under control {settings.control}" if not config.thinks else "without the terms mixed and policy"
            where = "in the last stage of preset curriculum" if config.distil_weight else where
            yield "CFG-111", f"thoughts.trainable: embeddings trains nothing {where}; set it to lora"
            return
        if not (base or mixed or policy or distil):
            yield (
                "CFG-114",
                f"thoughts.control: {settings.control} with preset {settings.preset} leaves no term of the loss, so nothing "
                "would be trained; set thoughts.mixed_weight or thoughts.base_weight above 0, or another control",
            )
            return


def arm_applies(arm: str, trainable: str, thinks: bool) -> bool:
    """Whether a row of the table of thoughts makes sense: a model that learned no thoughts has none to show, and where all weights
    trained there is no way back to the base."""
    if arm in ("base", "untrained") and trainable == "full":
        return False
    return arm == "base" or thinks or arm in ("no_thought", "temperature")


def _check_arms(recipe: Recipe) -> Iterator[tuple[str, str]]:
    settings, control = recipe.evaluate.thoughts, recipe.thoughts.control
    arms = [arm for arm in settings.arms if arm_applies(arm, recipe.thoughts.trainable, control not in PLAIN)]
    named = f"evaluate.thoughts.arms: {', '.join(settings.arms)}"
    if settings.arms and not arms:
        why = f"control {control}" if control in PLAIN else f"trainable {recipe.thoughts.trainable}"
        yield "CFG-025", f"{named}; a run with {why} has none of these rows; add no_thought"
    elif settings.generated and not set(arms) & set(GENERATING):
        yield (
            "CFG-025",
            f"{named}; none of them generates, as evaluate.thoughts.generated needs: {', '.join(GENERATING)}",
        )


def _check_over(settings: ThoughtSettings, experts: list[str]) -> Iterator[tuple[str, str]]:
    over = settings.over
    if over == BASE:
        return
    if over != ROUTED and not over.startswith(ONE):
        allowed = (BASE, ROUTED, *(f"{ONE}{name}" for name in experts))
        yield "CFG-110", f"thoughts.over: '{over}'; allowed are {BASE}, {ROUTED}, {ONE}NAME.{suggest(over, allowed)}"
    elif not experts:
        yield (
            "CFG-110",
            f"thoughts.over: {over}, but the recipe has no experts; set data.experts, or thoughts.over: base",
        )
    elif over.startswith(ONE) and over.removeprefix(ONE) not in experts:
        name = over.removeprefix(ONE)
        yield (
            "CFG-110",
            f"thoughts.over: there is no expert '{name}'; there are {', '.join(experts)}.{suggest(name, experts)}",
        )


def _check_rotary(model: str) -> Iterator[tuple[str, str]]:
    """Of a local folder; of any other base the stage itself finds it before its first step (thoughts/attention.py)."""
    path = Path(model).expanduser() / "config.json"
    config = read_json(path) if path.is_file() else {}
    kind = length_dependent(config.get("text_config", config)) if isinstance(config, dict) else ""
    if kind:
        yield (
            "CFG-105",
            f"base.model: {path} has rotary positions of type '{kind}', whose frequencies change with the length of the "
            "sequence; thoughts need a base with fixed ones (default, linear, llama3, yarn)",
        )


def _check_full(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.thoughts.over != BASE or has_experts(recipe):
        yield (
            "CFG-111",
            "thoughts.trainable: full changes the base, which experts are made for; set thoughts.over: base in a recipe "
            "without experts, or thoughts.trainable: lora",
        )
    if recipe.base.dtype != "float32":
        yield (
            "CFG-111",
            f"thoughts.trainable: full trains fp32 weights; base.dtype is {recipe.base.dtype}, set it to float32",
        )
    if _zero_stage(recipe) == 3:
        yield (
            "CFG-111",
            "thoughts.trainable: full needs whole weights while thoughts are sampled and differentiated, which ZeRO-3 takes "
            "apart; choose a strategy of ZeRO 0 to 2 (thoughts.train.strategy: zero2), or thoughts.trainable: lora",
        )


def _zero_stage(recipe: Recipe) -> int | None:
    """The ZeRO stage of the `thoughts` stage's strategy; None for a bad strategy, which train/checks.py reports."""
    from .strategy import zero_stage

    try:
        return zero_stage(recipe.thoughts.train.strategy or recipe.strategy)
    except RecipeError:
        return None
