"""The runs of a comparison: each arm with each seed is a recipe of its own. No torch. Called by train/pipeline.py, compare.py and
launch/.

    python launch/train.py --config launch/recipes/urepa_compare.yaml                      # what is missing, then the table
    CUDA_VISIBLE_DEVICES=2 python launch/train.py --config ... --compare.only [D-0,D-1]    # two runs, in this process
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.errors import RecipeError, suggest
from ..base.files import safe_name
from .image_checks import TRAINED
from .recipe import Recipe
from .settings import plain, recipe_from_plain

ARMS = "arms"


def run_names(recipe: Recipe) -> list[str]:
    """ARM-SEED of every run, seed by seed, so that a comparison that is cut short has whole seeds."""
    compare = recipe.compare
    return [
        f"{arm}-{seed}"
        for number, seed in enumerate(compare.seeds)
        for arm in compare.arms
        if number == 0 or arm not in compare.one_seed
    ]


def chosen_runs(recipe: Recipe) -> list[str]:
    """`compare.only`, checked. RecipeError CFG-124 for a run that is not there."""
    names = run_names(recipe)
    for name in recipe.compare.only:
        if name not in names:
            raise RecipeError(
                f"compare.only: '{name}'; the runs are {', '.join(names)}.{suggest(name, names)}", code="CFG-124"
            )
    return list(recipe.compare.only)


def arm_recipe(recipe: Recipe, run: str) -> Recipe:
    """The recipe of one run. RecipeError, naming the arm, if its settings cannot be."""
    arm, _, seed = run.rpartition("-")
    content = plain(recipe)
    content |= {
        "name": f"{recipe.name}-{run}", "output": str(Path(recipe.output) / ARMS / safe_name(run, "run")), "seed": int(seed),
        "compare": {},
    }  # fmt: skip
    for name, value in recipe.compare.arms[arm].items():
        _set(content, name, value, arm)
    taught = ["teacher"] if content["teacher"]["kind"] in TRAINED else []
    content["stages"] = [*taught, "urepa", "evaluate"]
    try:
        return recipe_from_plain(content)
    except RecipeError as error:
        raise RecipeError(f"compare.arms.{arm}: {error.message}", code=error.code.removeprefix("QG-")) from error


def check_arms(recipe: Recipe) -> None:
    """RecipeError for the first arm whose recipe cannot be, or for a run in `compare.only` that is not there."""
    for arm in recipe.compare.arms:
        arm_recipe(recipe, f"{arm}-{recipe.compare.seeds[0]}")
    chosen_runs(recipe)


def outcome_folder(recipe: Recipe) -> Path:
    """Where the outcome of a start of this recipe lies."""
    if not recipe.compare.only:
        return Path(recipe.output)
    return Path(recipe.output) / ARMS / recipe.compare.only[-1]


def launch_lines(recipe: Recipe, arguments: Sequence[str], devices: int) -> list[str]:
    """A shell command per device that together run everything, then the one for the table."""
    names = run_names(recipe)
    command = " ".join(["python launch/train.py", *map(shlex.quote, arguments)])
    lines = [
        f"CUDA_VISIBLE_DEVICES={device} {command} --compare.only '[{','.join(names[device::devices])}]' &"
        for device in range(min(devices, len(names)))
    ]
    return [*lines, "wait", command]


def _set(content: dict[str, Any], name: str, value: Any, arm: str) -> None:
    """Set the dotted setting; a mapping is merged."""
    *path, last = name.split(".")
    place = content
    for part in path:
        inner = place.get(part)
        if not isinstance(inner, dict):
            raise RecipeError(f"compare.arms.{arm}: unknown setting '{name}'", code="CFG-001")
        place = inner
    if isinstance(value, Mapping) and isinstance(place.get(last), dict):
        for key, part in value.items():
            _set(place[last], str(key), part, arm)
    else:
        text = isinstance(place.get(last), str) and isinstance(value, (int, float))  # the parser reads "2" as a number
        place[last] = str(value) if text else value
