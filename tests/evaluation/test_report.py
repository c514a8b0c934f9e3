"""S9 and the page: hostile text stays text, nothing outside is asked for, the size holds."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from quietgoose.base.errors import DataError
from quietgoose.evaluation import report
from quietgoose.evaluation.page import visible
from quietgoose.evaluation.report import MAX_BYTES, Trace, curves, read_events, write_report
from quietgoose.evaluation.results import ItemScores, Results, summarise
from quietgoose.evaluation.tasks import make_task

from .pages import HOSTILE, Page, browse, outside


def trace(tokens: list[str], layers: int = 2, experts: tuple[str, ...] = ("one", "two")) -> Trace:
    random = np.random.default_rng(0)
    weights = {
        f"model.layers.{layer}.mlp.up_proj": random.random((len(tokens), len(experts))).tolist()
        for layer in range(layers)
    }
    votes = np.sum(list(weights.values()), axis=0).tolist()
    return Trace(tokens, experts, votes, weights)


def some_results(name: str = "task") -> Results:
    task = make_task(name, [{"prompt": "p", "completion": " c"}] * 8, group="expert")
    scores = {
        (arm, name): ItemScores((np.arange(8) % cycle == 0) * 1.0, np.full(8, 2.0), np.full(8, 4.0))
        for arm, cycle in (("base", 4), ("routed", 2))
    }
    cells, means = summarise([task], ["base", "routed"], scores, {name: "exact"}, "base", 50, 0)
    settings = {"bootstrap": 50, "seed": 0}
    return Results((name,), ("base", "routed"), "base", cells, means, {"base": 1.0}, settings)


def test_hostile_text_is_inert(tmp_path):
    """The page has the same tags whatever the data; the data block parses back to the text, made visible."""
    hostile = write_report(
        tmp_path / "hostile.html",
        HOSTILE[0],
        results=some_results(HOSTILE[1]),
        traces=[trace(HOSTILE, experts=(HOSTILE[0], HOSTILE[1]))],
        events=[{"stage": HOSTILE[0], "step": 0, "losses": {HOSTILE[1]: 1.0}}],
        facts={HOSTILE[0]: HOSTILE[1]},
        notes=HOSTILE,
    ).read_text(encoding="utf-8")
    calm = write_report(tmp_path / "calm.html", "calm").read_text(encoding="utf-8")
    assert Page(hostile).tags == Page(calm).tags
    block = Page(hostile).data
    assert not set("<>&\u202e\u2028\x00") & set(block)
    value = json.loads(block)
    assert value["title"] == HOSTILE[0]
    assert value["traces"][0]["tokens"] == [visible(text) for text in HOSTILE]
    assert value["traces"][0]["tokens"][3] == "a\\u202eb\\u2066c\\u200bd\\u0000e"
    assert visible("caf\u00e9 \u4e2d\n") == "caf\u00e9 \u4e2d\n"


def test_nothing_from_outside(tmp_path):
    path = write_report(tmp_path / "r.html", "t", traces=[trace(["a"])])
    assert outside(path.read_text(encoding="utf-8")) == {"http://www.w3.org/2000/svg"}


def test_numbers_arrive(tmp_path):
    events = [{"stage": "gates", "step": step, "losses": {"one": 1.0 - step / 10}} for step in range(3)]
    path = write_report(
        tmp_path / "r.html",
        "run",
        results=some_results(),
        traces=[trace(["a", "b", "c"], layers=3)],
        events=events,
        facts={"base": "tiny"},
        highlight="routed",
    )
    value = json.loads(Page(path.read_text(encoding="utf-8")).data)
    assert value["results"]["means"][1]["accuracy"][0] == 0.5
    assert value["curves"][0]["lines"] == [{"name": "one", "steps": [0, 1, 2], "values": [1.0, 0.9, 0.8]}]
    made = trace(["a", "b", "c"], layers=3)
    tops = [np.argmax(rows, axis=1).tolist() for rows in made.modules.values()]
    assert [site["top"] for site in value["traces"][0]["sites"]] == ["".join(map(str, top)) for top in tops]
    assert [site["layer"] for site in value["traces"][0]["sites"]] == [0, 1, 2]
    assert value["heat"]["share"][0] == [round(tops[0].count(e) / 3, 4) for e in range(2)]
    assert all(abs(sum(row) - 1000) <= 1 for row in value["traces"][0]["votes"])


def test_size_holds_by_leaving_modules_out(tmp_path):
    long = [trace([f"word{i}" for i in range(300)], layers=130) for _ in range(6)]
    path = write_report(tmp_path / "r.html", "t", traces=long)
    assert path.stat().st_size <= MAX_BYTES
    value = json.loads(Page(path.read_text(encoding="utf-8")).data)
    kept = [bool(entry["sites"]) for entry in value["traces"]]
    assert kept == sorted(kept, reverse=True)
    assert 0 < sum(kept) < 6
    assert f"the modules of the last {6 - sum(kept)} of 6 prompts" in value["notes"][-1]


def test_curves_thin_and_take_the_rerun_step():
    events = [{"stage": "s", "step": step, "losses": {"a": 5.0}} for step in range(1000)]
    events += [
        {"stage": "s", "step": 999, "losses": {"a": 1.0}},
        {"event": "saved"},
        {"step": 3, "losses": {"a": None}},
    ]
    (stage,) = curves(events)
    line = stage["lines"][0]
    assert len(line["steps"]) == report.MAX_POINTS
    assert line["steps"][-1] == 999
    assert line["values"][0] == 5.0
    assert line["values"][-1] < 5.0


def test_events_file_cut_at_its_end(tmp_path):
    path = tmp_path / "events.jsonl"
    assert read_events(path) == []
    path.write_text('{"step": 1, "losses": {}}\n{"step": 2, "lo')
    assert len(read_events(path)) == 1
    path.write_text('{"step"\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"events\.jsonl:1"):
        read_events(path)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Trace(["a"], ["one"], [[1.0, 2.0]]), "votes have shape (1, 2), not (1 tokens, 1 experts)"),
        (Trace(["a"], ["one"], [[1.0]], {"m": [0, 0]}), "module m has shape (2,)"),
        (Trace(["a"], ["one"], [[1.0]], expected=[0, 0]), "2 expected experts, 1 tokens"),
    ],
)
def test_ragged_traces_are_refused(tmp_path, bad, words):
    with pytest.raises(DataError) as caught:
        write_report(tmp_path / "r.html", "t", traces=[bad])
    assert words in str(caught.value)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here; the parser tests stand in for it")
def test_a_real_browser_shows_hostile_text_literally(tmp_path):
    path = write_report(tmp_path / "r.html", "calm title", traces=[trace(HOSTILE)], results=some_results())
    dom = browse(path, tmp_path / "profile")
    page = Page(dom)
    assert "<title>calm title</title>" in dom
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    options = [attributes for tag, attributes in page.tags if attributes.get("role") == "option"]
    assert len(options) == len(HOSTILE)
    assert (options[1]["aria-label"] or "").startswith(HOSTILE[1])
    assert sum(attributes.get("tabindex") == "0" for attributes in options) == 1
    assert sum(tag == "svg" for tag, _ in page.tags) == 1
