"""quietgoose: LoRA experts, routed per token.

>>> import quietgoose
>>> model = quietgoose.load("runs/nano_demo/export")   # a Hugging Face causal LM; every token picks its experts
"""

from __future__ import annotations

from typing import Any

from .version import __version__

__all__ = ["ThoughtGeneration", "ZipCache", "__version__", "compile_decode", "load", "load_tokenizer", "merge",
           "sensitive_layers"]  # fmt: skip


def __getattr__(name: str) -> Any:
    # lazily, so that `import quietgoose` costs no torch import
    if name in {"load", "load_tokenizer", "merge"}:
        from .train import export

        return getattr(export, name)
    if name in {"ZipCache", "compile_decode", "sensitive_layers"}:
        from . import cache

        return getattr(cache, name)
    if name == "ThoughtGeneration":
        from .thoughts import generation

        return generation.ThoughtGeneration
    raise AttributeError(f"module 'quietgoose' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
