"""The methods kv_quality.py compares, in the order in which they run.

A method is a peer's name and its settings. ZipCache settings name a preset or fields of quietgoose.cache.policy.Policy.
`seeds` > 1 repeats a method that draws probes (or its selection) at random. Called by kv_quality.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CHUNK = 512  # queries at a time where attention is written out: probabilities of 8k prompts need not stand in memory


@dataclass(frozen=True)
class Method:
    """`family` colours the picture; `long` methods take part in the slow stages (drift, long passkeys)."""

    name: str
    peer: str
    settings: dict[str, Any] = field(default_factory=dict)
    family: str = ""
    seeds: int = 1
    long: bool = False


def zip_method(name: str, *, seeds: int = 1, long: bool = False, family: str = "zipcache", **policy: Any) -> Method:
    return Method(name, "zipcache", {"policy": policy}, family, seeds, long)


def preset(name: str, *, seeds: int = 1) -> Method:
    return Method(f"zip {name}", "zipcache", {"policy": name}, "preset", seeds, True)


def kivi(bits: int, residual: int, *, value_bits: int | None = None, long: bool = False) -> Method:
    name = f"KIVI-{bits} R{residual}" if value_bits is None else f"KIVI K{bits}V{value_bits} R{residual}"
    settings = {"bits": bits, "residual": residual, "group": 32, "value_bits": value_bits}
    return Method(name, "kivi", settings, f"kivi R{residual}", 1, long)


def hugging_face(backend: str, bits: int, *, long: bool = False) -> Method:
    return Method(f"HF {backend}-{bits}", backend, {"nbits": bits}, f"HF {backend}", 1, long)


def importance(name: str, peer: str, *, long: bool = False, **settings: Any) -> Method:
    return Method(name, peer, {**settings, "query_chunk": CHUNK}, peer, 1, long)


SIXTEEN = Method("16 bit", "dynamic", {}, "16 bit", 1, True)

METHODS: list[Method] = [
    SIXTEEN,
    preset("quality"), preset("paper", seeds=3), preset("default"), preset("small"), preset("lossless"),
    kivi(4, 32, long=True), kivi(2, 32, long=True), kivi(4, 32, value_bits=2), kivi(2, 32, value_bits=4),
    hugging_face("quanto", 4, long=True), hugging_face("quanto", 2), hugging_face("hqq", 4, long=True), hugging_face("hqq", 2),
    kivi(4, 128), importance("H2O 40 %", "h2o", long=True, heavy_ratio=0.2, recent_ratio=0.2),
    importance("MiKV 4/2 60 %", "mikv", long=True), importance("MiKV 16/2 20 %", "mikv", high_bits=16, ratio=0.2),
    zip_method("zip 60 % random", seeds=3, family="control", salient_ratio=0.6, saliency="random"),
    zip_method("zip 60 % authors_code", family="control", salient_ratio=0.6, saliency="authors_code"),
    zip_method("zip 60 % row_length", family="control", salient_ratio=0.6, saliency="row_length"),
    zip_method("zip 60 % accumulated", family="control", salient_ratio=0.6, saliency="accumulated"),
    zip_method("zip 60 % recent", family="control", salient_ratio=0.6, saliency="recent"),
    zip_method("zip 4/4 queries", salient_ratio=1.0, low_bits=4, rounding="queries"),
    zip_method("zip 4/4 s16 queries", salient_ratio=1.0, low_bits=4, sink_tokens=16, rounding="queries"),
    zip_method("zip 80 % queries", salient_ratio=0.8, rounding="queries"),
    zip_method("zip 60 % queries", salient_ratio=0.6, rounding="queries"),
    zip_method("zip 4/4", long=True, salient_ratio=1.0, low_bits=4), zip_method("zip 80 %", salient_ratio=0.8),
    zip_method("zip 60 %", salient_ratio=0.6), zip_method("zip 40 %", salient_ratio=0.4), zip_method("zip 2/2", salient_ratio=0.0),
    kivi(2, 128), kivi(4, 256),
    zip_method("zip 16/4 2 % s16 r64 queries", salient_ratio=0.02, high_bits=16, low_bits=4, sink_tokens=16, recent_tokens=64,
               rounding="queries"),
    zip_method("zip 16/4 5 % s16 r64 queries", salient_ratio=0.05, high_bits=16, low_bits=4, sink_tokens=16, recent_tokens=64,
               rounding="queries"),
    zip_method("zip 4/4 s16 r128 queries", salient_ratio=1.0, low_bits=4, sink_tokens=16, recent_tokens=128, rounding="queries"),
    zip_method("zip 4/4 s16 r64 queries, layers 7 18 in 16", salient_ratio=1.0, low_bits=4, sink_tokens=16, recent_tokens=64,
               rounding="queries", sixteen_bit_layers=[7, 18]),
    zip_method("zip 4/4 s16 r64 queries, layers 18 23 in 16", salient_ratio=1.0, low_bits=4, sink_tokens=16, recent_tokens=64,
               rounding="queries", sixteen_bit_layers=[18, 23]),
    zip_method("zip quality, layers 18 23 in 16", preset="quality", sixteen_bit_layers=[18, 23]),
    zip_method("zip 4/4 s4", salient_ratio=1.0, low_bits=4, sink_tokens=4),
    zip_method("zip 4/4 s16", salient_ratio=1.0, low_bits=4, sink_tokens=16),
    zip_method("zip 4/4 s4 r64", salient_ratio=1.0, low_bits=4, sink_tokens=4, recent_tokens=64),
    zip_method("zip 80 % s4", sink_tokens=4), zip_method("zip 80 % s4 r64", sink_tokens=4, recent_tokens=64),
    zip_method("zip 60 % s4", salient_ratio=0.6, sink_tokens=4),
    zip_method("zip 60 % s4 r64", salient_ratio=0.6, sink_tokens=4, recent_tokens=64),
    zip_method("zip 40 % s4 r64", salient_ratio=0.4, sink_tokens=4, recent_tokens=64),
    zip_method("zip 16/4 2 % s8 r16", long=True, salient_ratio=0.02, high_bits=16, low_bits=4, sink_tokens=8, recent_tokens=16),
    zip_method("zip 16/4 5 % s8 r16", salient_ratio=0.05, high_bits=16, low_bits=4, sink_tokens=8, recent_tokens=16),
    zip_method("zip 4/4 s16 r64", salient_ratio=1.0, low_bits=4, sink_tokens=16, recent_tokens=64),
    zip_method("zip 16/4 2 %", salient_ratio=0.02, high_bits=16, low_bits=4),
    zip_method("zip 16/4 2 % s8 r64", salient_ratio=0.02, high_bits=16, low_bits=4, sink_tokens=8, recent_tokens=64),
    zip_method("zip 16/4 2 % random", family="control", salient_ratio=0.02, high_bits=16, low_bits=4, saliency="random"),
    Method("HF fp8", "fp8", {}, "HF fp8"),
]  # fmt: skip


def chosen(names: list[str] | None) -> list[Method]:
    """The methods whose names contain one of `names`, 16 bit first; all if None.

    Raises:
        ValueError: a name that fits no method.
    """
    if not names:
        return METHODS
    for name in names:
        if not any(name in method.name for method in METHODS):
            raise ValueError(f"--methods {name}: fits none of {', '.join(method.name for method in METHODS)}")
    found = [method for method in METHODS if any(name in method.name for name in names)]
    return found if SIXTEEN in found else [SIXTEEN, *found]


def seeded(method: Method, seed: int) -> Method:
    """The method with another seed of its random choices."""
    policy = method.settings.get("policy")
    if seed == 0 or policy is None:
        return method
    fields = {"preset": policy} if isinstance(policy, str) else dict(policy)
    return Method(method.name, method.peer, {**method.settings, "policy": {**fields, "seed": seed}}, method.family)
