"""Activation checkpointing of a Hugging Face model, as the jobs need it."""

from __future__ import annotations

from torch import nn


def recompute_activations(model: nn.Module, wanted: bool) -> None:
    """Recompute each block in the backward pass (or do not). Non-reentrant: the experts' tensors reach a block through
    the shared context, not as its arguments, and reentrant checkpointing would drop their gradients."""
    if wanted:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    else:
        model.gradient_checkpointing_disable()  # type: ignore[operator]
