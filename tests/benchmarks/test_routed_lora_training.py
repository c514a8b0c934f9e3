"""The benchmark of training through a routed model runs anywhere, and times nothing whose gradients are wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


def cells(monkeypatch: pytest.MonkeyPatch, out: Path) -> dict[str, dict[str, Any]]:
    import routed_lora_training

    words = ["--shapes", "tiny", "--batches", "1x4", "--experts", "3", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["routed_lora_training.py", *words])
    routed_lora_training.main()
    return {cell["what"]: cell for cell in json.loads(out.read_text())["cells"]}


def test_every_implementation_has_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = cells(monkeypatch, tmp_path / "found.json")
    assert set(found) == {"base", "reference", "auto"}
    assert all(cell["ms"] > 0 for cell in found.values())
    assert found["auto"]["gradient_rmse"] < 1e-2


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import routed_lora_training

    own, count = routed_lora_training.gradients, iter(range(9))

    def wrong(model: Any, tokens: int) -> list[torch.Tensor]:
        return [gradient * (1 + 0.1 * next(count)) for gradient in own(model, tokens)[:1]]

    monkeypatch.setattr(routed_lora_training, "gradients", wrong)
    found = cells(monkeypatch, tmp_path / "found.json")
    assert "ms" in found["reference"]
    assert "ms" not in found["auto"]
    assert "relative RMSE" in found["auto"]["error"]
