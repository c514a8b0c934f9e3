"""ZipCache: a KV cache in few bits that the attention reads in place.

    model.generate(..., past_key_values=quietgoose.ZipCache(model.config))

policy.py says what is kept at which precision, state.py holds one layer's packed tokens and tail without knowing any
model, hf.py plugs it into transformers, decode.py captures a decode step. Importing this package imports no
transformers: what needs it (`_LAZY`) is loaded when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .memory import Bytes
from .policy import PRESETS, Policy, resolve_policy
from .state import LayerState

if TYPE_CHECKING:
    from .decode import compile_decode
    from .decode_sampling import Sampling
    from .decode_static import StaticKV
    from .hf import ZipCache
    from .sensitivity import layer_sensitivity, sensitive_layers

__all__ = ["PRESETS", "Bytes", "LayerState", "Policy", "Sampling", "StaticKV", "ZipCache", "compile_decode",
           "layer_sensitivity", "resolve_policy", "sensitive_layers"]  # fmt: skip

_LAZY = {"ZipCache": "hf", "compile_decode": "decode", "Sampling": "decode_sampling", "StaticKV": "decode_static",
         "sensitive_layers": "sensitivity", "layer_sensitivity": "sensitivity"}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
