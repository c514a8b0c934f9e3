"""Bad rows are told before anything is trained: of training files the first rows, of evaluation files all, in a dry run all."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from quietgoose.base.errors import RecipeError
from quietgoose.train.checks import expert_names
from quietgoose.train.plan import show_plan
from quietgoose.train.row_checks import HEAD
from quietgoose.train.settings import load_recipe

GOOD = '{"prompt": "a", "completion": " b"}\n'
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    for task in ("one", "two"):
        folder = tmp_path / "collection" / task
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text(2 * GOOD)
    return tmp_path / "collection"


@pytest.fixture
def recipe_file(tmp_path: Path, collection: Path) -> Path:
    content = {
        "output": str(tmp_path / "run"),
        "stages": ["base", "experts", "gates", "evaluate"],
        "base": {"nano": {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "mlp_width": 32, "context": 64}},
        "data": {
            "base": {"path": f"skills:base + {collection}/one/train.jsonl"},
            "collection": str(collection),
            "sequence_length": 64,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def refused(recipe_file: Path, *options: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(["--config", str(recipe_file), *options])
    return caught.value


@pytest.mark.parametrize(
    ("row", "code", "text"),
    [
        ('{"prompt": "x"}\n', "QG-DATA-001", "line 2: field completion is missing"),
        ('{"prompt": "x", "completion": " y"\n', "QG-DATA-001", "line 2: not JSON"),
        (
            '{"prompt": "x", "choices": [" a", " b"], "answer": 2}\n',
            "QG-DATA-001",
            "line 2: field completion is missing, and field 'answer' is 2; it must be an index from 0 to 1",
        ),
    ],
)
def test_training_row(recipe_file: Path, collection: Path, row: str, code: str, text: str) -> None:
    load_recipe(["--config", str(recipe_file)])
    (collection / "two" / "train.jsonl").write_text(GOOD + row)
    error = refused(recipe_file)
    assert error.code == code
    assert text in str(error)
    assert str(collection / "two" / "train.jsonl") in str(error)


@pytest.mark.parametrize("row", [CHAT, '{"prompt": "x", "choices": [" a", " b"], "answer": 1}\n'])
def test_rows_that_can_be_trained(recipe_file: Path, collection: Path, row: str) -> None:
    (collection / "two" / "train.jsonl").write_text(GOOD + row)
    load_recipe(["--config", str(recipe_file)])


def test_a_file_of_a_joined_source(recipe_file: Path, collection: Path) -> None:
    (collection / "one" / "train.jsonl").write_text("[]\n")
    error = refused(recipe_file, "--data.collection", str(collection / "two"))
    assert "one/train.jsonl, line 1: a row must be a JSON object" in str(error)


def test_bad_rows_that_are_to_be_skipped(recipe_file: Path, collection: Path) -> None:
    (collection / "two" / "train.jsonl").write_text('{"prompt": "x"}\n' + GOOD)
    load_recipe(["--config", str(recipe_file), "--data.on_bad_row", "skip"])


def test_rows_of_stages_that_do_not_run(recipe_file: Path, collection: Path) -> None:
    (collection / "two" / "test.jsonl").write_text("[]\n")
    refused(recipe_file)
    load_recipe(["--config", str(recipe_file), "--stages", "[base,experts]"])


def test_evaluation_rows_to_the_last(recipe_file: Path, collection: Path) -> None:
    (collection / "one" / "test.jsonl").write_text(2 * HEAD * GOOD + '{"prompt": "x", "target": "y"}\n')
    error = refused(recipe_file)
    assert f"one/test.jsonl:{2 * HEAD + 1}: field 'completion' is missing" in str(error)
    load_recipe(["--config", str(recipe_file), "--evaluate.limit", "20"])  # reads no further


def test_a_dry_run_reads_every_training_row(recipe_file: Path, collection: Path) -> None:
    (collection / "one" / "train.jsonl").write_text(2 * HEAD * GOOD + "{\n")
    recipe = load_recipe(["--config", str(recipe_file)])
    with pytest.raises(RecipeError, match=rf"one/train.jsonl, line {2 * HEAD + 1}: not JSON") as caught:
        show_plan(recipe)
    assert str(caught.value).count("not JSON") == 1  # base and expert read the same file


def test_a_loaded_expert_with_rows_is_one_expert(recipe_file: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).touch()
    recipe = load_recipe(["--config", str(recipe_file), f"--experts.load.one={adapter}"])
    assert expert_names(recipe) == ["one", "two"]
