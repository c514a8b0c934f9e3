"""What the commands share: how options may be spelt, and errors in one piece with their exit code.

    --batch-tokens 512, --batch_tokens=512             one option: names take - and _ alike, values stay as they are
    --experts.train.micro-rows 4                       so do the settings of a recipe; names that users choose stay
    QG-CFG-001 option '--modle' is unknown. Did you mean '--model'?

Called by evaluate.py, generate.py, sample.py (run_command) and by train.py, cli.py (spelt_settings).
"""

from __future__ import annotations

import argparse
import inspect
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from quietgoose.base.errors import QuietGooseError
from quietgoose.base.options import usage_error


def run_command(command: Callable[..., None], argv: Sequence[str] | None, bare: Mapping[str, str] | None = None) -> int:
    """Call `command` with its arguments from the command line. Exit code 0, or that of the error, whose text goes to stderr:
    one line for an option that is misspelt, missing or of a wrong type.

    `bare`: what an option stands for if no value follows it.
    """
    from jsonargparse import auto_cli

    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with plain_warnings():
            try:
                given = spelt_options(command, words, bare or {})
                auto_cli(command, args=given, as_positional=False, exit_on_error=False)
            except argparse.ArgumentError as error:
                options = [f"--{name}" for name in inspect.signature(command).parameters]
                raise usage_error(str(error), options) from error
    except QuietGooseError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return 0


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Every warning is one line on stderr, without the place in the code and the line that stands there."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def quiet_bars() -> None:
    """The bars of transformers and the hub, which load weights and fetch files, on a terminal only. Imports transformers."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


def spelt_options(command: Callable[..., None], words: Sequence[str], bare: Mapping[str, str]) -> list[str]:
    """The words with the options as jsonargparse knows them: --kv-cache is --kv_cache, a bare --json is --json=true."""
    names = inspect.signature(command).parameters
    found = []
    for word, following in zip(words, [*words[1:], "--"]):
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and name.rstrip("+") in names:
            alone = name in bare and not equals and (bare[name] == "true" or following.startswith("--"))
            word = f"--{name}={bare[name]}" if alone else f"--{name}{equals}{value}"
        found.append(word)
    return found


def spelt_settings(words: Sequence[str]) -> list[str]:
    """The words with the settings of a recipe, and train.py's own options, spelt with _."""
    found = []
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        found.append(f"--{_setting(name)}{equals}{value}" if word.startswith("--") and name else word)
    return found


def _setting(name: str) -> str:
    """The dotted name with _ for - in every part that is a setting then."""
    from quietgoose.train.recipe import Recipe
    from quietgoose.train.settings import OWN_OPTIONS, dataclass_in

    kind: Any = Recipe
    chosen_by_user = False
    parts: list[str] = []
    for part in name.split("."):
        fields: Mapping[str, Any] = {} if kind is None else typing.get_type_hints(kind)
        spelt = part.replace("-", "_")
        known = spelt.rstrip("+") in fields or (spelt in OWN_OPTIONS and not parts)
        parts.append(spelt if known and not chosen_by_user else part)
        if chosen_by_user:
            chosen_by_user = False  # the part after a name is a setting again
        else:
            kind, chosen_by_user = dataclass_in(fields.get(spelt))
    return ".".join(parts)
