"""What `compile` and `parallel` of a training cannot be together with its strategy: told before anything is loaded.

Called by train/checks.py; train/compiled.py and train/parallel.py decide the rest when device and processes are known. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..base.errors import RecipeError
from .recipe import Recipe, RowTrainSettings
from .strategy import zero_stage


def check_speed(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(code, message) of every contradiction in the listed stages."""
    known: dict[str, RowTrainSettings] = {"experts": recipe.experts.train, "gates": recipe.gates.train}
    for stage in recipe.stages:
        train = known.get(stage)
        if train is None:
            continue
        name = train.strategy or recipe.strategy
        try:
            sharded = zero_stage(name) == 3
        except RecipeError:
            continue  # told by the check of strategies
        if sharded and train.compile in ("layers", "graph"):
            yield (
                "CFG-032",
                f"{stage}.train.compile: {train.compile} is impossible with strategy {name}, whose hooks in every module cut a "
                "graph to pieces; set auto or off, or another strategy",
            )
        if sharded and train.parallel == "expert":
            yield (
                "DIST-005",
                f"{stage}.train.parallel: expert is impossible with strategy {name}, which divides the frozen base over "
                "processes that train the same; set data, or strategy zero0, zero1 or zero2",
            )
        if train.compile == "graph" and train.activation_checkpointing:
            yield (
                "CFG-032",
                f"{stage}.train.compile: graph has no use for {stage}.train.activation_checkpointing; switch one of them off",
            )
