"""The console command `quietgoose`:

quietgoose doctor                      what is missing on this machine
quietgoose train --config RECIPE ...   the DeepSpeed launcher around launch/train.py; every setting is an option
quietgoose evaluate --model PATH ...   launch/evaluate.py
quietgoose generate --model PATH ...   launch/generate.py
quietgoose sample --model PATH ...     launch/sample.py: images of an exported U-Net
quietgoose stop [--now] RUN            save after this step and stop; --now: stop without saving
quietgoose sync RUN                    send MLflow what it has not got
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from quietgoose.base.errors import ExitCode, QuietGooseError, RecipeError, suggest
from quietgoose.base.files import check_writable
from quietgoose.base.options import OneLineParser
from quietgoose.launch.command import spelt_settings
from quietgoose.train.redaction import install_excepthook
from quietgoose.train.settings import exit_with


def train(argv: Sequence[str]) -> int:
    """`--processes N` and, after `--launcher`, options of the DeepSpeed launcher up to `--`; the rest is the recipe's."""
    from quietgoose.train.settings import parse_command

    options = OneLineParser(prog="quietgoose train", add_help=False, allow_abbrev=False)
    options.add_argument("--processes", type=int)
    own, rest = options.parse_known_args(list(argv))
    launcher: list[str] = []
    if "--launcher" in rest:
        start = rest.index("--launcher")
        end = rest.index("--", start) if "--" in rest[start:] else len(rest)
        launcher, rest = rest[start + 1 : end], rest[:start] + rest[end + 1 :]
    rest = spelt_settings(rest)
    command = parse_command(rest)
    if own.processes is not None and own.processes < 1:
        raise RecipeError(f"--processes {own.processes}: at least 1", code="CFG-003")
    if command.dry_run:
        from quietgoose.train.plan import show_plan

        show_plan(command.recipe, own.processes or 1, [word for word in rest if word != "--dry_run"])
        return 0
    check_writable(Path(command.recipe.output), f"output: {command.recipe.output}", folder=True)
    from quietgoose.train.compare_settings import outcome_folder
    from quietgoose.train.launcher import launch

    return launch(outcome_folder(command.recipe), rest, own.processes, launcher)


def doctor(argv: Sequence[str]) -> int:
    from quietgoose.launch.doctor import main as examine

    return examine(argv)


def generate(argv: Sequence[str]) -> int:
    from quietgoose.launch.generate import main as speak

    return speak(argv)


def sample(argv: Sequence[str]) -> int:
    from quietgoose.launch.sample import main as draw

    return draw(argv)


def evaluate(argv: Sequence[str]) -> int:
    from quietgoose.launch.evaluate import main as score

    return score(argv)


def stop(argv: Sequence[str]) -> int:
    parser = OneLineParser(prog="quietgoose stop", description="Stop a run after its current step.")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--now", action="store_true", help="without saving")
    arguments = parser.parse_args(argv)
    _run_folder(arguments.run)
    from quietgoose.train.run_folder import in_use
    from quietgoose.train.stop import last_end, request_stop

    running = in_use(arguments.run)
    request_stop(arguments.run, now=arguments.now)  # a start on its way to the lock sees it too
    if running:
        print(f"{arguments.run}: will {'stop at once' if arguments.now else 'save and stop'} after the current step")
    else:
        print(f"{arguments.run}: no process runs it ({last_end(arguments.run)}), so there is nothing to stop")
    return 0


def sync(argv: Sequence[str]) -> int:
    parser = OneLineParser(prog="quietgoose sync", description="Send MLflow what it has not got.")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--credentials", help="0600 file with token, or username and password")
    arguments = parser.parse_args(argv)
    _run_folder(arguments.run)
    from quietgoose.train.tracking import sync as send

    sent = send(arguments.run, print, arguments.credentials)
    print(f"{arguments.run}: {'MLflow has everything' if sent else 'MLflow has not got everything'}")
    return 0 if sent else int(ExitCode.ENVIRONMENT)


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "doctor": doctor, "train": train, "evaluate": evaluate, "generate": generate, "sample": sample,
    "stop": stop, "sync": sync,
}  # fmt: skip


def _run_folder(folder: Path) -> None:
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"{folder}: no recipe.yaml there, so it is no run folder", code="CFG-005")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command."""
    install_excepthook()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        if words[0] not in COMMANDS:
            near = suggest(words[0], list(COMMANDS))
            raise RecipeError(f"command '{words[0]}' is unknown; there are {', '.join(COMMANDS)}.{near}")
        return COMMANDS[words[0]](words[1:])
    except QuietGooseError as error:
        return exit_with(error, 0)


if __name__ == "__main__":
    sys.exit(main())
