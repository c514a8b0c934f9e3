"""ZipCache: a KV cache in few bits that the attention reads in place.

    model.generate(..., past_key_values=quietgoose.ZipCache(model.config))

policy.py says what is kept at which precision, state.py holds one layer's packed tokens and tail without knowing any
model, hf.py plugs it into transformers, decode.py captures a decode step. Importing this package imports no
transformers: `ZipCache` and `compile_decode` are loaded when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .memory import Bytes
from .policy import PRESETS, Policy, resolve_policy
from .state import LayerState

if TYPE_CHECKING:
    from .decode import compile_decode
    from .hf import ZipCache

__all__ = ["PRESETS", "Bytes", "LayerState", "Policy", "ZipCache", "compile_decode", "resolve_policy"]

_LAZY = {"ZipCache": "hf", "compile_decode": "decode"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
