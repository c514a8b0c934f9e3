"""The `compare` stage: the arms' scores side by side, paired over seeds, and what may be said of them.

Every arm with every seed is a run of its own (compare_settings.py): found finished, or run here. A seed gives all arms the same
initial weights, images, times and noise, so differences are paired by seed: mean difference with a 95 % t interval. The verdict
claims a gain only if that interval lies below zero against every control; anything else is "no gain shown". Scores at equal time
charge the teacher's training and its features to the arms that use them. Writes compare.json, compare.md and compare.csv.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base import distributed
from ..base.errors import ArtifactError
from ..base.files import read_json, write_json
from ..evaluation.report import read_events
from .compare_report import write_comparison
from .compare_settings import arm_recipe, run_names
from .evaluate_images import evaluate_settings
from .image_cost import run_cost, share_fills
from .image_results import NAME, read_image_results
from .recipe import Recipe
from .run_folder import RunFolder
from .settings import plain
from .stages import Context, Writer
from .unet_folder import card_of, read_card

FORMAT = 1
SCORES = f"{NAME}.json"
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, 97.5 %, for 1 to 10 degrees of freedom."""
PAIRED = ("jfd", "kid", "class_accuracy", "precision", "recall", "nearest_ratio", "copies", "velocity_loss")


def compare_settings(recipe: Recipe) -> Mapping[str, Any]:
    """Everything the table depends on: the settings of all runs."""
    runs = {run: evaluate_settings(arm_recipe(recipe, run)) for run in run_names(recipe)}
    return {"runs": runs, "treatment": recipe.compare.treatment, "controls": list(recipe.compare.controls)}


def has_scores(arm: Recipe) -> bool:
    """Whether an arm's scores are sealed with these very settings and unchanged; neither its weights nor its pictures need be there
    any more. RecipeError CFG-021 for other settings, ArtifactError EXP-001 for scores that changed."""
    return RunFolder(Path(arm.output)).finished("evaluate", evaluate_settings(arm), files=[SCORES])


def run_compare(context: Context) -> Writer:
    """Run what is missing, then put the results together."""
    recipe = context.recipe
    runs = run_names(recipe)
    for number, run in enumerate(runs, start=1):
        if distributed.on_main(lambda run=run: has_scores(arm_recipe(recipe, run))):
            context.event("arm_found", run=run)
            continue
        context.event("arm_started", run=run)
        context.run(arm_recipe(recipe, run))
        context.progress("arms", number, len(runs))
    return lambda folder: write_results(recipe, folder, context.facts)


def write_results(recipe: Recipe, folder: Path, facts: Mapping[str, Any]) -> None:
    """compare.json, .md, .csv from the runs' folders."""
    found = {run: read_run(arm_recipe(recipe, run)) for run in run_names(recipe)}
    share_fills([entry["cost"] for entry in found.values()])
    comparison = compare(found, recipe.compare.treatment, recipe.compare.controls)
    comparison["arms"] = plain(recipe.compare)["arms"]
    known = runs_facts(found, facts)
    write_json(folder / "compare.json", {"format": FORMAT, "facts": known, **comparison})
    write_comparison(comparison, folder, recipe.name, known)


def runs_facts(found: Mapping[str, Mapping[str, Any]], here: Mapping[str, Any]) -> dict[str, Any]:
    """What the runs ran on, which need not be the machine that makes their table."""
    known = dict(here)
    for name in ("hardware", "processes", "versions"):
        known[name] = "; ".join(sorted({str(entry["facts"].get(name, "not recorded")) for entry in found.values()}))
    return known | ({"table made on": here["hardware"]} if known["hardware"] != here.get("hardware") else {})


def read_run(child: Recipe) -> dict[str, Any]:
    """What one run found: judge, floors, its points by the first sampler, its cost. ArtifactError EXP-001 if it has no results
    or no events. Results of older runs do not describe the U-Net, its unet.json does."""
    folder = RunFolder(Path(child.output))
    results = read_image_results(folder.result("evaluate"))
    card = (
        card_of(results["unet"], folder.result("evaluate")) if "unet" in results else read_card(folder.result("urepa"))
    )
    events = read_events(folder.root / "events.jsonl")
    if not events:
        raise ArtifactError(
            f"{folder.root / 'events.jsonl'}: no such file; the arm's cost is read from it", code="EXP-001"
        )
    return {
        "judge": results["judge"], "floors": results["floors"], "points": results["points"], "samplers": results["samplers"],
        "steps": child.urepa.train.steps, "facts": results.get("facts", {}), "cost": run_cost(child, card, events),
    }  # fmt: skip


def compare(found: Mapping[str, Mapping[str, Any]], treatment: str, controls: Sequence[str]) -> dict[str, Any]:
    """The comparison as plain data. ArtifactError EXP-004 if two runs had different judges."""
    judges = {entry["judge"]["digest"] for entry in found.values()}
    if len(judges) != 1:
        raise ArtifactError(
            "compare: the runs were judged by different judges; delete their stages/evaluate", code="EXP-004"
        )
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run, entry in found.items():
        arm, _, seed = run.rpartition("-")
        by_arm.setdefault(arm, {})[int(seed)] = entry
    first = next(iter(found.values()))
    sampler = next(iter(first["samplers"]))
    keys = list(dict.fromkeys(_key(point) for entry in found.values() for point in entry["points"]))
    final = next(key for key in reversed(keys) if key[0] == first["steps"] and key[1:3] == ("average", sampler))
    scores = {_label(key): {arm: _scores(seeds, key) for arm, seeds in by_arm.items()} for key in keys}
    count = curve_count(found.values(), sampler)
    differences = {
        other: {name: paired(by_arm, treatment, other, final, name) for name in PAIRED}
        for other in by_arm
        if treatment in by_arm and other != treatment
    }
    return {
        "judge": first["judge"], "floors": first["floors"], "samplers": first["samplers"], "steps": first["steps"],
        "final": _label(final), "treatment": treatment, "controls": list(controls), "scores": scores,
        "differences": differences, "costs": {arm: _mean_cost(seeds) for arm, seeds in by_arm.items()},
        "equal": equal_cost(by_arm, treatment, (sampler, count)), "equal_count": count,
        "verdict": verdict(differences, treatment, controls),
    }  # fmt: skip


def paired(
    by_arm: Mapping[str, Mapping[int, Any]], arm: str, other: str, key: tuple[Any, ...], name: str
) -> dict[str, Any] | None:
    """Mean of arm - other over the seeds that both have, with its 95 % interval; null if the score is missing."""
    mine, theirs = _scores(by_arm[arm], key), _scores(by_arm[other], key)
    common = [seed for seed in mine if seed in theirs]
    pairs = [(mine[seed].get(name), theirs[seed].get(name)) for seed in common]
    values = [a - b for a, b in pairs if a is not None and b is not None]
    if not values or len(values) < len(common):
        return None
    return {"seeds": common, "values": values, **t_interval(values)}


def t_interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and its 95 % interval by Student's t; no interval for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    freedom = len(values) - 1
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / freedom)
    half = (T_975[freedom - 1] if freedom <= len(T_975) else 1.96) * spread / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def verdict(differences: Mapping[str, Mapping[str, Any]], treatment: str, controls: Sequence[str]) -> dict[str, Any]:
    """`gain` only if JFD is below every control's beyond the interval; `loss` if it is above one's; else `no gain shown`."""
    judged = {}
    for other in controls:
        difference = differences.get(other, {}).get("jfd")
        if difference is None or difference["high"] is None:
            judged[other] = "too few seeds"
        elif difference["high"] < 0:
            judged[other] = "below"
        else:
            judged[other] = "above" if difference["low"] > 0 else "within the interval"
    words = set(judged.values())
    if not judged or "too few seeds" in words:
        result = "undecided"
    elif words == {"below"}:
        result = "gain"
    else:
        result = "loss" if "above" in words else "no gain shown"
    return {"result": result, "treatment": treatment, "against": judged}


def curve_count(runs: Iterable[Mapping[str, Any]], sampler: str) -> int:
    """The number of samples at which the average has most points by step; of equals the larger."""
    steps: dict[int, set[int]] = {}
    for point in (point for entry in runs for point in entry["points"]):
        if (point["weights"], point["sampler"]) == ("average", sampler):
            steps.setdefault(point["count"], set()).add(point["step"])
    return max(steps, key=lambda count: (len(steps[count]), count))


def equal_cost(
    by_arm: Mapping[str, Mapping[int, Any]], treatment: str, curve: tuple[str, int]
) -> dict[str, dict[str, Any]]:
    """For every other arm: its last JFD and cost, and the treatment's JFD at that time and at those FLOPs, means over seeds. Null
    where the treatment's curve does not reach back so far (or has no points)."""
    if treatment not in by_arm:
        return {}
    made: dict[str, dict[str, Any]] = {}
    for other, seeds in by_arm.items():
        if other == treatment:
            continue
        common = [seed for seed in seeds if seed in by_arm[treatment]]
        entry: dict[str, Any] = {}
        for measure in ("seconds", "pflop"):
            rows = [_at_cost(by_arm[treatment][seed], seeds[seed], measure, curve) for seed in common]
            whole = bool(rows) and all(row is not None for row in rows)
            entry[measure] = [sum(part) / len(rows) for part in zip(*rows)] if whole else None  # type: ignore[arg-type]
        made[other] = entry
    return made


def _at_cost(
    treatment: Mapping[str, Any], other: Mapping[str, Any], measure: str, curve: tuple[str, int]
) -> tuple[float, float, float] | None:
    """(cost of the other arm's whole training, its last JFD, the treatment's JFD at that cost, linear between points)."""

    def line(run: Mapping[str, Any]) -> list[tuple[float, float]]:
        points = [p for p in run["points"] if (p["weights"], p["sampler"], p["count"]) == ("average", *curve)]
        cost = run["cost"]
        if cost[measure] is None:
            return []
        return sorted((cost[f"once_{measure}"] + p["step"] * cost[measure], p["scores"]["jfd"]) for p in points)

    mine, theirs = line(treatment), line(other)
    if not theirs or len(mine) < 2:
        return None
    budget, last = theirs[-1]
    if budget < mine[0][0]:
        return None
    if budget >= mine[-1][0]:
        return budget, last, mine[-1][1]
    for (x0, y0), (x1, y1) in zip(mine, mine[1:]):  # noqa: RUF007
        if x0 <= budget <= x1:
            return budget, last, y0 + (y1 - y0) * (budget - x0) / (x1 - x0)
    return None


def _key(point: Mapping[str, Any]) -> tuple[int, str, str, int]:
    return point["step"], point["weights"], point["sampler"], point["count"]


def _label(key: tuple[Any, ...]) -> str:
    step, weights, sampler, count = key
    return f"step {step}, {weights}, {sampler}, {count} samples"


def _scores(seeds: Mapping[int, Mapping[str, Any]], key: tuple[Any, ...]) -> dict[int, Mapping[str, Any]]:
    return {seed: point["scores"] for seed, entry in seeds.items() for point in entry["points"] if _key(point) == key}


def _mean_cost(seeds: Mapping[int, Mapping[str, Any]]) -> dict[str, float | None]:
    names = [name for name in next(iter(seeds.values()))["cost"] if name != "features"]
    made: dict[str, float | None] = {}
    for name in names:
        values = [entry["cost"][name] for entry in seeds.values()]
        made[name] = None if any(value is None for value in values) else sum(values) / len(values)
    return made


def read_comparison(folder: Path) -> dict[str, Any]:
    """compare.json of a finished comparison. ArtifactError EXP-001."""
    path = folder / "compare.json"
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; run the stage 'compare'", code="EXP-001")
    return read_json(path)
