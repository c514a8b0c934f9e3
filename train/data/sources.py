"""Which rows every expert trains on, by the recipe's data settings. Imports no torch: the recipe's checks ask it in the
first second. Called by train/checks.py, train/data/build.py, train/stages.py.
"""

from __future__ import annotations

from pathlib import Path

from ...base.errors import DataError, RecipeError, suggest
from ...base.files import read_json, safe_name
from ..recipe import DataSettings, SourceSettings
from .rows import split_file


def resolve_sources(data: DataSettings) -> dict[str, SourceSettings]:
    """Expert name -> source: `include` out of `collection` (all its tasks with role `expert` if empty), then
    `experts`.

    Raises:
        RecipeError: CFG-011, a task that is not in the collection, a name given twice, include without
        collection. NameRefused: SEC-002, a name that cannot be a folder.
        DataError: DATA-002, no collection folder, no training file.
    """
    sources: dict[str, SourceSettings] = {}
    if data.collection:
        sources = {name: SourceSettings(path=str(path)) for name, path in _tasks(data.collection, data.include).items()}
    elif data.include:
        raise RecipeError("data.include names tasks of a collection; set data.collection to its folder", code="CFG-011")
    for name, source in data.experts.items():
        if name in sources:
            raise RecipeError(f"data.experts.{name}: data.include has this name already; rename one", code="CFG-011")
        sources[safe_name(name)] = source
    return sources


def _tasks(collection: str, include: list[str]) -> dict[str, Path]:
    """Folders of the tasks, in the order asked for, else by name."""
    folder = Path(collection).expanduser()
    if not folder.is_dir():
        raise DataError(f"data.collection: {collection}: no such folder", code="DATA-002")
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    for name in include:
        if safe_name(name) not in there:
            raise RecipeError(
                f"data.include: '{name}' is no folder of {collection};{suggest(name, there)} it has {', '.join(there)}",
                code="CFG-011",
            )
    if len(set(include)) < len(include):
        raise RecipeError(f"data.include names a task twice: {', '.join(include)}", code="CFG-011")
    names = include or _experts(folder, there)
    for name in names:
        split_file(folder / safe_name(name), "train")
    return {name: folder / name for name in names}


def _experts(folder: Path, there: list[str]) -> list[str]:
    """The tasks whose role is `expert` by collection.json; without that file, every folder."""
    listing = folder / "collection.json"
    if not listing.is_file():
        return there
    roles = read_json(listing)
    return [name for name in there if roles.get(name, {}).get("role") == "expert"]
