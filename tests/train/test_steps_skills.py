"""Questions in steps: answers, steps, splits and hard tokens hold by construction; names are read strictly."""

from __future__ import annotations

import itertools
import re

import pytest
from quietgoose.base.errors import DataError
from quietgoose.train import skills
from quietgoose.train import steps_skills as steps
from quietgoose.train.data.rows import BadRows, RowReport, open_source, read_rows
from quietgoose.train.nano import nano_tokenizer
from quietgoose.train.recipe import SourceSettings
from quietgoose.train.word_problems import PROBLEMS

ASKED = re.compile(r"([?@])([s-z])([K-P]+)=(?:>([s-z]+)=)?([s-z])")


def solve(start: str, names: str, seed: int) -> str:
    state, found = start, ""
    for name in names:
        state = steps.tables(seed)[name][state]
        found += state
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tables_are_different_permutations(seed) -> None:
    tables = steps.tables(seed)
    assert len({tuple(table.values()) for table in tables.values()}) == len(steps.NAMES_OF_PERMUTATIONS)
    for table in tables.values():
        assert sorted(table.values()) == sorted(table) == list(steps.STATES)
        assert any(a != b for a, b in table.items())
    pairs = [(a, b) for a in tables for b in tables if any(
        tables[a][tables[b][s]] != tables[b][tables[a][s]] for s in steps.STATES)]  # fmt: skip
    assert pairs, "the permutations must not commute, or the order of the steps would not matter"


@pytest.mark.parametrize("kind", steps.KINDS)
def test_every_question_of_a_text_is_answered_rightly(kind) -> None:
    worked = set()
    for row in steps.rows(f"permutations-{kind},k=4,questions=3,filler=2", "train", 5, 60):
        text = row["prompt"] + row["completion"]
        found = ASKED.findall(text)
        assert len(found) == 3
        assert row["target"] == row["completion"]
        for _, start, names, told, answer in found:
            states = solve(start, names, 5)
            assert (len(names), answer) == (4, states[-1])
            assert told in ("", states)
            worked.add(bool(told))
            assert steps.split_of(start + names) == "train"
        assert text.index(found[-1][1] + found[-1][2]) == len(row["prompt"]) - 6
        assert [mark == "@" for mark, *_ in found] == [False, False, True], "the last question announces the end"
    assert worked == {"direct": {False}, "worked": {True}, "half": {False, True}}[kind]


def test_hard_positions_are_the_answers_nobody_told_the_steps_of() -> None:
    for row in steps.rows("permutations-half,k=3,questions=4,filler=2", "train", 0, 40):
        text = row["prompt"] + row["completion"]
        direct = [m for m in ASKED.finditer(text) if not m[4]]
        assert steps.hard_positions(text) == [m.start(5) for m in direct]
    text = "".join(
        r["prompt"] + r["completion"] for r in steps.rows("permutations-direct,k=5,questions=8", "train", 0, 20)
    )
    assert 0.03 < len(steps.hard_positions(text)) / len(text) < 0.08


def test_the_filler_uses_no_symbol_of_the_questions() -> None:
    words = set(steps.vocabulary(0))
    assert len(words) == steps.NUM_WORDS
    assert not set("".join(words)) & set(steps.STATES + steps.NAMES_OF_PERMUTATIONS)


def test_no_symbol_of_a_question_is_one_of_the_demos_skills() -> None:
    own = {steps.WITHIN, steps.LAST} | set(steps.STATES) | set(steps.NAMES_OF_PERMUTATIONS) | {steps.TELL}
    assert not own & set(skills.KIND_OF)


@pytest.mark.parametrize("family", list(PROBLEMS))
@pytest.mark.parametrize("k", [1, 2, 4])
def test_word_problems_add_up(family, k) -> None:
    for row in steps.rows(f"{family}-worked,k={k}", "train", 1, 80):
        told, answer = re.fullmatch(r" \((.*)\) (\d+)", row["completion"]).groups()
        sums = told.split(", ")
        assert len(sums) == k
        for one in sums:
            left, result = one.split("=")
            assert eval(left.replace("/", "//")) == int(result) >= 0
        assert all(b.startswith(a.split("=")[1]) for a, b in itertools.pairwise(sums)), (
            "each sum starts from the last result"
        )
        assert sums[-1].endswith(f"={answer}")
        numbers = re.findall(r"\d+", row["prompt"])
        assert re.match(r"\d+", sums[0])[0] in numbers
        assert row["prompt"].endswith(" Answer:")
    direct = steps.rows(f"{family}-direct,k={k}", "test", 1, 30)
    assert all(
        re.fullmatch(r" \d+", row["completion"]) and row["target"] == row["completion"].strip() for row in direct
    )


@pytest.mark.parametrize("name", ["permutations-half,k=4", "coach-half,k=3"])
def test_rows_are_repeatable(name) -> None:
    assert steps.rows(name, "test", 3, 20) == steps.rows(name, "test", 3, 200)[:20]
    assert steps.rows(name, "test", 3, 20) != steps.rows(name, "test", 4, 20)
    assert steps.rows(f"{name},rows=30", "train", 3) == steps.rows(name, "train", 3)[:30]


def test_no_question_is_in_two_splits() -> None:
    def questions(name: str, split: str) -> set[str]:
        rows = steps.rows(name, split, 3, 400)
        if name.startswith("permutations"):
            texts = [row["prompt"] + row["completion"] for row in rows]
            return {start + names for text in texts for _, start, names, _, _ in ASKED.findall(text)}
        return {row["completion"].split(")")[0] for row in rows}

    for name in ("permutations-half,k=4", "purse-worked,k=3"):
        train, validation, test = (questions(name, split) for split in steps.COUNTS)
        assert train
        assert not train & test
        assert not train & validation
        assert not validation & test


def test_a_character_is_a_token_of_the_nano_and_sources_open_by_name() -> None:
    bad = BadRows("error", RowReport())
    path = "steps:permutations-direct,k=5 + skills:base"
    rows = list(read_rows(open_source(SourceSettings(path=path), "base", 0), None, bad))
    tokenizer = nano_tokenizer()
    first, last = rows[0], rows[-1]
    assert first.prompt is not None
    assert first.completion is not None
    assert last.text is not None, "the second source follows the first"
    assert len(tokenizer(first.prompt + first.completion)["input_ids"]) == len(first.prompt + first.completion)
    assert len(rows) == steps.COUNTS["train"] + 12000
    joined = open_source(SourceSettings(path=path), "base", 0).fingerprint()
    assert joined != open_source(SourceSettings(path="steps:permutations-direct,k=5"), "base", 0).fingerprint()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("permutation-direct", "Did you mean 'permutations-direct'"),
        ("permutations-maybe", "kinds direct, worked, half"),
        ("permutations-direct,kk=3", "Did you mean 'k'"),
        ("permutations-direct,k=0", "allowed are 1 to 32"),
        ("permutations-direct,k=x", "k=NUMBER"),
        ("purse-direct,filler=3", "allowed are k=NUMBER, rows=NUMBER"),
        ("purse-direct,k=9", "allowed are 1 to 6"),
    ],
)
def test_names_are_read_strictly(name, text) -> None:
    with pytest.raises(DataError, match="QG-DATA-002") as caught:
        open_source(SourceSettings(path=f"steps:{name}"), "x", 0)
    assert text in str(caught.value)
    with pytest.raises(DataError, match="Did you mean 'test'"):
        steps.rows("permutations-direct", "tst", 0)
