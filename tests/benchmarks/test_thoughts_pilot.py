"""The pilot's script: its questions are what they say, it learns from the seed alone, and goes on where its file ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import thoughts_pilot as pilot
import torch


def test_questions_are_compositions_and_only_the_answer_has_a_label() -> None:
    questions = pilot.Questions(3)
    prompt, states = questions.drawn(40, 7)
    for line, way in zip(prompt.tolist(), states.tolist()):
        assert (line[0], line[-1]) == (pilot.BEGIN, pilot.EQUALS)
        state = line[1]
        for name, wanted in zip(line[2:-1], way, strict=True):
            state = int(questions.images_PX[name - pilot.STATES, state])
            assert state == wanted
    rows = questions.rows(40, 7)
    assert torch.equal(rows.labels_BT[:, -2], states[:, -1])
    assert int((rows.labels_BT != -100).sum()) == 40
    assert not torch.equal(questions.drawn(40, 8)[0], prompt)


def test_a_started_table_is_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    out = tmp_path / "pilot.json"

    def run(*words: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["thoughts_pilot", "--tiny", "--out", str(out), "--seeds", "0", *words])
        pilot.main()
        return json.loads(out.read_text())["rows"]

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    first = run("--weights", "0.1", "--heads", "paper", "bounded")
    assert [(row["head"], row["weight"]) for row in first] == [("paper", 0.1), ("bounded", 0.1)]
    assert [look["step"] for look in first[0]["looks"]] == [0, 2, 4]
    assert run("--weights", "0.1", "0.3")[:2] == first, "what is there is not run again"
    assert run("--weights", "0.1", "0.3", "0.5", "--budget-seconds", "0")[3:] == [], "a spent budget starts nothing"
    assert "| paper, random | - | - |" in capsys.readouterr().out
    out.unlink()
    assert run("--weights", "0.1") == first[:1], "the same again from the seed"
