"""Layers that keep their input alone and run again in the backward pass: activation checkpointing of the gradient pass.

Not transformers' own switch: that wants a model in training mode, and saves the state of random numbers, which waits for the
device where it is captured. Thoughts drop nothing out, so no state need be saved. Called by terms.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..base.errors import RecipeError


def layers_of(model: nn.Module) -> list[Any]:
    """Those that transformers marks as fit for it."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def recomputed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """If `wanted`, what the layers compute within is forgotten and computed again; the backward pass belongs inside as well.

    RecipeError CFG-103 for a model without such layers.
    """
    layers = layers_of(model) if wanted else []
    if wanted and not layers:
        raise RecipeError(
            f"{type(model).__name__} has no layers that transformers can run again: switch thoughts.train.activation_checkpointing "
            "off",
            code="CFG-103",
        )
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_run_again, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _run_again(forward: Any, *inputs: Any, **options: Any) -> Any:
    return checkpoint(
        partial(forward, **options), *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
    )
