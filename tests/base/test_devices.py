"""A device that is not there is refused by the option's name, with what there is."""

from __future__ import annotations

import pytest
import torch
from quietgoose.base.devices import usable_device
from quietgoose.base.errors import RecipeError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """`gpus(n)`: what PyTorch says of a machine with that many."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda") if count else None)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)

    return pretend


def test_what_is_there_is_taken(gpus) -> None:
    gpus(0)
    for wanted in (None, "auto", "cpu", torch.device("cpu")):
        assert usable_device(wanted) == torch.device("cpu")
    gpus(2)
    assert usable_device() == usable_device("auto") == torch.device("cuda")
    assert usable_device("cuda:1") == torch.device("cuda:1")
    assert usable_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("count", "wanted", "why"),
    [
        (0, "cuda", "there is no GPU that PyTorch sees; use cpu"),
        (0, torch.device("cuda:1"), "there is no GPU that PyTorch sees"),
        (2, "cuda:2", "PyTorch sees 2 of this kind, so at most cuda:1"),
        (2, "mps", "there is no mps that PyTorch sees"),
        (0, "meta", "there is no meta that PyTorch sees"),
        (0, "gpu", "allowed are auto, cpu, cuda"),
        (0, "", "allowed are auto, cpu, cuda"),
        (0, 1.5, "allowed are auto, cpu, cuda"),
    ],
)
def test_what_is_not_there_is_refused(gpus, count: int, wanted, why: str) -> None:
    gpus(count)
    with pytest.raises(RecipeError, match=f"QG-CFG-082 --device {wanted}: {why}"):
        usable_device(wanted, "--device")
