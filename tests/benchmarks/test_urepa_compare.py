"""What benchmarks/urepa_compare.sh keeps can be gone on from: a seal comes with the files that it seals, or not at all."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "urepa_compare.sh"


def test_an_arm_that_is_not_finished_keeps_no_seal(tmp_path: Path) -> None:
    """Its weights stay behind: a seal without them would be an error in the next run, and the arm could never end."""
    work, results, programs = (tmp_path / name for name in ("work", "results", "programs"))
    finished, cut = (work / "run" / "arms" / name / "stages" for name in ("a-0", "b-0"))
    for file in (
        "urepa/DONE.json",
        "urepa/result/model.safetensors",
        "evaluate/DONE.json",
        "evaluate/result/scores.json",
    ):
        for arm in (finished, cut):
            if arm is finished or file.startswith("urepa"):
                (arm / file).parent.mkdir(parents=True, exist_ok=True)
                (arm / file).write_text("{}")
    programs.mkdir()
    (programs / "python").write_text("#!/bin/sh\necho 'runs: a-0, b-0'\n")
    (programs / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), "train.parquet", "test.parquet", str(work), str(results), "1", "30"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert "a-0 was finished before" in done.stdout, done.stdout + done.stderr
    assert "finished: 1 of 2" in done.stdout
    with tarfile.open(results / "urepa_compare.tar.gz") as archive:
        kept = {name.removeprefix("run/arms/") for name in archive.getnames()}
    assert kept == {"a-0/stages/evaluate/DONE.json", "a-0/stages/evaluate/result/scores.json"}
