"""The decode benchmark starts on any machine with its small shape, checks before it times, and keeps failures as text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the script in this process with arguments; returns the JSON it left."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import kv_cache

    def run(*arguments: str) -> Any:
        out = tmp_path / "result.json"
        words = ["kv_cache.py", "--tiny", "--steps", "4", "--decode-seconds", "0.2", "--out", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", words)
        before = torch.is_grad_enabled()
        try:
            kv_cache.main()
        finally:
            torch.set_grad_enabled(before)
        return json.loads(out.read_text())

    return run


@pytest.mark.slow
def test_small_shape_end_to_end(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    peers = ["dynamic", "static_captured", "zip_eager", "zip_captured:lossless", "nonsense", "hqq4"]
    found = script(
        "--device", "cpu", "--cells", "1x40", "2x500", "--prefill-tokens", "600", "--fuse", "none", "--peers", *peers
    )
    assert found["gate"]["green"]
    rows = {(r["peer"], r["rows"]): r for r in found["results"]}
    assert len(rows) == 2 * len(peers)
    assert "allowed are" in rows["nonsense", 1]["not_available"]
    for name in peers[:4]:
        assert rows[name, 1]["filled"] == "prefill"
        assert rows[name, 2]["filled"] == "random keys and values"
        for cell in (1, 2):
            row = rows[name, cell]
            assert row["decode_ms"]["p20"] <= row["decode_ms"]["median"] <= row["decode_ms"]["p80"]
            assert row["cache_bytes"] > 0
    assert rows["zip_eager", 2]["bits_per_number"] < 5 < rows["zip_captured:lossless", 2]["bits_per_number"]
    table = capsys.readouterr().out
    assert "### 2 x 500" in table
    assert "|zip_eager|eager|" in table


def test_a_red_gate_times_nothing(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import kv_cache_gate
    from quietgoose.cache.decode_zip import ZipDecodable

    own = ZipDecodable.attend

    def wrong(self: Any, layer: int, query: Any, key: Any, value: Any, scaling: float) -> Any:
        return own(self, layer, query, key, value * 1.5, scaling)

    monkeypatch.setattr(ZipDecodable, "attend", wrong)
    monkeypatch.setattr(kv_cache_gate, "STEPS", 4)
    with pytest.raises(SystemExit, match="gate is red"):
        script("--device", "cpu", "--peers", "dynamic")


def test_cells_are_checked(script: Any) -> None:
    with pytest.raises(SystemExit, match="rows x tokens"):
        script("--cells", "8by4096")
