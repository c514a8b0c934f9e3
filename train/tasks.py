"""A task from the name of a source in a recipe: a folder in the collection's layout, or `skills:NAME`, `steps:NAME`.

Called by the `evaluate` stage.
"""

from __future__ import annotations

from ..evaluation.tasks import Task, load_task, make_task
from .data.rows import SKILLS, STEPS, made_rows

MIXED = f"{SKILLS}mixed"


def task_of(name: str, source: str, split: str, seed: int, limit: int | None) -> Task:
    """The first `limit` items of a source in a split. Raises DataError for what is wrong with it."""
    if source.startswith((SKILLS, STEPS)):
        group = "two experts" if source == MIXED else "one expert" if source.startswith(SKILLS) else ""
        return make_task(name, made_rows(source, split, seed, limit), group, source)
    return load_task(source, split, limit)
