"""The routed LoRA benchmark runs its layer part anywhere, and what it times computes the same thing."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


def gate(layer: Any, function: Any, k: int, arrow: bool) -> float:
    from routed_lora_layers import timed
    from routed_lora_peers import error_of

    return timed(layer, function, error_of(layer, k, arrow))["error"]


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
    from routed_lora_peers import Layer, plain_concat

    layer = Layer("tiny", 4, 30, 1, torch.device("cpu"), torch.float32)
    assert gate(layer, plain_concat(2), 2, False) < 1e-5
    assert gate(layer, plain_concat(1), 2, False) > 1e-2


def layer_cells(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> list[dict[str, Any]]:
    import routed_lora

    common = ["--parts", "layer", "--shapes", "tiny", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["routed_lora.py", *common, *words])
    routed_lora.main()
    return json.loads(out.read_text())["cells"]


def test_a_wrong_formulation_of_ours_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import routed_lora_layers
    from routed_lora_peers import plain_concat

    def two(options: Any, layer: Any, k: int) -> dict[str, Any]:
        return {"ours": plain_concat(1), "fused": plain_concat(k)}

    monkeypatch.setattr(routed_lora_layers, "rows", two)
    found = layer_cells(monkeypatch, tmp_path / "found.json", "--tokens", "9", "--experts", "4", "--k", "2")
    ours, fused = (next(c for c in found if c["what"] == name) for name in ("ours", "fused"))
    assert ours["error"] > 1e-2
    assert ("ms" in ours, "refused" in ours) == (False, True)
    assert ("ms" in fused, "refused" in fused) == (True, False)


def test_the_grid_is_whole_and_its_first_k_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every cell of the grid has a row of every peer: a time, or why there is none."""
    import routed_lora_layers
    from routed_lora_peers import PEERS

    monkeypatch.setattr(routed_lora_layers, "MOST_BYTES", 50_000)  # of the tiny shape
    words = ["--tokens", "3", "19", "--experts", "2", "16", "--k", "1", "2", "4"]
    found = layer_cells(monkeypatch, tmp_path / "found.json", *words)
    rows = [c for c in found if c["k"]]
    want = {(n, t, k, name) for n in (2, 16) for t in (3, 19) for k in (1, 2, 4) if k <= n for name in PEERS}
    assert {(c["experts"], c["tokens"], c["k"], c["what"]) for c in rows} == want
    assert len(rows) == len(want)
    skipped = [c for c in rows if "ms" not in c]
    assert {(c["experts"], c["tokens"], c["what"]) for c in skipped} == {
        (16, 19, "peft_arrow"),
        (16, 19, "mttl"),
        (2, 19, "mttl"),
    }
    assert all("skipped" in c for c in skipped)
    ks = [c["k"] for c in rows]
    assert ks.index(1) > max(i for i, k in enumerate(ks) if k == 2)
    assert next(c["experts"] for c in rows if c["k"] == 2) == 16
    assert sum(c["k"] == 0 for c in found) == 2 * 4  # base and one LoRA, once a cell


def test_what_the_budget_leaves_out_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["--tokens", "3", "--experts", "2", "--k", "2", "--budget-seconds", "0"]
    found = layer_cells(monkeypatch, tmp_path / "found.json", *words)
    assert [(c["experts"], c["ks"], "budget" in c["skipped"]) for c in found] == [(2, [2], True)]


def test_a_layer_with_other_tokens_has_the_same_experts() -> None:
    from routed_lora_layers import jobs
    from routed_lora_peers import Layer, plain_concat

    bank = Layer("tiny", 3, 1, 2, torch.device("cpu"), torch.float32)
    layer = bank.at(7, 1)
    assert (layer.tokens, len(layer.copies), [x.shape[0] for x in layer.inputs]) == (7, 1, [7] * 4)
    assert layer.copies[0][0].a_RI is bank.copies[0][0].a_RI
    assert gate(layer, plain_concat(2), 2, False) < 1e-5
    assert gate(bank.last(), plain_concat(2), 2, False) < 1e-5
    options = argparse.Namespace(k=[1, 2, 4], shapes=["tiny"], experts=[2, 16], tokens=[1, 9], ours=["table", "split"])
    found = jobs(options)
    assert found[0] == ("tiny", 16, 1, 2, "table")
    assert len(found) == len(set(found)) == 2 * 2 * (3 + 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_compared_is_what_is_timed() -> None:
    """A formulation that goes another way while it is captured, and is wrong there."""
    from routed_lora_layers import timed
    from routed_lora_peers import Layer, error_of, plain_concat

    layer = Layer("tiny", 4, 30, 2, torch.device("cuda"), torch.bfloat16)
    right, check = plain_concat(2), error_of(layer, 2)

    def other(x: torch.Tensor, group: Any) -> list[torch.Tensor]:
        return [2 * y if torch.cuda.is_current_stream_capturing() else y for y in right(x, group)]

    assert timed(layer, right, check, limit=2e-2)["mode"] == "graph"
    wrong = timed(layer, other, check, limit=2e-2)
    assert wrong["error"] > 0.5
    assert "ms" not in wrong
    assert timed(layer, other, check, capture=False, limit=2e-2)["mode"] == "calls"


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


def test_a_cell_whose_base_fails_leaves_the_other_cells_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import routed_lora_layers

    plain = routed_lora_layers.base

    def base(x: torch.Tensor, group: Any) -> list[torch.Tensor]:
        if len(x) == 19:
            raise RuntimeError("no memory for so many tokens")
        return plain(x, group)

    monkeypatch.setattr(routed_lora_layers, "base", base)
    words = ["--tokens", "19", "3", "--experts", "2", "--k", "2", "1", "--peers", "plain_concat"]
    found = layer_cells(monkeypatch, tmp_path / "found.json", *words)
    failed = [c for c in found if "failed" in c]
    assert [(c["tokens"], c["ks"], c["failed"]) for c in failed] == [
        (19, [2], "no memory for so many tokens"), (19, [1], "no memory for so many tokens"),
    ]  # fmt: skip
    assert {(c["tokens"], c["k"]) for c in found if c.get("what") == "plain_concat"} == {(3, 2), (3, 1)}


@pytest.mark.parametrize("bad", [slice(1500, 1700), slice(4990, 5000)])
def test_the_gate_sees_tokens_in_the_middle_and_at_the_end(bad: slice) -> None:
    """A race spoils tiles that come late: 5,000 tokens, of which one tile's outputs are wrong."""
    from routed_lora_peers import Layer, plain_concat

    layer = Layer("tiny", 2, 5000, 1, torch.device("cpu"), torch.float32)
    right = plain_concat(1)

    def late_error(x: torch.Tensor, group: Any) -> list[torch.Tensor]:
        return [y.index_fill(0, torch.arange(5000)[bad], 0.0) for y in right(x, group)]

    assert gate(layer, right, 1, False) < 1e-5
    assert gate(layer, late_error, 1, False) > 1e-2


def test_a_nan_at_a_later_linear_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from quietgoose.kernels.testing import relative_rmse
    from routed_lora_peers import Layer, plain_concat

    layer, right = Layer("tiny", 2, 9, 1, torch.device("cpu"), torch.float32), plain_concat(1)
    seen = []

    def last_is_nan(x: torch.Tensor, group: Any) -> list[torch.Tensor]:
        seen.append(group)
        return [y * float("nan") if len(seen) > 1 else y for y in right(x, group)]

    assert not gate(layer, last_is_nan, 1, False) <= 1e-2
    import routed_lora_whole

    calls = iter(range(10**6))
    monkeypatch.setattr(
        routed_lora_whole, "relative_rmse", lambda *pair: float("nan") if next(calls) == 5 else relative_rmse(*pair)
    )
    cells = whole(monkeypatch, tmp_path / "found.json", "--parts", "models")
    assert [c["refused"] for c in cells if "refused" in c] == ["red gate: ['2x8']"]


@pytest.mark.parametrize("tokens", [1, 1024, 1025, 32768])
def test_checked_rows_reach_from_the_first_to_the_last(tokens: int) -> None:
    from routed_lora_peers import Layer

    rows = Layer("tiny", 1, tokens, 1, torch.device("cpu"), torch.float32).checked_rows()
    assert (int(rows[0]), int(rows[-1])) == (0, tokens - 1)
    assert tokens == 1 or int(rows.diff().max()) <= 1 + tokens // 800
    assert len(rows) <= 1024
    assert torch.equal(rows[-min(128, tokens) :].cpu(), torch.arange(tokens)[-128:])


def whole(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> list[dict[str, Any]]:
    import routed_lora

    common = ["--shapes", "tiny", "--device", "cpu", "--model-experts", "4", "--batches", "2x8", "--fuse", "none"]
    common += ["--caches", "static", "--no-peft", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["routed_lora.py", *common, *words])
    routed_lora.main()
    return json.loads(out.read_text())["cells"]


def test_whole_models_are_compared_before_they_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cells = whole(monkeypatch, tmp_path / "found.json", "--parts", "models", "decode")
    assert not [c for c in cells if "failed" in c or "refused" in c]
    assert [(c["part"], c.get("what", c.get("experts"))) for c in cells] == [
        ("models", "base"), ("models", "routed 4"), ("decode", 0), ("decode", 4),
    ]  # fmt: skip
    assert all(c["ms"] > 0 and c["share"] > 0 for c in cells)
    assert cells[1]["sites_error"]["2x8"] < 1e-2
    assert cells[1]["logits_error"] <= 1.2 * cells[1]["logits_error_plain"] < 0.1
    assert all(c["logits_error"] < 2e-2 for c in cells[2:])


def test_a_model_further_from_fp32_than_its_plain_twin_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import routed_lora_whole

    right = routed_lora_whole.forward

    def wrong(model: Any, ids: Any) -> Any:
        state = getattr(model, "routing_state", None)
        banks = [] if state is None else [site.adapter.shared for site in state.modules.values()]
        return (
            right(model, ids)
            if all(b.implementation == "reference" for b in banks)
            else lambda: 1.1 * right(model, ids)()
        )

    monkeypatch.setattr(routed_lora_whole, "forward", wrong)
    cells = whole(monkeypatch, tmp_path / "found.json", "--parts", "models")
    assert [c["what"] for c in cells if "ms" in c] == ["base"]
    assert [c["refused"] for c in cells if "refused" in c] == ["red gate: ['2x8']"]


def test_a_decode_step_that_answers_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from quietgoose.cache.decode import CompiledDecode

    own = CompiledDecode.step
    monkeypatch.setattr(CompiledDecode, "step", lambda self, token: own(self, token) * 1.2)
    cells = whole(monkeypatch, tmp_path / "found.json", "--parts", "decode")
    assert ["refused" in c for c in cells] == [True, True]


def test_a_part_that_fails_leaves_the_others_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import routed_lora_whole

    def broken(*given: Any) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr(routed_lora_whole, "without_mask", broken)
    cells = whole(monkeypatch, tmp_path / "found.json", "--parts", "models", "layer", "--tokens", "3", "--experts", "4")
    assert "not today" in cells[0]["failed"]
    assert {c["part"] for c in cells[1:]} == {"layer"}
    monkeypatch.undo()
    monkeypatch.setattr(routed_lora_whole, "make_library", broken)
    cells = whole(monkeypatch, tmp_path / "again.json", "--parts", "models", "decode")
    assert [("not today" in c.get("failed", ""), "ms" in c) for c in cells] == [(False, True), (True, False)] * 2


def test_arms_of_a_wide_model_are_captured_one_by_one_and_the_tables_are_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU, where nothing is captured: what each arm would be captured with."""
    import argparse

    import routed_lora_wide
    from quietgoose.kernels.routed_lora import formulation, tiles

    seen: list[tuple[Any, ...]] = []

    def captured(work: Any) -> Any:
        tables = tiles.choose(tiles.BESIDE, 4096, 4096), tiles.choose(tiles.STOCK_PIECE, 4096, 4096)
        seen.append((formulation(512, 256, 4096), *tables))
        return work

    monkeypatch.setattr(routed_lora_wide, "captured", captured)
    kept = list(tiles.CROSSOVERS), list(tiles.BESIDE), list(tiles.STOCK_PIECE)
    model = routed_lora_wide.make_model("tiny", None, torch.device("cpu"))
    names = [*routed_lora_wide.arms()]
    options = argparse.Namespace(shape="tiny", experts=3, rounds=2, seconds=0.01, arms=names)
    found = routed_lora_wide._batch(options, model, "1x4")
    assert kept == (tiles.CROSSOVERS, tiles.BESIDE, tiles.STOCK_PIECE)
    own = ("split", False, (4096, 2048))
    pieces = [tiles.STOCK_PIECES[number] for number in (0, 1, 4)]
    others = [(name, False, piece) for name in ("split", "stock") for piece in pieces]
    assert seen == [own, own, ("persistent", *own[1:]), *others, ("stock", True, own[2])]
    assert names[3] == "split, pieces of 8192 outputs"
    assert [row["arm"] for row in found] == ["base", *names]
    assert found[0]["share"] == 1.0
    assert all(row["ms"] > 0 and row["least"] <= row["share"] <= row["most"] for row in found)
