"""The routed LoRA benchmark runs its layer part anywhere, and what it times computes the same thing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch


def test_every_formulation_is_the_same_function_and_has_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import routed_lora
    from routed_lora_peers import PEERS

    out = tmp_path / "found.json"
    words = [
        "--parts",
        "layer",
        "--shapes",
        "tiny",
        "--device",
        "cpu",
        "--tokens",
        "1",
        "9",
        "--experts",
        "4",
        "--k",
        "1",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["routed_lora.py", *words, "--out", str(out)])
    routed_lora.main()
    cells = json.loads(out.read_text())["cells"]
    assert not [c for c in cells if "failed" in c or "refused" in c]
    for tokens in (1, 9):
        rows = {c["what"]: c for c in cells if c["tokens"] == tokens and c["k"] == 2}
        assert set(rows) == set(PEERS)
        assert all(c["error"] < 1e-5 for name, c in rows.items() if name != "mttl")
        assert {c["what"] for c in cells if c["tokens"] == tokens and c["k"] == 0} == {"base", "peft_single_lora"}


def test_a_wrong_formulation_is_seen() -> None:
    """Weights of the wrong experts: the comparison with fp64 that stands before every time is not a formality."""
    from routed_lora import gate
    from routed_lora_peers import Layer, plain_concat

    layer = Layer("tiny", 4, 30, 1, torch.device("cpu"), torch.float32)
    assert gate(layer, plain_concat(2), 2, False) < 1e-5
    assert gate(layer, plain_concat(1), 2, False) > 1e-2


def test_a_failing_peer_leaves_its_error_and_the_rest_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import routed_lora

    def broken(k: int):
        raise RuntimeError("not today")

    monkeypatch.setitem(routed_lora.PEERS, "grouped_mm", lambda k: lambda x, g: broken(k))
    out = tmp_path / "found.json"
    words = ["--parts", "layer", "--shapes", "tiny", "--device", "cpu", "--tokens", "3", "--experts", "4", "--k", "2"]
    monkeypatch.setattr(sys, "argv", ["routed_lora.py", *words, "--out", str(out)])
    routed_lora.main()
    rows = {c["what"]: c for c in json.loads(out.read_text())["cells"]}
    assert "not today" in rows["grouped_mm"]["failed"]
    assert rows["r_three"]["ms"] > 0
