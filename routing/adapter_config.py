"""The schema that `adapter_config.json` must pass before anything else reads it (SEC-004: field, value, allowed).

PEFT itself accepts far more: regular expressions as names, code references (auto_mapping), other layer kinds. We read
ordinary LoRA on linears: any rank up to 1024, alpha, rsLoRA, rank and alpha patterns with plain names, any targets.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import ArtifactError, SecurityError, suggest
from ..base.files import inside

SIZE_LIMIT = 2**20
RANK_LIMIT = 1024
PLAIN_NAME = re.compile(r"\^?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z")


@dataclass(frozen=True)
class AdapterConfig:
    """The fields that matter to LoRA on linears."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base: str | None

    def rank_at(self, site: str) -> int:
        return _by_pattern(self.rank_pattern, site, self.rank)

    def alpha_at(self, site: str) -> float:
        return _by_pattern(self.alpha_pattern, site, self.alpha)


@dataclass(frozen=True)
class _Rule:
    allowed: str
    holds: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= RANK_LIMIT


def _alpha(value: Any) -> bool:
    return _number(value) and 0 < value <= 1e6


def _plain(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 256 and bool(PLAIN_NAME.match(value))


def _plain_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_plain, value))


def _pattern(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_plain(k) and check(v) for k, v in value.items())


def _one_of(*allowed: Any) -> _Rule:
    shown = ", ".join(json.dumps(a) for a in allowed)
    return _Rule(shown, lambda v: any(type(v) is type(a) and v == a for a in allowed))


_OFF = _Rule("unset (null, false or empty)", lambda v: v is None or v is False or v == [] or v == {})
_BOOL = _Rule("true or false", lambda v: isinstance(v, bool))
_TEXT = _Rule("a text or null", lambda v: v is None or (isinstance(v, str) and len(v) <= 4096))
_ANY_NUMBER = _Rule("a number", _number)
_LAYERS = _Rule(
    "layer numbers or null",
    lambda v: v is None or type(v) is int or (isinstance(v, list) and all(type(n) is int for n in v)),
)
_NAMES = _Rule("plain names or null", lambda v: v is None or v == [] or _plain(v) or _plain_list(v))

RULES: dict[str, _Rule] = {
    "peft_type": _one_of("LORA"),
    "task_type": _one_of(None, "CAUSAL_LM"),
    "r": _Rule(f"a whole number from 1 to {RANK_LIMIT}", _rank),
    "lora_alpha": _Rule("a number above 0, at most 1e6", _alpha),
    "use_rslora": _BOOL,
    "rank_pattern": _Rule(f"plain names to ranks from 1 to {RANK_LIMIT}", _pattern(_rank)),
    "alpha_pattern": _Rule("plain names to numbers above 0", _pattern(_alpha)),
    "target_modules": _Rule(
        'a list of plain names, or "all-linear" (no regular expressions)',
        lambda v: v == "all-linear" or _plain_list(v),
    ),
    "exclude_modules": _Rule("a list of plain names or null", lambda v: v in (None, []) or _plain_list(v)),
    "layers_to_transform": _LAYERS,
    "layers_pattern": _NAMES,
    "lora_dropout": _Rule("a number from 0 to 1", lambda v: _number(v) and 0 <= v <= 1),
    "init_lora_weights": _one_of(True, False, "gaussian", "orthogonal", "eva"),
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "peft_version": _TEXT,
    "inference_mode": _BOOL,
    "bias": _one_of("none"),
    "megatron_core": _one_of(None, "megatron.core"),
    "qalora_group_size": _ANY_NUMBER,
}
RULES |= dict.fromkeys(
    (
        "auto_mapping", "fan_in_fan_out", "modules_to_save", "megatron_config", "trainable_token_indices",
        "loftq_config", "corda_config", "lora_ga_config", "use_dora", "velora_config", "alora_invocation_tokens",
        "use_qalora", "monteclora_config", "layer_replication", "lora_bias", "target_parameters", "use_bdlora",
        "arrow_config", "kasa_config", "ensure_weight_tying", "runtime_config",
    ),
    _OFF,
)  # fmt: skip
RULES["eva_config"] = _Rule("null or a JSON object", lambda v: v is None or isinstance(v, dict))
REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The checked configuration of a PEFT adapter folder. Raises SEC-003, SEC-004, or EXP-001 if the file is absent."""
    path = inside(folder, "adapter_config.json")
    if not path.is_file():
        raise ArtifactError(f"{folder}: no adapter_config.json; name a folder that PEFT saved", code="EXP-001")
    if path.stat().st_size > SIZE_LIMIT:
        raise _refuse(path, f"{path.stat().st_size} bytes; at most {SIZE_LIMIT} are allowed")
    values = _parse(path)
    for key, value in values.items():
        if key not in RULES:
            raise _refuse(path, f"unknown field {ascii(key)[:80]}{suggest(key, list(RULES))}")
        if not RULES[key].holds(value):
            raise _refuse(path, f"{key} is {ascii(value)[:120]}; allowed: {RULES[key].allowed}")
    for key in REQUIRED:
        if key not in values:
            raise _refuse(path, f"{key} is missing")
    return AdapterConfig(
        values["r"],
        float(values["lora_alpha"]),
        values.get("use_rslora", False),
        values.get("rank_pattern", {}),
        {key: float(alpha) for key, alpha in values.get("alpha_pattern", {}).items()},
        values.get("base_model_name_or_path"),
    )


def _parse(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _refuse(path, f"not plain JSON ({error})") from error
    if not isinstance(values, dict):
        raise _refuse(path, "not a JSON object")
    return values


def _by_pattern(pattern: Mapping[str, Any], site: str, default: Any) -> Any:
    """PEFT's rule for plain names: the first key that is the site's name or the end of it at a dot; ^ anchors."""
    for key, value in pattern.items():
        if site == key.removeprefix("^") or (not key.startswith("^") and site.endswith(f".{key}")):
            return value
    return default


def _refuse(path: Path, why: str) -> SecurityError:
    return SecurityError(f"{path}: {why}. Only ordinary LoRA on linears is read", code="SEC-004")
