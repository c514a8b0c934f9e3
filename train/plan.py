"""The dry run: what a recipe would train, in which memory, for how many steps and tokens, and whether every row of its files is
well-formed. No GPU, no weights, no data but those files.

    deepspeed launch/train.py --config launch/recipes/smollm2_collection.yaml --dry_run

Weights, gradients, buckets and optimizer state: state_memory.py, with the settings of the stage's strategy. Activations of `base` and
`thoughts` are found by taking a step without numbers (text_memory.py, thought_memory.py); those of experts and gates, which
torch.compile fuses, are 34 * tokens * width bytes a layer in 16 bit (Korthikanti et al. 2022, eq. 2 without the attention matrix,
which fused attention never holds), twice that in fp32; with recomputation only the input of every layer. So are those of `thoughts`
over a model whose code asks its tensors what they hold (mixtures of experts), and the plan says so. An estimate: what the allocator
cannot fit together comes on top.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import DataError, QuietGooseError
from .checks import expert_names, trains
from .image_checks import draws_images
from .recipe import Recipe, RowTrainSettings, TrainSettings
from .thought_settings import BASE, thought_plan, training_steps

if TYPE_CHECKING:
    from ..thoughts.config import ThoughtConfig
    from .plan_images import ImagePlan
    from .thought_memory import ThoughtBytes

ZERO_STAGES = (0, 1, 2, 3)
ACTIVATION_BYTES = 34
CHECKPOINT_BYTES = 12
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class StagePlan:
    """One training stage. `memory` is bytes of a process's device by ZeRO stage; `chosen` the ZeRO stage of its strategy, and
    `host` what that strategy keeps of a process in the host's memory."""

    name: str
    trainable: int
    frozen: int
    steps: int
    rows: int
    micro_batches: int
    tokens: int
    memory: Mapping[int, int]
    chosen: int
    checkpoint: int
    host: int = 0
    thoughts: ThoughtPlan | None = None


@dataclass(frozen=True)
class ThoughtPlan:
    """The largest step of the `thoughts` stage: thoughts over all ranks, their tokens, and what one process holds of it, in bytes
    (thought_memory.py). `untraced`: why that is by a formula, if it is."""

    thoughts: int
    tokens: int
    memory: ThoughtBytes
    untraced: str = ""


@dataclass(frozen=True)
class Plan:
    base: str
    parameters: int
    sites: int
    per_expert: int
    experts: tuple[str, ...]
    rows: Mapping[str, int | None]
    stages: tuple[StagePlan, ...]
    world: int


def make_plan(recipe: Recipe, world: int = 1) -> Plan:
    """Everything the dry run shows. Raises what building the base on the meta device and finding the sites raise."""
    from ..routing.sites import AdapterLayout, GateLayout, find_sites
    from .base_models import load_base

    base = load_base(recipe.base, "cpu", meta=True)
    if "thoughts" in recipe.stages:
        from ..thoughts.generation import check_model

        check_model(base.model)
    parameters = sum(p.numel() for p in base.model.parameters())
    names = tuple(expert_names(recipe))
    sites = find_sites(base.model, recipe.experts.targets) if names else ()
    own = [name for name in names if name not in recipe.experts.load]
    adapter = AdapterLayout.uniform(sites, recipe.experts.rank).numel
    frozen_adapters = adapter * len(names)
    sizes = {
        "base": (parameters, 0, 1),
        "experts": (adapter * len(own), parameters, len(own)),
        "gates": (GateLayout(tuple(sites)).numel * len(names), parameters + frozen_adapters, len(names)),
    }
    sizes["thoughts"] = (
        _thought_trainables(recipe, base.model, parameters),
        _below(recipe, parameters, frozen_adapters),
        1,
    )
    stages = tuple(
        _stage_plan(recipe, name, train, sizes[name], base.model, world) for name, train in trains(recipe).items()
    )
    return Plan(base.id, parameters, len(sites), adapter, names, count_rows(recipe), stages, world)


def _thought_trainables(recipe: Recipe, model: Any, parameters: int) -> int:
    """Entries of START, END, mixing head, and of the LoRA or all weights."""
    from ..routing.sites import AdapterLayout, find_sites
    from .thought_model import hidden_size

    settings, width = recipe.thoughts, hidden_size(model)
    config = thought_plan(settings).stages[0]
    head = 0 if config.head == "thought" else 3 * width * width + 3 * width
    own = {"lora": 0, "embeddings": 0, "full": parameters}[settings.trainable]
    if settings.trainable == "lora":
        own = AdapterLayout.uniform(find_sites(model, settings.targets), settings.rank).numel
    return own + (2 * width + head if config.thinks else 0)


def _below(recipe: Recipe, parameters: int, adapters: int) -> int:
    """Frozen entries under the thoughts."""
    if recipe.thoughts.trainable == "full":
        return 0
    return parameters + (0 if recipe.thoughts.over == BASE else adapters)


def thought_plan_of(recipe: Recipe, rows: int, rows_here: int, model: Any) -> ThoughtPlan | None:
    """What the largest step thinks; None for a control without thoughts. `rows` of a step, `rows_here` of a micro-batch."""
    from ..thoughts.anchors import anchors_in_row
    from .thought_memory import thought_bytes

    untraced = ""
    length, plan = recipe.data.sequence_length, thought_plan(recipe.thoughts)
    stages = [one for one in plan.stages if one.thinks]
    if not stages:
        return None
    per_row = [anchors_in_row(one, length) * one.samples for one in stages]
    try:
        memory = thought_bytes(recipe, model, plan, rows_here, len(expert_names(recipe)))
    except QuietGooseError:
        raise  # the stage would say the same
    except Exception as error:  # whatever torch says of a model that cannot run without numbers, and can with them
        memory = _thoughts_by_formula(recipe, model.config.get_text_config(), stages, rows_here)
        untraced = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return ThoughtPlan(
        thoughts=rows * max(per_row),
        tokens=rows * max(n * one.tokens for n, one in zip(per_row, stages)),
        memory=memory,
        untraced=untraced,
    )


def _thoughts_by_formula(recipe: Recipe, config: Any, stages: Sequence[ThoughtConfig], rows: int) -> ThoughtBytes:
    """Keys and values of the thoughts, and activations of the prefix and of a chunk of branches: half of what is held at times."""
    from .thought_memory import ThoughtBytes, chunk_of, rolled_out

    length, bytes_each = recipe.data.sequence_length, DTYPE_BYTES[recipe.base.dtype]
    layers, width = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    entry = 2 * layers * heads * (getattr(config, "head_dim", None) or width // config.num_attention_heads) * bytes_each
    share = {"exact": 1.0, "int8": 1 / bytes_each, "int4": 0.5 / bytes_each}[recipe.thoughts.rollout_cache]
    stored = int(rows * max(rolled_out(recipe, one) * one.samples * one.tokens for one in stages) * entry * share)
    chunk = max(chunk_of(recipe, one) * one.samples * one.branch_length for one in stages)
    recomputed = recipe.thoughts.train.activation_checkpointing
    active = sum(
        activation_bytes(rows * count, layers, width, bytes_each, again)
        for count, again in ((length, False), (chunk, recomputed))
    )
    captured = recipe.thoughts.capture == "auto"
    return ThoughtBytes(stored, stored, stored, active) if captured else ThoughtBytes(stored, 0, stored + active, 0)


def _stage_plan(
    recipe: Recipe, name: str, train: TrainSettings, sizes: tuple[int, int, int], model: Any, world: int
) -> StagePlan:
    from .data.loader import share_of
    from .state_memory import Trained, held
    from .strategy import load_strategy, zero_stage

    trainable, frozen, terms = sizes
    rows = train.rows_per_expert * terms
    share = share_of(rows, train.micro_rows, world)
    thoughts = thought_plan_of(recipe, rows, share.rows, model) if name == "thoughts" else None
    active = _active(recipe, name, train, share.rows, model) if thoughts is None else thoughts.memory.whole
    own, sharing = trainable, world
    if isinstance(train, RowTrainSettings) and train.parallel == "expert":
        own, sharing = trainable // terms * -(-terms // world), 1
    strategy = train.strategy or recipe.strategy
    trained = Trained(
        own, frozen * (4 if name == "base" else DTYPE_BYTES[recipe.base.dtype]), frozen_apart=name == "thoughts",
        long=name in ("experts", "gates") or (name == "thoughts" and recipe.thoughts.trainable != "full"),
        micros=share.micros, recomputed=train.activation_checkpointing,
    )  # fmt: skip
    chosen = zero_stage(strategy)
    by_stage = {z: held(trained, load_strategy(strategy if z == chosen else f"zero{z}"), sharing) for z in ZERO_STAGES}
    steps = training_steps(recipe.thoughts, recipe.data.sequence_length) if name == "thoughts" else train.steps
    return StagePlan(
        name=name, trainable=trainable, frozen=frozen, steps=steps, rows=rows, micro_batches=share.micros,
        tokens=steps * rows * recipe.data.sequence_length, memory={z: one.peak(active) for z, one in by_stage.items()},
        chosen=chosen, checkpoint=trainable * CHECKPOINT_BYTES, host=by_stage[chosen].host, thoughts=thoughts,
    )  # fmt: skip


def _active(recipe: Recipe, name: str, train: TrainSettings, rows: int, model: Any) -> int:
    """Bytes of a micro-batch of a stage that does not think."""
    from .text_memory import base_bytes

    length, config = recipe.data.sequence_length, model.config.get_text_config()
    if name == "base" and not train.activation_checkpointing:
        return base_bytes(model, rows, length)
    shape = (config.num_hidden_layers, config.hidden_size)
    bytes_each = 4 if name == "base" else DTYPE_BYTES[recipe.base.dtype]
    return activation_bytes(rows * length, *shape, bytes_each, train.activation_checkpointing)


def activation_bytes(tokens: int, layers: int, width: int, bytes_each: int, recomputed: bool) -> int:
    """What a forward pass keeps for its backward pass."""
    per_layer = tokens * width * (bytes_each if recomputed else ACTIVATION_BYTES * bytes_each // 2)
    one_layer = tokens * width * ACTIVATION_BYTES * bytes_each // 2 if recomputed else 0
    return layers * per_layer + one_layer


def count_rows(recipe: Recipe) -> dict[str, int | None]:
    """Rows of every expert's source; None where only training would tell (datasets, embedded skills)."""
    from .data.rows import FileSource, open_source
    from .data.sources import resolve_sources

    counts: dict[str, int | None] = {}
    for name, settings in resolve_sources(recipe.data).items():
        source = open_source(settings, name, recipe.seed)
        counts[name] = None
        if isinstance(source, FileSource):
            found = _lines(source.path)
            counts[name] = found if settings.limit is None else min(found, settings.limit)
    return counts


def _lines(path: Path) -> int:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as handle:
            return sum(1 for line in handle if line.strip())
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})", code="DATA-002") from error


def show_plan(recipe: Recipe, world: int = 1, arguments: Sequence[str] = ()) -> Plan | ImagePlan:
    """Print the plan as tables on stdout; returns it. `arguments`: the command line, less --dry_run."""
    from rich.console import Console

    if draws_images(recipe):
        from .plan_images import show_image_plan

        return show_image_plan(recipe, world, arguments)
    from .row_checks import check_rows
    from .settings import refuse

    if problems := list(dict.fromkeys(check_rows(recipe, head=None))):
        refuse(problems)
    plan = make_plan(recipe, world)
    console = Console(width=None if _terminal() else 120, highlight=False)
    console.print(_facts(plan, recipe))
    console.print(_stages(plan))
    console.print(_memory(plan))
    console.print("* the strategy of the recipe. Nothing was trained or written.")
    return plan


def _terminal() -> bool:
    import sys

    return sys.stdout.isatty()


def _facts(plan: Plan, recipe: Recipe) -> Any:
    from rich.table import Table

    table = Table(title=f"{recipe.name}: {', '.join(recipe.stages)} -> {recipe.output}", show_header=False)
    table.add_row("base", f"{plan.base}, {plan.parameters:,} parameters, {recipe.base.dtype}, frozen")
    if plan.experts:
        rank = f"rank {recipe.experts.rank}, alpha {recipe.experts.alpha:g}"
        table.add_row("adapters", f"{plan.sites} linears, {rank}, {plan.per_expert:,} parameters an expert")
        table.add_row("experts", f"{len(plan.experts)}: {', '.join(plan.experts)}")
    rows = ", ".join(f"{name} {count:,}" for name, count in plan.rows.items() if count is not None)
    table.add_row("rows", rows or "counted when training starts")
    if "evaluate" in recipe.stages and plan.experts:
        table.add_row("evaluate", f"{', '.join(recipe.evaluate.arms)} on split {recipe.evaluate.split}")
    if "thoughts" in recipe.stages:
        _thought_facts(table, plan, recipe)
    table.add_row("processes", str(plan.world))
    return table


def _thought_facts(table: Any, plan: Plan, recipe: Recipe) -> None:
    settings = recipe.thoughts
    for number, one in enumerate(thought_plan(settings).stages, start=1):
        control = f", control {settings.control}" if settings.control != "none" else ""
        where = {
            "every_n": f"every {one.every}.",
            "random": f"{one.share:.0%} at random",
            "entropy": f"{one.share:.0%} by entropy",
        }
        shape = f"{one.samples} thoughts of {one.tokens} tokens, {one.lookahead} scored, anchors {where.get(one.anchors, 'every')}"
        if one.thinks:
            shape += f"; head {one.head} from {one.initial_weight:g}, advantage {one.advantage}, beta {one.coefficients()[2]:g}"
        name = "thoughts" if number == 1 else f"thoughts {number}"
        table.add_row(
            name, f"preset {settings.preset}{control}, over {settings.over}, trains {settings.trainable}: {shape}"
        )
    step = next((stage.thoughts for stage in plan.stages if stage.thoughts is not None), None)
    if step is not None:
        table.add_row("a step thinks", f"{step.thoughts:,} thoughts, {step.tokens:,} tokens")
        of = step.memory
        graph = f", {size(of.pool)} reserved for captured steps" if of.pool else ""
        kept = f"{size(of.stored)} of it keys and values of thoughts{graph}"
        table.add_row("memory of it", f"{size(of.whole)} a process, beside weights and optimizer; {kept}")
        if step.untraced:
            table.add_row("", f"by a formula, which can be half of it: no step without numbers ({step.untraced})")
    if "evaluate" in recipe.stages:
        table.add_row(
            "evaluate", f"{', '.join(recipe.evaluate.thoughts.arms)} on {', '.join(recipe.evaluate.thoughts.tasks)}"
        )


def _stages(plan: Plan) -> Any:
    from rich.table import Table

    table = Table("stage", title="training")
    for name in ("trainable", "frozen", "steps", "rows a step", "micro-batches", "tokens at most", "checkpoint"):
        table.add_column(name, justify="right")
    for stage in plan.stages:
        table.add_row(
            stage.name, f"{stage.trainable:,}", f"{stage.frozen:,}", f"{stage.steps:,}", str(stage.rows),
            str(stage.micro_batches), f"{stage.tokens:,}", size(stage.checkpoint),
        )  # fmt: skip
    return table


def _memory(plan: Plan) -> Any:
    from rich.table import Table

    table = Table("stage", title="memory of one process, estimated")
    for zero in ZERO_STAGES:
        table.add_column(f"ZeRO-{zero}", justify="right")
    for stage in plan.stages:
        host = f" (+ {size(stage.host)} on the host)" if stage.host else ""
        cells = [size(stage.memory[z]) + (f" *{host}" if z == stage.chosen else "") for z in ZERO_STAGES]
        table.add_row(stage.name, *cells)
    return table


def size(count: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
