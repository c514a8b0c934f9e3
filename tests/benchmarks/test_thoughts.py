"""The thoughts benchmarks start on any machine, check before they time, and the peer's loop computes what thoughts/ does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import thought_attention as attention_script
import thoughts_authors_loop as loop_script
import thoughts_memory as memory_script
import torch
from quietgoose.thoughts.config import ThoughtConfig

CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs a script's main in this process with arguments; returns the JSON it left."""

    def started(script: Any, *arguments: str, tiny: bool = True) -> Any:
        out = tmp_path / "result.json"
        words = [script.__name__, "--device", "cpu", "--seconds", "0.05", "--out", str(out), *arguments]
        words += ["--tiny"] if tiny else []
        monkeypatch.setattr(sys, "argv", words)
        script.main()
        return json.loads(out.read_text())

    return started


@pytest.mark.parametrize("fixes", list(memory_script.LOOP_ARMS.values()), ids=list(memory_script.LOOP_ARMS))
def test_the_authors_loop_has_the_losses_and_gradients_of_thoughts(fixes) -> None:
    config = ThoughtConfig(tokens=2, lookahead=3, samples=3, ratio_cap=None, advantage="one_sided", initial_weight=0.2)
    found = loop_script.gate(loop_script.small_model(), torch.arange(22).view(2, 11) % 61, config, fixes)
    assert loop_script.is_green(found), found
    assert found["compared"] == 26


def test_a_longer_lookahead_than_the_row_and_one_thought_token() -> None:
    config = ThoughtConfig(tokens=1, lookahead=6, samples=2, ratio_cap=None)
    found = loop_script.gate(loop_script.small_model(1), torch.tensor([[3, 9, 12, 40]]), config)
    assert loop_script.is_green(found), found


def test_the_gate_sees_a_position_that_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = loop_script.AuthorsLoop._forward
    monkeypatch.setattr(
        loop_script.AuthorsLoop, "_forward", lambda self, x, cache, step: forward(self, x.roll(step, 1), cache, step)
    )
    assert not loop_script.is_green(loop_script.small_gate(CPU))


def test_every_arm_runs_and_is_in_the_table(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["loop", "fused", "phases_dense", "prefix_once", "graphs", "captured", "int4", "recomputed"]
    found = run(memory_script, "--cells", "10:2:2", "--rows", "1", "--arms", *arms, "--branch-tokens", "32768", "24")
    rows = {r["arm"]: r for r in found["results"]}
    assert set(rows) == set(arms)
    assert [r["arm"] for r in found["results"]].count("captured") == 2, "one a chunk"
    for row in found["results"]:
        assert row["step_ms"]["p20"] <= row["step_ms"]["median"] <= row["step_ms"]["p80"], row
        assert row["tokens_per_second"] > 0
    # the dense mask and the kernel sample the same thoughts; few bits sample under another policy than is trained
    assert rows["phases_dense"]["rollout_kl"] < 1e-9
    assert rows["prefix_once"]["rollout_kl"] < 1e-9
    assert rows["int4"]["rollout_kl"] > 1e-6
    assert rows["int4"]["thought_kv_bytes"] < rows["graphs"]["thought_kv_bytes"] / 4
    assert memory_script.thoughts_attention.thought_attention.__module__ == "quietgoose.kernels.thought_attention"
    table = capsys.readouterr().out
    assert "L:T:S = 10:2:2" in table
    assert "|loop|1|" in table
    assert "|recomputed 24|1|" in table


MEASURED = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("cell", "arm", "chunk"),
    [
        ("512:9:2", "captured", 2048),
        ("512:9:2", "recomputed", 2048),
        ("1024:13:4", "captured", 8192),
        ("2048:4:2", "recomputed", 8192),
    ],
)
def test_an_estimate_is_what_was_measured_on_a_gpu(run: Any, cell: str, arm: str, chunk: int) -> None:
    file = MEASURED / "2026-11-27_thoughts_memory_captured_h100.json"
    report = json.loads(file.read_text())
    found = [
        r["peak_bytes"]
        for one in report.get("runs", [report])
        for r in one["results"]
        if (r["branch_tokens"], r["cell"], r["arm"], r["rows"]) == (chunk, cell, arm, 1)
    ]
    words = ["--estimate", str(chunk), "--cells", cell, "--arms", arm, "--rows", "1"]
    (told,) = run(memory_script, *words, tiny=False)["results"]
    assert found
    lost = found[0] - told["peak_bytes"]
    assert 0.2e9 < lost < 1.2e9, "what pools of captured graphs cannot hand out again, and libraries' work spaces"


def test_an_estimate_knows_chunks_and_bits(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--estimate", "0", "64", "--cells", "16:3:2", "--rows", "2", "--arms", "chunks", "int4"]
    all_at_once, in_chunks = run(memory_script, *words)["results"]
    assert all_at_once["arm"] == in_chunks["arm"] == "int4", "arms whose rollout is captured"
    assert in_chunks["peak_bytes"] < 0.8 * all_at_once["peak_bytes"]
    exact = 2 * 2 * 2 * 2 * 16 * 2 * 3 * 8 * 2  # keys and values, layers, rows, heads, anchors, S, T, width, bytes
    assert in_chunks["thought_kv_bytes"] == all_at_once["thought_kv_bytes"] < exact / 2
    assert "|int4, all at once|int4, chunks of 64|" in capsys.readouterr().out


def test_a_red_gate_times_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        memory_script, "small_gate", lambda device: dict.fromkeys([*loop_script.GATE_LIMITS, "compared"], 1.0)
    )
    with pytest.raises(SystemExit, match="nothing is timed"):
        run(memory_script, "--cells", "10:2:2")


def test_kernel_benchmark_end_to_end(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(attention_script, "--peers", "dense", "flex")
    rows = {(r["case"].split()[0], r["case"].split()[-1], r["peer"]): r for r in found["results"]}
    for case in attention_script.TINY_CASES:
        for kind in ("gradient", "rollout"):
            assert "not_available" in rows[case, kind, "flex"]
            for peer in ("dense", "stock"):
                row = rows[case, kind, peer]
                assert max(row["error_of"].values()) < 1e-5
                assert ("both_ms" in row) == (kind == "gradient")
    assert "|stock|" in capsys.readouterr().out


def test_a_wrong_peer_is_not_timed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_script.dense
    monkeypatch.setattr(attention_script, "dense", lambda case, *tensors: right(case, *tensors) * 1.01)
    found = run(attention_script, "--cases", "tiny:20:nth4:1:1:1", "--kinds", "gradient", "--peers", "dense")
    dense = next(r for r in found["results"] if r["peer"] == "dense")
    assert "out is off by" in dense["error"]
    assert "forward_ms" not in dense


def test_the_sweep_times_each_kernel(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(attention_script, "SWEPT", [(16, 16, 4, 1)])
    found = run(attention_script, "--sweep", "--cases", "tiny:12:nth4:1:1:1", "--kinds", "gradient")
    rows = found["sweep"][0]["rows"]
    assert {r["kernel"] for r in rows} == {"forward", "query_gradient", "own_gradient", "prefix_gradient"}
    assert all("ms" in r for r in rows), rows
