"""From command line and YAML to a checked `Recipe`, in the first second: nothing here imports torch.

`load_recipe(["--config", "launch/recipes/nano_demo.yaml", "--experts.rank", "8"])`; also `--print_config`, `--dry_run`
and the `--local_rank` that the DeepSpeed launcher adds. Unknown keys are refused with the nearest known name, and all
problems are listed at once. What settings must not contradict each other is in train/checks.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..alignment.settings import SamplerSettings
from ..base.errors import QuietGooseError, RecipeError, suggest
from ..base.options import UNRECOGNIZED, OneLineParser, plain_words
from .checks import check_recipe
from .recipe import Recipe
from .redaction import redact
from .safe_yaml import read_yaml
from .thought_settings import PRESET_FIELDS

OWN_OPTIONS = ("config", "print_config", "dry_run", "local_rank", "help")
OF_ONE_VALUE = 'Parser key "value": '
# settings that change no trained number: they may differ between a run and its continuation
HARMLESS = (
    "name",
    "output",
    "stages",
    "data.cache",
    "images.cache",
    "compare.only",
    "evaluate",
    "tracking",
    "checkpoint",
    "resume",
)


@dataclass(frozen=True)
class Command:
    """What the command line asked for."""

    recipe: Recipe
    dry_run: bool
    local_rank: int


def load_recipe(argv: Sequence[str]) -> Recipe:
    """The checked recipe of a command line. RecipeError lists every problem; SystemExit after `--help` and
    `--print_config`, which print and stop."""
    return parse_command(argv).recipe


def parse_command(argv: Sequence[str]) -> Command:
    """As `load_recipe`, with the options that are no settings."""
    arguments = list(argv)
    _refuse_unknown(arguments)
    own, settings_given = _own_options().parse_known_args(arguments)
    parser = _parser()
    if {"-h", "--help"} & set(settings_given):
        from .settings_help import explain

        explain(parser, Recipe)
    try:
        nulls = [f"--thoughts.{name}=null" for name in _taken_back(settings_given)]
        namespace = parser.instantiate(parser.parse_args([*settings_given, *nulls]))
    except SystemExit as stop:
        raise stop if stop.code in (0, None) else RecipeError("command line refused") from stop
    except Exception as error:
        if isinstance(error, QuietGooseError):
            raise
        refuse(_bad_values(settings_given) or [("CFG-003", _said_by_parser(error))], error)
    return Command(_checked(_as_recipe(namespace)), own.dry_run, own.local_rank)


def recipe_from_plain(content: Mapping[str, Any]) -> Recipe:
    """The checked recipe of what `plain` made, or of any nested mapping. RecipeError as `load_recipe`."""
    unknown = _unknown_keys(content, Recipe, "")
    if unknown:
        refuse([("CFG-001", text) for text in unknown])
    parser = _kept_parser()
    try:
        namespace = parser.instantiate(parser.parse_object(dict(content)))
    except Exception as error:
        raise RecipeError(_one_line(error), code="CFG-003") from error
    return _checked(_as_recipe(namespace))


def _as_recipe(namespace: Any) -> Recipe:
    return Recipe(**{field.name: namespace[field.name] for field in dataclasses.fields(Recipe)})


def _checked(recipe: Recipe) -> Recipe:
    """With what is left out written out, so that what runs is what is saved; RecipeError with every problem."""
    if not recipe.evaluate.tasks:
        recipe.evaluate.collection = recipe.evaluate.collection or recipe.data.collection
    if "urepa" in recipe.stages or "compare" in recipe.stages:
        recipe.evaluate.images.samplers = recipe.evaluate.images.samplers or {"ode": SamplerSettings()}
    problems = check_recipe(recipe)
    if problems:
        refuse(problems)
    if "compare" in recipe.stages:
        from .compare_settings import check_arms

        check_arms(recipe)
    return recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe, every value written out, secrets masked. `--config` reads it back."""
    return yaml.safe_dump(redact.value(plain(recipe)), sort_keys=False, allow_unicode=True, width=110)


def recipe_from_yaml(path: Path) -> Recipe:
    """The recipe that `recipe_to_yaml` wrote, for instance beside a checkpoint."""
    return load_recipe(["--config", str(path)])


def plain(recipe: Any) -> Any:
    """A dataclass as JSON values; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> leaf. Lists are leaves, and so is an empty mapping."""
    if isinstance(value, Mapping) and value:
        return {k: leaf for key in value for k, leaf in flatten(value[key], f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def training_settings(recipe: Recipe) -> dict[str, Any]:
    """Dotted name -> value of every setting that a trained number depends on."""
    return {key: value for key, value in flatten(plain(recipe)).items() if not _harmless(key)}


def recipe_hash(recipe: Recipe) -> str:
    """sha256 over `training_settings`."""
    text = json.dumps(training_settings(recipe), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Setting -> `was 16, is 8`, for the settings two `training_settings` do not share."""
    absent = "absent"
    return {
        key: f"was {old.get(key, absent)!r}, is {new.get(key, absent)!r}"
        for key in sorted(set(old) | set(new))
        if old.get(key, absent) != new.get(key, absent)
    }


def exit_with(error: QuietGooseError, rank: int) -> int:
    """Write the error to stderr in one piece: whole on rank 0, its first line elsewhere. Returns the exit code."""
    text = redact(str(error))
    sys.stderr.write(f"{text}\n" if rank == 0 else f"rank {rank}: {text.splitlines()[0]}\n")
    sys.stderr.flush()
    return int(error.exit_code)


def _harmless(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in HARMLESS)


def refuse(problems: Sequence[tuple[str, str]], cause: BaseException | None = None) -> typing.NoReturn:
    """RecipeError for problems, as many as there are, with the code of the first."""
    code, text = problems[0]
    if len(problems) == 1:
        raise RecipeError(text, code=code) from cause
    lines = "".join(f"\n  QG-{c} {t}" for c, t in problems)
    raise RecipeError(f"{len(problems)} problems in the recipe:{lines}", code=code) from cause


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="launch/train.py",
        exit_on_error=False,
        description="Train, evaluate and export what a recipe says. Every setting of the recipe is an option. "
        "Also: --dry_run prints sizes, memory, steps and tokens, then stops; --local_rank is the launcher's.",
    )
    parser.add_argument("--config", action="config", help="a recipe (YAML); later options override it")
    parser.add_class_arguments(Recipe)
    return parser


@functools.cache
def _kept_parser() -> Any:
    """For the arms of a comparison: making one takes longer than using it."""
    return _parser()


def _own_options() -> OneLineParser:
    """Options that are no settings, so that --print_config does not print them into recipes."""
    options = OneLineParser(prog="launch/train.py", add_help=False, allow_abbrev=False)
    options.add_argument("--dry_run", action="store_true")
    options.add_argument("--local_rank", type=int, default=0)
    return options


def _refuse_unknown(arguments: Sequence[str]) -> None:
    """CFG-001 for every unknown key in every file and option, CFG-006/7 for files that cannot be read safely."""
    problems: list[tuple[str, str]] = []
    for path in _config_files(arguments):
        content = read_yaml(path)
        problems += [("CFG-001", f"{path}: {text}") for text in _unknown_keys(content, Recipe, "")]
    for argument in arguments:
        if argument.startswith("-") and not argument[1:2].isdigit():  # -1 is a value, not an option
            problems += [("CFG-001", text) for text in _unknown_option(argument)]
    if problems:
        refuse(problems)


def _config_files(arguments: Sequence[str]) -> Iterator[Path]:
    for number, argument in enumerate(arguments):
        if argument.startswith("--config="):
            yield Path(argument.partition("=")[2])
        elif argument == "--config":
            if number + 1 == len(arguments):
                raise RecipeError("--config: give the path of a recipe, for example launch/recipes/nano_demo.yaml")
            yield Path(arguments[number + 1])


def _taken_back(arguments: Sequence[str]) -> list[str]:
    """Fields of `thoughts:` that files set before `thoughts.preset` was named, in a later file or in an option: the preset is laid
    over them, so that one option makes a recipe the preset's experiment. What is set beside it, after it or by an option stays."""
    layers = list(_layers(arguments))
    naming = [number for number, (_, keys) in enumerate(layers) if "thoughts.preset" in keys]
    if not naming:
        return []
    kept = {key for number, (option, keys) in enumerate(layers) if option or number >= naming[-1] for key in keys}
    return [name for name in PRESET_FIELDS if f"thoughts.{name}" not in kept]


def _layers(arguments: Sequence[str]) -> Iterator[tuple[bool, set[str]]]:
    """(whether it is an option, the settings it names) of every file and option, in the order in which they apply."""
    for number, argument in enumerate(arguments):
        name, assigned, value = argument.partition("=")
        if not name.startswith("--"):
            continue
        if not assigned and number + 1 < len(arguments):
            value = arguments[number + 1]
        if name == "--config":
            yield False, {key for key, _ in _leaves(read_yaml(Path(value)), Recipe, "")}
        elif name == "--thoughts":  # the section as one option, as YAML or as a file
            given = yaml.safe_load(value)
            given = read_yaml(Path(given)) if isinstance(given, str) and Path(given).is_file() else given
            yield True, {f"thoughts.{key}" for key in (given if isinstance(given, Mapping) else ())}
        else:
            yield True, {name.lstrip("-").rstrip("+")}


def _unknown_option(argument: str) -> list[str]:
    name = argument.split("=", 1)[0]
    key = name.lstrip("-").rstrip("+")
    if name in ("-h", "--help") or (name.startswith("--") and key in OWN_OPTIONS):
        return []
    if not name.startswith("--") or not key:
        return [f"option '{name}' is unknown; settings are given as --section.key value"]
    nested: Any = None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    unknown = _unknown_keys(nested, Recipe, "", leaf_is_option=True)
    if unknown and "." not in key:
        near = suggest(key, [*OWN_OPTIONS, *(f.name for f in dataclasses.fields(Recipe))])
        return [f"option '{name}' is unknown.{near}"]
    return [f"option {name}: {text}" for text in unknown]


def _unknown_keys(content: Any, kind: Any, prefix: str, leaf_is_option: bool = False) -> list[str]:
    """Messages for the keys in `content` that the dataclass `kind` does not have, at any depth."""
    if not isinstance(content, Mapping):
        return []  # a wrong value, which the parser reports
    hints = typing.get_type_hints(kind)
    problems: list[str] = []
    for key, value in content.items():
        if key not in hints:
            known = ", ".join(hints)
            problems.append(f"unknown setting '{prefix}{key}'.{suggest(str(key), list(hints)) or f' Allowed: {known}'}")
            continue
        inner, many = dataclass_in(hints[key])
        if inner is None:
            if leaf_is_option and isinstance(value, Mapping) and typing.get_origin(hints[key]) is not dict:
                problems.append(f"setting '{prefix}{key}' has no parts")
        elif many and isinstance(value, Mapping):
            for name, part in value.items():
                problems += _unknown_keys(part, inner, f"{prefix}{key}.{name}.", leaf_is_option)
        else:
            problems += _unknown_keys(value, inner, f"{prefix}{key}.", leaf_is_option)
    return problems


def dataclass_in(hint: Any) -> tuple[type | None, bool]:
    """(the dataclass a setting holds or None, whether it holds many by name)."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint, False
    for part in typing.get_args(hint):
        inner, _ = dataclass_in(part)
        if inner is not None:
            return inner, typing.get_origin(hint) is dict
    return None, False


def _bad_values(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """One message for every single value that its type refuses; the parser alone would stop at the first. Each is tried with a
    parser of that one type: the parser of the whole recipe takes a tenth of a second a value."""
    problems: list[tuple[str, str]] = []
    for path in _config_files(arguments):
        for key, value in _leaves(read_yaml(path), Recipe, ""):
            problems += _try_value(key, value, f"{path}: {key}: {value!r}")
    for number, argument in enumerate(arguments):
        key, assigned, text = argument.partition("=")
        if not argument.startswith("--") or key.lstrip("-") in OWN_OPTIONS:
            continue
        if not assigned and number + 1 < len(arguments) and not arguments[number + 1].startswith("--"):
            text = arguments[number + 1]
        shown = argument if assigned else f"{key} {text}".rstrip()
        problems += _try_value(key.lstrip("-").rstrip("+"), [text] if key.endswith("+") else text, shown)
    return problems


def _leaves(content: Any, kind: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) down to what is no dataclass."""
    hints = typing.get_type_hints(kind)
    for key, value in content.items():
        inner, many = dataclass_in(hints[key])
        if inner is None or many or not isinstance(value, Mapping):
            yield f"{prefix}{key}", value
        else:
            yield from _leaves(value, inner, f"{prefix}{key}.")


def _try_value(key: str, value: Any, what: str) -> list[tuple[str, str]]:
    """CFG-003 if the type of the setting `key` refuses `value`, a YAML value or the text of an option."""
    from jsonargparse import ArgumentParser

    hint = _hint_of(key.split("."), Recipe)
    if hint is None:
        return []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        if isinstance(value, str):
            parser.parse_args([f"--value={value}"])
        else:
            parser.parse_object({"value": value})
    except Exception as error:
        said = _one_line(error).removeprefix(OF_ONE_VALUE)
        return [("CFG-003", f"{what}: {said.removesuffix(f', found {value}')}")]  # `what` shows the value
    return []


def _hint_of(parts: Sequence[str], kind: Any) -> Any:
    """The type of the setting that dotted `parts` name within `kind`; None if they lead nowhere."""
    if not parts:
        return kind
    inner, many = dataclass_in(kind)
    if inner is not None and not many:
        return _hint_of(parts[1:], typing.get_type_hints(inner).get(parts[0]))
    return _hint_of(parts[1:], typing.get_args(kind)[1]) if typing.get_origin(kind) is dict else None


def _said_by_parser(error: BaseException) -> str:
    text = _one_line(error)
    if not text.startswith(UNRECOGNIZED):
        return text
    return f"{text.removeprefix(UNRECOGNIZED)}: belongs to no option; settings are given as --section.key value"


def _one_line(error: BaseException) -> str:
    return plain_words(" ".join(str(error).split()))[:400]
