"""From recipe settings to StepData: which sources, read, tokenised, packed, ordered. Called by
train/stages.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...base.errors import DataError, RecipeError, suggest
from ...base.files import read_json, safe_name
from ..recipe import DataSettings, SourceSettings, TrainSettings
from .loader import StepData
from .packing import pack
from .rows import log, split_file
from .tokens import TokenSettings, token_set, tokenizer_hash


def default_cache() -> Path:
    """~/.cache/quietgoose: token caches and converted base models."""
    return Path.home() / ".cache" / "quietgoose"


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


def build_step_data(
    sources: Mapping[str, SourceSettings | None],
    tokenizer: Any,
    settings: DataSettings,
    train: TrainSettings,
    seed: int,
    rank: int = 0,
    world: int = 1,
) -> StepData:
    """One loss term per source, in the order of `sources`. Every rank calls it; ranks share the token cache.

    The `base` stage calls it with the one source `{"loss": data.base}` and `loss_on: all`.

    Raises: as tokens.token_set; DATA-003 if there is no source; CFG-011 if a source is not set.
    """
    cache = Path(settings.cache).expanduser() if settings.cache else default_cache()
    rule = TokenSettings(settings.sequence_length, settings.loss_on, settings.on_bad_row)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    reads = tokenizer_hash(tokenizer)
    packed = []
    for name, source in sources.items():
        if source is None:
            raise RecipeError("stages has 'base', so data.base must name its source", code="CFG-011")
        tokens = token_set(source, name, tokenizer, rule, cache / "tokens", seed, reads)
        packed.append(pack(name, tokens, settings.sequence_length, pad_id or 0, seed))
    data = StepData(packed, train.rows_per_expert, train.micro_rows, seed, rank, world, pad_id or 0)
    for name, summary in data.summary().items():
        log.info("%s: %s", name, summary)
    return data


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
