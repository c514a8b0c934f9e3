"""What a wrong command line or setting says: one line, in words of a person, with the nearest name that there is.

jsonargparse and argparse answer a misspelt option with a page of usage, and a wrong value with the name of a Python class. Called by
train/settings.py, launch/command.py, launch/doctor.py and launch/cli.py.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import NoReturn

from .errors import RecipeError, suggest

UNRECOGNIZED = "unrecognized arguments: "
REQUIRED = "the following arguments are required: "
INVALID = re.compile(r"^argument (?P<name>\S+): invalid (?P<kind>\w+) value: '(?P<value>.*)'$")
PARSER_KEY = re.compile(r'^Parser key "([^"]*)": ')
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list, as in [a, b]",
    "tuple": "a list, as in [a, b]",
    "dict": "a mapping, as in {name: value}",
    "NoneType": "null",
}
NO_VALUE = re.compile(r"^argument (?P<name>\S+): expected (?:one|at least one) argument$")
KIND = re.compile(r"typing\.Literal\[([^\]]*)\]|<class '(?:\w+\.)*(\w+)'>|(?:typing\.)?(\w+)\[|(\w+)")
VALUE = r"(?:\. Got value: ?(?P<value>.*))?$"
EXPECTED = re.compile(r"Expected an? (?P<kind>typing\.Literal\[[^\]]*\]|<class '[\w.]+'>)" + VALUE)
OF_SIZE = re.compile(r"Expected a tuple with (?P<size>\d+) elements?" + VALUE)
OF_SETTINGS = re.compile(r"Expected a dot import path string: ?(?P<value>.*)$")
UNION = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[(?P<kinds>.*?)\] Errors: .*?"
    r"Given value type: <class '\w+'> Given value: ?(?P<value>.*)$"
)


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are a RecipeError of one line, with no usage before it: CFG-001, for a wrong value CFG-003."""

    def error(self, message: str) -> NoReturn:
        names = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        raise usage_error(message, names)


def usage_error(message: str, options: Iterable[str]) -> RecipeError:
    """What argparse or jsonargparse says of a command line, in one plain line. `options`: those there are, with their --."""
    text = " ".join(message.split())
    if text.startswith(UNRECOGNIZED):
        return RecipeError(_unknown(text.removeprefix(UNRECOGNIZED), list(options)))
    if text.startswith(REQUIRED):
        missing = text.removeprefix(REQUIRED).split(", ")
        known = {name.lstrip("-"): name for name in options}
        names = " and ".join(_spelt(known.get(name, name)) for name in missing)
        return RecipeError(f"give {names}; --help says what they are")
    if alone := NO_VALUE.match(text):
        return RecipeError(f"{_spelt(alone['name'])}: give a value after it", code="CFG-003")
    if wrong := INVALID.match(text):
        wanted = WORDS.get(wrong["kind"], wrong["kind"])
        return RecipeError(
            f"{_spelt(wrong['name'])}: must be {wanted}, found {wrong['value'] or 'nothing'}", code="CFG-003"
        )
    key = PARSER_KEY.match(text)
    text = f"{_spelt(f'--{key[1]}')}: {text[key.end() :]}" if key else text
    return RecipeError(plain_words(text), code="CFG-003")


def plain_words(text: str) -> str:
    """jsonargparse's sentence about a value of a wrong type, on one line: what it must be and what was found. Other text stays."""
    if found := UNION.search(text):
        kinds = _kinds(found["kinds"])
        wanted = " or ".join(dict.fromkeys(kinds))
    elif found := OF_SIZE.search(text):
        wanted = f"a list of {found['size']} values"
    elif found := OF_SETTINGS.search(text):
        wanted = WORDS["dict"]
    elif found := EXPECTED.search(text):
        wanted = _kinds(found["kind"])[0]
    else:
        return text
    value = found["value"]
    shown = "" if value is None else f", found {value or 'nothing'}"
    return f"{text[: found.start()]}must be {wanted}{shown}"


def _kinds(text: str) -> list[str]:
    """Words for types as Python writes them, separated by commas."""
    words = []
    while text:
        found = KIND.search(text)
        if found is None:
            break
        literal, *names = found.groups()
        name = next((one for one in names if one), "")
        other = WORDS["dict"] if name[:1].isupper() else name  # a class of settings
        words.append(_one_of(literal) if literal is not None else WORDS.get(name, other))
        text = text[found.end() :]
        if names[1]:  # list[...]: what is in it is told when the list itself is one
            text = _after_bracket(text)
    return words


def _one_of(literal: str) -> str:
    values = [value.strip().strip("'\"") for value in literal.split(",")]
    return values[0] if len(values) == 1 else f"one of {', '.join(values)}"


def _after_bracket(text: str) -> str:
    depth = 1
    for position, letter in enumerate(text):
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if depth == 0:
            return text[position + 1 :]
    return ""


def _unknown(words: str, options: list[str]) -> str:
    name = next((word.partition("=")[0] for word in words.split() if word.startswith("-")), "")
    if not name:
        return f"{words}: belongs to no option; options are given as --name value"
    spelt = [_spelt(option) for option in options]
    near = suggest(_spelt(name), spelt) or f" There are {', '.join(spelt)}"
    return f"option '{name}' is unknown.{near}"


def _spelt(option: str) -> str:
    return option.replace("_", "-")
