"""Ranks for tests: `ranks(cases, world)` runs tests/train/rank_worker.py in `world` gloo processes.

The processes are forked from a server that has torch and DeepSpeed imported, so a start costs a second, not ten.
Nothing of DeepSpeed or torch.distributed is replaced.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

WORKER = Path(__file__).with_name("rank_worker.py")
HANG_SECONDS = 100
PRELOAD = [  # also what torch and DeepSpeed import late: 3 s a process
    "deepspeed", "torch._dynamo", "deepspeed.module_inject.auto_ep_layer", "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.runtime.zero.muon.muon_optimizer",
    "quietgoose.train.loop",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def fork_server():
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONWARNINGS="ignore")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@pytest.fixture
def ranks(fork_server, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """`ranks([case, ...], world=2, wait=True)`: exit codes by rank and the results by case name."""

    def start(cases: list[dict], world: int = 2, out: Path = tmp_path, worker: Path = WORKER) -> SimpleNamespace:
        processes = start_ranks(fork_server, cases, world, out, worker)
        codes = [_join(process) for process in processes]
        results = {}
        for case in cases:
            name = case["name"] if "name" in case else case["run"]
            path = out / f"{name}.json"
            if path.exists():
                results[name] = SimpleNamespace(**json.loads(path.read_text()))
        return SimpleNamespace(codes=codes, out=out, results=results)

    return start


def start_ranks(context, cases: list[dict], world: int, out: Path, worker: Path = WORKER) -> list:
    port = str(free_port())
    processes = []
    for rank in range(world):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        settings = {"out": str(out), "cases": cases, "environment": environment}
        process = context.Process(target=runpy.run_path, args=(str(worker), {"SETTINGS": settings}, "__qg_rank__"))
        process.start()
        processes.append(process)
    return processes


def _join(process) -> int:
    process.join(HANG_SECONDS)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"a rank hangs after {HANG_SECONDS} s")
    return process.exitcode
