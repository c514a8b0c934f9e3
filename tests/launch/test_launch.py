"""What people start: refusals come before torch, the doctor runs, stop writes the stop file, the launcher's line is safe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quietgoose.base.files import read_json
from quietgoose.launch import cli
from quietgoose.train.launcher import launch_line, without_secrets
from quietgoose.train.run_folder import RunFolder, held, in_use
from quietgoose.train.settings import load_recipe, recipe_to_yaml
from quietgoose.train.stop import write_outcome

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train.py"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": " b"}\n' * 7)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"output: {tmp_path / 'run'}\nstages: [base, experts, gates]\n"
        "experts: {rank: 4, train: {steps: 30}}\n"
        "base: {nano: {layers: 2, width: 64, heads: 2, kv_heads: 1, mlp_width: 96}}\n"
        f"data: {{sequence_length: 64, base: {{path: {rows}}}, experts: {{one: {{path: {rows}}}, two: {{path: {rows}}}}}}}\n"
    )
    return path


def start(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TRAIN), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def test_misspelt_key_is_refused_at_once(recipe_file: Path) -> None:
    best = 1e9
    for _ in range(3):  # the best of three: other programs share the processor
        started = time.monotonic()
        done = start("--local_rank=0", "--config", recipe_file, "--experts.rnk=3")
        best = min(best, time.monotonic() - started)
        assert done.returncode == 2
        assert done.stderr.startswith(
            "QG-CFG-001 option --experts.rnk: unknown setting 'experts.rnk'. Did you mean 'rank'?"
        )
        assert not (recipe_file.parent / "run").exists()
    assert best < 1.5


def test_other_ranks_refuse_in_one_line(recipe_file: Path) -> None:
    done = start("--config", recipe_file, "--experts.rnk=3", "--gates.x=1", RANK="3")
    assert done.returncode == 2
    assert done.stderr.startswith("rank 3: QG-CFG-001")
    assert len(done.stderr.splitlines()) == 1


def test_print_config_can_be_read_back(recipe_file: Path, tmp_path: Path) -> None:
    done = start("--config", recipe_file, "--experts.rank=5", "--print_config")
    assert done.returncode == 0, done.stderr
    copy = tmp_path / "copy.yaml"
    copy.write_text(done.stdout)
    assert load_recipe(["--config", str(copy)]).experts.rank == 5
    assert start("--config", recipe_file, "--print_config", RANK="1").stdout == ""


def test_dry_run_counts_right(recipe_file: Path) -> None:
    """Against counting by hand: 2 layers, width 64, 2 heads of 32, one key-value head, MLP 96."""
    from quietgoose.train.plan import make_plan

    plan = make_plan(load_recipe(["--config", str(recipe_file)]), world=2)
    linears = {
        "q": (64, 64),
        "k": (64, 32),
        "v": (64, 32),
        "o": (64, 64),
        "gate": (64, 96),
        "up": (64, 96),
        "down": (96, 64),
    }
    per_expert = 2 * sum(4 * (i + o) for i, o in linears.values())
    base = 2 * 258 * 64 + 64 + 2 * (2 * 64 + sum(i * o for i, o in linears.values()))
    gates = 2 * sum(i for i, _ in linears.values())
    stages = {stage.name: stage for stage in plan.stages}
    assert (plan.parameters, plan.sites, plan.per_expert) == (base, 14, per_expert)
    assert {name: stage.trainable for name, stage in stages.items()} == {
        "base": base, "experts": 2 * per_expert, "gates": 2 * gates,
    }  # fmt: skip
    assert (stages["experts"].frozen, stages["gates"].frozen) == (base, base + 2 * per_expert)
    assert stages["experts"].tokens == 30 * 2 * 8 * 64
    assert stages["experts"].micro_batches == 1, "16 rows over 2 processes are 8 each"
    assert plan.rows == {"one": 7, "two": 7}
    memory = stages["base"].memory
    assert memory[1] < memory[0], (
        "ZeRO-1 shards the moments; a bucket holds all gradients of so small a model at ZeRO-2"
    )
    assert stages["experts"].chosen == 2


def test_dry_run_prints_and_writes_nothing(recipe_file: Path) -> None:
    done = start("--config", recipe_file, "--dry_run")
    assert done.returncode == 0, done.stderr
    for text in ("14 linears", "ZeRO-3", "trainable", "tokens at most"):
        assert text in done.stdout
    assert not (recipe_file.parent / "run").exists()


def test_doctor_finds_this_machine_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from quietgoose.launch.doctor import main

    assert main(["--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for name in (
        "Python",
        "torch",
        "deepspeed",
        "C++ compiler",
        "ninja",
        "GPU",
        "flash-attn",
        "triton",
        "CUDA toolkit",
        "memory",
        "disk",
    ):
        assert f" {name}" in text
    assert "A run can start" in text


@pytest.mark.parametrize("below", ["", "x/y"])
def test_doctor_stops_where_runs_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, below: str
) -> None:
    from quietgoose.launch import doctor
    from quietgoose.train import diagnosis

    monkeypatch.setattr(diagnosis, "_imports", lambda: iter(()))
    (tmp_path / "file").write_text("")
    assert doctor.main(["--output", str(tmp_path / "file" / below)]) == 3
    captured = capsys.readouterr()
    assert "file is a file. choose another output folder" in captured.out
    assert "1 of" in captured.err


@pytest.mark.parametrize(("gpu", "said"), [(False, "ok"), (True, "note")])
def test_doctor_says_what_a_gpu_would_use(monkeypatch: pytest.MonkeyPatch, gpu: bool, said: str) -> None:
    from quietgoose.train import diagnosis

    monkeypatch.setattr(diagnosis, "_version_of", lambda name: "")
    monkeypatch.setattr(diagnosis.shutil, "which", lambda *names, **options: None)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    found = list(diagnosis._gpu_packages(gpu))
    assert [(one.name, one.state) for one in found] == [("flash-attn", said), ("triton", said), ("CUDA toolkit", said)]
    assert all(bool(one.fix) is gpu for one in found), "advice only where it would help"


def test_doctor_stops_at_a_wrong_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from quietgoose.launch import doctor
    from quietgoose.train import diagnosis

    real = diagnosis.importlib.metadata.version
    monkeypatch.setattr(diagnosis, "_imports", lambda: iter(()))
    monkeypatch.setattr(
        diagnosis.importlib.metadata, "version", lambda name: "0.18.0" if name == "deepspeed" else real(name)
    )
    assert doctor.main([]) == 3
    captured = capsys.readouterr()
    assert "STOP deepspeed: 0.18.0. pip install 'deepspeed==0.19.8'" in captured.out
    assert "QG-ENV-001" in captured.err


def test_stop_writes_the_stop_file(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert cli.main(["stop", str(run)]) == 2
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe_to_yaml(load_recipe(["--config", str(recipe_file)])))
    with held(RunFolder(run)):
        assert cli.main(["stop", str(run)]) == 0
        assert (run / "STOP").read_text() == "save"
        assert "will save and stop after the current step" in capsys.readouterr().out
        assert cli.main(["stop", "--now", str(run)]) == 0
        assert (run / "STOP").read_text() == "now"
        assert "will stop at once after the current step" in capsys.readouterr().out


def test_stop_says_that_no_process_runs_it(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe_to_yaml(load_recipe(["--config", str(recipe_file)])))
    ends = {
        "finished": "its last start finished",
        "failed": "its last start failed",
        "running": "its last start was killed",
    }
    for state, words in {"": "it never started", **ends}.items():
        if state:
            with held(RunFolder(run)):
                write_outcome(run, state, None, "", None)
        assert cli.main(["stop", str(run)]) == 0
        assert capsys.readouterr().out == f"{run}: no process runs it ({words}), so there is nothing to stop\n"
    assert not in_use(run)
    assert (run / "STOP").read_text() == "save", "a start that is on its way to the lock stops too"


def test_a_run_that_is_stopped_says_at_which_step(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe_file.parent / "run"
    rows = json.dumps({"prompt": "a", "completion": " b"}) + "\n"
    (recipe_file.parent / "rows.jsonl").write_text(rows * 300)
    given = ["--config", recipe_file, "--stages", "[base]", "--base.train.steps=100000", "--tracking.enabled=false"]
    given += ["--data.cache", run.parent / "cache"]
    command = [sys.executable, str(TRAIN), *map(str, given)]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own)
    try:
        deadline = time.monotonic() + 120
        while '"kind":"step"' not in ((run / "events.jsonl").read_text() if (run / "events.jsonl").is_file() else ""):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]  # noqa: PT018
            time.sleep(0.1)
        assert cli.main(["stop", str(run)]) == 0
        assert "will save and stop" in capsys.readouterr().out
        assert process.wait(60) == 75
    finally:
        process.kill()
        process.communicate()
    outcome = read_json(run / "outcome.json")
    assert f"stopped after step {outcome['step']}, checkpoint of step {outcome['step']} holds" in outcome["message"]
    assert cli.main(["stop", str(run)]) == 0
    assert "no process runs it (its last start stopped)" in capsys.readouterr().out
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["kind"] == "step"]
    assert outcome["step"] == len(steps)
    assert steps[0]["losses"].keys() == steps[0]["gradient_norms"].keys() == {"loss"}
    (told,) = (event for event in events if event["kind"] == "data")
    assert told["sources"].keys() == {"loss"}


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_train_refuses_before_the_launcher(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", str(recipe_file), "--experts.rnk=1"]) == 2
    assert "Did you mean 'rank'?" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_torch(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    given = ("--config", recipe_file, "--output", tmp_path / "file" / "x")
    done = start(*given)
    assert done.returncode == 6, done.stderr
    assert done.stderr.startswith(
        f"QG-IO-010 output: {tmp_path / 'file' / 'x'}: cannot be written there (Not a directory"
    )
    assert "Traceback" not in done.stderr
    assert cli.main(["train", *map(str, given)]) == 6
    assert "QG-IO-010" in capsys.readouterr().err


def test_settings_may_be_spelt_with_hyphens(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = start("--config", recipe_file, "--data.sequence-length=32", "--print-config")
    assert done.returncode == 0, done.stderr
    assert "sequence_length: 32" in done.stdout
    assert cli.main(["train", "--config", str(recipe_file), "--data.sequence-length", "32", "--dry-run"]) == 0
    assert f"{30 * 2 * 8 * 32:,}" in capsys.readouterr().out


def test_launch_line_keeps_secrets_and_fixed_ports_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "canary-token")
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    command, environment = launch_line(["--config", "x.yaml"], 2)
    other, _ = launch_line(["--config", "x.yaml"], 2)
    assert "canary-token" not in " ".join([*command, *environment.values()])
    assert command[-3:] == [str(TRAIN), "--config", "x.yaml"]
    ports = {line[line.index("--master_port") + 1] for line in (command, other)}
    assert "29500" not in ports
    assert without_secrets({"TOKENIZERS_PARALLELISM": "false", "A_PASSWORD": "x"}) == {
        "TOKENIZERS_PARALLELISM": "false"
    }
