"""Score an exported model on task folders nobody need have tuned on:

    python launch/evaluate.py --model runs/nano_demo/export --tasks FOLDER --out results.json

FOLDER is one task ({test,validation}.jsonl[.gz] with prompt, completion and choices+answer or target) or a
folder of tasks. Writes the table as JSON, Markdown and CSV beside each other. Under a launcher (`torchrun
--nproc_per_node 2 launch/evaluate.py ...`) the items are shared by the processes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from quietgoose.base.errors import RecipeError
from quietgoose.base.files import check_writable, storing
from quietgoose.launch.command import quiet_bars, run_command
from quietgoose.train.checks import check_store

Generation = Literal["never", "numbers", "always"]


def evaluate(
    model: str,
    tasks: str,
    out: str,
    router: str | None = None,
    arms: list[str] | None = None,
    k: int | None = None,
    base: str | None = None,
    include: list[str] | None = None,
    split: str = "test",
    limit: int | None = None,
    baseline: str = "base",
    generate: Generation = "always",
    max_new_tokens: int = 64,
    batch_tokens: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    device: str | None = None,
    tracking_uri: str | None = None,
    experiment: str = "quietgoose",
    credentials: str | None = None,
) -> None:
    """Evaluate an exported folder.

    Args:
        model: the exported folder (quietgoose.json stands in it)
        tasks: a task folder, or a folder of task folders
        out: the JSON file to write; the Markdown and CSV tables go beside it
        router: phatgoose, phatgoose_mean, average_activation, arrow, random or uniform; the exported one by default
        arms: rows of the table; by default the plain base and the router
        k: experts a token; the exported number by default
        base: where the base model is found, if not where the export says
        include: only these tasks, in this order
        split: train, validation or test
        limit: only the first items of every task
        baseline: the arm that differences are taken against
        generate: which generate tasks are really generated greedily; the others are judged teacher-forced
        max_new_tokens: for numeric targets; string targets take what their answer needs
        batch_tokens: tokens of one forward pass; by default 8192 on a CPU, 65536 on a GPU
        bootstrap: resamples of the intervals
        seed: of the bootstrap, random gates and merges
        device: auto, cpu, cuda, cuda:1, ...; by default a GPU if there is one
        tracking_uri: log the tables to MLflow there: sqlite:///PATH or http(s)://...; by default they are only written
        experiment: MLflow's experiment
        credentials: a 0600 file with token, or username and password, for MLflow
    """
    target = Path(out).expanduser()
    if target.suffix != ".json":
        raise RecipeError(f"--out {out}: must end in .json; the other tables go beside it", code="CFG-001")
    _at_least_one(
        k=k, limit=limit, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens, bootstrap=bootstrap
    )  # fmt: skip
    if os.environ.get("RANK", "0") == "0":  # who will write
        check_writable(target, f"--out {out}")
    check_store("--tracking-uri", tracking_uri, credentials)
    folder = Path(model).expanduser()
    manifest = _language_manifest(folder, model)
    from quietgoose.evaluation.tasks import find_tasks, load_task

    found = [load_task(folder, split, limit) for folder in find_tasks(tasks, split, include or [])]
    import quietgoose.evaluation.run as evaluation
    import torch
    from quietgoose.base.distributed import world
    from quietgoose.evaluation.tables import to_markdown, write_results
    from quietgoose.routing.model import state
    from quietgoose.train.arms import build_arms, check_arms
    from quietgoose.train.export import check_routing, load, load_tokenizer

    check_arms(arms or [])
    check_routing(manifest, router, k)
    where = _device(device)
    _join_peers()
    quiet_bars()
    routed = load(folder, base=base, router=router, k=k, device=where, thoughts=False)  # the arms are routers
    attached = state(routed)
    names = arms or list(dict.fromkeys([baseline, attached.router]))
    rows, limited = build_arms(names, routed, attached.library, found, attached.k, seed)
    progress = _Progress(world().is_main)
    results = evaluation.evaluate(
        routed,
        load_tokenizer(folder),
        found,
        rows,
        device=where,
        batch_tokens=batch_tokens or (65536 if where.startswith("cuda") else 8192),
        max_new_tokens=max_new_tokens,
        generate=generate,
        bootstrap=bootstrap,
        baseline=baseline,
        seed=seed,
        arm_tasks=limited,
        on_progress=progress,
    )
    if world().is_main:
        results = dataclasses.replace(results, notes=(*results.notes, *_left_out(names, results.arms)))
        facts = _facts(folder, manifest, where, min(attached.k, len(attached.library)))
        print(to_markdown(results, facts=facts))  # first, so that a disk that is full costs no table
        with storing(f"--out {out}"):
            paths = write_results(results, target.parent, f"{folder.name} on {split}", facts, target.stem)
        print("written:", *paths)
        if tracking_uri is not None:
            print(_logged(tracking_uri, experiment, credentials, paths, facts, results))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of the error, whose text goes to stderr."""
    return run_command(evaluate, argv)


def _logged(
    uri: str, experiment: str, credentials: str | None, paths: Sequence[Path], facts: Mapping[str, Any], results: Any
) -> str:
    """The tables as one MLflow run; its metrics are the means of every group of tasks. How it went."""
    from quietgoose.evaluation.tables import mean_values
    from quietgoose.train.tracking import log_tables

    name = f"{facts['model']}: {paths[0].stem}"
    return log_tables(uri, experiment, credentials, paths[0].parent, name, facts, mean_values(results), paths)


def _at_least_one(**numbers: int | None) -> None:
    """RecipeError CFG-001 for an option below 1; None is not given."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise RecipeError(f"--{name.replace('_', '-')} {value}: at least 1", code="CFG-001")


def _language_manifest(folder: Path, given: str) -> dict[str, Any]:
    """What the export says, before its files are looked at; RecipeError CFG-083 if it cannot be scored."""
    from quietgoose.train.export_manifest import IMAGES, kind_of, parse_manifest

    manifest = parse_manifest(folder)
    if kind_of(manifest) == IMAGES:
        raise RecipeError(
            f"--model {given}: draws images; its run's evaluate stage scores them, launch/sample.py draws them",
            code="CFG-083",
        )
    if not manifest["experts"]:
        raise RecipeError(f"--model {given}: has no experts whose arms could be compared", code="CFG-083")
    return manifest


def _left_out(names: Sequence[str], arms: Sequence[str]) -> list[str]:
    """A note for every arm that was asked for and is no row."""
    why = {"oracle": "no task has the name of an expert"}
    missing = [name for name in names if name not in arms and name != "experts"]
    return [f"{name} is left out: {why.get(name, 'it can run on none of the tasks')}" for name in missing]


class _Progress:
    """Batches done, on rank 0: a bar on a terminal, a line every ten seconds otherwise."""

    def __init__(self, is_main: bool) -> None:
        self.shown = is_main
        self.started = self.last = time.monotonic()
        self.bar: Any = None

    def __call__(self, arm: str, done: int, total: int) -> None:
        if not self.shown:
            return
        now = time.monotonic()
        if sys.stderr.isatty():
            self._draw(arm, done, total)
        elif now - self.last >= 10 or done == total:
            left = (now - self.started) / done * (total - done)
            print(f"{arm}: batch {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)
            self.last = now

    def _draw(self, arm: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        if self.bar is None:
            columns = TextColumn("{task.description:<24}"), BarColumn(), TimeRemainingColumn()
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.bar.add_task(arm, total=total)
            self.bar.start()
        self.bar.update(0, completed=done, description=arm)
        if done == total:
            self.bar.stop()


def _device(wanted: str | None) -> str:
    from quietgoose.base.devices import usable_device

    device = usable_device(wanted, "--device")
    if wanted in (None, "auto") and device.type == "cuda":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return str(device)


def _join_peers() -> None:
    """Under a launcher the processes gather their scores over gloo; nothing else is exchanged."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def _facts(model: Path, manifest: Mapping[str, Any], device: str, k: int) -> dict[str, Any]:
    import torch
    import transformers

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    return {
        "model": model.name,
        "base": manifest["base"]["id"],
        "k": k,
        "device": name,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


if __name__ == "__main__":
    sys.exit(main())
