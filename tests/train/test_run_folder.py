"""A finished stage is skipped, a changed one refused, a torn one redone; one process holds the folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from quietgoose.base.errors import ArtifactError, QuietGooseError, RecipeError
from quietgoose.train.run_folder import RunFolder, held


def make(folder: RunFolder, settings: dict) -> None:
    with folder.staging("gates") as staging:
        (staging / "gates.safetensors").write_bytes(b"g" * 10)
    folder.seal("gates", settings)


def test_a_sealed_stage_is_finished_until_its_settings_or_files_change(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    settings = {"gates": {"lr": 5e-3}, "seed": 0}
    assert not folder.finished("gates", settings)
    make(folder, settings)
    assert folder.finished("gates", settings)
    with pytest.raises(RecipeError, match=r"gates\.lr was 0\.005, is 0\.1"):
        folder.finished("gates", {"gates": {"lr": 0.1}, "seed": 0})
    (folder.result("gates") / "gates.safetensors").write_bytes(b"h" * 10)
    with pytest.raises(ArtifactError, match="has changed"):
        folder.finished("gates", settings)


def test_a_stage_that_fails_leaves_nothing_behind_that_counts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def half() -> None:
        with folder.staging("gates") as staging:
            (staging / "half").write_bytes(b"x")
            raise ValueError("the stage failed")

    with pytest.raises(ValueError, match="the stage failed"):
        half()
    assert not folder.result("gates").exists()
    make(folder, {})
    assert [p.name for p in folder.stage("gates").iterdir() if p.is_dir()] == ["result"]


def test_a_missing_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="put 'experts' before 'gates'"):
        RunFolder(tmp_path).require("experts", "gates")


def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from quietgoose.train.run_folder import RunFolder, held\n"
        "with held(RunFolder(Path(sys.argv[1]))): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline().strip() == "held"
    with pytest.raises(QuietGooseError, match=f"in use by process {other.pid}"), held(RunFolder(tmp_path)):
        pass
    other.kill()
    other.wait()
    with held(RunFolder(tmp_path)):
        pass
