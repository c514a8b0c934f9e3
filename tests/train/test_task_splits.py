"""Splits of tasks are looked for before anything runs; what the table of thoughts leaves out, it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quietgoose.base.errors import DataError, QuietGooseError
from quietgoose.evaluation.tasks import make_task
from quietgoose.train.evaluate_thoughts import _possible
from quietgoose.train.settings import load_recipe
from quietgoose.train.tasks import check_split, task_of, with_split

COLLECTION = str(Path(__file__).resolve().parents[2] / "launch/recipes/smollm2_collection.yaml")
RECIPE = str(Path(__file__).resolve().parents[2] / "launch/recipes/thoughts_smollm2.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A task with the split `test` only, as commonsense_qa is kept."""
    row = {"prompt": "q ", "completion": "a", "choices": ["a", "b"], "answer": 0}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    return str(tmp_path)


def options(folder: str, *more: str) -> list[str]:
    tasks = json.dumps({"commonsense_qa": folder})
    return ["--config", RECIPE, "--evaluate.thoughts.tasks", tasks, *more]


def test_the_command_that_the_recipe_shows_is_accepted(folder: str) -> None:
    recipe = load_recipe(options(folder, "--evaluate.thoughts.generated", json.dumps({"gsm8k": folder})))
    assert recipe.evaluate.thoughts.tasks == {"commonsense_qa": folder}
    assert "temperature" in recipe.evaluate.thoughts.arms


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--evaluate.split", "validation"], r"evaluate.thoughts.tasks.commonsense_qa.*splits found: test"),
        (["--evaluate.split", "tests"], "no split 'tests'"),
        (["--evaluate.thoughts.temperature_split", "valdation"], "Did you mean 'validation'"),
        (["--evaluate.thoughts.generated", '{"gsm8k": "./nowhere"}'], "generated.gsm8k: ./nowhere: no such folder"),
    ],
)
def test_a_split_that_is_not_there_is_told_at_the_start(folder: str, more: list[str], text: str) -> None:
    with pytest.raises(QuietGooseError, match=text) as caught:
        load_recipe(options(folder, *more))
    assert "QG-DATA-002" in str(caught.value)


COLLECTIONS = {
    "once for both": (["--data.collection", "/nope"], ["data.collection: /nope: no such folder"]),
    "home is home": (["--data.collection", "~/no/pe"], ["data.collection: ~/no/pe: no such folder"]),
    "its own": (
        ["--data.collection", "FOLDER", "--evaluate.collection", "/nope"], ["evaluate.collection: /nope: no such folder"],
    ),
    "two": (
        ["--data.collection", "/nope", "--evaluate.collection", "/nix"],
        ["data.collection: /nope: no such folder", "evaluate.collection: /nix: no such folder"],
    ),
    "evaluated alone": (
        ["--data.collection", "/nope", "--stages", "[evaluate]"],
        ["data.collection: /nope: no such folder"],
    ),
    "a split": (
        ["--data.collection", "FOLDER", "--evaluate.split", "dev"],
        ["data.collection: FOLDER: no sub-folder holds dev.jsonl"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COLLECTIONS)
def test_a_collection_is_told_once_and_by_its_setting(tmp_path: Path, folder: str, case: str) -> None:
    row = json.dumps({"prompt": "q ", "completion": "a", "choices": ["a", "b"], "answer": 0})
    for split in ("train", "test"):
        (tmp_path / "collection" / "one").mkdir(parents=True, exist_ok=True)
        (tmp_path / "collection" / "one" / f"{split}.jsonl").write_text(row)
    here = str(tmp_path / "collection")
    more, lines = COLLECTIONS[case]
    given = [word.replace("FOLDER", here) for word in more]
    with pytest.raises(QuietGooseError) as caught:
        load_recipe(["--config", COLLECTION, "--data.include", "[]", "--evaluate.include", "[]", *given])
    told = [
        line.strip().partition(" ")[2]
        for line in str(caught.value).splitlines()
        if "folder" in line and "stages:" not in line
    ]
    assert len(told) == len(lines), told
    for have, want in zip(told, lines):
        assert have.startswith(want.replace("FOLDER", here))
    assert "QG-DATA-002" in str(caught.value)


def test_every_kind_of_source(folder: str) -> None:
    for source in ("steps:purse-direct", "skills:digits", folder):
        check_split(source, "test")
        assert task_of("t", source, "test", 0, 1).items
        with pytest.raises(DataError, match="no split 'dev'"):
            check_split(source, "dev")
    with pytest.raises(DataError, match="QG-DATA-002"):
        check_split("steps:purze-direct", "test")
    sources = {"made": "steps:purse-direct", "kept": folder, "gone": f"{folder}/no"}
    assert with_split(sources, "validation") == {"made": "steps:purse-direct"}
    assert with_split(sources, "test") == {"made": "steps:purse-direct", "kept": folder}


def test_arms_that_the_tasks_do_not_allow_are_left_out_and_named() -> None:
    rows = [{"prompt": f"p{n}", "completion": "a"} for n in range(2)]
    one, two = make_task("one", rows), make_task("two", rows[:1])
    arms = ["no_thought", "shuffled", "temperature"]
    assert _possible(arms, [one, two], {"one": "", "two": ""}, "validation") == (arms, [])
    kept, notes = _possible(arms, [one, two], {"one": ""}, "validation")
    assert kept == arms
    assert notes == ["temperature: left out for two: no split validation to fit the number on"]
    kept, notes = _possible(arms, [two], {}, "validation")
    assert kept == ["no_thought"]
    assert [note.split(":")[0] for note in notes] == ["temperature", "shuffled"]
