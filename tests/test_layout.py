"""The rooms map into one package, the list in pyproject.toml is whole, and no room shadows anybody's package."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    mapping = CONFIG["package-dir"]
    parts = package.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in mapping:
            return ROOT.joinpath(mapping[prefix], *parts[length:])
    raise AssertionError(f"{package} is not mapped")


def test_every_listed_package_is_there_and_every_folder_is_listed() -> None:
    listed = {folder_of(package) for package in CONFIG["packages"]}
    assert all((folder / "__init__.py").is_file() for folder in listed)
    rooms = [ROOT / name for name in set(CONFIG["package-dir"].values())]
    found = {init.parent for room in rooms for init in room.rglob("__init__.py")}
    assert found == listed


def test_transformers_does_not_import_a_room() -> None:
    """A root package named `kernels` on sys.path would be taken for the Hugging Face package of that name."""
    code = (
        "import sys, transformers, transformers.integrations\n"
        "rooms = {'kernels', 'routing', 'thoughts', 'train', 'launch', 'base', 'evaluation'} & set(sys.modules)\n"
        f"bad = [r for r in rooms if str(getattr(sys.modules[r], '__file__', '')).startswith({str(ROOT)!r})]\n"
        "print(bad); raise SystemExit(bool(bad))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_package_and_listing_its_names_costs_no_torch() -> None:
    code = "import sys, quietgoose; raise SystemExit('torch' in sys.modules or 'load' not in dir(quietgoose))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
