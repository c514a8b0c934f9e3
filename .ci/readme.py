"""Runs the commands of README.md as they stand there, after `make demo`:

    .venv/bin/python .ci/readme.py

In a temporary folder where `launch` and `.venv` are the repository's, and PATH and the export that the README speaks of are the
demo's. Every command is run, or named in ELSEWHERE with the reason why not here; a
command that is not run is still parsed with --print_config. A command in neither place, or a reason without its command, is
an error.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "runs" / "nano_demo"
ELSEWHERE = {
    "make demo": ".ci/run runs it before this",
    "make test": ".ci/run runs it after this",
    "source .venv/bin/activate": "PATH is set so",
    'deepspeed launch/train.py --config launch/recipes/smollm2_collection.yaml --data.collection FOLDER --data.include "[]"'
    ' --evaluate.include "[]"': "wants a GPU; the demo is the same chain",
    "python launch/train.py --config launch/recipes/urepa_compare.yaml": "wants a GPU and CIFAR-10; the digits are the same chain",
}
INPUTS = 'inputs = tokenizer("AB 402 =", return_tensors="pt")'  # what the README's later blocks call `inputs`
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python|quietgoose) [^`]+)`")
SECONDS = 600


def commands(text: str) -> Iterator[str]:
    """Shell commands of the fenced blocks and of `python ...` within sentences, in order, without comments."""
    for kind, block in BLOCK.findall(text):
        if kind == "bash":
            for line in block.splitlines():
                if command := re.sub(r"\s+#.*$", "", line).strip():
                    yield command
    yield from INLINE.findall(BLOCK.sub("", text))


def program(text: str) -> str:
    """The Python blocks, one after another, as one program."""
    blocks = [block for kind, block in BLOCK.findall(text) if kind == "python"]
    return "\n".join([blocks[0], INPUTS, *blocks[1:]])


def furnish(place: Path) -> None:
    """Links that the README's names stand for."""
    for name, target in (("launch", ROOT / "launch"), (".venv", ROOT / ".venv"), ("PATH", DEMO / "export")):
        (place / name).symlink_to(target)
    (place / "runs" / "smollm2_collection").mkdir(parents=True)
    (place / "runs" / "smollm2_collection" / "export").symlink_to(DEMO / "export")


def run(command: str | list[str], place: Path, environment: dict[str, str]) -> None:
    shown = command if isinstance(command, str) else "the Python blocks"
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=place, env=environment, shell=isinstance(command, str), text=True, timeout=SECONDS,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    print(f"{'ok  ' if done.returncode == 0 else 'FAIL'} {time.monotonic() - started:5.1f} s  {shown}", flush=True)
    if done.returncode:
        sys.exit(done.stdout[-4000:])


def main() -> int:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = list(commands(text))
    if gone := [command for command in ELSEWHERE if command not in listed]:
        sys.exit(f".ci/readme.py names commands that README.md does not have: {gone}")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        furnish(place)
        path = f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
        for command in listed:
            if command not in ELSEWHERE:
                run(command, place, environment)
            elif "--config" in command:
                run(f"{command} --print_config".replace("deepspeed", "python", 1), place, environment)
        run([sys.executable, "-c", program(text)], place, environment)
        wanted = ("results.json", "results.md", "merged/adapter_model.safetensors", "thoughts.html", "samples.png")
        if absent := [name for name in wanted if not (place / name).is_file()]:
            sys.exit(f"the README's commands did not leave {absent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
