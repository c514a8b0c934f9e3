"""Who listens to a module's call."""

from __future__ import annotations

import pytest
from quietgoose.base.modules import hooked
from torch import nn

LISTENERS = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "before forward": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "before backward": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    "accelerate": lambda module: setattr(module, "_hf_hook", object()),
}


@pytest.mark.parametrize("kind", LISTENERS)
def test_every_listener_is_seen(kind: str) -> None:
    module = nn.Linear(2, 2)
    assert not hooked(module)
    handle = LISTENERS[kind](module)
    assert hooked(module)
    if handle is not None:
        handle.remove()
        assert not hooked(module)
