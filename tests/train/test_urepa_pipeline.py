"""`urepa_digits` as it ships, on the CPU: teacher, training (killed on one process, continued on two under the launcher), evaluation,
export; and what the dry run says of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quietgoose.base.errors import DataError, RecipeError
from quietgoose.train.mlflow_sink import step_values
from quietgoose.train.plan_images import make_image_plan
from quietgoose.train.settings import load_recipe
from quietgoose.train.stages_images import run_urepa
from quietgoose.train.teacher_stage import run_teacher
from quietgoose.train.unet_folder import load_unet, read_card
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "launch/recipes/urepa_digits.yaml"


def start(output: Path, world: int, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """Plain python for one process, the launcher for more."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators",
        str(world),
        "--master_port",
        port,
    ]
    command = [
        sys.executable, *(launcher if world > 1 else []), "launch/train.py", "--config", str(DIGITS), "--output", str(output),
        "--images.cache", str(output.parent / "cache"),
        *options,
    ]  # fmt: skip
    own = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=170)


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_digits_from_teacher_to_export(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (
        "--urepa.train.steps",
        "60",
        "--checkpoint.every",
        "20",
        "--evaluate.images.at",
        "[30]",
        "--tracking.enabled",
        "false",
    )
    kill = json.dumps([{"rank": 0, "step": 45, "point": "micro", "action": "kill"}])
    struck = start(run, 1, *words, QG_FAULT_TESTS="1", QG_FAULT_PLAN=kill)
    assert struck.returncode != 0, "the planned kill did not happen"
    done = start(run, 2, *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["kind"] == "step" and e["stage"] == "urepa"]
    assert [e["step"] for e in steps] == [*range(45), *range(40, 60)]
    values = step_values(steps[-1])
    wanted = {
        "loss",
        "loss/velocity",
        "loss/token",
        "loss/manifold",
        "token_cosine",
        "lambda",
        "images_per_second",
        "total",
    }
    assert wanted | {"gradient_norm/backbone", "gradient_norm/projector"} <= set(values)
    assert values["lambda"] == 0.5
    assert values["token_cosine"] == pytest.approx(-values["loss/token"])
    total = values["loss/velocity"] + 0.5 * (values["loss/token"] + 3.0 * values["loss/manifold"])
    assert values["total"] == pytest.approx(total, rel=1e-5)
    for number in range(40, 45):  # taken twice, from the checkpoint of step 40: by one process, by two
        first, second = (step_values(e) for e in steps if e["step"] == number)
        for name in ("loss/velocity", "loss/token", "loss/manifold", "gradient_norm/backbone"):
            assert second[name] == pytest.approx(first[name], rel=1e-4), (number, name)
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert step_values(steps[-1])["token_cosine"] > step_values(steps[0])["token_cosine"] + 0.1

    result = run / "stages/urepa/result"
    assert read_card(result).tap == "middle.0"
    average, raw = (load_file(result / f"{name}.safetensors") for name in ("average", "raw"))
    assert set(average) == set(raw) == {name for name, _ in load_unet(result).named_parameters()}
    assert not torch.equal(average["patches.weight"], raw["patches.weight"])
    early = load_unet(result, "raw", step=30)
    assert not torch.equal(early.patches.weight, raw["patches.weight"])  # type: ignore[union-attr]
    assert (result / "projector.safetensors").is_file()
    exported = load_file(run / "export/model.safetensors")
    assert not any("projector" in name for name in exported)
    assert all(torch.equal(exported[name], average[name]) for name in average)
    table = (run / "stages/evaluate/result/image_results.md").read_text()
    assert all(words in table for words in ("floor: held-out images", "step 30, average", "step 60, average, ode"))


def test_the_dry_run_knows_sizes_without_weights() -> None:
    recipe = load_recipe(["--config", str(DIGITS)])
    plan = make_image_plan(recipe, world=2)
    assert (plan.shape, plan.num_classes, plan.images) == ((1, 8, 8), 10, 1797)
    assert plan.backbone == 568_321
    assert plan.tap == "middle.0 (block 2 of 4, 4x4 tokens of width 64)"
    assert plan.chosen == 2
    assert plan.memory[1] < plan.memory[0], "moments are divided"
    assert plan.memory[3] > plan.memory[0], "weights and buckets of so small a model are not spared"
    without = make_image_plan(load_recipe(["--config", str(DIGITS), "--teacher.kind", "none", "--stages", "[urepa]"]))
    assert (without.projector, without.tap) == (0, "none")
    assert 0 < without.flops < plan.flops
    small = make_image_plan(load_recipe(["--config", str(DIGITS), "--urepa.train.micro_rows", "8"]))
    whole = make_image_plan(recipe)
    assert 0 < plan.activations < 0.6 * whole.activations, "two processes share the images of a step"
    assert without.activations <= whole.activations
    assert (small.micro_batches, whole.micro_batches) == (4, 1)
    assert whole.memory[0] - small.memory[0] == whole.activations - small.activations > 0.5 * whole.activations


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages", "[urepa]", "--output", "nowhere"], "CFG-020.*'urepa' needs the result of 'teacher'"),
        (["--stages", "[evaluate]", "--output", "nowhere"], "CFG-020|CFG-011|CFG-026|CFG-008"),
        (["--urepa.align.projector", "conv", "--urepa.align.order", "inside"], "CFG-123.*inside"),
        (["--urepa.align.token", "0", "--urepa.align.manifold", "0"], "CFG-123.*nothing is aligned"),
        (["--urepa.backbone.diffusers", '{"layers_per_block": 1}'], "CFG-123.*kind: diffusers"),
        (["--urepa.backbone.kind", "diffusers", "--urepa.backbone.width", "32"], "CFG-123.*belongs to sit_down"),
        (["--teacher.kind", "file", "--stages", "[urepa]"], "CFG-092.*needs the folder"),
        (["--urepa.label_drop", "1.5"], "CFG-003.*label_drop"),
        (["--stages", "[base, teacher, urepa]"], "CFG-004.*make two recipes"),
    ],
)
def test_what_a_recipe_may_not_say(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        load_recipe(["--config", str(DIGITS), *words])


def test_the_dry_run_knows_what_an_autoencoder_makes_of_images(tmp_path: Path) -> None:
    """A teacher sees pixels; the U-Net sees what the folder's own configuration says."""
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "config.json").write_text(json.dumps({"block_out_channels": [8, 8, 8], "latent_channels": 16}))
    words = ["--config", str(DIGITS), "--images.size", "32", "--images.vae", str(vae), "--teacher.patch", "4"]
    plan = make_image_plan(load_recipe([*words, "--images.limit", "100"]))
    assert plan.shape == (16, 8, 8)
    assert plan.teacher.startswith("self, 8x8 tokens")
    assert plan.images == 100
    (vae / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"DATA-044 images.vae: .*config.json"):
        make_image_plan(load_recipe(words))


def test_a_curve_has_no_points_before_the_first_step() -> None:
    with pytest.raises(RecipeError, match=r"CFG-003 evaluate.images.at: 0; allowed are 1 to"):
        load_recipe(["--config", str(DIGITS), "--evaluate.images.at", "[30, 0]"])


def test_guidance_needs_labels_that_are_dropped() -> None:
    words = ["--config", str(DIGITS), "--evaluate.images.samplers", "{guided: {guidance: 1.8}}"]
    assert load_recipe(words).evaluate.images.samplers["guided"].guidance == 1.8
    with pytest.raises(
        RecipeError, match=r"CFG-090 evaluate.images.samplers.guided.guidance: 1.8 needs .*urepa.label_drop"
    ):
        load_recipe([*words, "--urepa.label_drop", "0"])


@pytest.mark.parametrize("stages", ["[teacher, urepa, evaluate]", "[urepa, evaluate]"])
def test_images_too_few_to_judge_are_refused_before_anything_is_trained(tmp_path: Path, stages: str) -> None:
    """Not after hours of training."""
    few = [
        "--images.limit",
        "20",
        "--images.cache",
        str(tmp_path / "cache"),
        "--output",
        str(tmp_path / "run"),
        "--stages",
        stages,
    ]
    kind = [] if "teacher" in stages else ["--teacher.kind", "none"]
    recipe = load_recipe(["--config", str(DIGITS), *few, *kind])
    context: Any = SimpleNamespace(recipe=recipe, device=torch.device("cpu"))
    first = run_teacher if "teacher" in stages else run_urepa
    with pytest.raises(DataError, match=r"DATA-045 .*20 training and 20 held-out images allow 10 samples"):
        first(context)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["images"]
