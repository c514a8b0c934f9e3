"""Presets carry the papers' numbers; what cannot run is refused by name."""

from __future__ import annotations

import pytest
from quietgoose.base.errors import RecipeError
from quietgoose.thoughts.config import PRESETS, ThoughtConfig, curriculum, preset


def test_the_papers_numbers() -> None:
    paper, default, rlp = PRESETS["paper"], PRESETS["default"], PRESETS["rlp"]
    assert (paper.tokens, paper.lookahead, paper.samples) == (9, 4, 2)
    assert (paper.temperature, paper.policy_temperature, paper.advantage, paper.beta) == (1.0, 3.0, "one_sided", 1e6)
    assert (paper.ratio_cap, paper.initial_weight) == (None, 0.0)
    assert (default.tokens, default.lookahead, default.samples, default.beta) == (8, 4, 4, 1.0)
    assert (default.advantage, default.ratio_cap, default.initial_weight) == ("two_sided", 2.0, 0.5)
    assert default.temperature == default.policy_temperature == 1.0
    assert (rlp.lookahead, rlp.base_weight, rlp.mixed_weight, rlp.head, rlp.clip) == (1, 0.0, 0.0, "thought", 0.2)
    assert default.branch_length == 8 + 2 + 3


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"tokens": 0}, "CFG-080"),
        ({"samples": 0}, "CFG-080"),
        ({"lookahead": -1}, "CFG-080"),
        ({"every": 0}, "CFG-080"),
        ({"limit": 0}, "CFG-080"),
        ({"share": 0.0}, "CFG-080"),
        ({"share": 1.5}, "CFG-080"),
        ({"temperature": 0.0}, "CFG-080"),
        ({"temperature": float("nan"), "policy_temperature": float("nan")}, "CFG-080"),
        ({"head": "bounded", "initial_weight": 1.0}, "CFG-080"),
        ({"clip": 0.2}, "CFG-081"),
        ({"policy_temperature": 3.0}, "CFG-081"),
        ({"ratio_cap": 0.5}, "CFG-081"),
        ({"ratio_cap": None, "clip": 1.5}, "CFG-081"),
    ],
)
def test_what_cannot_run_is_refused(changes, code) -> None:
    with pytest.raises(RecipeError, match=code):
        ThoughtConfig(**changes)


def test_unknown_preset_suggests_the_near_one() -> None:
    with pytest.raises(RecipeError, match=r"CFG-082.*Did you mean 'paper'"):
        preset("papper")


def test_controls_take_terms_away() -> None:
    assert preset("default").coefficients() == (0.5, 0.5, 1.0, 0.0)
    assert preset("default", control="no_policy").coefficients() == (0.5, 0.5, 0.0, 0.0)
    assert preset("default", control="pause").coefficients() == (0.5, 0.5, 0.0, 0.0)
    assert preset("default", control="random_thoughts").coefficients() == (0.5, 0.5, 0.0, 0.0)
    assert preset("default", control="no_thoughts").coefficients() == (1.0, 0.0, 0.0, 0.0)


def test_curriculum_shortens_then_distils() -> None:
    plan = curriculum(preset("default", samples=2))
    sizes = [(plan.at(step, 100).tokens, plan.at(step, 100).lookahead) for step in (0, 24, 25, 49, 50, 74, 75, 99)]
    assert sizes == [(13, 8)] * 2 + [(9, 4)] * 2 + [(5, 4)] * 4
    assert [plan.at(step, 100).distil_weight > 0 for step in (0, 74, 75, 99)] == [False, False, True, True]
    last = plan.at(99, 100)
    assert last.coefficients() == (0.5, 0.0, 0.0, 0.5)
    assert not last.has_policy
    assert {stage.head for stage in plan.stages} == {"paper"}
