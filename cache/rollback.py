"""Trying tokens on a cache and taking them back: a thought is decoded, mixed in, and leaves no trace.

    reserve(cache, 10)               # room in the tail, so that none of ten columns is packed
    ... a forward of 2 tokens ...
    marked = mark(cache)             # the first of them is to stay
    ... forwards of 8 more ...
    roll_back(cache, marked, columns=9, queries=1)

A crop alone would keep what the queries of the tried tokens added to the saliency of the others: `LayerState.crop` undoes
those of the last forward only. Layers of transformers have no such evidence. Caller: thoughts/generation.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import Cache

from ..base.errors import RecipeError
from ..kernels.cached_attention import SaliencyBuffers
from .hf_layer import ZipLayer
from .tail import copied, put_back


def reserve(cache: Cache, columns: int) -> None:
    """Flush the tails that cannot take `columns` more without a flush. RecipeError (CFG-076) if no tail can."""
    for layer in cache.layers:
        if not isinstance(layer, ZipLayer):
            continue
        policy = layer.policy
        if columns > policy.flush_every:
            raise RecipeError(
                f"a thought takes {columns} columns of the ZipCache's 16-bit tail, flush_every = {policy.flush_every} is "
                f"its room: use a policy with flush_every >= {columns}, or shorter thoughts",
                code="CFG-076",
            )
        state = layer.state
        if state is not None and state.window.columns + columns > policy.recent_tokens + policy.flush_every:
            state.flush()


def mark(cache: Cache) -> list[SaliencyBuffers | None]:
    """What `roll_back` needs, the saliency buffers of each layer's tail as they are now; None where it has none."""
    return [None if (buffers := _buffers(layer)) is None else copied(buffers) for layer in cache.layers]


def roll_back(cache: Cache, marked: Sequence[SaliencyBuffers | None], *, columns: int, queries: int) -> None:
    """Drop the last `columns` columns, of which the first `queries` were in the forward before the mark, its last ones.

    These queries, and all after the mark, no longer count as probes; the forward's other queries do. Nothing may have
    been flushed since the mark (`reserve`).
    """
    layers: list[Any] = cache.layers
    for layer, evidence in zip(layers, marked, strict=True):
        buffers = _buffers(layer)
        if buffers is None or evidence is None:
            layer.crop(-columns)
            continue
        layer.crop(queries - columns)
        put_back(buffers, evidence)
        layer.crop(-queries)


def _buffers(layer: Any) -> SaliencyBuffers | None:
    return layer.state.saliency if isinstance(layer, ZipLayer) and layer.state is not None else None
