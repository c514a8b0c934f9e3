"""The benchmark of a linear with row adapters runs anywhere, and a way that gives other numbers has no time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

WAYS = {"base alone", "adapters_first", "base_first", "apart"}


def lines(monkeypatch: pytest.MonkeyPatch, out: Path) -> list[dict[str, Any]]:
    import training_products

    words = ["--tiny", "--device", "cpu", "--seconds", "0.01", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["training_products.py", *words])
    training_products.main()
    return json.loads(out.read_text())["lines"]


def test_every_way_is_timed_at_every_site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = lines(monkeypatch, tmp_path / "made" / "found.json")
    assert [line["site"] for line in found] == ["q, o", "k, v", "gate, up", "down"]
    assert all(line.keys() == {"site", "least_us", *WAYS} for line in found)
    assert all(line[way] > 0 for line in found for way in WAYS)


def test_a_way_that_is_wrong_has_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from quietgoose.kernels.routed_lora import rows

    right = rows.adapters_first
    monkeypatch.setattr(rows, "adapters_first", lambda *given: 1.02 * right(*given))
    for line in lines(monkeypatch, tmp_path / "found.json"):
        assert str(line["adapters_first"]).startswith("red")
        assert line["base_first"] > 0
