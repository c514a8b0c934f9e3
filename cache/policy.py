"""What a ZipCache keeps at which precision, and when: one frozen dataclass and its presets.

    salient_ratio r   the top ceil(r * n) tokens of a flush go to `high_bits`, the others to `low_bits`   (ZipCache, section 4)
    flush_every       decoded tokens wait at 16 bits and are packed together (the paper: 100)
    sink_tokens       a row's first valid tokens, recent_tokens its last columns: never packed, or not yet (ours)
    rounding          of the keys of prompts and chunks: to nearest, or with their queries in mind (kernels/quantize/rounding.py)

Callers: cache/state.py, cache/hf.py, recipes. A misspelt or impossible setting is refused here, before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from ..base.errors import RecipeError, suggest
from ..base.settings import known_settings
from ..kernels.cached_attention.layout import MAX_QUERY
from ..kernels.quantize.layout import BITS
from ..kernels.saliency.probes import SaliencyMode

ATTENTION_MODES = (
    SaliencyMode.EQ8,
    SaliencyMode.ROW_LENGTH,
    SaliencyMode.ACCUMULATED,
    SaliencyMode.AUTHORS_CODE,
)


Rounding = Literal["nearest", "queries"]


@dataclass(frozen=True)
class Policy:
    """Settings of a quantised KV cache; the same for all layers except `sixteen_bit_layers`."""

    salient_ratio: float = 0.8
    high_bits: int = 4  # 2, 4 or 16; 16 stores the values as they are
    low_bits: int = 2
    probe_recent: float = 0.05  # share of a chunk's tokens that are probes because they are its last
    probe_random: float = 0.05  # share drawn from the others, reproducibly
    probe_cap: int = 512  # probes of a chunk at most
    saliency: SaliencyMode = SaliencyMode.EQ8
    flush_every: int = 128  # tokens
    sink_tokens: int = 0  # tokens of each row
    recent_tokens: int = 0  # columns
    max_query: int = 16  # tokens appended at once, at most
    rounding: Rounding = "nearest"
    seed: int = 0
    sixteen_bit_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "saliency", _mode(self.saliency))
        layers = self.sixteen_bit_layers
        if isinstance(layers, (str, int)):
            raise _bad("sixteen_bit_layers", layers, "a list of layer indices, for example [0, 31]")
        object.__setattr__(self, "sixteen_bit_layers", tuple(layers))
        _integer("high_bits", self.high_bits, 2, 16)
        _integer("low_bits", self.low_bits, 2, 16)
        for name, bits in (("high_bits", self.high_bits), ("low_bits", self.low_bits)):
            if bits not in BITS:
                raise _bad(name, bits, "2, 4 or 16 (16 stores the values as they are)")
        if self.low_bits > self.high_bits:
            raise _bad("low_bits", self.low_bits, f"at most high_bits, which is {self.high_bits}")
        _fraction("salient_ratio", self.salient_ratio)
        _fraction("probe_recent", self.probe_recent)
        _fraction("probe_random", self.probe_random)
        if not 0 < self.probe_recent + self.probe_random <= 1:
            raise _bad("probe_recent + probe_random", self.probe_recent + self.probe_random, "above 0 and at most 1")
        _integer("probe_cap", self.probe_cap, 1, None)
        _integer("flush_every", self.flush_every, 1, None)
        _integer("sink_tokens", self.sink_tokens, 0, None)
        _integer("recent_tokens", self.recent_tokens, 0, None)
        _integer("max_query", self.max_query, 1, MAX_QUERY)
        _integer("seed", self.seed, None, None)
        if self.rounding not in get_args(Rounding):
            raise _bad("rounding", self.rounding, " or ".join(get_args(Rounding)))
        for layer in self.sixteen_bit_layers:
            _integer("sixteen_bit_layers", layer, 0, None)

    @property
    def splits(self) -> bool:
        """Are there two groups of tokens, so that saliency matters?"""
        return 0.0 < self.salient_ratio < 1.0

    @property
    def uses_attention(self) -> bool:
        """Does the choice of salient tokens need attention scores?"""
        return self.splits and self.saliency in ATTENTION_MODES

    @property
    def rounds_with_queries(self) -> bool:
        """Are there codes, and do they depend on the queries of a chunk?"""
        used = {self.high_bits} if self.salient_ratio == 1.0 else {self.high_bits, self.low_bits}
        return self.rounding == "queries" and used != {16}

    @property
    def tail_slots(self) -> int:
        """W, the width of the 16-bit tail: allocated once."""
        return self.sink_tokens + self.recent_tokens + self.flush_every + self.max_query

    def for_layer(self, index: int) -> Policy:
        """The policy of one layer: lossless without saliency where the layer is named in `sixteen_bit_layers`."""
        if index not in self.sixteen_bit_layers:
            return self
        return replace(self, salient_ratio=1.0, high_bits=16, low_bits=16)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `Policy.from_dict` is the inverse."""
        return asdict(self) | {"saliency": str(self.saliency), "sixteen_bit_layers": list(self.sixteen_bit_layers)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Policy:
        """A policy from settings by name, the others at their defaults; a name that does not exist is refused."""
        return known_settings(cls, settings, "cache policy", code="CFG-050")


def resolve_policy(policy: Policy | str | Mapping[str, Any] | None) -> Policy:
    """A Policy from itself, the name of a preset, or a mapping of settings (`preset` names what it starts from)."""
    if policy is None:
        return PRESETS["default"]
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str):
        if policy not in PRESETS:
            raise RecipeError(
                f"cache policy is '{policy}'; presets are {', '.join(PRESETS)}.{suggest(policy, list(PRESETS))}",
                code="CFG-050",
            )
        return PRESETS[policy]
    if isinstance(policy, Mapping):
        settings = dict(policy)
        base = resolve_policy(settings.pop("preset", "default"))
        return known_settings(Policy, base.to_dict() | settings, "cache policy", code="CFG-050", also=("preset",))
    raise _bad("policy", policy, f"a Policy, a mapping of settings, or a preset: {', '.join(PRESETS)}")


def _mode(value: Any) -> SaliencyMode:
    try:
        return SaliencyMode(value)
    except ValueError:
        allowed = [str(mode) for mode in SaliencyMode]
        hint = suggest(str(value), allowed)
        raise _bad("saliency", value, f"{', '.join(allowed)}.{hint}") from None


def _fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise _bad(name, value, "a number from 0 to 1")


def _integer(name: str, value: Any, low: int | None, high: int | None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (low is not None and value < low) or (high is not None and value > high):
        bounds = [f"at least {low}" if low is not None else "", f"at most {high}" if high is not None else ""]
        raise _bad(name, value, "an integer " + " and ".join(part for part in bounds if part))


def _bad(name: str, value: Any, allowed: str) -> RecipeError:
    return RecipeError(f"cache policy: {name} is {value!r}; allowed: {allowed}", code="CFG-050")


PRESETS: dict[str, Policy] = {
    "default": Policy(),
    # the paper's 60 % without sinks or recents; it compresses every 100 tokens, here 128: one whole block
    "paper": Policy(salient_ratio=0.6),
    # no 2-bit tokens: every 4/2 mix lost retrieval; 128 recent tokens: with 64 it lost 2.6 points of it, with 128 1.9; keys rounded
    # with the queries in mind: a third of the KL (docs/log.md)
    "quality": Policy(
        salient_ratio=1.0, high_bits=4, low_bits=4, sink_tokens=16, recent_tokens=128, rounding="queries"
    ),
    "small": Policy(salient_ratio=0.4),
    "lossless": Policy(salient_ratio=1.0, high_bits=16, low_bits=16),
}
