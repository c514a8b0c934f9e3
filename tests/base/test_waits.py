"""A wait for the device becomes the caller's error; any other error stays what it is, and the debug mode is put back."""

from __future__ import annotations

import pytest
import torch
from quietgoose.base.waits import refusing_waits


class Waits(Exception):
    pass


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The debug modes set, on a machine that may have no device."""
    found: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", found.append)
    return found


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("called a synchronizing CUDA operation"), Waits),
        (RuntimeError("out of range"), RuntimeError),
        (None, None),
    ],
)
def test_only_a_wait_is_refused(modes: list[object], error: Exception | None, expected: type[Exception] | None) -> None:
    found = None
    try:
        with refusing_waits(Waits):
            assert modes == ["error"]
            if error is not None:
                raise error
    except Exception as raised:
        found = type(raised)
    assert found is expected
    assert modes == ["error", 0]
