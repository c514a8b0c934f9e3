"""Gate settings against accuracy on the validation sets: steps, rows per step, learning rate, Adam's eps, and k.

    python benchmarks/gate_ablation.py --run runs/smollm2_collection --out gates.json [--k 1 2 3] [--limit 100]
    python benchmarks/gate_ablation.py --run A --out a.json --variants '{"steps400": {"steps": 400}}'

With `--ways g+0.3a cg` also routed by other vectors than the gates': sums with mean activations, or less their mean.
Takes the sealed experts of a run, trains gates anew for every variant (keys: steps, rows_per_expert, lr, eps, schedule,
beta2, loss_on) and routes the experts' own validation sets (choose there; `--split test` is for what was chosen). Writes
after every variant; prints a table with the distance to the oracle. One process, one device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from quietgoose.base.files import write_json
from quietgoose.evaluation.run import evaluate
from quietgoose.routing.gates_format import load_gates
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.routers import SiteVectors, centred, gate_vectors, mean_vectors, standardise
from quietgoose.routing.sites import find_sites
from quietgoose.train.arms import build_arms, routed
from quietgoose.train.data.loader import StepData
from quietgoose.train.engine import Engine, initialize_distributed, shutdown
from quietgoose.train.evaluate_stage import load_tasks
from quietgoose.train.facts import facts
from quietgoose.train.recipe import Recipe
from quietgoose.train.run_folder import RunFolder
from quietgoose.train.settings import recipe_from_yaml
from quietgoose.train.stages import Context, run_gates, the_base, the_library, trained_sources
from quietgoose.train.strategy import load_strategy
from quietgoose.train.types import StepReport

Change = dict[str, Any]
VARIANTS: dict[str, Change] = {
    "recipe": {},
    "eps1e-2_lr5e-2": {"eps": 1e-2, "lr": 5e-2},
    "eps1e-3_lr2e-2": {"eps": 1e-3, "lr": 2e-2},
    "rows16": {"rows_per_expert": 16},
    "steps30": {"steps": 30},
    "steps400": {"steps": 400},
}


def with_variant(recipe: Recipe, change: Change) -> Recipe:
    """The recipe with other gate settings."""
    train = recipe.gates.train
    size, optimizing, data = {"steps", "rows_per_expert"}, {"lr", "eps", "schedule", "beta2"}, {"loss_on"}
    if unknown := sorted(set(change) - size - optimizing - data):
        raise SystemExit(f"--variants: unknown key {unknown[0]!r}; allowed: {sorted(size | optimizing | data)}")
    recipe = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, **{k: change[k] for k in data if k in change})
    )
    given = {key: change[key] for key in optimizing - {"beta2"} if key in change}
    if "beta2" in change:
        given["betas"] = (train.optimizer.betas[0], change["beta2"])
    optimizer = dataclasses.replace(train.optimizer, **given)
    changed = dataclasses.replace(train, optimizer=optimizer, **{key: change[key] for key in size if key in change})
    return dataclasses.replace(recipe, gates=dataclasses.replace(recipe.gates, train=changed))


def fit(recipe: Recipe, device: torch.device, job: Any, data: StepData, settings: Any, seen: list[StepReport]) -> Any:
    """The gates of one variant, without checkpoints."""
    job.to(device)
    engine = Engine(
        job, job.parameter_groups(), settings.optimizer, settings.steps, data.micro_count,
        load_strategy(settings.strategy or recipe.strategy), data.names, device, micro_rows=data.share.rows,
    )  # fmt: skip
    for step in range(settings.steps):
        seen.append(engine.step(data.step(step)))
    trained = engine.trainable()
    engine.destroy()
    return trained


def context_of(recipe: Recipe, run: Path, device: torch.device, world: Any, seen: list[StepReport]) -> Context:
    return Context(
        recipe=recipe,
        folder=RunFolder(run),
        device=device,
        world=world,
        train=lambda stage, job, data, settings, sha: fit(recipe, device, job, data, settings, seen),
        event=lambda *args, **fields: None,
        progress=lambda *args: None,
        facts={},
        run=lambda recipe: None,
    )


def directions(library: ExpertLibrary, way: str) -> SiteVectors:
    """Router vectors from gates (`g`), mean activations (`a`), either less its mean over the experts (`cg`, `ca`), or a
    sum such as `cg+0.5ca`: every term is standardised before it is weighted. `cg+1ca` is the router `phatgoose_mean`."""
    known = {"g": gate_vectors(library), "a": mean_vectors(library)}
    total: dict[str, dict[str, torch.Tensor]] = {}
    for term in way.split("+"):
        weight, centre, name = re.fullmatch(r"([0-9.]*)(c?)([ga])", term).groups()  # pyright: ignore[reportOptionalMemberAccess]
        vectors = centred(known[name]) if centre else known[name]
        for site, of_experts in vectors.items():
            for expert, vector in of_experts.items():
                part = float(weight or 1) * standardise(vector).cpu()
                held = total.setdefault(site, {})
                held[expert] = held[expert] + part if expert in held else part
    return total


def score(
    context: Context, gates: Path, tasks: list[Any], ks: list[int], with_oracle: bool, ways: list[str]
) -> dict[str, Any]:
    """Arm -> macro mean and accuracy by task, on the tasks given."""
    base = the_base(context, "evaluate")
    sites = tuple(find_sites(base.model, ["all-linear"]))
    library = load_gates(gates, the_library(context, base, "evaluate", gates=False), sites)
    arms: dict[str, Any] = {}
    limited: dict[str, Any] = {}
    for k in ks:
        made, _ = build_arms(["phatgoose"], base.model, library, tasks, k, 0)
        arms[f"k{k}"] = made["phatgoose"]
    for k, way in product(ks, ways):
        arms[f"k{k} {way}"] = routed(base.model, library, "phatgoose", k, 0, partial(directions, library, way))
    if with_oracle:
        made, limited = build_arms(["oracle"], base.model, library, tasks, 1, 0)
        arms |= made
    settings = context.recipe.evaluate
    with torch.inference_mode():
        results = evaluate(
            base.model, base.tokenizer, tasks, arms, device=context.device, batch_tokens=settings.batch_tokens,
            max_new_tokens=settings.max_new_tokens, bootstrap=50, baseline=next(iter(arms)), arm_tasks=limited,
        )  # fmt: skip
    table: dict[str, dict[str, float]] = {arm: {} for arm in arms}
    for cell in results.cells:
        table[cell.arm][cell.task] = round(100 * cell.accuracy.value, 1)
    return {arm: {"mean": round(sum(row.values()) / len(row), 2), "tasks": row} for arm, row in table.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run folder whose experts stage is finished")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", type=json.loads, default=VARIANTS)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--ways", nargs="*", default=[], help="router vectors instead of the gates': a, cg, g+0.3a, cg+0.5ca ..."
    )
    parser.add_argument("--limit", type=int, default=100, help="items of every set")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further variant after this long")
    options = parser.parse_args()
    start = time.monotonic()
    world = initialize_distributed()
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    recipe = recipe_from_yaml(options.run / "recipe.yaml")
    names = list(trained_sources(recipe))
    wanted = names if recipe.evaluate.collection else []
    held_out = dataclasses.replace(recipe.evaluate, split=options.split, limit=options.limit, include=wanted)
    tasks = [task for task in load_tasks(held_out, recipe.seed) if task.name in names]
    report: dict[str, Any] = {"facts": facts(), "split": options.split, "limit": options.limit, "variants": {}}
    for name, change in options.variants.items():
        if time.monotonic() - start > options.seconds:
            break
        changed, seen = with_variant(recipe, change), list[StepReport]()
        context = context_of(changed, options.run, device, world, seen)
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            run_gates(context)(Path(folder))
            trained_seconds = time.monotonic() - begin
            rows = score(
                context, Path(folder) / "gates.safetensors", tasks, options.k, not report["variants"], options.ways
            )
        report["variants"][name] = {
            "settings": {**change}, "seconds": round(trained_seconds, 1), "loss": [round(r.loss, 4) for r in seen[::10]],
            "gradient_norms": {e: [float(f"{r.gradient_norms[e]:.2g}") for r in seen[::10]] for e in names}, **rows,
        }  # fmt: skip
        write_json(options.out, report)
        means = {arm: row["mean"] for arm, row in rows.items()}
        print(f"{time.monotonic() - start:6.1f} s  {name:16s} {trained_seconds:5.1f} s  {means}", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
