"""A preset of thoughts named beside, behind or in the middle of recipes: what it takes back, and what stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from quietgoose.thoughts.config import PRESETS
from quietgoose.train.settings import load_recipe
from quietgoose.train.thought_settings import PRESET_FIELDS, thought_plan

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ["--config", str(ROOT / "launch" / "recipes" / "thoughts_permutations.yaml")]


def test_one_option_makes_a_recipe_the_experiment_of_a_preset(tmp_path: Path) -> None:
    """Whatever the recipe says of head, weights and ratios; its sizes stay, and so does what is set beside the preset."""
    recipe = [*RECIPE, f"--output={tmp_path}"]
    as_it_stands = load_recipe(recipe).thoughts
    assert (as_it_stands.head, as_it_stands.initial_weight) == ("bounded", 0.5)
    for name, wanted in PRESETS.items():
        config = thought_plan(load_recipe([*recipe, f"--thoughts.preset={name}"]).thoughts).stages[0]
        assert [getattr(config, one) for one in PRESET_FIELDS] == [getattr(wanted, one) for one in PRESET_FIELDS]
        assert (config.tokens, config.samples) == (8, 4)
    later = tmp_path / "later.yaml"
    later.write_text("thoughts: {preset: paper, initial_weight: 0.2}\n")
    config = thought_plan(load_recipe([*recipe, "--config", str(later)]).thoughts).stages[0]
    assert (config.head, config.initial_weight, config.advantage) == ("paper", 0.2, "one_sided")
    beside = [*recipe, "--thoughts.preset=paper", "--thoughts.head=bounded", "--thoughts.initial_weight=0.3"]
    config = thought_plan(load_recipe(beside).thoughts).stages[0]
    assert (config.head, config.initial_weight, config.advantage) == ("bounded", 0.3, "one_sided")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--thoughts.preset=rlp", "PAPER"], ("paper", "paper", 0.2)),  # the last to name one, with a weight
        (["--thoughts.preset=rlp", "WEIGHT"], ("rlp", "thought", 0.4)),  # a later file overrides an option
        (["PAPER", "WEIGHT"], ("paper", "paper", 0.4)),
        (["--thoughts.head=bounded", "PAPER"], ("paper", "bounded", 0.2)),  # an option is meant wherever it stands
        (["--thoughts", "{preset: rlp, lookahead: 2}"], ("rlp", "thought", 1.0)),
        (["--thoughts", "{preset: rlp, initial_weight: 0.5}"], ("rlp", "thought", 0.5)),
        (["--thoughts", "SECTION"], ("paper", "paper", 0.3)),
        (["BONUS", "--thoughts.preset", "paper"], ("paper", "paper", 0.0)),
    ],
)
def test_what_comes_after_a_preset_stays(tmp_path: Path, words: list[str], wanted: tuple) -> None:
    files = {
        "PAPER": "thoughts: {preset: paper, initial_weight: 0.2}", "WEIGHT": "thoughts: {initial_weight: 0.4}",
        "SECTION": "{preset: paper, initial_weight: 0.3}", "BONUS": "thoughts: {entropy_bonus: 1e-3}",
    }  # fmt: skip
    given = [f"--output={tmp_path}", *RECIPE]
    for word in words:
        if word in files:
            (tmp_path / word).write_text(files[word])
            given += [str(tmp_path / word)] if word == "SECTION" else ["--config", str(tmp_path / word)]
        else:
            given.append(word)
    settings = load_recipe(given).thoughts
    config = thought_plan(settings).stages[0]
    assert (settings.preset, config.head, config.initial_weight) == wanted
    assert config.entropy_bonus == 0


def test_a_printed_recipe_is_the_one_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = [*RECIPE, f"--output={tmp_path}", "--thoughts.preset=rlp"]
    with pytest.raises(SystemExit):
        load_recipe([*asked, "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_recipe(["--config", str(printed)]) == load_recipe(asked)
