"""Score an exported model on task folders nobody need have tuned on:

    python launch/evaluate.py --model runs/nano_demo/export --tasks FOLDER --out results.json

FOLDER is one task ({test,validation}.jsonl[.gz] with prompt, completion and choices+answer or target) or a
folder of tasks. Writes the table as JSON, Markdown and CSV beside each other. Under a launcher (`torchrun
--nproc_per_node 2 launch/evaluate.py ...`) the items are shared by the processes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from quietgoose.base.errors import QuietGooseError, RecipeError
from quietgoose.base.files import read_json

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
) -> None:
    """Evaluate an exported folder.

    Args:
        model: the exported folder (quietgoose.json stands in it)
        tasks: a task folder, or a folder of task folders
        out: the JSON file to write; the Markdown and CSV tables go beside it
        router: phatgoose, arrow, random or uniform; the exported one by default
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
        device: cpu, cuda, cuda:1, ...; by default a GPU if there is one
    """
    target = Path(out)
    if target.suffix != ".json":
        raise RecipeError(f"--out {out}: must end in .json; the other tables go beside it", code="CFG-001")
    from quietgoose.evaluation.tasks import find_tasks, load_task

    found = [load_task(folder, split, limit) for folder in find_tasks(tasks, split, include or [])]
    import quietgoose.evaluation.run as evaluation
    import torch
    from quietgoose.base.distributed import world
    from quietgoose.evaluation.tables import to_markdown, write_results
    from quietgoose.routing.model import state
    from quietgoose.train.arms import build_arms, check_arms
    from quietgoose.train.export import load, load_tokenizer

    check_arms(arms or [])
    if "average_activation" in (arms or []):
        _no_activations()
    where = _device(device)
    _join_peers()
    routed = load(model, base=base, router=router, k=k, device=where, thoughts=False)  # the arms are routers
    attached = state(routed)
    names = arms or list(dict.fromkeys([baseline, attached.router]))
    rows, limited = build_arms(names, routed, attached.library, found, attached.k, seed, _no_activations)
    progress = _Progress(world().is_main)
    results = evaluation.evaluate(
        routed,
        load_tokenizer(model),
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
        facts = _facts(Path(model), where, attached.k)
        paths = write_results(results, target.parent, f"{Path(model).name} on {split}", facts, target.stem)
        print(to_markdown(results, facts=facts))
        print("written:", *paths)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of the error, whose text goes to stderr."""
    try:
        auto_cli(evaluate, args=list(argv) if argv is not None else None, as_positional=False)
    except QuietGooseError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return 0


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
    import torch

    if wanted is not None:
        return wanted
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _join_peers() -> None:
    """Under a launcher the processes gather their scores over gloo; nothing else is exchanged."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def _no_activations() -> Any:
    raise RecipeError(
        "--arms average_activation: an export has no training data to average over; take it in the run's "
        "evaluate stage, or leave it out",
        code="CFG-022",
    )


def _facts(model: Path, device: str, k: int) -> dict[str, Any]:
    import torch
    import transformers

    manifest = read_json(model / "quietgoose.json")
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
