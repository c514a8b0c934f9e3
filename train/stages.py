"""The stages of a run. Each computes on all ranks and hands back a writer that rank 0 calls with an empty folder.

base      a nano model from scratch                     -> a Hugging Face folder
experts   all LoRA experts in one pass                  -> a PEFT folder per expert
gates     all PHATGOOSE gates in one pass               -> gates.safetensors
evaluate  every arm on every task (train/arms.py)       -> results.json, results.md, report data
export    the routed model as one folder (train/export.py)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..base import distributed
from ..base.distributed import World
from ..base.errors import RecipeError
from ..base.files import read_json, write_json
from ..routing.gates_format import load_gates, save_gates
from ..routing.library import ExpertLibrary
from ..routing.peft_format import load_peft, save_peft
from ..routing.sites import all_sites
from .base_models import LoadedBase, load_base
from .compiled import Speed, choose_speed
from .data.attention import model_inputs, resolve_attention
from .data.build import build_step_data, resolve_sources
from .data.loader import StepData, Terms
from .export import Provenance, export_model
from .jobs.base import LanguageModelJob
from .jobs.experts import ExpertJob
from .jobs.gates import GateJob
from .mean_activations import mean_activations
from .nano import build_nano
from .parallel import owned
from .recipe import (
    DataSettings,
    ExpertSettings,
    GateSettings,
    Recipe,
    RowTrainSettings,
    SourceSettings,
    TrainSettings,
)
from .run_folder import RunFolder
from .thought_model import hidden_size, read_thinking
from .thought_settings import has_experts, has_thoughts

SPEED_ONLY = ("compile", "attention", "parallel")
"""Settings of RowTrainSettings that no trained number depends on but by rounding."""

Writer = Callable[[Path], None]


@dataclass
class Context:
    """What every stage is given. `train(stage, job, data, settings, base_sha256[, steps])` runs one training loop and returns the
    trained tensors, whole and in fp32 on the CPU, on every rank; at `steps` they are kept aside (train/snapshots.py).
    `run(recipe)` runs another recipe within this one."""

    recipe: Recipe
    folder: RunFolder
    device: torch.device
    world: World
    train: Callable[..., Mapping[str, torch.Tensor]]
    event: Callable[..., None]
    progress: Callable[[str, int, int], None]
    facts: Mapping[str, Any]
    run: Callable[[Recipe], None]


@dataclass(frozen=True)
class Stage:
    """`settings` names every setting that the result depends on; with other settings the result is refused."""

    name: str
    settings: Callable[[Recipe], Mapping[str, Any]]
    run: Callable[[Context], Writer]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=dataclasses.asdict))


def base_settings(recipe: Recipe) -> Mapping[str, Any]:
    shape = {"nano": recipe.base.nano, "train": recipe.base.train} if recipe.base.model == "nano" else {}
    return _plain(
        {"seed": recipe.seed, "model": recipe.base.model, "dtype": recipe.base.dtype, **shape,
         "data": recipe.data.base, "sequence_length": recipe.data.sequence_length}
    )  # fmt: skip


def expert_settings(recipe: Recipe) -> Mapping[str, Any]:
    data = {k: v for k, v in vars(recipe.data).items() if k not in ("cache", "thoughts")}
    return _plain({"base": base_settings(recipe), "data": data, "experts": _slow(recipe.experts)})


def gate_settings(recipe: Recipe) -> Mapping[str, Any]:
    return _plain({"experts": expert_settings(recipe), "gates": _slow(recipe.gates)})


def _slow(settings: ExpertSettings | GateSettings) -> dict[str, Any]:
    """Without what decides only how fast it goes: a run may go on with other settings of these."""
    found = dataclasses.asdict(settings)
    for name in SPEED_ONLY:
        del found["train"][name]
    return found


def evaluate_settings(recipe: Recipe) -> Mapping[str, Any]:
    return _plain({**export_settings(recipe), "evaluate": recipe.evaluate})


def export_settings(recipe: Recipe) -> Mapping[str, Any]:
    thoughts = {"thoughts": recipe.thoughts, "rows": recipe.data.thoughts} if has_thoughts(recipe) else {}
    return _plain({"gates": gate_settings(recipe), "router": recipe.router, **thoughts})


def trained_sources(recipe: Recipe) -> dict[str, SourceSettings]:
    """Experts that this run trains: every source whose name is not among `experts.load`."""
    return {name: s for name, s in resolve_sources(recipe.data).items() if name not in recipe.experts.load}


def gate_sources(recipe: Recipe) -> dict[str, SourceSettings]:
    """A source for every expert's gates, trained experts first. RecipeError CFG-028 if a loaded one has none."""
    sources = resolve_sources(recipe.data)
    missing = [name for name in recipe.experts.load if name not in sources]
    if missing:
        raise RecipeError(
            f"experts.load.{missing[0]}: its gates need its kind of data; name a source in data.experts.{missing[0]}",
            code="CFG-028",
        )
    return {**trained_sources(recipe), **{name: sources[name] for name in recipe.experts.load}}


def the_base(context: Context, wanted_by: str) -> LoadedBase:
    """The frozen base: the `base` stage's result for nano, else what the recipe names. Rank 0 loads first, so that a
    model is fetched and converted once."""
    settings = context.recipe.base
    nano = context.folder.require("base", wanted_by) if settings.model == "nano" else None
    base: LoadedBase | None = None
    for turn in (True, False):
        if context.world.is_main is turn:
            base = load_base(settings, context.device, nano)
        distributed.barrier()
    assert base is not None
    context.event("base", id=base.id, sha256=base.sha256, attention=base.attention, notes=list(base.notes))
    return base


def the_library(context: Context, base: LoadedBase, wanted_by: str, *, gates: bool) -> ExpertLibrary:
    """Trained experts, then loaded ones, in the recipe's order; with their gates if asked."""
    sites = all_sites(base.model)
    experts = []
    if trained_sources(context.recipe):
        result = context.folder.require("experts", wanted_by)
        names = read_json(result / "experts.json")["names"]
        experts += [load_peft(result / name, name, sites) for name in names]
    experts += [load_peft(Path(path), name, sites) for name, path in context.recipe.experts.load.items()]
    library = ExpertLibrary(experts)
    if gates:
        library = load_gates(context.folder.require("gates", wanted_by) / "gates.safetensors", library, sites)
    return library


def step_data(
    context: Context,
    sources: Mapping[str, SourceSettings | None],
    tokenizer: Any,
    settings: DataSettings,
    train: TrainSettings,
    terms: Terms | None = None,
) -> StepData:
    """This rank's share. Rank 0 goes first, so that texts are tokenised once."""
    data: StepData | None = None
    for turn in (True, False):
        if context.world.is_main is turn:
            data = build_step_data(
                sources, tokenizer, settings, train, context.recipe.seed, context.world.rank, context.world.size, terms
            )
        distributed.barrier()
    assert data is not None
    context.event("data", sources=data.summary(), sha256=data.hash())
    return data


def _speed(context: Context, base: LoadedBase, settings: RowTrainSettings) -> Speed:
    """How a training over `base` goes, told to the log."""
    strategy = settings.strategy or context.recipe.strategy
    speed = choose_speed(base.model, base.attention, settings, context.device, strategy)
    context.event("speed", compile=speed.mode, reason=speed.reason, attention=speed.attention)
    return speed


def run_base(context: Context) -> Writer:
    recipe = context.recipe
    model, tokenizer = build_nano(recipe.base.nano, recipe.seed)
    attention, _ = resolve_attention(recipe.base.attention, context.device, torch.float32)
    model.to(context.device)  # type: ignore[arg-type]
    model.set_attn_implementation(attention)
    text = dataclasses.replace(recipe.data, loss_on="all")
    data = step_data(context, {"loss": recipe.data.base}, tokenizer, text, recipe.base.train)
    job = LanguageModelJob(model, lambda batch: model_inputs(batch, attention))
    trained = context.train("base", job, data, recipe.base.train, "")

    def write(folder: Path) -> None:
        fresh, _ = build_nano(recipe.base.nano, recipe.seed)
        own = {name.removeprefix("model."): tensor for name, tensor in trained.items()}
        missing, unexpected = fresh.load_state_dict(own, strict=False)
        tied = {"lm_head.weight"} if fresh.config.tie_word_embeddings else set()
        if set(missing) - tied or unexpected:
            raise RuntimeError(f"trained tensors do not fit the model: missing {missing}, unexpected {unexpected}")
        fresh.to(getattr(torch, recipe.base.dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return write


def run_experts(context: Context) -> Writer:
    recipe = context.recipe
    base = the_base(context, "experts")
    sources = trained_sources(recipe)
    data = step_data(context, sources, base.tokenizer, recipe.data, recipe.experts.train)
    speed = _speed(context, base, recipe.experts.train)
    own = owned(list(sources), recipe.experts.train, recipe.experts.train.strategy or recipe.strategy)
    job = ExpertJob(base.model, speed.attention, list(sources), recipe.experts, recipe.seed, speed.mode, own)
    trained = context.train("experts", job, data, recipe.experts.train, base.sha256)
    experts = job.experts(trained)

    def write(folder: Path) -> None:
        for expert in experts:
            save_peft(expert, folder / expert.card.name, base_id=base.id)
        write_json(folder / "experts.json", {"names": [expert.card.name for expert in experts]})

    return write


def run_gates(context: Context) -> Writer:
    recipe = context.recipe
    base = the_base(context, "gates")
    library = the_library(context, base, "gates", gates=False)
    data = step_data(context, gate_sources(recipe), base.tokenizer, recipe.data, recipe.gates.train)
    means = mean_activations(base, library, data, context.device)
    speed = _speed(context, base, recipe.gates.train)
    own = owned(library.names, recipe.gates.train, recipe.gates.train.strategy or recipe.strategy)
    job = GateJob(base.model, speed.attention, library, recipe.gates, speed.mode, own)
    trained = context.train("gates", job, data, recipe.gates.train, base.sha256)
    gated = job.library(trained, means)
    return lambda folder: save_gates(gated, folder / "gates.safetensors")


def run_export(context: Context) -> Writer:
    recipe = context.recipe
    base = the_base(context, "export")
    library = the_library(context, base, "export", gates=True) if has_experts(recipe) else None
    own_base = context.folder.require("base", "export") if recipe.base.model == "nano" else None
    thinking = None
    if has_thoughts(recipe):
        result = context.folder.require("thoughts", "export")
        thinking = read_thinking(result, hidden_size(base.model), all_sites(base.model))
        if thinking.trainable == "full":
            own_base = result / "model"
            base = load_base(dataclasses.replace(recipe.base, model=str(own_base)), context.device)
    provenance = Provenance(
        recipe=_plain(recipe),
        experts={name: _plain(source) for name, source in resolve_sources(recipe.data).items()},
        results=_tables(context.folder.result("evaluate")),
    )
    return lambda folder: export_model(folder, base, library, recipe.router, provenance, own_base, thinking)


def _tables(evaluated: Path) -> str:
    """What the `evaluate` stage found, for the export's card."""
    files = [evaluated / f"{name}.md" for name in ("results", "thoughts", "generated")]
    return "\n".join(file.read_text() for file in files if file.is_file())
