"""--help explains every option of every command: its text is more than the name and the type."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Sequence

import pytest
from quietgoose.launch import doctor, evaluate, generate, sample, train
from quietgoose.train.recipe import Recipe
from quietgoose.train.settings import dataclass_in
from quietgoose.train.settings_help import MEANING

COMMANDS = {one.__name__.rpartition(".")[2]: one.main for one in (train, evaluate, generate, sample, doctor)}


def options(text: str) -> dict[str, str]:
    """Option -> what is said of it, without type and default."""
    found = {}
    for block in re.split(r"\n(?=  -)", text)[1:]:
        block = re.split(r"\n(?=\S|\n)", block)[0]
        names = re.findall(r"--[\w.]+\+?", block.split("\n")[0])
        words = re.sub(r"\(([^()]|\([^()]*\))*\)", "", " ".join(block.split()))  # types and defaults stand in brackets
        rest = re.sub(r"^(-\w, )?(--[\w.+]+( \S+)?,? ?)+", "", words) if "\n" in block or "  " in block.strip() else ""
        found[names[0]] = rest.strip()
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main: Callable[[Sequence[str]], int] = COMMANDS[name]
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    told = options(capsys.readouterr().out)
    assert len(told) > {"train": 250, "doctor": 2}.get(name, 10)
    assert not {option: text for option, text in told.items() if len(text) < 4}


def test_every_setting_of_a_recipe_has_a_sentence_and_no_sentence_lacks_its_setting() -> None:
    known: dict[str, set[str]] = {}

    def walk(kind: type) -> None:
        known[kind.__name__] = {field.name for field in dataclasses.fields(kind)}
        for hint in typing.get_type_hints(kind).values():
            inner, _ = dataclass_in(hint)
            if inner is not None and inner.__name__ not in known:
                walk(inner)

    walk(Recipe)
    assert {name: set(settings) for name, settings in MEANING.items()} == known
