"""A task from the name of a source in a recipe: a folder in the collection's layout, or `skills:NAME`, `steps:NAME`.

Called by the `evaluate` stage, and at the start of a run by the checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..base.errors import DataError, suggest
from ..evaluation.tasks import Task, load_task, make_task, split_file
from .data.rows import SKILLS, STEPS, made_rows

MIXED = f"{SKILLS}mixed"


def task_of(name: str, source: str, split: str, seed: int, limit: int | None) -> Task:
    """The first `limit` items of a source in a split. Raises DataError for what is wrong with it."""
    if source.startswith((SKILLS, STEPS)):
        group = "two experts" if source == MIXED else "one expert" if source.startswith(SKILLS) else ""
        return make_task(name, made_rows(source, split, seed, limit), group, source)
    return load_task(Path(source).expanduser(), split, limit)


def check_split(source: str, split: str) -> None:
    """DataError DATA-002 unless the source has that split. Reads no rows and imports no torch."""
    if not source.startswith((SKILLS, STEPS)):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise DataError(f"{source}: no such folder", code="DATA-002")
        split_file(folder, split)
        return
    from . import skills, steps_skills

    if source.startswith(STEPS):
        steps_skills.parse_name(source.removeprefix(STEPS))
    splits = steps_skills.COUNTS if source.startswith(STEPS) else skills.COUNTS
    if split not in splits:
        raise DataError(
            f"{source}: no split '{split}' (splits found: {', '.join(splits)}).{suggest(split, list(splits))}",
            code="DATA-002",
        )


def with_split(sources: Mapping[str, str], split: str) -> dict[str, str]:
    """Those of the sources, by task name, that have the split."""
    found = {}
    for name, source in sources.items():
        try:
            check_split(source, split)
        except DataError:
            continue
        found[name] = source
    return found
