"""Reading task folders: good ones, and one clear error for each way a row can be bad."""

from __future__ import annotations

import gzip
import json

import pytest
from quietgoose.base.errors import DataError
from quietgoose.evaluation.tasks import find_tasks, load_task, make_task, matches

CHOICE = {"prompt": "p", "completion": " b", "choices": [" a", " b"], "answer": 1}
TEXT = {"prompt": "p", "completion": " walk left", "target": "walk left"}


def write(folder, rows, split="test", packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    data = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()
    path = folder / f"{split}.jsonl"
    if packed:
        with gzip.open(f"{path}.gz", "wb") as handle:
            handle.write(data)
    else:
        path.write_bytes(data)
    return folder


def test_kinds_and_groups(tmp_path):
    (tmp_path / "collection.json").write_text('{"number": {"role": "zero-shot"}}')
    choice = load_task(write(tmp_path / "choice", [CHOICE, CHOICE, CHOICE]), limit=2)
    assert (choice.kind, len(choice.items), choice.items[0].gold, choice.group) == ("choice", 2, 1, "")
    text = load_task(write(tmp_path / "text", [TEXT, {"prompt": "p", "completion": " 7"}], packed=False))
    assert (text.kind, text.match, text.items[1].target) == ("generate", "exact", "7")
    number = load_task(write(tmp_path / "number", [{**TEXT, "target": "1,018"}, {**TEXT, "target": -3.5}]))
    assert (number.match, number.group, number.items[1].target) == ("number", "zero-shot", "-3.5")
    assert [path.name for path in find_tasks(tmp_path)] == ["choice", "number", "text"]
    assert [path.name for path in find_tasks(tmp_path, include=["text", "choice"])] == ["text", "choice"]
    assert find_tasks(tmp_path / "text") == [tmp_path / "text"]


def test_codes_with_leading_zeros_are_text():
    assert make_task("t", [{**TEXT, "target": "012"}, {**TEXT, "target": "7"}]).match == "exact"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "not a JSON object"),
        ("[1]", "must be a JSON object, got list"),
        ({"prompt": "p"}, "field 'completion' is missing"),
        ({**CHOICE, "prompt": 3}, "field 'prompt' is int '3'"),
        ({**CHOICE, "answer": 2}, "'answer' is 2; it must be an index from 0 to 1"),
        ({**CHOICE, "answer": True}, "'answer' is True"),
        ({**CHOICE, "choices": [" a"]}, "'choices' must be a list of two or more"),
        ({**TEXT, "target": ["x"]}, "'target' must be a non-empty string"),
        (TEXT, "'choices' must be in all rows of a task or in none"),
    ],
)
def test_bad_rows_name_file_line_and_field(tmp_path, row, words):
    folder = write(tmp_path / "bad", [CHOICE, row])
    with pytest.raises(DataError) as caught:
        load_task(folder)
    assert "QG-DATA-001" in str(caught.value)
    assert "test.jsonl.gz:2" in str(caught.value)
    assert words in str(caught.value)


def test_unreadable_files(tmp_path):
    folder = write(tmp_path / "t", [CHOICE] * 50)
    whole = (folder / "test.jsonl.gz").read_bytes()
    (folder / "test.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        load_task(folder)
    (folder / "test.jsonl.gz").unlink()
    (folder / "test.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match=r"test.jsonl:1: not UTF-8 at byte 12"):
        load_task(folder)
    (folder / "test.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="no rows"):
        load_task(folder)


def test_missing_names_suggest(tmp_path):
    write(tmp_path / "mrpc", [CHOICE], split="validation")
    with pytest.raises(DataError, match=r"no split 'validtion' \(splits found: validation\). Did you mean"):
        load_task(tmp_path / "mrpc", "validtion")
    with pytest.raises(DataError, match=r"no task 'mrcp'.*Did you mean 'mrpc'"):
        find_tasks(tmp_path, "validation", ["mrcp"])
    with pytest.raises(DataError, match=r"no sub-folder holds test\.jsonl"):
        find_tasks(tmp_path)
    with pytest.raises(DataError, match="limit 0"):
        load_task(tmp_path / "mrpc", "validation", 0)


@pytest.mark.parametrize(
    ("text", "target", "right"),
    [
        (" 18", "18", True),
        (" 3 + 15 = 18.\nQuestion: what is 4?\nAnswer: 5", "18", True),
        (" The answer is $1,018.00", "1018", True),
        (" 20-2", "2", True),
        (" so -2", "-2", True),
        (" 1, 2, 18", "18", True),
        (" 18 and then 19", "18", False),
        ("Question: 18", "18", False),
        (" none", "18", False),
        ("...18", "18", True),
        (" 18.5", "18", False),
    ],
)
def test_last_number_rule(text, target, right):
    assert matches(text, target, "number") is right


def test_exact_rule_strips():
    assert matches("  walk left\n", "walk left", "exact")
    assert not matches("walk  left", "walk left", "exact")
