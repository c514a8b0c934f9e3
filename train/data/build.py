"""From recipe settings to StepData: which sources, read, tokenised, packed, ordered. Called by
train/stages.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...base.errors import RecipeError
from ..recipe import DataSettings, RowTrainSettings, SourceSettings, TrainSettings
from .loader import StepData, Terms
from .packing import pack
from .rows import log
from .sources import resolve_sources as resolve_sources
from .tokens import TokenSettings, token_set, tokenizer_hash


def default_cache() -> Path:
    """~/.cache/quietgoose: token caches and converted base models."""
    return Path.home() / ".cache" / "quietgoose"


def build_step_data(
    sources: Mapping[str, SourceSettings | None],
    tokenizer: Any,
    settings: DataSettings,
    train: TrainSettings,
    seed: int,
    rank: int = 0,
    world: int = 1,
    terms: Terms | None = None,
) -> StepData:
    """One loss term per source, in the order of `sources`, or `terms`. Every rank calls it; ranks share the token cache.

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
    alone = isinstance(train, RowTrainSettings) and train.parallel == "expert"
    data = StepData(packed, train.rows_per_expert, train.micro_rows, seed, rank, world, pad_id or 0, terms, alone)
    for name, summary in data.summary().items():
        log.info("%s: %s", name, summary)
    return data
