"""Settings given by name: a misspelt one is refused with the names there are. Callers: cache/policy.py, thoughts/generation.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from .errors import RecipeError, suggest

SettingsT = TypeVar("SettingsT")


def known_settings(
    kind: type[SettingsT], given: Mapping[str, Any], what: str, *, code: str, also: Sequence[str] = ()
) -> SettingsT:
    """`kind(**given)` for a dataclass `kind`. RecipeError `code`, whose text begins with `what`, for a name that is no field.
    `also`: names the caller takes out of what was given before it calls."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in names:
            names = [*also, *names]
            raise RecipeError(
                f"{what}: no setting '{name}'; there are {', '.join(names)}.{suggest(str(name), names)}", code=code
            )
    return kind(**given)
