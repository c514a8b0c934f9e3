"""Quality harness: windows and cells, teacher-forced scores against brute force, statistics, a whole tiny study."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import kv_quality
import kv_quality_methods as methods
import kv_tasks
import numpy as np
import pytest
import torch
from kv_quality_report import markdown, picture, places, statistics
from kv_quality_score import STEP, Scorer
from kv_tasks import Cell, TaskMaker, Windows, docstrings, text_windows
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

KIVI = methods.kivi(2, 32)
H2O = methods.importance("H2O", "h2o")


class Letters:
    """A tokenizer for tests: one token for a known word with the space or hyphen before it, one for any other character."""

    def __init__(self):
        syllables = [a + b for a in ("ba", "ce", "di", "fo", "gu") for b in "bcdfghjklmnpqrstvwxz"]
        self.words = [f" {first}{second}" for first in syllables[:12] for second in syllables[12:22]]
        self.pieces = [chr(i) for i in range(300)] + self.words + [word[1:] for word in self.words]
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}

    def __len__(self):
        return len(self.pieces)

    def decode(self, ids):
        return "".join(self.pieces[int(i)] for i in ids)

    def encode(self, text, add_special_tokens=False):
        found, at = [], 0
        while at < len(text):
            size = next(size for size in (7, 6, 1) if text[at : at + size] in self.ids)
            found.append(self.ids[text[at : at + size]])
            at += size
        return found


@pytest.fixture(scope="module")
def tokenizer():
    return Letters()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def windows_of(count, prefix, continuation, vocabulary=300):
    tokens = torch.randint(vocabulary, (count, prefix + continuation), generator=torch.Generator().manual_seed(1))
    return Windows(tokens, ["random"] * count, prefix)


def test_windows_are_half_and_half(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("a wise man said nothing " * 500)
    windows = text_windows(tokenizer, tmp_path / "book.txt", 6, 200, 50)
    assert windows.tokens.shape == (6, 250)
    assert sorted(windows.source) == ["book"] * 3 + ["docstrings"] * 3
    assert len({tuple(row.tolist()) for row in windows.tokens}) == 6


def test_too_little_text_is_an_error(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "book.txt").write_text("short")
    monkeypatch.setattr(kv_tasks, "docstrings", lambda: iter(["a few words " * 30]))
    with pytest.raises(ValueError, match="--windows 4"):
        text_windows(tokenizer, tmp_path / "book.txt", 4, 200, 50)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="--text"):
        text_windows(tokenizer, tmp_path / "empty", 4, 200, 50)


def test_docstrings_exist():
    assert len(next(docstrings())) > 200


@pytest.mark.parametrize(("name", "answer"), [("passkey 400", 5), ("codes 5", 4), ("lines 4", 5)])
def test_cells_hold_their_answer(tokenizer, name, answer):
    cell = TaskMaker(tokenizer).by_name(name, 7)
    assert cell.answer.shape == (7, answer)
    for row in range(7):
        context, question = tokenizer.decode(cell.context[row]), tokenizer.decode(cell.question[row])
        code = tokenizer.decode(cell.answer[row])
        assert code.isdigit()
        assert code in context
        assert code not in question
        assert name.startswith("passkey") or code not in context[-100:]  # no method answers from recent tokens alone
        if name.startswith("codes"):
            word = question.removeprefix("\nThe code of ").removesuffix(" is ")
            assert f"The code of {word} is {code}." in context
    again = TaskMaker(tokenizer).by_name(name, 7)
    assert torch.equal(cell.context, again.context)
    assert not torch.equal(cell.context, TaskMaker(tokenizer, seed=1).by_name(name, 7).context)


def test_exact_cache_has_no_kl_and_two_bits_has(model):
    windows = windows_of(5, 70, 40)
    scorer = Scorer(model, rows_per_batch=2)
    reference = scorer.reference(windows)
    same = scorer.windows(windows, methods.SIXTEEN, reference)
    assert max(same["kl"]) < 1e-6
    assert min(same["top1"]) == 1.0
    assert same["bits"] == 16.0
    assert max(same["attention_error"]) < 1e-5
    worse = scorer.windows(windows, KIVI, reference)
    assert min(worse["kl"]) > 1e-4
    assert len(worse["kl"]) == 5
    assert len(worse["kl_by_chunk"]) == -(-40 // STEP)
    assert len(worse["attention_error"]) == 2
    assert min(worse["attention_error"]) > 1e-3
    assert worse["bits"] < 12


def test_kl_and_nats_are_those_of_full_logits(model):
    """The chunked, hidden-state way of scoring equals plain logits of the whole window."""
    windows = windows_of(2, 70, 20)
    scorer = Scorer(model)
    found = scorer.windows(windows, methods.SIXTEEN, scorer.reference(windows))
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(windows.tokens).logits[:, 70:]
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), windows.tokens[:, 71:].flatten(), reduction="none"
    )
    assert found["nll"] == pytest.approx(nats.view(2, -1).mean(1).tolist(), rel=1e-4)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("question", [3, 30])
def test_exact_match_is_what_greedy_decoding_gives(model, inside, question):
    """Answers taken from a greedy run are all right; one changed digit is wrong from there on."""
    generator = torch.Generator().manual_seed(3)
    context = torch.randint(300, (4, 40), generator=generator)
    asked = torch.randint(300, (4, question), generator=generator)
    model.set_attn_implementation("sdpa")
    whole = model.generate(
        torch.cat([context, asked], 1), past_key_values=DynamicCache(config=model.config), do_sample=False, max_new_tokens=5,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    answer = whole[:, -5:].clone()
    answer[2, 4] = (answer[2, 4] + 1) % 300
    found = Scorer(model, tokens_per_batch=150).retrieval(
        Cell("t", context, asked, answer), methods.SIXTEEN, inside=inside
    )
    assert found["exact"] == [1, 1, 0, 1]
    assert found["digit"][2] == pytest.approx(0.75 if inside else 0.8)


def test_a_method_with_its_own_attention_leaves_the_next_alone(model):
    windows, scorer = windows_of(2, 70, 40), Scorer(model)
    reference = scorer.reference(windows)
    lossless = methods.preset("lossless")
    before = scorer.windows(windows, lossless, reference)
    scorer.windows(windows, H2O, reference)
    assert scorer.windows(windows, lossless, reference)["kl"] == before["kl"]


def test_seeds_change_only_the_seed():
    method = methods.zip_method("z", salient_ratio=0.6)
    assert methods.seeded(method, 0) is method
    assert methods.seeded(method, 2).settings["policy"] == {"salient_ratio": 0.6, "seed": 2}
    assert methods.seeded(methods.preset("paper"), 1).settings["policy"] == {"preset": "paper", "seed": 1}
    assert methods.seeded(KIVI, 2) is KIVI


def test_methods_are_chosen_by_part_of_name():
    assert [m.name for m in methods.chosen(["KIVI-4 R32"])] == ["16 bit", "KIVI-4 R32"]
    assert len({m.name for m in methods.METHODS}) == len(methods.METHODS)
    with pytest.raises(ValueError, match="SnapKV"):
        methods.chosen(["SnapKV"])


def data_of(kl_and_bits):
    random = np.random.default_rng(0)
    noise = random.lognormal(sigma=0.3, size=40)
    rows = {
        name: {"family": "zipcache", "text": [{"kl": (kl * noise).tolist(), "top1": [0.9] * 40, "bits": bits}]}
        for name, (kl, bits) in kl_and_bits.items()
    }
    meta = dict.fromkeys(("model", "note", "device", "dtype", "torch", "transformers"), "x")
    numbers = dict.fromkeys(("windows", "prefix", "continuation", "samples"), 1)
    return {"meta": {**meta, **numbers, "cells": []}, "methods": rows}


def test_equal_bytes_lies_on_the_rivals_line():
    data = data_of(
        {
            "KIVI-4 R32": (0.01, 5.0),
            "KIVI-2 R32": (1.0, 3.0),
            "mine": (0.05, 4.0),
            "big": (0.005, 6.0),
            "tiny": (2.0, 2.0),
        }
    )
    found = statistics(data)
    row = found["mine"]["at_equal_bytes"]["KIVI"]
    assert row["value"] == pytest.approx(0.5, rel=1e-6)  # the line gives 0.1 half-way
    assert row["low"] <= row["value"] <= row["high"]
    assert row["where"] == "between"
    assert found["big"]["at_equal_bytes"]["KIVI"]["where"] == "rival uses fewer bits"
    assert found["big"]["at_equal_bytes"]["KIVI"]["value"] == pytest.approx(0.5, rel=1e-6)
    assert found["tiny"]["at_equal_bytes"]["KIVI"]["where"] == "rival uses more bits"
    assert "KIVI" not in found["KIVI-2 R32"]["at_equal_bytes"]


def test_picture_is_well_formed():
    drawn = picture(data_of({"a < b": (0.01, 5.0), "b & c": (1.0, 3.0)}))
    root = ElementTree.fromstring(drawn)
    assert len([node for node in root.iter() if node.tag.endswith("circle")]) >= 2


def test_names_in_the_picture_cover_no_point_and_no_other_name():
    points = {
        "KIVI-4 R128": (100.0, 100.0),
        "KIVI-4 R256": (140.0, 101.0),
        "HF quanto-4": (100.0, 104.0),
        "mine": (95.0, 92.0),
    }
    found = places(points, list(points))
    boxes = []
    for name, (x, y, anchor) in found.items():
        begin = x if anchor == "start" else x - 5.6 * len(name)
        boxes.append((begin, y - 9, begin + 5.6 * len(name), y + 1))
    marks = [(x - 3, y - 3, x + 3, y + 3) for x, y in points.values()]
    for number, (a, b, c, d) in enumerate(boxes):
        for e, f, g, h in boxes[number + 1 :] + marks:
            assert c <= e or g <= a or d <= f or h <= b


def study(model, tokenizer, monkeypatch, tmp_path, chosen, *more):
    monkeypatch.setattr(kv_quality, "SHORT_CELLS", ("codes 5", "lines 3"))
    monkeypatch.setattr(kv_quality, "LONG_CELLS", ("passkey 300",))
    given = kv_quality.arguments([
        "--windows", "4", "--prefix", "60", "--continuation", "20", "--samples", "3", "--rollouts", "2", "--rollout", "68",
        "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path / "out" / "kv"), *more,
    ])  # fmt: skip
    return kv_quality.Study(Scorer(model), tokenizer, chosen, given).run(), tmp_path / "out" / "kv.json"


def test_a_whole_study_survives_a_method_that_fails(model, tokenizer, monkeypatch, tmp_path):
    broken = methods.Method("broken", "kivi", {"bits": 3})
    slow = methods.kivi(4, 32, long=True)
    data, file = study(model, tokenizer, monkeypatch, tmp_path, [methods.SIXTEEN, broken, slow, H2O])
    assert json.loads(file.read_text())["methods"].keys() == data["methods"].keys()
    assert "bits: 3" in data["methods"]["broken"]["errors"][0]
    assert set(data["methods"]["KIVI-4 R32"]) >= {"text", "retrieval", "drift", "seconds"}
    assert set(data["methods"]["KIVI-4 R32"]["retrieval"]) == {
        "codes 5 out",
        "codes 5 in",
        "lines 3 out",
        "passkey 300 out",
    }
    assert "drift" not in data["methods"]["H2O"]
    text = markdown(json.loads(file.read_text()))
    assert "KIVI-4 R32" in text
    assert "Not measured" in text


def test_a_spent_budget_is_written_down(model, tokenizer, monkeypatch, tmp_path):
    data, _ = study(
        model, tokenizer, monkeypatch, tmp_path, [methods.SIXTEEN, KIVI], "--budget-seconds", "1e-9", "--stages", "text"
    )
    assert "budget" in data["methods"]["KIVI-2 R32"]["errors"][0]
    assert "text" not in data["methods"]["KIVI-2 R32"]
