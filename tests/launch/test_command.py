"""How options may be spelt, in every command; what a command does with errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from quietgoose.base.errors import StorageError
from quietgoose.launch import cli, doctor
from quietgoose.launch import evaluate as evaluate_file
from quietgoose.launch import generate as generate_file
from quietgoose.launch import sample as sample_file
from quietgoose.launch.command import quiet_bars, run_command, spelt_options, spelt_settings
from quietgoose.launch.evaluate import evaluate
from quietgoose.launch.generate import BARE, generate
from quietgoose.launch.sample import sample
from quietgoose.train.settings import parse_command


@pytest.mark.parametrize("spelling", ["--some-limit {}", "--some_limit {}", "--some-limit={}", "--some_limit={}"])
def test_hyphens_and_underscores_are_one_option(spelling: str) -> None:
    seen = []

    def command(some_limit: int, other: str = "a-b") -> None:
        seen.append((some_limit, other))

    assert run_command(command, [*spelling.format(3).split(), "--other=c-d"]) == 0
    assert seen == [(3, "c-d")]


@pytest.mark.parametrize("command", [evaluate, generate, sample])
def test_every_option_of_every_command_has_both_spellings(command) -> None:
    import inspect

    names = list(inspect.signature(command).parameters)
    for words in ([f"--{name.replace('_', '-')}=v-w" for name in names], [f"--{name}=v-w" for name in names]):
        assert spelt_options(command, words, BARE) == [f"--{name}=v-w" for name in names]


def test_values_and_unknown_options_stay_as_they_are() -> None:
    words = ["--prompt", "kv-cache", "--prompt=--kv-cache", "--kv-cach", "x-y", "-k", "--"]
    assert spelt_options(generate, words, BARE) == words
    assert spelt_options(generate, ["--json", "--thoughts", "--show-thoughts", "--thoughts", "3"], BARE) == [
        "--json=true", "--thoughts=trained", "--show_thoughts=true", "--thoughts", "3",
    ]  # fmt: skip
    assert spelt_options(evaluate, ["--arms+=a-b"], {}) == ["--arms+=a-b"]


def test_settings_of_a_recipe_have_both_spellings_and_names_stay() -> None:
    pairs = {
        "--experts.train.micro-rows": "--experts.train.micro_rows",
        "--data.sequence-length=64": "--data.sequence_length=64",
        "--experts.train.optimizer.min-lr-ratio=a-b": "--experts.train.optimizer.min_lr_ratio=a-b",
        "--data.experts.my-skill.limit": "--data.experts.my-skill.limit",
        "--evaluate.images.samplers.with-guide.guidance-low=0": "--evaluate.images.samplers.with-guide.guidance_low=0",
        "--dry-run": "--dry_run", "--print-config": "--print_config", "--local-rank=0": "--local_rank=0",
        "--experts.rnk-x": "--experts.rnk-x", "a-b": "a-b", "--config": "--config", "-x-y": "-x-y",
    }  # fmt: skip
    assert spelt_settings(list(pairs)) == list(pairs.values())
    command = parse_command(
        spelt_settings(["--config", "launch/recipes/nano_demo.yaml", "--experts.train.micro-rows=3", "--dry-run"])
    )
    assert command.dry_run
    assert command.recipe.experts.train.micro_rows == 3


def test_an_error_is_one_piece_with_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise StorageError("--out x: no", code="IO-010")

    assert run_command(command, []) == 6
    assert capsys.readouterr().err == "QG-IO-010 --out x: no\n"


@pytest.mark.parametrize(
    ("main", "words", "text"),
    [
        (generate_file.main, ["--modle", "x"], "QG-CFG-001 option '--modle' is unknown. Did you mean '--model'?"),
        (generate_file.main, [], "QG-CFG-001 give --model; --help says what they are"),
        (generate_file.main, ["--model=x", "stray"], "QG-CFG-001 stray: belongs to no option; options are given as"),
        (generate_file.main, ["--model=x", "--seed=a"], "QG-CFG-003 --seed: must be a whole number, found a"),
        (generate_file.main, ["--model=x", "--kv-cache", "zip"], "QG-CFG-003 --kv-cache: must be one of zipcache, "),
        (
            evaluate_file.main,
            ["--boot-strap=2"],
            "QG-CFG-001 option '--boot-strap' is unknown. Did you mean '--bootstrap'?",
        ),
        (evaluate_file.main, ["--model=x"], "QG-CFG-001 give --tasks and --out; --help says what they are"),
        (
            sample_file.main,
            ["--model=x", "--cout", "3"],
            "QG-CFG-001 option '--cout' is unknown. Did you mean '--count'?",
        ),
        (doctor.main, ["--otput", "x"], "QG-CFG-001 option '--otput' is unknown. Did you mean '--output'?"),
        (cli.main, ["doctor", "--otput", "x"], "QG-CFG-001 option '--otput' is unknown. Did you mean '--output'?"),
        (cli.main, ["stop", "--nwo", "x"], "QG-CFG-001 option '--nwo' is unknown. Did you mean '--now'?"),
        (cli.main, ["train", "--processes", "x"], "QG-CFG-003 --processes: must be a whole number, found x"),
    ],
)
def test_a_wrong_option_is_one_line_in_every_command(main, words, text, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith(text)


def test_a_warning_is_one_line_and_stays() -> None:
    program = (
        "import warnings; from quietgoose.launch.command import run_command; before = warnings.formatwarning\n"
        "def command(): warnings.warn('slow\\nhere')\n"
        "assert run_command(command, []) == 0; assert warnings.formatwarning is before"
    )
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"
    }  # a test before may have set it
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, "warning: slow here\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_of_libraries_are_drawn_on_a_terminal_only(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    try:
        quiet_bars()
        assert logging.is_progress_bar_enabled() is terminal
    finally:
        logging.enable_progress_bar()
