"""One refusal of misspelt settings for everything that takes settings by name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from quietgoose.base.errors import RecipeError
from quietgoose.base.settings import known_settings
from quietgoose.cache.policy import Policy, resolve_policy
from quietgoose.thoughts.generation import ThoughtGeneration, thought_settings


@dataclass(frozen=True)
class Sizes:
    width: int = 1
    height: int = 2


def test_fields_are_set_and_the_others_keep_their_defaults() -> None:
    assert known_settings(Sizes, {"height": 5}, "sizes", code="CFG-001") == Sizes(1, 5)


def test_a_name_that_is_no_field_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError) as caught:
        known_settings(Sizes, {"hight": 5}, "sizes", code="CFG-001")
    assert str(caught.value) == "QG-CFG-001 sizes: no setting 'hight'; there are width, height. Did you mean 'height'?"


def test_who_uses_it() -> None:
    with pytest.raises(RecipeError, match=r"QG-CFG-050 cache policy: no setting 'seeed'; .*Did you mean 'seed'"):
        Policy.from_dict({"seeed": 1})
    with pytest.raises(RecipeError, match=r"no setting 'presett'; there are preset, .*Did you mean 'preset'"):
        resolve_policy({"presett": "paper"})
    with pytest.raises(RecipeError, match=r"QG-CFG-092 thoughts: no setting 'sample'; .*Did you mean 'samples'"):
        thought_settings({"sample": 1})
    assert Policy.from_dict({"seed": 3}) == Policy(seed=3)
    assert thought_settings({"samples": 2, "temperature": 1.0}) == ThoughtGeneration(samples=2, temperature=1.0)
