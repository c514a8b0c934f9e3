"""The comparison: which runs it is, what its tables and verdict say of made-up scores, and the whole of it on tiny runs."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image
from quietgoose.base.errors import ArtifactError, RecipeError
from quietgoose.base.files import read_json, write_json
from quietgoose.train import pipeline
from quietgoose.train.compare import compare, read_comparison, run_compare, t_interval
from quietgoose.train.compare_report import markdown
from quietgoose.train.compare_settings import arm_recipe, launch_lines, outcome_folder, run_names
from quietgoose.train.evaluate_images import evaluate_settings
from quietgoose.train.image_cost import share_fills
from quietgoose.train.image_results import write_image_results
from quietgoose.train.recipe import Recipe
from quietgoose.train.run_folder import RunFolder
from quietgoose.train.settings import load_recipe
from quietgoose.train.stages_images import urepa_settings
from quietgoose.train.unet_folder import UNetCard

ROOT = Path(__file__).resolve().parents[2]
COMPARE = ROOT / "launch/recipes/urepa_compare.yaml"
SMALL = {
    "version": 1, "name": "small", "stages": ["compare"], "strategy": "zero0", "images": {"source": "digits"},
    "teacher": {"patch": 1, "width": 16, "layers": 1, "heads": 2, "decoder_width": 16, "decoder_layers": 1,
                "train": {"steps": 5, "batch": 16}},
    "urepa": {"backbone": {"preset": "nano", "width": 32}, "align": {"hidden": 32},
              "train": {"steps": 4, "rows_per_expert": 8, "micro_rows": 8}},
    "compare": {"treatment": "D", "controls": ["A"], "seeds": [0, 1], "one_seed": ["B"],
                "arms": {"A": {"teacher.kind": "none"}, "D": {}, "B": {"urepa.align": {"tap": "2", "manifold": 0}}}},
    "evaluate": {"images": {"count": 40, "at": [2], "raw": False, "samplers": {"ode": {"steps": 2, "batch": 40}},
                            "judge": {"width": 8, "train": {"steps": 5, "batch": 16}}, "subsets": 2, "subset_size": 20,
                            "bootstrap": 2}},
    "tracking": {"enabled": False},
}  # fmt: skip


def options(tmp_path: Path, **changes: Any) -> list[str]:
    path = tmp_path / "small.yaml"
    images = {**SMALL["images"], "cache": str(tmp_path / "cache")}
    path.write_text(yaml.safe_dump({**SMALL, "output": str(tmp_path / "run"), "images": images, **changes}))
    return ["--config", str(path)]


def entry(jfd: dict[int, float], seconds: float, once: float = 0.0, judge: str = "j") -> dict[str, Any]:
    """One run's results: JFD by step."""
    points = [
        {"step": s, "weights": "average", "sampler": "ode", "count": 100, "scores": {"jfd": v, "copies": 0.1}}
        for s, v in jfd.items()
    ]
    cost = {
        "seconds": seconds, "once_seconds": once, "teacher_seconds": once, "fill_seconds": 0.0, "pflop": None, "once_pflop": None,
        "images_per_second": 1.0, "features": "", "token_cosine": 0.5,
    }  # fmt: skip
    floors = {"100": {"train": {"jfd": 1.0}, "test": {"jfd": 1.1}}}
    return {
        "judge": {"digest": judge, "accuracy": 0.9, "task": "classes"}, "floors": floors, "points": points, "samplers": {"ode": {}},
        "steps": max(jfd), "cost": cost, "facts": {},
    }  # fmt: skip


def scored(treatment: list[float], control: list[float]) -> dict[str, Any]:
    runs = {f"D-{n}": entry({50: 2 * v, 100: v}, 1.2, 30.0) for n, v in enumerate(treatment)}
    return runs | {f"A-{n}": entry({50: 2 * v, 100: v}, 1.0) for n, v in enumerate(control)}


def test_the_shipped_comparison_shares_everything_but_its_arms() -> None:
    recipe = load_recipe(["--config", str(COMPARE)])
    assert run_names(recipe)[:7] == [f"{arm}-0" for arm in "ADCEBFG"]
    assert len(run_names(recipe)) == 3 * 5 + 2
    runs = {run: arm_recipe(recipe, run) for run in [*run_names(recipe)[:7], "A-1", "D-1", "B-2"]}
    assert runs["A-1"].stages == ["urepa", "evaluate"]
    assert runs["D-1"].stages == ["teacher", "urepa", "evaluate"]
    assert [runs[f"{arm}-0"].teacher.kind for arm in "ABCDEFG"] == [
        "none",
        "self",
        "self",
        "self",
        "random",
        "label",
        "self",
    ]
    assert runs["B-2"].urepa.align.tap == "2"
    assert runs["C-0"].urepa.align.manifold == 0.0
    assert runs["G-0"].urepa.align.stop == 0.5
    assert {run.output for run in runs.values()} == {f"runs/urepa_compare/arms/{name}" for name in runs}
    for one in runs.values():
        assert one.urepa.backbone == recipe.urepa.backbone
        assert one.urepa.train == recipe.urepa.train
        assert (one.images, one.evaluate.images, one.teacher.seed) == (recipe.images, recipe.evaluate.images, 0)
    cifar = load_recipe(["--config", str(ROOT / "launch/recipes/urepa_cifar.yaml")])
    assert (cifar.urepa, cifar.teacher, cifar.images) == (runs["D-0"].urepa, runs["D-0"].teacher, runs["D-0"].images)


def test_commands_for_several_gpus_run_everything_once() -> None:
    recipe = load_recipe(["--config", str(COMPARE)])
    lines = launch_lines(recipe, ["--config", "a b.yaml"], 4)
    assert len(lines) == 6
    assert lines[-1] == "python launch/train.py --config 'a b.yaml'"
    named = [run for line in lines[:4] for run in line.split("[")[1].split("]")[0].split(",")]
    assert sorted(named) == sorted(run_names(recipe))


def test_arms_that_cannot_be_are_refused_before_anything_runs(tmp_path: Path) -> None:
    def with_arm(**arm: Any) -> list[str]:
        compare_block = {**SMALL["compare"], "arms": {"A": {}, "D": arm}}
        return options(tmp_path, compare={**compare_block, "one_seed": []})

    with pytest.raises(RecipeError, match=r"compare.arms.D: unknown setting 'urepa.algn.weight'"):
        load_recipe(with_arm(**{"urepa.algn.weight": 1.0}))
    with pytest.raises(RecipeError, match=r"compare.arms.D: .*'urepa.align.wieght'.*Did you mean 'weight'"):
        load_recipe(with_arm(**{"urepa.align.wieght": 1.0}))
    with pytest.raises(RecipeError, match=r"compare.arms.D: urepa.align.stop: 2.0; allowed are 0 to 1"):
        load_recipe(with_arm(**{"urepa.align.stop": 2.0}))
    with pytest.raises(RecipeError, match=r"compare.only: 'D-7'; the runs are A-0, B-0, D-0"):
        load_recipe([*options(tmp_path), "--compare.only", "[D-7]"])
    with pytest.raises(RecipeError, match=r"QG-CFG-124.*'Z' is none of compare.arms"):
        load_recipe([*options(tmp_path), "--compare.controls", "[Z]"])
    only = load_recipe([*options(tmp_path), "--compare.only", "[D-1]"])
    assert outcome_folder(only) == tmp_path / "run/arms/D-1"


def test_intervals_are_student_s() -> None:
    made = t_interval([1.0, 2.0, 6.0])
    half = 4.303 * math.sqrt(7.0) / math.sqrt(3)
    assert made["mean"] == 3.0
    assert (made["low"], made["high"]) == (pytest.approx(3 - half), pytest.approx(3 + half))
    assert t_interval([1.5]) == {"mean": 1.5, "low": None, "high": None}


@pytest.mark.parametrize(
    ("treatment", "control", "result"),
    [
        ([10.0, 20.0, 30.0], [11.0, 21.1, 31.0], "gain"),  # paired: seeds differ by ten times the gain
        ([10.0, 20.0, 30.0], [11.0, 19.5, 31.0], "no gain shown"),
        ([12.0, 22.0, 32.0], [11.0, 21.1, 31.0], "loss"),
        ([10.0], [11.0], "undecided"),
    ],
)
def test_the_verdict_claims_no_more_than_the_seeds_show(
    treatment: list[float], control: list[float], result: str
) -> None:
    found = compare(scored(treatment, control), "D", ["A"])
    assert found["verdict"]["result"] == result
    assert compare(scored(treatment, control), "D", ["A", "E"])["verdict"]["result"] == "undecided"
    text = markdown(found, "title", {})
    assert ("better than every control" in text) == (result == "gain")
    assert "not FID" in text


def test_equal_time_charges_the_teacher() -> None:
    """D: 1.2 s a step and 30 s once. A's 100 s are D's step 58.3, between its points at 90 s and 150 s."""
    found = compare(scored([10.0], [11.0]), "D", ["A"])
    budget, theirs, mine = found["equal"]["A"]["seconds"]
    assert (budget, theirs) == (100.0, 11.0)
    assert mine == pytest.approx(20.0 + (100 - 90) / (150 - 90) * (10.0 - 20.0))
    assert found["equal"]["A"]["pflop"] is None


def test_equal_time_is_read_from_the_curve_s_own_number_of_samples() -> None:
    """evaluate.images.at_count: the points before the last one have fewer samples, and the last one both."""
    runs = scored([10.0], [11.0])
    for run in runs.values():
        last = run["points"][-1]
        run["points"] = [{**point, "count": 50} for point in run["points"]] + [{**last, "scores": {"jfd": 1.0}}]
    found = compare(runs, "D", ["A"])
    assert found["final"] == "step 100, average, ode, 100 samples"
    assert found["equal_count"] == 50
    assert found["equal"]["A"]["seconds"] == [100.0, 11.0, pytest.approx(20.0 - 10.0 / 6.0)]
    assert "JFD of D at its seconds (50 samples)" in markdown(found, "title", {})


def test_features_found_on_disk_are_charged_like_computed_ones() -> None:
    costs = [
        {"features": "x", "fill_seconds": 40.0, "teacher_seconds": 5.0},
        {"features": "x", "fill_seconds": 0.2, "teacher_seconds": 5.0},
        {"features": "", "fill_seconds": 0.0, "teacher_seconds": 0.0},
    ]
    share_fills(costs)
    assert [cost["once_seconds"] for cost in costs] == [45.0, 45.0, 0.0]


def test_runs_of_different_judges_are_not_compared() -> None:
    runs = {"D-0": entry({100: 1.0}, 1.0), "A-0": entry({100: 1.0}, 1.0, judge="k")}
    with pytest.raises(ArtifactError, match="different judges"):
        compare(runs, "D", ["A"])


def card_for(child: Recipe) -> UNetCard:
    teacher = "" if child.teacher.kind == "none" else "teacher"
    return UNetCard(child.urepa.backbone, (1, 8, 8), tuple("0123456789"), "data", 4, "middle.0", teacher)


def seal_arm(child: Recipe, jfd: float, *, card: bool = True) -> None:
    """An arm as it is left without its weights: its scores, sealed, and its events."""
    folder = RunFolder(Path(child.output))
    taught = child.teacher.kind != "none"
    found = entry({2: 2 * jfd, 4: jfd}, 0.0)
    for point in found["points"]:
        point |= {"count": 40, "seconds": 1.0, "scores": {"jfd": jfd, "jfd_sd": 0.1, "copies": 0.1}}
    floor = {"jfd": 1.0, "jfd_sd": 0.1}
    results = {
        "format": 1, "judge": found["judge"], "classes": list("0123456789"), "order": ["ode"], "samplers": {"ode": {}},
        "floors": {"40": {"train": floor, "test": floor}}, "points": found["points"],
    }  # fmt: skip
    with folder.staging("evaluate") as out:
        write_image_results(
            results | ({"unet": card_for(child).plain()} if card else {}), out, child.name, {"hardware": "a GPU"}
        )
        (out / "samples").mkdir()
        Image.new("L", (8, 8)).save(out / "samples/00000004_average_ode.png")
    folder.seal("evaluate", evaluate_settings(child))
    shutil.rmtree(folder.result("evaluate") / "samples")
    with folder.staging("urepa") as out:
        (out / "average.safetensors").write_bytes(b"weights")
    folder.seal("urepa", urepa_settings(child))
    shutil.rmtree(folder.result("urepa"))
    teacher = [
        {"kind": "teacher", "stage": "teacher", "seconds": 7.0},
        {"kind": "teacher_features", "source": "disk", "dim": 16, "grid": [8, 8], "fill_seconds": 2.0},
    ]  # fmt: skip
    events = [
        {"kind": "unet", "images": 1600}, *(teacher if taught else []),
        *({"kind": "step", "stage": "urepa", "step": n, "seconds": 0.5} for n in range(4)),
    ]  # fmt: skip
    (folder.root / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.fixture
def left(tmp_path: Path) -> Recipe:
    """A comparison of A-1 and D-1 of which only scores and events are left."""
    arms = {name: SMALL["compare"]["arms"][name] for name in "AD"}
    recipe = load_recipe(options(tmp_path, compare={**SMALL["compare"], "seeds": [1], "one_seed": [], "arms": arms}))
    for name, jfd in (("A-1", 12.0), ("D-1", 10.0)):
        seal_arm(arm_recipe(recipe, name), jfd)
    return recipe


def tabulate(recipe: Recipe, folder: Path) -> dict[str, Any]:
    context: Any = SimpleNamespace(
        recipe=recipe, facts={"hardware": "a CPU"}, event=lambda *a, **k: None, progress=lambda *a: None,
        run=lambda inner: pytest.fail(f"{inner.name} was run again"),
    )  # fmt: skip
    folder.mkdir()
    run_compare(context)(folder)
    return read_comparison(folder)


def test_a_table_needs_scores_and_events_of_its_arms_and_no_weights(left: Recipe, tmp_path: Path) -> None:
    found = tabulate(left, tmp_path / "table")
    assert found["differences"]["A"]["jfd"]["mean"] == -2.0
    assert (found["facts"]["hardware"], found["facts"]["table made on"]) == ("a GPU", "a CPU")
    assert found["costs"]["D"]["once_seconds"] == 7.0 + 2.0
    assert found["costs"]["A"]["once_seconds"] == 0.0
    assert found["costs"]["D"]["seconds"] == 0.5
    assert found["costs"]["D"]["pflop"] > found["costs"]["A"]["pflop"] > 0
    arm = arm_recipe(left, "D-1")
    seal_arm(arm, 10.0, card=False)  # results of an older release: unet.json says what the U-Net was
    with pytest.raises(ArtifactError, match=r"EXP-001.*unet.json: no such file"):
        tabulate(left, tmp_path / "older")
    write_json(RunFolder(Path(arm.output)).result("urepa") / "unet.json", card_for(arm).plain())
    assert tabulate(left, tmp_path / "again")["costs"] == found["costs"]


@pytest.mark.parametrize("name", ["stages/evaluate/result/image_results.json", "events.jsonl"])
def test_scores_that_changed_or_a_cost_that_is_gone_is_refused(left: Recipe, tmp_path: Path, name: str) -> None:
    path = tmp_path / "run/arms/D-1" / name
    if name == "events.jsonl":
        path.unlink()
    else:
        path.write_text(path.read_text().replace("10.0", "1.0"))
    with pytest.raises(ArtifactError, match=f"EXP-001 .*{path.name}"):
        tabulate(left, tmp_path / "table")


@pytest.mark.distributed
def test_a_run_whose_scores_stand_is_found_though_its_weights_are_gone(
    left: Recipe, tmp_path: Path, fork_server
) -> None:
    """As one process of several is told which runs to make: finished ones cost nothing, and none is an error."""
    left.compare.only = ["D-1", "A-1"]
    alone = fork_server.Process(target=pipeline.run, args=(left,))
    alone.start()
    alone.join(100)
    for name in left.compare.only:
        arm = tmp_path / "run/arms" / name
        assert read_json(arm / "outcome.json")["state"] == "finished"
        kinds = [read_line(line)["kind"] for line in (arm / "events.jsonl").open()]
        assert kinds.count("arm_found") == 1
        assert kinds.count("step") == 4
        report = (arm / "report.html").read_text()
        assert "JFD" in report
        assert "a GPU" in report, "where its scores are from, not where the report was made"
    assert not (tmp_path / "run/stages").exists()


def start(arguments: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "launch/train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)


@pytest.mark.slow
@pytest.mark.distributed
def test_runs_apart_are_found_by_the_comparison(tmp_path: Path) -> None:
    """One run in a process of its own; the comparison finds it, runs the others, and is itself found finished."""
    words = options(tmp_path, compare={**SMALL["compare"], "seeds": [1], "one_seed": []})
    alone = start([*words, "--compare.only", "[D-1]"])
    assert alone.returncode == 0, alone.stdout + alone.stderr
    arms = tmp_path / "run/arms"
    assert [path.name for path in arms.iterdir()] == ["D-1"]
    assert read_json(arms / "D-1/outcome.json")["state"] == "finished"
    before = (arms / "D-1/stages/urepa/DONE.json").stat().st_mtime_ns
    whole = start(words)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert (arms / "D-1/stages/urepa/DONE.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in arms.iterdir()) == ["A-1", "B-1", "D-1"]
    assert {read_json(arm / "outcome.json")["state"] for arm in arms.iterdir()} == {"finished"}
    found = read_json(tmp_path / "run/stages/compare/result/compare.json")
    assert found["final"] == "step 4, average, ode, 40 samples"
    assert set(found["scores"]["step 2, average, ode, 40 samples"]) == {"A", "B", "D"}
    assert found["differences"]["A"]["jfd"]["seeds"] == [1]
    assert found["verdict"]["result"] == "undecided"
    assert found["costs"]["A"]["once_pflop"] == 0
    assert found["costs"]["D"]["pflop"] > found["costs"]["A"]["pflop"] > 0
    assert (tmp_path / "run/stages/compare/result/compare.csv").read_text().count("\n") == 1 + 2 * 3
    # the arms began alike: at step 0 the same image, time and noise, hence the same velocity loss of a fresh U-Net
    first = {
        next(e for e in map(read_line, (arms / name / "events.jsonl").open()) if e["kind"] == "step")["losses"][
            "velocity"
        ]
        for name in ("A-1", "D-1", "B-1")
    }
    assert len(first) == 1


def read_line(line: str) -> dict[str, Any]:
    return json.loads(line)
