"""The floors hold: import-linter's contracts from pyproject.toml, over the package as it is when installed.

import-linter reads a package from one folder, while the rooms stand at the top of the repository, so the test lays
the rooms out in a temporary folder the way a wheel would. The command alone: `pytest tests/test_import_contracts.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_import_contracts(tmp_path: Path) -> None:
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for package, folder in sorted(mapping.items()):
        ignore = shutil.ignore_patterns("__pycache__", "*.yaml", "*.json", "*.html", "*.md")
        shutil.copytree(ROOT / folder, tmp_path.joinpath(*package.split(".")), ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    linter = Path(sys.executable).with_name("lint-imports")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [str(linter), "--config", "pyproject.toml", "--no-cache"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
