"""The comparison: which runs it is, what its tables and verdict say of made-up scores, and the whole of it on tiny runs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from quietgoose.base.errors import ArtifactError, RecipeError
from quietgoose.base.files import read_json
from quietgoose.train.compare import compare, t_interval
from quietgoose.train.compare_report import markdown
from quietgoose.train.compare_settings import arm_recipe, launch_lines, outcome_folder, run_names
from quietgoose.train.image_cost import share_fills
from quietgoose.train.settings import load_recipe

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
        "steps": max(jfd), "cost": cost,
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
    import json

    return json.loads(line)
