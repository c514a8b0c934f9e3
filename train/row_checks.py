"""A look at rows before anything is trained, so that a wrong field is told at once and not after the stages before it.

`check_rows` is one of the cross-checks of a recipe (checks.py); the dry run (plan.py) calls it for every row. It reads files
only: hub datasets are fetched and embedded skills made when a stage wants them. No torch, no tokenizer: what does not fit into
`data.sequence_length` is told by data/tokens.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ..base.errors import DataError, QuietGooseError
from ..evaluation.tasks import find_tasks, load_task
from .data.rows import JOIN, BadRows, FileSource, RowReport, open_source, read_rows
from .data.sources import resolve_sources
from .recipe import Recipe, SourceSettings
from .tasks import check_split
from .thought_settings import has_experts, has_thoughts

HEAD = 100
Problem = tuple[str, str]


def check_rows(recipe: Recipe, head: int | None = HEAD) -> Iterator[Problem]:
    """The first bad row of every training file among its first `head` rows (None: all) and of every evaluation file. Files that
    are not there are left to the checks of their settings."""
    for name, source in _training(recipe):
        for part in source.path.split(JOIN):
            yield from _bad_row(recipe, name, replace(source, path=part.strip()), head)
    for folder, split in _evaluation(recipe):
        try:
            load_task(folder, split, recipe.evaluate.limit)
        except DataError as error:
            yield error.code.removeprefix("QG-"), error.message


def check_collection(recipe: Recipe) -> Iterator[Problem]:
    """What is wrong with the collection that is evaluated, under the setting that names it: `data.collection` if that is where it
    comes from. A folder that is not there is told as the check of `data` tells it, so that the recipe's checks say it once."""
    settings = recipe.evaluate
    setting = "data.collection" if settings.collection == recipe.data.collection else "evaluate.collection"
    folder = Path(settings.collection or "").expanduser()
    try:
        find_tasks(folder, settings.split, settings.include)
    except DataError as error:
        found = error.message if folder.is_dir() else f"{settings.collection}: no such folder"
        yield error.code.removeprefix("QG-"), f"{setting}: {found}"


def check_task_sources(where: str, tasks: Mapping[str, str], split: str) -> Iterator[Problem]:
    """Sources of tasks that lack the split."""
    for name, source in tasks.items():
        try:
            check_split(source, split)
        except DataError as error:
            yield error.code.removeprefix("QG-"), f"{where}.{name}: {error.message}"


def _training(recipe: Recipe) -> Iterator[tuple[str, SourceSettings]]:
    if "base" in recipe.stages and recipe.data.base is not None:
        yield "base", recipe.data.base
    if {"experts", "gates"} & set(recipe.stages):
        yield from resolve_sources(recipe.data).items()
    if "thoughts" in recipe.stages and recipe.data.thoughts is not None:
        yield "thoughts", recipe.data.thoughts


def _bad_row(recipe: Recipe, name: str, settings: SourceSettings, head: int | None) -> Iterator[Problem]:
    try:
        source = open_source(settings, name, recipe.seed)
    except QuietGooseError:
        return  # told by the check of the setting
    if not isinstance(source, FileSource):
        return
    limits = [limit for limit in (settings.limit, head) if limit is not None]
    try:
        for _ in read_rows(source, min(limits, default=None), BadRows(recipe.data.on_bad_row, RowReport())):
            pass
    except DataError as error:
        yield error.code.removeprefix("QG-"), error.message


def _evaluation(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Task folders that the `evaluate` stage reads, with their split."""
    settings = recipe.evaluate
    if "evaluate" not in recipe.stages:
        return
    named: list[str] = []
    if has_experts(recipe):
        if settings.collection:
            try:
                folders = find_tasks(Path(settings.collection).expanduser(), settings.split, settings.include)
            except DataError:
                folders = []  # told by the check of the setting
            yield from ((folder, settings.split) for folder in folders)
        named += settings.tasks.values()
    if has_thoughts(recipe):
        named += [*settings.thoughts.tasks.values(), *settings.thoughts.generated.values()]
    for source in dict.fromkeys(named):
        folder = Path(source).expanduser()
        if folder.is_dir() and _has(source, settings.split):
            yield folder, settings.split


def _has(source: str, split: str) -> bool:
    try:
        check_split(source, split)
    except DataError:
        return False
    return True
