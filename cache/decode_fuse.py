"""Fewer launches in a decode step: what is compiled, and the compiler's settings."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..base.errors import RecipeError, suggest

Fuse = Literal["model", "layer", "none"]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a causal LM: the longest ModuleList whose members share one class."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    return max(lists, key=len, default=[])


def inductor_options(tune: bool) -> dict[str, Any]:
    """Settings of the compiler. `tune`: measured GEMM templates, and matrix-vector products as tuned reductions."""
    options: dict[str, Any] = {"triton.cudagraphs": False}
    if tune:
        options |= {"max_autotune": True, "coordinate_descent_tuning": True, "epilogue_fusion": True}
    return options


def fused_forward(model: nn.Module, fuse: Fuse, tune: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """(token [B,1], position [B,1]) -> logits [B,V] with the attention implementation that is active.

    `model`: one graph for the step. `layer`: one traced decoder layer for all of them (compiles in seconds, one more
    launch a layer). `none`: the model's own launches.
    """
    allowed = ("model", "layer", "none")
    if fuse not in allowed:
        hint = suggest(str(fuse), allowed)
        raise RecipeError(f"compile_decode: fuse is {fuse!r}; allowed: {', '.join(allowed)}.{hint}", code="CFG-045")

    def forward(token: Tensor, position: Tensor) -> Tensor:
        out = model(input_ids=token, position_ids=position, use_cache=False, return_dict=True)
        return out.logits[:, -1]

    settings: dict[str, Any] = {"dynamic": False, "options": inductor_options(tune)}
    if fuse == "none":
        return forward
    if fuse == "model":
        return torch.compile(forward, fullgraph=True, **settings)
    layers = decoder_layers(model)
    if not layers:
        raise RecipeError("compile_decode: fuse='layer' found no list of decoder layers in the model", code="CFG-045")
    traced = torch.compile(call_layer, fullgraph=True, **settings)

    def by_layer(token: Tensor, position: Tensor) -> Tensor:
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(replaced(layer, traced))
            return forward(token, position)

    return by_layer


def call_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


@contextmanager
def replaced(layer: nn.Module, traced: Callable[..., Any]) -> Any:
    """Inside, calling `layer` runs the traced function on it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return traced(layer, *args, **kwargs)

    own = layer.__dict__.get("forward")
    layer.forward = call
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own
