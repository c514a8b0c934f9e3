"""Presets carry the papers' numbers; what cannot run is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from quietgoose.base.errors import RecipeError
from quietgoose.thoughts.config import PRESETS, ThoughtConfig, curriculum, preset


def test_the_papers_numbers() -> None:
    paper, default, rlp = PRESETS["paper"], PRESETS["default"], PRESETS["rlp"]
    assert (paper.tokens, paper.lookahead, paper.samples) == (9, 4, 2)
    assert (paper.temperature, paper.policy_temperature, paper.advantage, paper.beta) == (1.0, 3.0, "one_sided", 1e6)
    assert (paper.ratio_cap, paper.initial_weight) == (None, 0.0)
    assert (default.tokens, default.lookahead, default.samples, default.beta) == (8, 4, 4, 1.0)
    assert (default.advantage, default.ratio_cap, default.initial_weight) == ("two_sided", 2.0, 0.1)
    assert default.temperature == default.policy_temperature == 1.0
    assert (rlp.lookahead, rlp.base_weight, rlp.mixed_weight, rlp.head, rlp.clip) == (1, 0.0, 0.0, "thought", 0.2)
    assert default.branch_length == 8 + 2 + 3


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"tokens": 0}, "CFG-100"),
        ({"samples": 0}, "CFG-100"),
        ({"lookahead": -1}, "CFG-100"),
        ({"every": 0}, "CFG-100"),
        ({"limit": 0}, "CFG-100"),
        ({"share": 0.0}, "CFG-100"),
        ({"share": 1.5}, "CFG-100"),
        ({"temperature": 0.0}, "CFG-100"),
        ({"temperature": float("nan"), "policy_temperature": float("nan")}, "CFG-100"),
        ({"head": "bounded", "initial_weight": 1.0}, "CFG-100"),
        ({"head": "bounded", "initial_weight": float("nan")}, "CFG-100"),
        ({"initial_weight": float("inf")}, "CFG-100"),
        ({"beta": float("nan")}, "CFG-100"),
        ({"entropy_bonus": -1e-3}, "CFG-100"),
        ({"head": "papper"}, "CFG-100.*Did you mean 'paper'"),
        ({"advantage": "both"}, "CFG-100"),
        ({"control": "shuffled"}, "CFG-100"),
        ({"anchors": "entropie"}, "CFG-100"),
        ({"rollout_cache": "int2"}, "CFG-100"),
        ({"clip": 0.2}, "CFG-101"),
        ({"policy_temperature": 3.0}, "CFG-101"),
        ({"ratio_cap": 0.5}, "CFG-101"),
        ({"ratio_cap": None, "clip": 1.5}, "CFG-101"),
    ],
)
def test_what_cannot_run_is_refused(changes, code) -> None:
    with pytest.raises(RecipeError, match=code):
        ThoughtConfig(**changes)


def test_a_config_names_captured_steps_however_it_was_made() -> None:
    ids: Any = [2, 0]
    assert hash(ThoughtConfig(banned=ids)) == hash(ThoughtConfig(banned=(2, 0)))


def test_unknown_preset_suggests_the_near_one() -> None:
    with pytest.raises(RecipeError, match=r"CFG-102.*Did you mean 'paper'"):
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
