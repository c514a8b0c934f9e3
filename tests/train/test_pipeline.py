"""The whole chain under the real launcher, two processes, the embedded skills and a very small nano.

One undisturbed run (with every connection off this machine refused), one that is killed four times (a rank in the
middle of the experts, rank 0 in the middle of their next save, a rank in the middle of the gates, one in the middle of
the thoughts) and continued by the same command: the adapters, the gates, the thoughts and the tables are the same bit
for bit. Then what a user does with the export.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quietgoose.base.errors import ArtifactError, RecipeError
from quietgoose.base.files import read_json
from quietgoose.train import export
from quietgoose.train.mlflow_sink import numbers
from quietgoose.train.run_folder import hash_tree
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

SMALL = [
    "--base.nano", '{"layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "mlp_width": 128, "context": 128}',
    "--base.train.steps", "3", "--experts.train.steps", "5", "--experts.rank", "4", "--gates.train.steps", "6",
    "--thoughts.train.steps", "7", "--thoughts.train.rows_per_expert", "2", "--thoughts.train.micro_rows", "1",
    "--evaluate.thoughts.limit", "8", "--evaluate.thoughts.rows", "4", "--checkpoint.every", "2", "--evaluate.limit", "8",
    "--evaluate.bootstrap", "50", "--tracking.enabled", "false",
]  # fmt: skip

NO_NETWORK = """
import os, socket
plain = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        with open(os.environ["QG_TEST_CONNECTIONS"], "a") as log:
            log.write(f"{address}\\n")
        raise OSError("refused by the test")
    return plain(self, address)
socket.socket.connect = connect
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(output: Path, *options: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [
        sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2",
        "--master_port", free_port(), "launch/train.py", "--config", "launch/recipes/nano_demo.yaml",
        "--output", str(output), "--data.cache", str(output.parent / "cache"), *SMALL, *options,
    ]  # fmt: skip
    own = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        command, cwd=ROOT, env={**own, **(environment or {})}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made without any connection off this machine (row S11)."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    log = folder / "connections"
    done = run(folder / "run", environment={"PYTHONPATH": str(folder / "site"), "QG_TEST_CONNECTIONS": str(log)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not log.exists(), f"somebody tried to reach {log.read_text()}"
    return folder / "run"


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    assert read_json(whole / "outcome.json")["state"] == "finished"
    events = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    kinds = [event["kind"] for event in events]
    assert kinds.count("stage_finished") == 6
    assert "step_skipped" not in kinds
    assert {p.name for p in (whole / "export").iterdir()} >= {"quietgoose.json", "gates.safetensors", "experts", "base"}
    assert "<script" in (whole / "report.html").read_text()
    table = (whole / "stages" / "evaluate" / "result" / "results.md").read_text()
    assert all(arm in table for arm in ("base", "expert:digits", "oracle", "random", "merged", "arrow", "phatgoose"))
    assert "| phatgoose_mean |" in table
    assert "| average_activation |" in table
    assert (whole / "logs" / "rank1.log").is_file()
    evaluated = whole / "stages" / "evaluate" / "result"
    (told,) = (dict(numbers(event)) for event in events if event["kind"] == "routing")  # what MLflow gets
    assert 0 < told["entropy"] < math.log(2), "two experts a token, neither alone nor both alike at every site"
    assert told["entropy"] == read_json(evaluated / "routing.json")["entropy"]
    (means,) = (dict(numbers(event)) for event in events if event["kind"] == "results")
    table = read_json(evaluated / "results.json")["means"]
    assert means["accuracy/phatgoose/all"] == next(
        mean["accuracy"][0] for mean in table if (mean["arm"], mean["group"]) == ("phatgoose", "all")
    )
    (thinking,) = (dict(numbers(event)) for event in events if event["kind"] == "thoughts")
    assert {"accuracy/thought/all", "nats/no_thought/all"} <= set(thinking)
    thoughts = (evaluated / "thoughts.md").read_text()
    assert all(arm in thoughts for arm in ("no_thought", "shuffled", "pause", "random", "temperature", "entropy, nats"))
    page = (evaluated / "thoughts.html").read_text()
    assert "<script" in page
    assert "thoughts.loss_on: completion" in page, "the page scores questions too, the table answers only"


@pytest.mark.slow  # test_faults.py kills ranks, also inside a save, in seconds
def test_killed_four_times_and_continued_equals_undisturbed(whole: Path, tmp_path: Path) -> None:
    # base has steps 0 to 2, experts 0 to 4, gates 0 to 5, thoughts 0 to 6, so a step names the stage that is struck
    kills = [
        {"rank": 1, "step": 3, "point": "step", "action": "kill"},
        {"rank": 0, "step": 4, "point": "save.writing", "action": "kill"},
        {"rank": 1, "step": 5, "point": "step", "action": "kill"},
        {"rank": 1, "step": 6, "point": "micro", "action": "kill"},
    ]
    output = tmp_path / "run"
    for kill, stage in zip(kills, ("experts", "experts", "gates", "thoughts"), strict=True):
        done = run(output, environment={"QG_FAULT_TESTS": "1", "QG_FAULT_PLAN": json.dumps([kill])})
        assert done.returncode != 0, "the planned kill did not happen"
        assert not (output / "stages" / stage / "DONE.json").exists()
        assert list((output / "stages" / stage / "checkpoints").glob("step_*"))
    done = run(output)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continues at step" in done.stderr
    for stage in ("base", "experts", "gates", "thoughts"):
        assert hash_tree(output / "stages" / stage / "result") == hash_tree(whole / "stages" / stage / "result"), stage
    for table in ("results.json", "thoughts.json"):
        mine, other = (read_json(p / "stages" / "evaluate" / "result" / table) for p in (output, whole))
        assert mine["cells"] == other["cells"]
    assert not list(output.rglob("*.tmp-*"))


def test_a_finished_run_is_not_repeated_and_another_recipe_is_refused(whole: Path) -> None:
    before = hash_tree(whole / "stages")
    again = run(whole)
    assert again.returncode == 0, again.stderr[-3000:]
    assert hash_tree(whole / "stages") == before
    other = run(whole, "--experts.rank", "8")
    assert other.returncode == 2
    assert "experts.rank was 4, is 8" in other.stdout + other.stderr
    assert hash_tree(whole / "stages") == before


def probe(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.tensor([list(b"ab 12 = cd 34"), list(b"#! [] = #! []")])
    with torch.no_grad():
        return model(tokens).logits


def test_a_loaded_export_computes_what_was_trained_bit_for_bit(whole: Path) -> None:
    from quietgoose.routing.gates_format import load_gates
    from quietgoose.routing.library import ExpertLibrary
    from quietgoose.routing.model import attach
    from quietgoose.routing.peft_format import load_peft
    from quietgoose.routing.sites import find_sites
    from quietgoose.train.base_models import load_base
    from quietgoose.train.recipe import BaseSettings
    from quietgoose.train.thought_model import put_thinking, read_thinking

    base = load_base(BaseSettings(model=str(whole / "stages" / "base" / "result")))
    sites = find_sites(base.model, ["all-linear"])
    results = whole / "stages" / "experts" / "result"
    names = read_json(results / "experts.json")["names"]
    library = ExpertLibrary(load_peft(results / name, name, sites) for name in names)
    library = load_gates(whole / "stages" / "gates" / "result" / "gates.safetensors", library, sites)
    attach(base.model, library, "phatgoose", 2)
    thinking = read_thinking(whole / "stages" / "thoughts" / "result", 64, sites)
    put_thinking(base.model, thinking)
    trained = probe(base.model)
    code = (
        "import quietgoose, sys, torch; from safetensors.torch import save_file\n"
        "m = quietgoose.load(sys.argv[1]); assert m.thought_state.config.tokens == 5\n"
        "t = torch.tensor([list(b'ab 12 = cd 34'), list(b'#! [] = #! []')])\n"
        "with torch.no_grad(): logits = m(t).logits\n"
        "out = m.generate(t, max_new_tokens=4, do_sample=False); assert out.shape == (2, 17)\n"
        "out = m.generate(t, max_new_tokens=4, do_sample=False, thoughts=True); assert out.shape == (2, 17)\n"
        "save_file({'logits': logits}, sys.argv[2])"
    )
    out = whole.parent / "logits.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, str(whole / "export"), str(out)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(load_file(out)["logits"], trained)


def test_peft_opens_an_exported_expert_and_the_merge(whole: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    routed = export.load(whole / "export", thoughts=False)
    from quietgoose.routing.model import set_router

    alone = probe(set_router(routed, "expert:digits"))
    base = AutoModelForCausalLM.from_pretrained(whole / "export" / "base")
    opened = probe(PeftModel.from_pretrained(base, str(whole / "export" / "experts" / "digits")))
    torch.testing.assert_close(opened, alone, rtol=1e-5, atol=1e-5)
    merged = export.merge(whole / "export", tmp_path / "merged")
    uniform = probe(export.load(whole / "export", router="uniform"))
    base = AutoModelForCausalLM.from_pretrained(whole / "export" / "base")
    torch.testing.assert_close(probe(PeftModel.from_pretrained(base, str(merged))), uniform, rtol=1e-5, atol=1e-5)
    with pytest.raises(RecipeError, match="not empty"):
        export.merge(whole / "export", tmp_path / "merged")


def test_restricting_experts_touches_no_other(whole: Path) -> None:
    two = export.load(whole / "export", experts=["digits", "marks"], k=1)
    assert two.routing_state.library.names == ("digits", "marks")
    everything = export.load(whole / "export", thoughts=False)
    for site, adapter in two.routing_state.library["marks"].adapters.items():
        assert torch.equal(adapter.a_RI, everything.routing_state.library["marks"].adapters[site].a_RI)
    with pytest.raises(RecipeError, match="digits"):
        export.load(whole / "export", experts=["digitz"])


@pytest.mark.parametrize("file", ["gates.safetensors", "experts/marks/adapter_model.safetensors", "tokenizer.json"])
def test_a_changed_file_is_refused(whole: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(whole / "export", tmp_path / "export")
    path = tmp_path / "export" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="changed after the export"):
        export.load(tmp_path / "export")
    path.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        export.load(tmp_path / "export")


def test_a_foreign_base_and_a_path_that_leaves_are_refused(whole: Path, tmp_path: Path) -> None:
    from quietgoose.base.errors import SecurityError

    foreign = tmp_path / "base"
    shutil.copytree(whole / "export" / "base", foreign)
    weights = load_file(foreign / "model.safetensors")
    from safetensors.torch import save_file

    save_file({name: w + 1e-3 for name, w in weights.items()}, foreign / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="the experts were trained on"):
        export.load(whole / "export", base=str(foreign))
    shutil.copytree(whole / "export", tmp_path / "export")
    manifest = read_json(tmp_path / "export" / "quietgoose.json")
    manifest["files"]["../base/config.json"] = "0" * 64
    (tmp_path / "export" / "quietgoose.json").write_text(json.dumps(manifest))
    with pytest.raises(SecurityError, match="leaves the folder"):
        export.load(tmp_path / "export")


def test_evaluate_reads_tasks_nobody_tuned_on(whole: Path, tmp_path: Path) -> None:
    task = tmp_path / "tasks" / "colours"
    task.mkdir(parents=True)
    rows = [{"prompt": f"{i} = ", "completion": " a", "choices": [" a", " b"], "answer": i % 2} for i in range(6)]
    (task / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable, "launch/evaluate.py", "--model", str(whole / "export"), "--tasks", str(tmp_path / "tasks"),
        "--out", str(tmp_path / "out.json"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    result = read_json(tmp_path / "out.json")
    assert result["arms"] == ["base", "phatgoose"]
    assert {cell["items"] for cell in result["cells"]} == {6}
