"""Cross-checks of a recipe: ranges, files, settings that contradict each other. No torch, no network, no GPU.

`check_recipe` returns all problems; train/settings.py raises them together before a process group exists.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from ..base.errors import QuietGooseError, RecipeError, suggest
from ..base.files import safe_name
from .image_checks import check_images, draws_images, finished, image_needs, image_ranges
from .recipe import STAGES, BaseSettings, Recipe, SourceSettings, TrainSettings
from .row_checks import check_collection, check_rows, check_task_sources
from .safe_yaml import read_yaml
from .speed_checks import check_speed
from .thought_settings import (
    ROUTED,
    check_table,
    check_thoughts,
    has_experts,
    has_thoughts,
    thinks_over_experts,
    thought_ranges,
)

Problem = tuple[str, str]
SMOLLM2_CONTEXT = 8192


def check_recipe(recipe: Recipe) -> list[Problem]:
    """(code, message) of everything that is wrong, in the order of the recipe."""
    if recipe.version != 1:
        return [("CFG-002", f"version: {recipe.version}; this release reads version 1")]
    checks: tuple[Callable[[Recipe], Iterator[Problem]], ...] = (
        _ranges, _stages, _strategies, check_speed, *(LANGUAGE if not draws_images(recipe) else (check_images,)), _tracking, _resume,
    )  # fmt: skip
    problems: list[Problem] = []
    for check in checks:
        try:
            problems += check(recipe)
        except QuietGooseError as error:
            problems.append((error.code.removeprefix("QG-"), error.message))
    return list(dict.fromkeys(problems))


def trains(recipe: Recipe) -> dict[str, TrainSettings]:
    """Training settings of the stages that train and are listed."""
    known = {
        "base": recipe.base.train, "experts": recipe.experts.train, "gates": recipe.gates.train,
        "thoughts": recipe.thoughts.train, "urepa": recipe.urepa.train,
    }  # fmt: skip
    return {name: known[name] for name in recipe.stages if name in known}


def expert_names(recipe: Recipe) -> list[str]:
    """All experts of the recipe, each once: included tasks, own sources, loaded adapters. Raises as data/build.py."""
    return list(dict.fromkeys([*_sources(recipe), *recipe.experts.load]))


def _sources(recipe: Recipe) -> dict[str, SourceSettings]:
    from .data.sources import resolve_sources

    return resolve_sources(recipe.data)


def _ranges(recipe: Recipe) -> Iterator[Problem]:
    numbers: list[tuple[str, float, float, float]] = [
        ("data.sequence_length", recipe.data.sequence_length, 8, 1 << 20),
        ("experts.rank", recipe.experts.rank, 1, 1024),
        ("experts.alpha", recipe.experts.alpha, 1e-6, 1e6),
        ("experts.misrouting", recipe.experts.misrouting, 0.0, 1.0),
        ("router.k", recipe.router.k, 1, 1024),
        ("evaluate.batch_tokens", recipe.evaluate.batch_tokens, 1, 1 << 30),
        ("evaluate.max_new_tokens", recipe.evaluate.max_new_tokens, 1, 1 << 20),
        ("evaluate.bootstrap", recipe.evaluate.bootstrap, 1, 1_000_000),
        ("checkpoint.every", recipe.checkpoint.every, 1, 1 << 40),
        ("checkpoint.keep", recipe.checkpoint.keep, 2, 1 << 20),
        ("seed", recipe.seed, 0, (1 << 63) - 1),
    ]
    for name, limit in (("limit", recipe.evaluate.limit), ("thoughts.limit", recipe.evaluate.thoughts.limit)):
        if limit is not None:
            numbers.append((f"evaluate.{name}", limit, 1, 1 << 40))
    if "thoughts" in recipe.stages:
        numbers += thought_ranges(recipe)
    if draws_images(recipe):
        numbers += image_ranges(recipe)
    for stage, train in trains(recipe).items():
        numbers += _train_ranges(f"{stage}.train", train)
    for name, value, low, high in numbers:
        if not (math.isfinite(value) and low <= value <= high):
            yield "CFG-003", f"{name}: {value}; allowed are {low:g} to {high:g}"
    for key in ("name", "output"):
        if not getattr(recipe, key).strip():
            yield "CFG-003", f"{key}: is empty; give a {'name' if key == 'name' else 'folder'}"
    if Path(recipe.output).exists() and not Path(recipe.output).is_dir():
        yield "CFG-005", f"output: {recipe.output} is a file; choose a folder"


def _train_ranges(prefix: str, train: TrainSettings) -> list[tuple[str, float, float, float]]:
    optimizer = train.optimizer
    return [
        (f"{prefix}.steps", train.steps, 1, 1 << 40),
        (f"{prefix}.rows_per_expert", train.rows_per_expert, 1, 1 << 20),
        (f"{prefix}.micro_rows", train.micro_rows, 1, 1 << 20),
        (f"{prefix}.optimizer.lr", optimizer.lr, 1e-12, 10.0),
        (f"{prefix}.optimizer.warmup", optimizer.warmup, 0.0, 1.0),
        (f"{prefix}.optimizer.min_lr_ratio", optimizer.min_lr_ratio, 0.0, 1.0),
        (f"{prefix}.optimizer.weight_decay", optimizer.weight_decay, 0.0, 10.0),
        (f"{prefix}.optimizer.betas[0]", optimizer.betas[0], 0.0, 0.999999),
        (f"{prefix}.optimizer.betas[1]", optimizer.betas[1], 0.0, 0.9999999),
        (f"{prefix}.optimizer.eps", optimizer.eps, 1e-30, 1.0),
        (f"{prefix}.optimizer.clip", optimizer.clip, 0.0, 1e6),
    ]


def _stages(recipe: Recipe) -> Iterator[Problem]:
    stages = list(recipe.stages)
    order = sorted(set(stages), key=STAGES.index)
    if not stages:
        yield "CFG-004", f"stages: is empty; allowed are {', '.join(STAGES)}"
    elif stages != order:
        yield "CFG-004", f"stages: {', '.join(stages)}; the order is {', '.join(order)}, each once"
    needs = {"experts": _needs_base(recipe), "gates": [*_needs_base(recipe), *_needs_experts(recipe)]}
    needs["thoughts"] = _needs_base(recipe)
    if thinks_over_experts(recipe):
        needs["thoughts"] = [*needs["gates"], *(["gates"] if recipe.thoughts.over == ROUTED else [])]
    routed = has_experts(recipe)
    needs["evaluate"] = needs["export"] = [*needs["gates"], "gates"] if routed else [*_needs_base(recipe), "thoughts"]
    needs |= image_needs(recipe)
    for stage in stages:
        for needed in needs.get(stage, []):
            if needed not in stages and not finished(recipe, needed):
                yield (
                    "CFG-020",
                    f"stages: '{stage}' needs the result of '{needed}', which {recipe.output} does not have; "
                    f"put '{needed}' before it",
                )
                return


def _needs_base(recipe: Recipe) -> list[str]:
    return ["base"] if recipe.base.model == "nano" else []


def _needs_experts(recipe: Recipe) -> list[str]:
    return ["experts"] if recipe.data.collection or recipe.data.experts else []


def _strategies(recipe: Recipe) -> Iterator[Problem]:
    from .strategy import load_strategy

    named = {"strategy": recipe.strategy}
    named |= {f"{stage}.train.strategy": train.strategy for stage, train in trains(recipe).items() if train.strategy}
    for where, name in named.items():
        try:
            load_strategy(name)
        except RecipeError as error:
            yield error.code.removeprefix("QG-"), f"{where}: {error.message}"


def _base(recipe: Recipe) -> Iterator[Problem]:
    base = recipe.base
    context, limit_name = _context(base)
    if context and recipe.data.sequence_length > context:
        yield (
            "CFG-008",
            f"data.sequence_length: {recipe.data.sequence_length} is over {limit_name} {context}; lower it",
        )
    if base.model == "nano":
        yield from _nano(recipe)
    else:
        if "base" in recipe.stages:
            yield "CFG-004", f"stages: 'base' trains the nano model only, and base.model is {base.model}; leave it out"
        yield from _model_name(base)
    if base.attention == "flash_attention_2":
        yield from _flash(base)


def _context(base: BaseSettings) -> tuple[int | None, str]:
    """The longest sequence of the base, if a look at its config tells, and what to call that limit."""
    if base.model == "nano":
        return base.nano.context, "base.nano.context"
    if base.model == "smollm2":
        return SMOLLM2_CONTEXT, "the context of smollm2,"
    config = Path(base.model).expanduser() / "config.json"
    if not config.is_file():
        return None, ""
    try:
        value = json.loads(config.read_text(encoding="utf-8")).get("max_position_embeddings")
    except (ValueError, AttributeError) as error:
        raise RecipeError(f"base.model: {config} is no configuration ({error})", code="CFG-013") from error
    return (value if isinstance(value, int) else None), f"max_position_embeddings of {config},"


def _nano(recipe: Recipe) -> Iterator[Problem]:
    shape = recipe.base.nano
    for name, value in vars(shape).items():
        if value < 1:
            yield "CFG-003", f"base.nano.{name}: {value}; at least 1"
            return
    if shape.width % shape.heads or (shape.width // shape.heads) % 2:
        yield "CFG-012", f"base.nano.width: {shape.width}; must be heads ({shape.heads}) times an even number"
    if shape.heads % shape.kv_heads:
        yield "CFG-012", f"base.nano.kv_heads: {shape.kv_heads}; must divide base.nano.heads ({shape.heads})"
    if "base" in recipe.stages:
        if recipe.data.base is None:
            yield "CFG-011", "data.base: is not set, and the stage 'base' trains on it; name its source"
        else:
            _check_source(recipe.data.base, "base")


def _model_name(base: BaseSettings) -> Iterator[Problem]:
    name = base.model
    local = Path(name).expanduser()
    if name == "smollm2" or local.exists():
        return
    if name.startswith((".", "/", "~")) or name.endswith((".gguf", ".whl")) or name.count("/") > 1:
        yield "CFG-013", f"base.model: {name}: no such file or folder"
    elif "/" not in name and (near := suggest(name, ["nano", "smollm2"])):
        yield "CFG-013", f"base.model: {name} is no folder here.{near}"


def _flash(base: BaseSettings) -> Iterator[Problem]:
    import importlib.util

    advice = "set base.attention: auto or sdpa"
    if base.dtype != "bfloat16":
        yield "CFG-010", f"base.attention: flash_attention_2 needs base.dtype bfloat16, not {base.dtype}; {advice}"
    if not cuda_devices():
        yield "CFG-010", f"base.attention: flash_attention_2 needs a CUDA device, and there is none; {advice}"
    elif importlib.util.find_spec("flash_attn") is None:
        yield "ENV-004", f"base.attention: flash_attention_2 needs pip install 'quietgoose[gpu]'; or {advice}"


def cuda_devices() -> int:
    """Devices the CUDA driver shows, asked without torch."""
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def _data(recipe: Recipe) -> Iterator[Problem]:
    if not {"experts", "gates"} & set(recipe.stages):
        return
    sources = _sources(recipe)
    for name, source in sources.items():
        try:
            _check_source(source, name)
        except QuietGooseError as error:
            yield error.code.removeprefix("QG-"), error.message
    if "experts" in recipe.stages and not sources:
        yield "CFG-011", "data: no expert has data; set data.collection and data.include, or data.experts"
    without = [name for name in recipe.experts.load if name not in sources]
    if "gates" in recipe.stages and without and not sources:
        yield "CFG-011", f"data.experts: gates of {', '.join(without)} need rows to train on; name their sources"


def _check_source(source: SourceSettings, name: str) -> None:
    from .data.rows import open_source

    if source.limit is not None and source.limit < 1:
        raise RecipeError(f"source of '{name}': limit {source.limit}; at least 1, or absent", code="CFG-003")
    open_source(source, name, 0)


def _experts(recipe: Recipe) -> Iterator[Problem]:
    for name, folder in recipe.experts.load.items():
        safe_name(name)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (Path(folder).expanduser() / file).is_file():
                yield "CFG-005", f"experts.load.{name}: {folder} has no {file}; give the folder of a PEFT adapter"
    if not recipe.experts.targets:
        yield "CFG-003", "experts.targets: is empty; name linears (for example q_proj) or all-linear"


def _thoughts(recipe: Recipe) -> Iterator[Problem]:
    if "thoughts" not in recipe.stages:
        return
    if recipe.data.thoughts is not None:
        _check_source(recipe.data.thoughts, "thoughts")
    context, _ = _context(recipe.base)
    yield from check_thoughts(recipe, context, expert_names(recipe))


def _router(recipe: Recipe) -> Iterator[Problem]:
    if not {"evaluate", "export"} & set(recipe.stages):
        return
    names = expert_names(recipe)
    if names and recipe.router.k > len(names):
        yield "CFG-009", f"router.k: {recipe.router.k}; there are {len(names)} experts, so at most {len(names)}"


def _evaluate(recipe: Recipe) -> Iterator[Problem]:
    settings = recipe.evaluate
    if "evaluate" not in recipe.stages:
        return
    if has_thoughts(recipe):
        yield from _evaluate_thoughts(recipe)
    if not has_experts(recipe):
        return  # nothing to route: the table of thoughts is the only one
    if not settings.collection and not settings.tasks:
        yield "CFG-026", "evaluate: no tasks; set evaluate.collection or evaluate.tasks"
    if len(set(settings.arms)) < len(settings.arms) or not settings.arms:
        yield "CFG-025", f"evaluate.arms: {', '.join(settings.arms) or 'none'}; name each arm once, at least one"
    if settings.baseline not in settings.arms and not settings.baseline.startswith("expert:"):
        yield "CFG-025", f"evaluate.baseline: '{settings.baseline}' is none of evaluate.arms"
    if settings.collection:
        yield from check_collection(recipe)
    elif settings.include:
        yield "CFG-011", "evaluate.include names tasks of a collection; set evaluate.collection to its folder"
    yield from check_task_sources("evaluate.tasks", settings.tasks, settings.split)


def _evaluate_thoughts(recipe: Recipe) -> Iterator[Problem]:
    settings = recipe.evaluate.thoughts
    if not settings.tasks and not settings.generated and settings.text is None:
        yield (
            "CFG-026",
            "evaluate.thoughts: nothing to measure thoughts on; set evaluate.thoughts.tasks, generated or text",
        )
    if not settings.arms or len(set(settings.arms)) < len(settings.arms):
        yield (
            "CFG-025",
            f"evaluate.thoughts.arms: {', '.join(settings.arms) or 'none'}; name each arm once, at least one",
        )
    if settings.text is not None:
        _check_source(settings.text, "evaluate.thoughts.text")
    for where, tasks in (("tasks", settings.tasks), ("generated", settings.generated)):
        yield from check_task_sources(f"evaluate.thoughts.{where}", tasks, recipe.evaluate.split)
    yield from check_table(recipe)


def _tracking(recipe: Recipe) -> Iterator[Problem]:
    if recipe.tracking.enabled:
        check_store("tracking.uri", recipe.tracking.uri, recipe.tracking.credentials)
    yield from ()


def check_store(where: str, uri: str | None, credentials: str | None) -> None:
    """RecipeError CFG-008 for an address that MLflow does not take; rank 0 raises as `read_credentials`."""
    if uri is not None and uri.startswith("file:"):
        raise RecipeError(
            f"{where}: file stores are gone from MLflow; use sqlite:///PATH or http(s)://", code="CFG-008"
        )
    if credentials and os.environ.get("RANK", "0") == "0":
        read_credentials(Path(credentials).expanduser())


def read_credentials(path: Path) -> dict[str, str]:
    """`token`, or `username` and `password`, from a YAML file that only its owner can read.

    Raises RecipeError: CFG-005 if it is not there or others may read it; CFG-006/007 as read_yaml; CFG-001, other keys.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise RecipeError(f"tracking.credentials: {path}: {error.strerror}", code="CFG-005") from error
    if mode & 0o077:
        raise RecipeError(
            f"tracking.credentials: {path} has mode {mode:04o}, others can read it; run: chmod 600 {path}",
            code="CFG-005",
        )
    content = read_yaml(path)
    if set(content) not in ({"token"}, {"username", "password"}):
        raise RecipeError(
            f"tracking.credentials: {path}: wanted is either token, or username and password, and nothing else"
        )
    return {key: str(value) for key, value in content.items()}


def _resume(recipe: Recipe) -> Iterator[Problem]:
    if recipe.resume.step is not None and recipe.resume.mode == "never":
        yield "CFG-008", "resume.step: is set while resume.mode is never; set resume.mode: required, or drop the step"
    if recipe.resume.step is not None and recipe.resume.step < 0:
        yield "CFG-003", f"resume.step: {recipe.resume.step}; at least 0"


LANGUAGE = (_base, _data, _experts, _thoughts, _router, _evaluate, check_rows)
