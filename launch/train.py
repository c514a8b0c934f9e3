"""Train what a recipe says, under the DeepSpeed launcher, torchrun or plain python:

    deepspeed launch/train.py --config launch/recipes/nano_demo.yaml
    python launch/train.py --config launch/recipes/nano_demo.yaml --experts.rank 8 --dry_run

Every setting is an option (`--help`, `--print_config`). The recipe is checked before torch is imported.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from quietgoose.base.errors import QuietGooseError
from quietgoose.base.files import check_writable
from quietgoose.launch.command import spelt_settings
from quietgoose.train.redaction import install_excepthook
from quietgoose.train.settings import exit_with, parse_command


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of this rank (base/errors.py)."""
    install_excepthook()
    rank = int(os.environ.get("RANK", "0"))
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
            if rank != 0:  # --help and --print_config print once
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            arguments = spelt_settings(arguments)
            command = parse_command(arguments)
        if command.dry_run:
            if rank == 0:
                from quietgoose.train.plan import show_plan

                world = int(os.environ.get("WORLD_SIZE", "1"))
                show_plan(command.recipe, world, [word for word in arguments if word != "--dry_run"])
            return 0
        check_writable(Path(command.recipe.output), f"output: {command.recipe.output}", folder=True)
    except QuietGooseError as error:
        return exit_with(error, rank)
    from quietgoose.train.pipeline import run

    return run(command.recipe)


if __name__ == "__main__":
    sys.exit(main())
