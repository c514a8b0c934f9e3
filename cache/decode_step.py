"""How one decode step of a stock model reaches a cache of ours without Python state in the traced code.

The attention function `quietgoose_decode` calls one opaque operator, `quietgoose::decode_attention(query, key, value,
scaling)`; the operator asks the cache that is active for its next layer, which stores the new key and value and attends.
The compiler therefore sees neither the cache's tensors nor its host logic (the way vLLM hides its KV cache behind
`unified_attention`): no clones by functionalisation, one traced code for all layers. Order is kept because every
layer's output feeds the next.

`Decodable` is what a cache must offer; decode_static.py and decode_zip.py implement it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..base.errors import RecipeError

IMPLEMENTATION = "quietgoose_decode"


class Decodable(Protocol):
    """A cache whose decode step can be captured: all tensors static, all Python outside the step."""

    num_layers: int

    def before_step(self) -> bool:
        """Work between steps: flush when full, refuse when the capacity is used up. True if storage may have moved."""
        ...

    def is_full(self) -> bool:
        """Whether the next `before_step` packs or refuses: the last moment to see that no step is needed."""
        ...

    def enter_step(self) -> None:
        """Device work at the start of a step, part of the graph: the lengths grow by one."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store key and value [B,Hk,1,D] in `layer`, attend query [B,H,1,D] -> [B,1,H,D]. Part of the graph."""
        ...

    def after_step(self) -> None:
        """Host mirrors after a step; a replay runs no Python, so this is where they advance."""

    def uncount(self, finished: Tensor) -> None:
        """The step just made is no evidence if all of `finished` (bool [B], on the device) is true: `drop` will take it back,
        and the host does not know yet. Between steps, without synchronisation."""

    def drop(self, columns: int) -> None:
        """Forget the last `columns` columns, all of them made by steps; between steps."""

    def valid_columns(self) -> Tensor | None:
        """bool [B, columns]: the columns that a step sees, tokens and not padding; None where all are."""
        ...

    def signature(self) -> Hashable:
        """Addresses of every tensor a step touches, and whatever else its launches depend on; when it changes, the
        step is captured again."""
        ...


class _Active:
    """The cache of the step that is being run, traced or captured, and the layer whose turn it is."""

    def __init__(self) -> None:
        self.cache: Decodable | None = None
        self.layer = 0


_ACTIVE = _Active()


def in_step() -> bool:
    """Whether a decode step is being run or captured right now."""
    return _ACTIVE.cache is not None


@torch.library.custom_op("quietgoose::decode_attention", mutates_args=())
def decode_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """query [B,H,1,D], key and value [B,Hk,1,D] (after RoPE) -> [B,1,H,D]; the next layer of the active cache."""
    cache = _ACTIVE.cache
    if cache is None:
        raise RuntimeError("quietgoose::decode_attention was called outside a decode step of compile_decode")
    layer = _ACTIVE.layer
    _ACTIVE.layer = layer + 1
    out = cache.attend(layer, query, key, value, scaling)
    return out.contiguous()


@decode_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    rows, heads, length, width = query.shape
    return query.new_empty(rows, length, heads, width)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of a decode step, registered as `quietgoose_decode`."""
    for setting in ("softcap", "s_aux"):
        if kwargs.get(setting) is not None:
            raise RecipeError(
                f"compile_decode: the model's attention uses {setting}, which the decode step does not know; "
                "use model.generate with the same cache",
                code="CFG-040",
            )
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    return torch.ops.quietgoose.decode_attention(query, key, value, factor), None


AttentionInterface.register(IMPLEMENTATION, attention_forward)


def attention_configs(model: nn.Module) -> list[Any]:
    """The distinct configs the model's modules read their attention implementation from."""
    found = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    return list(found.values())


@contextmanager
def decoding(model: nn.Module, cache: Decodable) -> Iterator[None]:
    """Inside: every attention layer of `model` goes to `cache`. Undone on leaving, so prefill stays stock."""
    configs = attention_configs(model)
    before = [config._attn_implementation for config in configs]
    outer = (_ACTIVE.cache, _ACTIVE.layer)
    try:
        for config in configs:
            config._attn_implementation = IMPLEMENTATION
        _ACTIVE.cache, _ACTIVE.layer = cache, 0
        yield
        if _ACTIVE.layer != cache.num_layers:
            raise RecipeError(
                f"compile_decode: the step called {_ACTIVE.layer} attention layers, the cache has {cache.num_layers}; "
                "only models whose every layer uses the attention registry are supported",
                code="CFG-041",
            )
    finally:
        for config, name in zip(configs, before):
            config._attn_implementation = name
        _ACTIVE.cache, _ACTIVE.layer = outer


def check_model(model: nn.Module, capacity: int) -> None:
    """Refuse what a full-attention cache would silently get wrong: sliding windows shorter than the capacity."""
    for config in attention_configs(model):
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        if not kinds and window is not None:
            kinds = {"sliding_attention"}
        other = kinds - {"full_attention", "sliding_attention"}
        if other:
            raise RecipeError(
                f"compile_decode: layers of type {sorted(other)} are not supported; supported: full_attention, and "
                "sliding_attention while the window is no shorter than the capacity",
                code="CFG-042",
            )
        if "sliding_attention" in kinds and window is not None and window < capacity:
            raise RecipeError(
                f"compile_decode: sliding window {window} is shorter than the capacity {capacity}; make the cache no "
                "larger than the window, or use model.generate",
                code="CFG-042",
            )


__all__ = ["IMPLEMENTATION", "Decodable", "attention_configs", "check_model", "decoding"]
