"""ZipCache in a captured decode step: write and attend are in the graph, flushes and counting on the host between.

One step, all layers: the tail lengths grow by one (a single launch), each layer writes its key and value to the last
slot and attends over arenas and tail (three launches). Every decoded column counts as a token, so no validity is
written: slots beyond the tail's length are valid beforehand (cache/tail.py).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ..base.errors import RecipeError
from .decode_append import write_last


class ZipDecodable:
    """Adapter of a filled ZipCache to decode_step.Decodable."""

    def __init__(self, cache: Any) -> None:
        states = [getattr(layer, "state", None) for layer in cache.layers]
        missing = [index for index, state in enumerate(states) if state is None]
        if missing:
            raise RecipeError(
                f"compile_decode: layers {missing[:4]} of the cache hold no packed state. Every layer must be a "
                "full-attention layer of a ZipCache that has seen a prompt; for other models use model.generate",
                code="CFG-048",
            )
        if any(layer.waiting for layer in cache.layers):
            raise RecipeError(
                "compile_decode: the keys of the last forward never reached the cache: make it as ZipCache(model.config), with "
                "the very config of the model, or call cache.reset() after an interrupted forward",
                code="CFG-066",
            )
        if any(layer.hidden or layer.blind for layer in cache.layers):
            raise RecipeError(
                "compile_decode: this cache holds columns that its model does not see (a later attention_mask hid them, or "
                "they were stored under another attention without a mask); a step sees all. Use model.generate, or "
                "cache.reset() and start again",
                code="CFG-049",
            )
        self.states: list[Any] = states
        self.num_layers = len(states)

    def before_step(self) -> bool:
        """Flush the layers whose window is full; True when any did (growing arenas move)."""
        flushed = [state.prepare(1) for state in self.states]
        return any(flushed)

    def is_full(self) -> bool:
        state = self.states[0]  # every layer holds the same columns
        return state.is_full or state.seq_length == state.capacity

    def enter_step(self) -> None:
        torch._foreach_add_([state.tail.length for state in self.states], 1)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        state = self.states[layer]
        write_last(key, value, state.tail.key, state.tail.value, state.tail.length)
        return state.attend(query, scaling=scaling).transpose(1, 2)

    def after_step(self) -> None:
        for state in self.states:
            state.advance(1)

    def uncount(self, finished: Tensor) -> None:
        accepted = [state.saliency.accepted for state in self.states if state.saliency is not None]
        if accepted:
            torch._foreach_mul_(accepted, (~finished).any().to(torch.int32))  # one launch for all layers

    def drop(self, columns: int) -> None:
        """What their queries added is undone for the last of them; the others are to be uncounted beforehand."""
        for state in self.states:
            state.crop(columns)

    def valid_columns(self) -> Tensor | None:
        return self.states[0].valid_columns()

    def signature(self) -> Hashable:
        addresses = tuple(t.data_ptr() for state in self.states for t in state.static_tensors())
        # a fork that has flushed reads its parent and its own store in two calls instead of one
        paths = tuple((len(s.history.segments), s.history.store.columns > 0) for s in self.states if s.history.segments)
        return addresses, paths
