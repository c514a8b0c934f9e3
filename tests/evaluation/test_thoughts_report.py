"""thoughts.html: numbers arrive, hostile text stays text, nothing outside is asked for, the size holds."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
from quietgoose.base.errors import DataError
from quietgoose.evaluation import thoughts_report
from quietgoose.evaluation.page import visible
from quietgoose.evaluation.thoughts_report import (
    SampledThought,
    ThoughtTrace,
    colour_limit,
    summarise,
    write_thoughts_report,
)

from .pages import HOSTILE, Page, browse, outside

NONE = math.nan


def trace(tokens: list[str], gains: list[float] | None = None, thought: str = "so") -> ThoughtTrace:
    """The first token is not scored; gain of token t is gains[t - 1]."""
    count = len(tokens)
    gains = [0.1 * (t + 1) for t in range(count - 1)] if gains is None else gains
    base = [NONE, *(2.0 for _ in gains)]
    mixed = [NONE, *(2.0 - gain for gain in gains)]
    thoughts = [[SampledThought(f"{thought} {t} {s}", 0.25 * s, -1.5, 0.5) for s in range(2)] for t in range(count)]
    return ThoughtTrace(tokens, base, mixed, [NONE, *(0.5 for _ in gains)], [[], *thoughts[1:]], new_from=count - 1)


def written(path, *traces: ThoughtTrace, **options) -> dict:
    write_thoughts_report(path, "t", traces, **options)
    return json.loads(Page(path.read_text(encoding="utf-8")).data)


def test_numbers_arrive(tmp_path):
    value = written(tmp_path / "t.html", trace(["a", "b", "c"]), facts={"T": 8}, notes=["note"])
    (entry,) = value["traces"]
    assert entry["tokens"] == ["a", "b", "c"]
    assert entry["base"] == [None, 2.0, 2.0]
    assert entry["mixed"] == [None, 1.9, 1.8]
    assert entry["weight"] == [None, 0.5, 0.5]
    pairs = [[[f"so {t} 0", 0.0, -1.5, 0.5], [f"so {t} 1", 0.25, -1.5, 0.5]] for t in (1, 2)]
    assert entry["thoughts"] == [[], *pairs]
    assert entry["new_from"] == 2
    assert value["facts"] == [["T", "8"]]
    assert value["notes"] == ["note"]
    assert value["summary"]["gain"] == pytest.approx(0.15)


def test_summary_counts_scored_tokens_only():
    found = summarise([trace(["a", "b", "c", "d"], [1.0, -0.5, 0.0]), trace(["x", "y"], [0.5])])
    assert found.scored == 4
    assert found.gain == pytest.approx(0.25)
    assert (found.helped, found.hurt) == (0.5, 0.25)
    assert found.weight == 0.5
    assert found.base_nll - found.mixed_nll == pytest.approx(0.25)
    answer = summarise(
        [replace(trace(["a", "b", "c", "d"], [1.0, -0.5, 0.25]), counted_from=2), trace(["x", "y"], [0.5])]
    )
    assert answer.scored == 3
    assert answer.gain == pytest.approx(0.25 / 3)
    assert answer.hurt == pytest.approx(1 / 3)
    empty = summarise([])
    assert empty.scored == 0
    assert math.isnan(empty.gain)


@pytest.mark.parametrize(
    ("gains", "limit"), [([0.001], 0.05), ([0.3], 0.5), ([-1.7], 2.0), ([5.0], 5.0), ([0.1] * 99 + [40.0], 0.1)]
)
def test_full_colour_is_a_round_number_that_one_outlier_does_not_move(gains, limit):
    assert colour_limit([trace(["t"] * (len(gains) + 1), gains)]) == pytest.approx(limit)


def test_hostile_text_is_inert(tmp_path):
    hostile, calm = tmp_path / "hostile.html", tmp_path / "calm.html"
    facts = {HOSTILE[0]: HOSTILE[1]}
    write_thoughts_report(hostile, HOSTILE[0], [trace(HOSTILE, thought=HOSTILE[1])], facts=facts, notes=HOSTILE)
    write_thoughts_report(calm, "calm", [])
    page = Page(hostile.read_text(encoding="utf-8"))
    assert page.tags == Page(calm.read_text(encoding="utf-8")).tags
    assert not set("<>&\u202e\u2028\x00") & set(page.data)
    entry = json.loads(page.data)["traces"][0]
    assert entry["tokens"] == [visible(text) for text in HOSTILE]
    assert entry["thoughts"][1][0][0] == visible(f"{HOSTILE[1]} 1 0")


def test_nothing_from_outside(tmp_path):
    path = write_thoughts_report(tmp_path / "t.html", "t", [trace(["a", "b"])])
    assert outside(path.read_text(encoding="utf-8")) == set()


def test_size_holds_by_leaving_out_the_thoughts_that_changed_least(tmp_path, monkeypatch):
    gains = [0.001 * t for t in range(400)]
    whole = written(tmp_path / "whole.html", trace(["w"] * 401, gains))
    assert None not in whole["traces"][0]["thoughts"]
    monkeypatch.setattr(thoughts_report, "MAX_BYTES", 40_000)
    value = written(tmp_path / "small.html", trace(["w"] * 401, gains), notes=["note"])
    assert (tmp_path / "small.html").stat().st_size <= 40_000
    kept = [thoughts is not None for thoughts in value["traces"][0]["thoughts"][1:]]
    assert kept == sorted(kept)
    assert 0 < sum(kept) < 400
    assert value["notes"] == ["note", value["notes"][1]]
    assert f"the thoughts of the {400 - sum(kept)} tokens" in value["notes"][1]


def test_thousands_of_tokens_are_quick_and_small(tmp_path):
    path = write_thoughts_report(tmp_path / "t.html", "t", [trace([" word"] * 5000)])
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (ThoughtTrace(["a"], [], [1.0], [1.0], [[]]), "trace 1: 0 entries in base_nll, 1 tokens"),
        (ThoughtTrace(["a"], [1.0], [1.0], [1.0], []), "0 entries in thoughts"),
        (ThoughtTrace(["a"], [1.0], [1.0], [1.0], [[]], new_from=2), "new_from is 2; allowed are 0 to 1"),
    ],
)
def test_ragged_traces_are_refused(tmp_path, bad, words):
    with pytest.raises(DataError) as caught:
        write_thoughts_report(tmp_path / "t.html", "t", [bad])
    assert words in str(caught.value)
    assert not (tmp_path / "t.html").exists()


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here; the parser tests stand in for it")
def test_a_real_browser_shows_tokens_and_the_thoughts_of_the_best(tmp_path):
    path = write_thoughts_report(tmp_path / "t.html", "calm title", [trace(HOSTILE, thought=HOSTILE[1])])
    dom = browse(path, tmp_path / "profile")
    page = Page(dom)
    assert "<title>calm title</title>" in dom
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    options = [attributes for tag, attributes in page.tags if attributes.get("role") == "option"]
    assert len(options) == len(HOSTILE)
    selected = [attributes["id"] for attributes in options if attributes["aria-selected"] == "true"]
    assert selected == [f"t1-{len(HOSTILE)}"]
    assert (options[1]["aria-label"] or "").endswith("gain +0.10 nats")
    assert sum(attributes.get("tabindex") == "0" for attributes in options) == 1
    assert "2 thoughts before it" in dom
    assert f"{len(HOSTILE) - 1} 1</code>" in dom
