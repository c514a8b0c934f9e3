"""Activation checkpointing of a Hugging Face model, as the jobs need it."""

from __future__ import annotations

from torch import nn


def recompute_activations(model: nn.Module, wanted: bool) -> None:
    """Recompute each block in the backward pass (or do not). Non-reentrant: the experts' tensors reach a block through
    the shared context, not as its arguments, and reentrant checkpointing would drop their gradients. Its check of shapes
    is off: under ZeRO-3 a frozen weight is whole or empty as need be, and the check refuses that.
    """
    settings = {"use_reentrant": False, "determinism_check": "none"}
    if wanted:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)  # type: ignore[operator]
    else:
        model.gradient_checkpointing_disable()  # type: ignore[operator]
