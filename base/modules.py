"""What a module's own call does beside its forward. Callers: what computes in the place of a linear's call (routing, cache)."""

from __future__ import annotations

from torch import nn


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to the module's call or stands in for it (hooks of forward and backward, ZeRO-3's among them;
    accelerate's): who computes without that call goes past them."""
    heard = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(map(bool, heard)) or hasattr(module, "_hf_hook")
