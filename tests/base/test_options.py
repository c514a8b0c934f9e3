"""Command lines and settings that are wrong are told in one line and in words of a person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from quietgoose.base.errors import RecipeError
from quietgoose.base.options import OneLineParser, plain_words, usage_error


@dataclass
class Part:
    size: int = 1


def said(hint: Any, value: str) -> str:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    with pytest.raises(ArgumentError) as caught:
        parser.parse_args([f"--value={value}"])
    return usage_error(str(caught.value), []).message


@pytest.mark.parametrize(
    ("hint", "value", "text"),
    [
        (int, "1.5", "a whole number, found 1.5"),
        (float, "x", "a number, found x"),
        (bool, "maybe", "true or false, found maybe"),
        (list[str], "x", "a list, as in [a, b], found x"),
        (list[int], "[1, x]", "a whole number, found x"),
        (tuple[float, float], "[1]", "a list of 2 values, found [1]"),
        (tuple[float, float], "1", "a list, as in [a, b], found 1"),
        (dict[str, int], "3", "a mapping, as in {name: value}, found 3"),
        (dict[str, Part], "{a: b}", "a mapping, as in {name: value}, found b"),
        (Part | None, "[1]", "a mapping, as in {name: value} or null, found [1]"),
        (int | None, "", "a whole number or null, found nothing"),
        (list[str] | None, "x", "a list, as in [a, b] or null, found x"),
        (int | list[list[int]] | None, "x", "a whole number or a list, as in [a, b] or null, found x"),
        (Literal["a", "b"], "c", "one of a, b, found c"),
        (Literal["a", "b"] | None, "c", "one of a, b or null, found c"),
        (list[Literal["a"]], "[c]", "a, found c"),
    ],
)
def test_a_wrong_type(hint: Any, value: str, text: str) -> None:
    assert said(hint, value) == f"--value: must be {text}"


def test_other_sentences_stay() -> None:
    assert plain_words("no such file: <class 'int'>") == "no such file: <class 'int'>"


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--otput", "x", "run"], "CFG-001", "option '--otput' is unknown. Did you mean '--output'?"),
        (["--zzz", "run"], "CFG-001", "option '--zzz' is unknown. There are --help, --output, --batch-tokens"),
        (["run", "--output"], "CFG-003", "--output: give a value after it"),
        (["run", "--batch_tokens", "many"], "CFG-003", "--batch-tokens: must be a whole number, found many"),
        ([], "CFG-001", "give run; --help says what they are"),
        (["run", "stray"], "CFG-001", "stray: belongs to no option; options are given as --name value"),
    ],
)
def test_a_wrong_command_line(words: list[str], code: str, text: str) -> None:
    parser = OneLineParser(prog="x")
    parser.add_argument("run")
    parser.add_argument("--output")
    parser.add_argument("--batch_tokens", type=int)
    with pytest.raises(RecipeError) as caught:
        parser.parse_args(words)
    assert str(caught.value) == f"QG-{code} {text}"
