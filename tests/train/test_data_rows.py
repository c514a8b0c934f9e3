"""Readers: what a good row is, what a bad one says, what is skipped, refused, read from where (R16, R18)."""

import gzip
import json
import logging

import pytest
from quietgoose.base.errors import DataError, NameRefused, RecipeError
from quietgoose.evaluation.tasks import load_task
from quietgoose.train.data.build import build_step_data, resolve_sources
from quietgoose.train.data.rows import BadRows, RowReport, open_source, read_rows
from quietgoose.train.nano import nano_tokenizer
from quietgoose.train.recipe import DataSettings, SourceSettings, TrainSettings

GOOD = {"prompt": "2+2=", "completion": " 4", "choices": [" 4"], "answer": 0}


def write(path, *lines):
    """Lines as given (bytes), or as JSON."""
    raw = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def read(path, policy="error", limit=None, **source):
    bad = BadRows(policy, RowReport())
    rows = list(read_rows(open_source(SourceSettings(path=path, **source), "e", 0), limit, bad))
    return rows, bad.report


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_files_with_blank_lines_bom_and_no_last_newline(tmp_path, name):
    path = write(tmp_path / name, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"", b"  ", {"text": "hëllo"})
    rows, report = read(path)
    assert [(r.prompt, r.completion, r.text) for r in rows] == [("2+2=", " 4", None), (None, None, "hëllo")]
    assert rows[1].where.endswith("line 4")
    assert (report.taken, report.skipped) == (2, 0)


BAD = {
    "not JSON": (b'{"prompt": "a", ', "not JSON"),
    "encoding": (b'{"prompt": "\xff", "completion": "a"}', "byte 13 is not UTF-8"),
    "no object": ([1, 2], "must be a JSON object, found list"),
    "no field": (
        {"question": "a"},
        "needs the fields prompt and completion, or messages, or text; found question",
    ),
    "missing": ({"prompt": "a"}, "field completion is missing"),
    "target alone": (
        {"prompt": "a", "target": "b"},
        "field completion is missing, and target does not say whether a space goes before the answer",
    ),
    "choices alone": ({"prompt": "a", "choices": ["b", "c"]}, "missing, and field 'answer' is None"),
    "no index": (
        {"prompt": "a", "choices": [" b", " c"], "answer": " b"},
        "field 'answer' is ' b'; it must be an index",
    ),
    "one choice": ({"prompt": "a", "choices": [" b"], "answer": 0}, "'choices' must be a list of two or more"),
    "no such choice": ({"prompt": "a", "choices": [" b", " c"], "target": "d"}, "'d', which is 0 of the choices"),
    "two such choices": ({"prompt": "a", "choices": ["b", " b"], "target": "b"}, "'b', which is 2 of the choices"),
    "two answers": (
        {"prompt": "a", "choices": [" b", " c"], "answer": 0, "target": "c"},
        "fields 'answer' and 'target' name two answers, ' b' and 'c'",
    ),
    "type": ({"prompt": "a", "completion": 4}, "field completion: must be text, found int"),
    "empty": ({"prompt": "a", "completion": ""}, "field completion is empty"),
    "surrogate": (
        b'{"prompt": "a\\ud800", "completion": "b"}',
        "field prompt: character 2 is a lone surrogate",
    ),
    "no list": ({"messages": "hi"}, "field messages: must be a list of messages, found str"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0], field role is missing"),
    "nothing said": ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
    "deep": (b"[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("fields", [{"answer": 1}, {"target": "no"}, {"answer": 1, "target": "no"}])
def test_the_right_choice_is_the_completion(tmp_path, fields):
    path = write(tmp_path / "test.jsonl", {"prompt": "2+2=5?", "choices": [" yes", " no"], **fields})
    [row], report = read(path)
    assert (row.prompt, row.completion, report.taken) == ("2+2=5?", " no", 1)
    [item] = load_task(tmp_path).items
    assert (item.completion, item.choices, item.answer) == (" no", (" yes", " no"), 1), "trained and evaluated alike"


@pytest.mark.parametrize("case", BAD)
def test_bad_row_names_file_line_field_and_reason(tmp_path, case):
    line, reason = BAD[case]
    path = write(tmp_path / "a.jsonl", GOOD, line, GOOD)
    with pytest.raises(DataError) as caught:
        read(path)
    assert f"{path}, line 2: " in str(caught.value)
    assert reason in str(caught.value)
    assert caught.value.code == ("QG-DATA-004" if case == "nothing said" else "QG-DATA-001")
    rows, report = read(path, "skip")
    assert (len(rows), report.taken, report.skipped) == (2, 2, 1)
    assert reason in report.reasons[0]


def test_limit_counts_good_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, {"x": 1}, GOOD, GOOD)
    rows, report = read(path, "skip", limit=2)
    assert (len(rows), report.skipped) == (2, 1)


def test_torn_gzip_and_missing_files_are_one_clear_error(tmp_path):
    whole = gzip.compress("\n".join(json.dumps({**GOOD, "n": n}) for n in range(5000)).encode())
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "plain.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "a.csv").write_text("x")
    for name, reason in (
        ("torn.jsonl.gz", "cannot be read after line"),
        ("plain.jsonl.gz", "cannot be read after line 0"),
        ("gone.jsonl", "no such file or folder"),
        ("a.csv", "allowed are files ending in .jsonl"),
        ("", "no train.jsonl.gz or train.jsonl; it has plain.jsonl.gz, torn.jsonl.gz"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            read(str(tmp_path / name))
        assert caught.value.code == "QG-DATA-002"


def test_folder_has_splits_and_a_split_cannot_leave_it(tmp_path):
    (tmp_path / "task").mkdir()
    write(tmp_path / "task" / "validation.jsonl", GOOD)
    write(tmp_path / "secret.jsonl", GOOD)
    assert len(read(str(tmp_path / "task"), split="validation")[0]) == 1
    with pytest.raises(NameRefused):
        read(str(tmp_path / "task"), split="../secret")


def test_hugging_face_dataset_by_name(monkeypatch):
    import datasets

    def load(name, configuration, split):
        assert (name, configuration, split) == ("org/name", "conf", "train")
        return datasets.Dataset.from_list([{"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": ""}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows, report = read("org/name:conf", "skip")
    assert rows[0].completion == " b"
    assert "dataset org/name:conf[train], row 1: field completion is empty" in report.reasons[0]


def test_embedded_skills_by_name(monkeypatch):
    from quietgoose.train import skills

    def rows(name, split, seed, count):
        return [{"prompt": f"{name} {split} {seed}", "completion": " ok"}]

    monkeypatch.setattr(skills, "rows", rows)
    source = open_source(SourceSettings(path="skills:reverse", split="test"), "e", 7)
    [row] = read_rows(source, None, BadRows("error", RowReport()))
    assert row.prompt == "reverse test 7"
    assert source.fingerprint() != open_source(SourceSettings(path="skills:reverse"), "e", 7).fingerprint()


def test_all_bad_is_refused_and_some_bad_is_counted(tmp_path, caplog):
    data = DataSettings(sequence_length=32, on_bad_row="skip", cache=str(tmp_path / "cache"))
    train = TrainSettings(rows_per_expert=1, micro_rows=1)
    empty = write(tmp_path / "empty.jsonl", {"x": 1})
    with pytest.raises(DataError, match=r"DATA-003 'e': no good row in the source \(1 left out\)"):
        build_step_data({"e": SourceSettings(path=empty)}, nano_tokenizer(), data, train, 0)
    long = {"prompt": "x" * 40, "completion": " y"}
    mixed = write(tmp_path / "mixed.jsonl", GOOD, long, {"x": 1})
    with caplog.at_level(logging.WARNING, "quietgoose.data"):
        built = build_step_data({"e": SourceSettings(path=mixed)}, nano_tokenizer(), data, train, 0)
    assert built.summary()["e"]["rows_skipped"] == 2
    assert built.summary()["e"]["rows_taken"] == 1
    assert "e: 2 rows left out, 1 taken" in caplog.text
    again = build_step_data({"e": SourceSettings(path=mixed)}, nano_tokenizer(), data, train, 0)
    assert again.summary() == built.summary()  # the count survives the cache
    data.on_bad_row = "error"
    write(tmp_path / "mixed.jsonl", GOOD, long, GOOD)
    with pytest.raises(DataError, match=r"DATA-004 .*mixed.jsonl, line 2: 42 tokens do not fit .*length 32"):
        build_step_data({"e": SourceSettings(path=mixed)}, nano_tokenizer(), data, train, 0)


def test_sources_of_a_collection(tmp_path):
    for name in ("b", "a", "zero"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl.gz", GOOD)
    (tmp_path / "collection.json").write_text(
        json.dumps({"a": {"role": "expert"}, "b": {"role": "expert"}, "zero": {"role": "zero-shot"}})
    )
    extra = {"c": SourceSettings(path="skills:c")}
    assert list(resolve_sources(DataSettings(collection=str(tmp_path), experts=extra))) == ["a", "b", "c"]
    assert list(resolve_sources(DataSettings(collection=str(tmp_path), include=["b", "a"]))) == ["b", "a"]
    assert list(resolve_sources(DataSettings(experts=extra))) == ["c"]
    for data, reason in (
        (
            DataSettings(collection=str(tmp_path), include=["zer"]),
            "'zer' is no folder .* Did you mean 'zero'",
        ),
        (DataSettings(collection=str(tmp_path), include=["a", "a"]), "names a task twice"),
        (
            DataSettings(collection=str(tmp_path), experts={"a": SourceSettings(path="x")}),
            "has this name already",
        ),
        (DataSettings(include=["a"]), "set data.collection"),
    ):
        with pytest.raises(RecipeError, match=reason):
            resolve_sources(data)
    with pytest.raises(NameRefused):
        resolve_sources(DataSettings(collection=str(tmp_path), include=["../a"]))
    with pytest.raises(NameRefused):
        resolve_sources(DataSettings(experts={"a/b": SourceSettings(path="x")}))
    with pytest.raises(DataError, match=r"no such folder"):
        resolve_sources(DataSettings(collection=str(tmp_path / "gone")))
