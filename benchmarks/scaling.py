"""Training on 1, 2 and 4 GPUs of one host: tokens a second, and the bytes every process sends against the formula.

    python benchmarks/scaling.py --gpus 1 2 --out results/scaling.json              # starts the processes itself, 8 minutes
    python benchmarks/scaling.py --gpus 1 2 4 --arms data:zero0 expert:zero0 --budget-seconds 500
    python benchmarks/scaling.py --gpus 1 2 --tiny                                  # small, processes over gloo on a CPU

An arm is parallel:strategy. Rows per GPU stay (weak scaling: `--rows` of each of 12 experts a GPU); with `--strong` rows in all do.
Expert parallelism gives every process twelve experts divided by W, with W times the rows of each. `link` times an all-reduce of
256 MiB; `waits` counts what waits for the device in a step. Bytes are counted in eager steps (train/traffic.py): they depend on
what is trained, not on the rows. JSON is rewritten after every arm; an arm that fails leaves its error there and the rest go on in
new processes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import about, elapsed_ms, write
from quietgoose.train.engine import initialize_distributed, shutdown
from quietgoose.train.parallel import owned, ring_bytes, zero3_bytes
from quietgoose.train.recipe import RowTrainSettings
from quietgoose.train.traffic import Traffic
from training_cases import Run, running, shapes, timed

ARMS = ("data:zero0", "data:zero1", "data:zero2", "expert:zero0", "expert:zero2", "data:zero3")
EXPERTS = 12
GRACE, SPARE = 30.0, 30.0
SEEN = 3
"""Steps before bytes are counted: DeepSpeed's ZeRO-3 learns the order of the modules in the first two micro-batches."""


def start(options: argparse.Namespace, arms: list[str], world: int, budget: float) -> Iterator[dict[str, Any]]:
    """Run the worker in `world` processes; the lines that rank 0 prints, as they come. A process that fails leaves the others in
    a collective for good: they are ended `GRACE` seconds later, and all of them that long after the budget."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [sys.executable, __file__, "--worker", "--arms", *arms, "--rows", str(options.rows)]
    words += ["--kind", options.kind, "--seconds", str(options.seconds), "--budget-seconds", str(budget)]
    words += [f"--{name}" for name in ("tiny", "strong") if getattr(options, name)]
    processes = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        environment = {**os.environ, **own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(words, env=environment, stdout=output, text=True))
    threading.Thread(target=_end, args=(processes, time.monotonic() + budget + GRACE), daemon=True).start()
    try:
        for text in processes[0].stdout or ():
            print(text, end="", flush=True)
            if text.startswith("{"):
                yield json.loads(text)
        codes = [process.wait() for process in processes]
        if any(codes):
            print(f"{world} processes ended with {codes}", flush=True)
    finally:
        for process in processes:
            process.kill()


def _end(processes: list[subprocess.Popen[str]], deadline: float) -> None:
    """End all processes at the deadline, or `GRACE` seconds after one of them has failed."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.2)


def run_world(options: argparse.Namespace, world: int, budget: float) -> Iterator[dict[str, Any]]:
    """All arms with `world` processes. After a failure those that are left go on in new processes."""
    end, arms = time.perf_counter() + budget, list(options.arms)
    while arms:
        left, told, failed = end - time.perf_counter(), set(), False
        if left < SPARE:
            yield from ({"gpus": world, "what": arm, "skipped": "the budget is spent"} for arm in arms)
            return
        for line in start(options, arms, world, left):
            told.add(line["what"])
            failed = "failed" in line
            yield line
        arms = [arm for arm in arms if arm not in told]
        if arms and not failed:
            yield {"gpus": world, "what": arms.pop(0), "failed": "a process ended or did not answer"}


class Worker:
    """One process of a measurement."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.begin = options, time.perf_counter()
        self.world = initialize_distributed()
        self.device = torch.device("cuda", self.world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        self.shape = shapes(options.tiny)["smollm2"]

    def put(self, **line: Any) -> None:
        if self.world.is_main:
            print(json.dumps({"gpus": self.world.size, **line}), flush=True)

    def run(self) -> None:
        if self.world.size > 1:
            self.put(what="link", **self.link())
        for arm in self.options.arms:
            spent = torch.tensor([time.perf_counter() - self.begin], device=self.device)
            if self.world.size > 1:
                dist.broadcast(spent, 0)
            if float(spent) > self.options.budget_seconds - SPARE:
                self.put(what=arm, skipped="the budget is spent")
                continue
            try:
                self.put(what=arm, **self.arm(*arm.split(":")))
            except Exception as error:  # the others wait in a collective: leave, whoever it is
                traceback.print_exc(limit=8)
                print(json.dumps({"gpus": self.world.size, "what": arm, "failed": str(error)[:300]}), flush=True)
                os._exit(1)

    def arm(self, parallel: str, strategy: str) -> dict[str, Any]:
        world, rows = self.world, self.options.rows
        in_all = rows if self.options.strong else rows * world.size
        settings: dict[str, Any] = {"parallel": parallel, "strategy": strategy, "rank": world.rank, "world": world.size}
        names = [f"e{i}" for i in range(EXPERTS)]
        settings["job_options"] = {"own": owned(names, RowTrainSettings(parallel=parallel), strategy)}
        per_rank = -(-EXPERTS * in_all // world.size)
        kind = self.options.kind
        with running(kind, self.shape, EXPERTS, in_all, self.device, micro_rows=per_rank, **settings) as run:
            found = timed(run.step, self.device, self.options.seconds)
            rate, waited = 1e3 * run.tokens / found["ms"], waits(run.step, self.device)
        with running(kind, self.shape, EXPERTS, world.size, self.device, compile="off", **settings) as run:
            for _ in range(SEEN):
                run.step()
            with Traffic() as traffic:
                run.step()
            entries, formula = sum(shape.numel() for shape in run.engine.shapes.values()), sent(run, parallel)
        return {
            "kind": kind, "rows_a_gpu": per_rank, **found, "tokens_per_second": round(rate), "waits": waited, "trained": entries,
            "sent_bytes": round(traffic.sent), "formula_bytes": formula, "collectives": dict(traffic.calls),
            "payload_bytes": dict(traffic.payload),
        }  # fmt: skip

    def link(self) -> dict[str, Any]:
        """Bus bandwidth of a large all-reduce: 2 (W - 1) / W bytes sent over its time."""
        tensor = torch.zeros(2**16 if self.options.tiny else 2**26, device=self.device)
        seconds = min(elapsed_ms(lambda: dist.all_reduce(tensor), self.device) for _ in range(8)) / 1e3
        sent = 2 * (self.world.size - 1) / self.world.size * tensor.numel() * 4
        return {"mebibytes": tensor.numel() * 4 / 2**20, "gigabytes_per_second": round(sent / seconds / 1e9, 1)}


def waits(step: Callable[[], Any], device: torch.device) -> int | None:
    """How often PyTorch waits for the device by itself in a step (its debug mode of synchronisations counts; waits that are asked
    for, as for the verdict of the step before, it lets pass)."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(one.message) for one in seen)


def sent(run: Run, parallel: str) -> int:
    """Bytes a process sends in a step by the formulas of train/parallel.py, the vector of the verdict (some 100) apart."""
    engine = run.engine
    trained = sum(shape.numel() for shape in engine.shapes.values())
    if parallel == "expert":
        return 0
    if engine.stage < 3:
        return ring_bytes(trained, engine.world.size, engine.stage)
    weights = [(getattr(p, "ds_numel", p.numel()), p.element_size()) for p in engine.deepspeed.module.parameters()]
    zero = engine.config["zero_optimization"]
    return zero3_bytes(weights, trained, engine.world.size, run.data.micro_count, zero)


def table(lines: list[dict[str, Any]]) -> None:
    """Tokens a second by arm and number of GPUs, and how many times one GPU's."""
    rates = {(line["what"], line["gpus"]): line["tokens_per_second"] for line in lines if "tokens_per_second" in line}
    for arm in dict.fromkeys(what for what, _ in rates):
        one = rates.get((arm, 1))
        for (what, gpus), rate in sorted(rates.items()):
            if what == arm:
                print(
                    f"{arm:14} {gpus} GPUs {rate:>10,} tokens/s" + (f"  {rate / one:.2f}x" if one else ""), flush=True
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--kind", default="experts", choices=["experts", "gates"])
    parser.add_argument("--rows", type=int, default=4, help="of each expert on every GPU")
    parser.add_argument("--strong", action="store_true")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--budget-seconds", type=float, default=540.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        Worker(options).run()
        shutdown()
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {**about(device), "lines": []}
    if options.out and options.out.is_file():
        record["lines"] = json.loads(options.out.read_text())["lines"]
    end = time.perf_counter() + options.budget_seconds
    for number, world in enumerate(options.gpus):
        share = (end - time.perf_counter()) / (len(options.gpus) - number)
        for line in run_world(options, world, share):
            record["lines"].append(line)
            if options.out:
                write(record, options.out)
    table(record["lines"])


if __name__ == "__main__":
    main()
