"""Thoughts without experts, and all weights trained: the run, its tables and its export, in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quietgoose.base.files import read_json
from quietgoose.train import export
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(300)

TINY = [
    "--base.nano", '{"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "mlp_width": 48, "context": 128}',
    "--base.train.steps", "3", "--base.train.rows_per_expert", "4", "--base.train.micro_rows", "4",
    "--data.base.path", "steps:permutations-half,k=2,rows=40", "--data.thoughts.path", "steps:permutations-direct,k=2,rows=40",
    "--data.sequence_length", "40", "--thoughts.tokens", "2", "--thoughts.chunk", "9", "--thoughts.train.steps", "3",
    "--thoughts.train.rows_per_expert", "2", "--thoughts.train.micro_rows", "1", "--evaluate.thoughts.limit", "6",
    "--evaluate.thoughts.rows", "3", "--evaluate.thoughts.tasks", '{"questions": "steps:permutations-direct,k=2"}',
    "--evaluate.thoughts.generated", '{"purse": "steps:purse-direct,k=1"}', "--evaluate.max_new_tokens", "3",
    "--evaluate.thoughts.text.path", "steps:permutations-direct,k=2", "--evaluate.bootstrap", "20",
    "--tracking.enabled", "false",
]  # fmt: skip


def run(output: Path, *options: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "launch/train.py", "--config", "launch/recipes/thoughts_permutations.yaml", "--output", str(output),
        "--data.cache", str(output.parent / "cache"), *TINY, *options,
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_run_without_experts(tmp_path: Path, trainable: str) -> None:
    dtype = "float32" if trainable == "full" else "bfloat16"
    only_test = tmp_path / "ranked"
    only_test.mkdir()
    rows = [{"prompt": f"q{n}", "completion": "no", "choices": ["no", "yes"], "answer": n % 2} for n in range(3)]
    (only_test / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = {"questions": "steps:permutations-direct,k=2", "ranked": str(only_test)}
    done = run(
        tmp_path / "run", "--thoughts.trainable", trainable, "--base.dtype", dtype, "--evaluate.thoughts.tasks",
        json.dumps(tasks),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "thoughts save" in done.stderr
    evaluated = tmp_path / "run" / "stages" / "evaluate" / "result"
    table = read_json(evaluated / "thoughts.json")
    missing = {"base", "untrained"} if trainable == "full" else set()
    every = {"base", "no_thought", "untrained", "thought", "shuffled", "pause", "random", "temperature"}
    assert set(table["arms"]) == every - missing
    fitted = [cell["task"] for cell in table["cells"] if cell["arm"] == "temperature"]
    assert fitted == ["questions"], "ranked has no split to fit on"
    assert table["notes"] == ["temperature: left out for ranked: no split validation to fit the number on"]
    assert table["notes"][0] in (evaluated / "thoughts.md").read_text()
    assert set(read_json(evaluated / "generated.json")["arms"]) == {"base", "no_thought", "thought"} - missing
    assert len(read_json(evaluated / "deciles.json")["deciles"]) == 10
    assert not (evaluated / "results.json").exists()
    loaded = export.load(tmp_path / "run" / "export")
    assert loaded.thought_state.config.tokens == 2
    before = load_file(tmp_path / "run" / "stages" / "base" / "result" / "model.safetensors")
    after = load_file(tmp_path / "run" / "export" / "base" / "model.safetensors")
    same = all(torch.equal(before[name], after[name]) for name in before)
    assert same is (trainable == "lora"), "the base moves only where all weights train"
    tokens = torch.tensor([list(b"@sKL=")])
    assert loaded.generate(tokens, max_new_tokens=2, do_sample=False, thoughts=True).shape == (1, 7)


@pytest.mark.slow
def test_a_control_is_a_run_like_any_other(tmp_path: Path) -> None:
    done = run(tmp_path / "run", "--thoughts.control", "no_thoughts", "--evaluate.thoughts.generated", "{}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = read_json(tmp_path / "run" / "stages" / "evaluate" / "result" / "thoughts.json")
    assert set(table["arms"]) == {"base", "no_thought", "temperature"}
    assert "what was thought" not in done.stdout + done.stderr, "there is no such page"
    assert not (tmp_path / "run" / "stages" / "evaluate" / "result" / "deciles.json").exists(), (
        "no thought saves anything"
    )


def test_the_dry_run_knows_what_a_step_thinks() -> None:
    from quietgoose.routing.sites import AdapterLayout, all_sites
    from quietgoose.train.nano import build_nano
    from quietgoose.train.plan import make_plan
    from quietgoose.train.recipe import NanoSettings
    from quietgoose.train.settings import load_recipe

    options = ["--config", str(ROOT / "launch/recipes/thoughts_permutations.yaml"), *TINY, "--base.dtype=float32"]
    width = 32
    model, _ = build_nano(NanoSettings(layers=2, width=width, heads=2, kv_heads=1, mlp_width=48, context=128), 0)
    lora = AdapterLayout.uniform(all_sites(model), 16).numel
    head = 3 * width * width + 3 * width

    def stage(*more: str):
        return next(s for s in make_plan(load_recipe([*options, *more]), world=2).stages if s.name == "thoughts")

    found = stage()
    assert found.trainable == lora + 2 * width + head
    assert found.frozen == sum(p.numel() for p in model.parameters())
    assert found.thoughts is not None
    assert (found.thoughts.thoughts, found.thoughts.tokens) == (2 * 40 * 4, 2 * 40 * 4 * 2)
    assert found.thoughts.memory.stored == 40 * 4 * 2 * (2 * 2 * 1 * 16 * 4), (
        "one row a process: entries of K and V, fp32"
    )
    assert stage("--thoughts.rollout_chunk=12").thoughts.memory.stored == 3 * 4 * 2 * (2 * 2 * 1 * 16 * 4), (
        "3 anchors at once"
    )
    assert stage("--thoughts.limit=5").thoughts.thoughts == 2 * 5 * 4
    assert stage("--thoughts.trainable=embeddings").trainable == 2 * width + head
    assert stage("--thoughts.trainable=full").frozen == 0
    assert stage("--experts.targets=[nothing]").trainable == found.trainable, "a recipe without experts has no sites"
    control = stage("--thoughts.control=no_thoughts")
    assert (control.trainable, control.thoughts) == (lora, None)
    assert stage("--thoughts.control=same_compute").steps == -(-3 * (4 * 3 + 3 * (1 + 4 * 4)) // 3)
