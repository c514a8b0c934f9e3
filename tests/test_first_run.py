"""docs/first_run.md does what it says: its files, recipe and commands are taken from the page and run in an empty folder.

Rows, dry run and the refused row in seconds; the whole of it in the slow test.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from quietgoose.train.settings import parse_command

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "first_run.md"
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    language: str
    name: str
    text: str


BLOCKS = [Block(*found) for found in BLOCK.findall(PAGE.read_text(encoding="utf-8"))]


def named(name: str, language: str) -> str:
    [text] = [block.text for block in BLOCKS if (block.language, block.name) == (language, name)]
    return text


def commands(word: str) -> list[str]:
    """The page's commands that contain `word`, in order, without those that are to be refused."""
    lines = [
        line for block in BLOCKS if (block.language, block.name) == ("bash", "") for line in block.text.splitlines()
    ]
    return [line for line in lines if word in line]


def shell(text: str, folder: Path, seconds: int) -> subprocess.CompletedProcess[str]:
    """`text` in bash as a reader would type it, with the environment active."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-ec", text],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a reader has after the page's files were written and its first command was run."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    for block in BLOCKS:
        if block.language in ("python", "yaml"):
            (tmp_path / block.name).write_text(block.text)
    [make] = commands("make_rows.py")
    assert shell(make, tmp_path, 60).returncode == 0
    return tmp_path


def test_the_rows_and_a_dry_run(folder: Path) -> None:
    shown = named("my_skills/next/train.jsonl", "json")
    assert (folder / "my_skills/next/train.jsonl").read_text().startswith(shown)
    assert len(shown.splitlines()) == 5
    for split, count in (("train", 600), ("test", 100)):
        files = sorted((folder / "my_skills").glob(f"*/{split}.jsonl"))
        assert [file.parent.name for file in files] == ["mirror", "next", "plus"]
        assert all(len(file.read_text().splitlines()) == count for file in files)
    [dry] = commands("--dry_run")
    done = shell(dry, folder, 120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "3: mirror, next, plus" in done.stdout
    assert not (folder / "runs").exists()


def test_the_bad_row_is_refused_as_the_page_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = shell(named("refused", "bash"), folder, 60)
    assert done.returncode == 2
    assert done.stderr == named("refused", "text")
    monkeypatch.chdir(folder)
    words = named("refused", "bash").splitlines()[-1].split()[2:]
    assert parse_command([*words, "--data.on_bad_row", "skip"]).dry_run


@pytest.mark.slow
def test_the_whole_page(folder: Path) -> None:
    for line in commands("launch/train.py")[1:]:
        done = shell(line, folder, 600)
        assert done.returncode == 0, done.stderr
        assert "WARNING" not in done.stderr
    [line] = commands("launch/evaluate.py")
    assert shell(line, folder, 120).returncode == 0
    cells = json.loads((folder / "first.json").read_text())["cells"]
    right = {arm: [cell["accuracy"][0] for cell in cells if cell["arm"] == arm] for arm in ("base", "phatgoose_mean")}
    assert max(right["base"]) < 0.05
    assert sum(right["phatgoose_mean"]) / 3 > 0.7
    answers = [shell(line, folder, 120) for line in commands("launch/generate.py")]
    assert "".join(done.stdout for done in answers) in [block.text for block in BLOCKS if block.language == "text"]
    done = shell("python use.py", folder, 120)
    assert done.stdout.strip() == named("use.py", "python").strip().rpartition("# ")[2]
