"""The part `layer` of benchmarks/routed_lora.py: one decoder layer's seven linears, by us and by others, cell by cell.

A cell is a shape, a number of experts and a number of tokens; a row one way to compute it with one k. Rows of the first k come
before those of the others, sixteen experts before 166, those before the rest. First other processes compile our kernels of all
cells (Triton keeps them on disk), so that what a cell takes is measuring. `ours` is what the table takes for each group (`takes`).

What is timed is what was compared with fp64: the outputs of the captured graph, not those of a call before it, which may have
gone by other kernels (kernels/routed_lora/descriptors.py). Not captured: r_three, which waits for the host, and what needs more
than MOST_CAPTURED, of which a graph would keep a second one. r_three runs one copy of the layer, since it is bound by the host.
"""

from __future__ import annotations

import gc
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from measure import elapsed_ms, peak_of, say, tidy, time_steps, wait
from quietgoose.kernels.testing import tolerance
from routed_lora_models import captured
from routed_lora_peers import OURS, PEERS, RANK, SHAPES, Group, Layer, base, error_of, ours, single_lora, taken
from torch import Tensor

Function = Callable[[Tensor, Group], list[Tensor]]
Check = Callable[[list[Tensor]], float]
Plain = dict[tuple[str, int, int], dict[str, Any]]
Job = tuple[str, int, int, int, str]

ROTATION_BYTES = 128 * 2**20
MOST_BYTES = 40 * 2**30  # a peer whose largest intermediate would need more is left out
MOST_CAPTURED = 8 * 2**30
MOST_STEPS, PEER_SECONDS = 60, 0.06
SECONDS = 0.15
FEW_TOKENS = 512
COMPILERS = 12
COMPILE_SHARE = 0.4  # of the budget, at most


def run_layer(report: Any) -> None:
    """All cells: the first k, then the others."""
    options = report.options
    cuda = options.device.startswith("cuda")
    if cuda:
        _compile_ahead(options)
    gc.collect()
    gc.freeze()  # what is imported is not looked at before every reading of memory
    plain: Plain = {}
    for shape, experts, ks in banks(options):
        _run_bank(report, shape, experts, ks, plain)


def banks(options: Any) -> Iterator[tuple[str, int, list[int]]]:
    """(shape, experts, each k) in the order in which they are measured: first of all banks one k, 2 where it is asked for, then of
    all banks the others."""
    ks = sorted(options.k, key=lambda k: k != 2)
    order = sorted(options.experts, key=lambda n: (n != 16, n != 166))
    for some, shape, experts in itertools.product((ks[:1], ks[1:]), options.shapes, order):
        if fitting := [k for k in some if k <= experts]:
            yield shape, experts, fitting


def _run_bank(report: Any, shape: str, experts: int, ks: list[int], plain: Plain) -> None:
    """All numbers of tokens with one bank of experts, which is made once."""
    options, device = report.options, torch.device(report.options.device)
    if report.late():
        report.add(part="layer", shape=shape, experts=experts, ks=ks, skipped="the budget is spent")
        return
    try:
        tidy(device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        most = max(_copies(shape, tokens, device) for tokens in options.tokens)
        bank = Layer(shape, experts, 1, most, device, dtype)
    except Exception as problem:
        report.add(part="layer", shape=shape, experts=experts, failed=str(problem)[:200])
        return
    for tokens in options.tokens:
        try:
            layer = bank.at(tokens, _copies(shape, tokens, device))
            for k in ks:
                run_cell(report, shape, layer, k, plain)
        except Exception as problem:  # of the base: what follows may fit
            report.add(part="layer", shape=shape, experts=experts, tokens=tokens, ks=ks, failed=str(problem)[:200])
            tidy(device)


def _copies(shape: str, tokens: int, device: torch.device) -> int:
    """Copies of a layer whose weights together outgrow the L2, for few tokens."""
    d, ff, q, kv = SHAPES[shape]
    small = tokens <= FEW_TOKENS and device.type == "cuda"
    return max(1, min(24, -(-ROTATION_BYTES // (2 * d * (2 * q + 2 * kv + 3 * ff))))) if small else 1


def run_cell(report: Any, shape: str, layer: Layer, k: int, plain: Plain) -> None:
    """Base and PEFT's single LoRA where they are not known yet, then every row of this k."""
    where: dict[str, Any] = {"part": "layer", "shape": shape, "experts": layer.experts, "tokens": layer.tokens}
    key = (shape, layer.experts, layer.tokens)
    if key not in plain:
        if report.late():
            report.add(**where, k=k, skipped="the budget is spent")
            return
        plain[key] = timed(layer, base)
        report.add(**where, k=0, what="base", **plain[key])
        report.add(**where, k=0, what="peft_single_lora", **shared(timed(layer, single_lora), plain[key]))
    checks: dict[bool, Check] = {}
    for name, function in rows(report.options, layer, k).items():
        if report.late():
            report.add(**where, k=k, what=name, skipped="the budget is spent")
            return
        if (need := largest(name, shape, layer, k)) > MOST_BYTES:
            report.add(**where, k=k, what=name, skipped=f"an intermediate of {need / 2**30:.0f} GiB")
            continue
        try:
            report.add(**where, k=k, what=name, **_row(layer, name, function, k, checks, plain[key]))
        except Exception as problem:
            report.add(**where, k=k, what=name, failed=f"{type(problem).__name__}: {str(problem)[:200]}")
            tidy(layer.inputs[0].device)


def rows(options: Any, layer: Layer, k: int) -> dict[str, Function]:
    """What is timed in a cell, by name."""
    found: dict[str, Function] = {}
    if layer.inputs[0].is_cuda:
        found = {_name(n): _ours(k, n) for n in options.ours if runs(n, layer)}
    return found | {name: PEERS[name](k) for name in options.peers}


def _name(method: str) -> str:
    return "ours" if method == "table" else method


def _ours(k: int, method: str) -> Function:
    return ours(k, None if method == "table" else method)


def runs(method: str, layer: Layer) -> bool:
    """Whether a formulation of ours can take a cell."""
    return not (method == "decode" and layer.tokens > 64) and not (method == "fused" and layer.experts > 64)


def largest(name: str, shape: str, layer: Layer, k: int) -> int:
    """Bytes of the largest intermediate, in 16 bits."""
    ff = SHAPES[shape][1]
    need = {"peft_arrow": layer.experts * ff, "mttl": 2 * RANK * ff, "grouped_mm": 3 * k * ff}.get(name, ff)
    return 2 * layer.tokens * need


def _row(
    layer: Layer, name: str, function: Function, k: int, checks: dict[bool, Check], plain: dict[str, Any]
) -> dict[str, Any]:
    """Error and times of one row; of ours no times if the error is too large."""
    start, arrow, own = time.perf_counter(), name == "peft_arrow", name in ("ours", *OURS)
    if name != "mttl" and arrow not in checks:
        checks[arrow] = error_of(layer, k, arrow)
    check = None if name == "mttl" else checks[arrow]
    found = timed(layer, function, check, name != "r_three", None if not own else tolerance(layer.dtype), not own)
    if name == "ours":
        found["takes"] = taken(layer)
    found = shared(found, plain) if "ms" in found else found
    return {**found, "seconds": round(time.perf_counter() - start, 2)}


def timed(
    layer: Layer, function: Function, check: Check | None = None, capture: bool = True, limit: float | None = None,
    peer: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds of one layer, captured or as plain calls; peak memory of a layer above what stands; the error against fp64 of
    what is timed (None without `check`). An error above `limit` is reported instead of times."""
    device, one, kept = layer.inputs[0].device, layer.last(), []
    if not capture:
        layer = one

    def work() -> None:
        kept[:] = layer.run(function)

    kept[:], peak = peak_of(lambda: one.run(function), device)
    call, mode = work, "calls" if device.type == "cuda" else "cpu"
    if mode == "calls" and capture and (peak or 0) <= MOST_CAPTURED:
        call, mode = captured(work, 1), "graph"
        for y in kept:  # what a replay leaves out is seen
            y.fill_(math.nan)
        call()
    error = None if check is None else check(kept)
    found = {} if check is None else {"error": error}
    if limit is not None and (error is None or not error <= limit):
        return {**found, "refused": "the gate against fp64 is red"}
    if mode == "cpu":
        return {**found, "ms": round(elapsed_ms(work, device) / len(layer.copies), 3), "mode": mode}
    steps = time_steps(call, device, MOST_STEPS, PEER_SECONDS if peer else SECONDS)
    times = {name: round(x / len(layer.copies), 4) for name, x in steps.short(6).items()}
    return {**found, **times, "mode": mode, "peak_mib": round((peak or 0) / 2**20, 1)}


def shared(found: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    return {**found, "share": round(found["ms"] / max(plain["ms"], 1e-6), 3)}


# compiling ahead -----------------------------------------------------------------------------------------------


def jobs(options: Any) -> list[Job]:
    """What is ours in all cells, in the order in which they are measured."""
    return [
        (shape, experts, tokens, k, method)
        for shape, experts, ks in banks(options)
        for tokens, k, method in itertools.product(options.tokens, ks, options.ours)
    ]


def _compile_ahead(options: Any) -> None:
    """Our kernels of all cells, in other processes, for at most COMPILE_SHARE of the budget; the rest when they are timed."""
    found, start = jobs(options), time.time()
    workers = max(1, min(COMPILERS, (os.cpu_count() or 2) - 2, len(found)))
    end = start + COMPILE_SHARE * options.budget_seconds
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            shares = [(found[n::workers], end) for n in range(workers)]
            done = list(pool.map(_compile_some, shares))
    except Exception as problem:
        say("compiling ahead:", type(problem).__name__, str(problem)[:200])
        return
    problems = [text for _, texts in done for text in texts]
    say(f"{sum(n for n, _ in done)} of {len(found)} rows compiled by {workers} processes", *problems[:3])


def _compile_some(share: tuple[list[Job], float]) -> tuple[int, list[str]]:
    """(how many are compiled, what failed). A call is enough: the first of its kind loads what a capture takes, too."""
    device, (found, end) = torch.device("cuda"), share
    bank: tuple[tuple[str, int], Layer] | None = None
    done, problems = 0, []
    for shape, experts, tokens, k, method in found:
        if time.time() > end:
            break
        if bank is None or bank[0] != (shape, experts):
            bank = None
            bank = ((shape, experts), Layer(shape, experts, 1, 1, device, torch.bfloat16))
        layer = bank[1].at(tokens, 1)
        try:
            if runs(method, layer):
                layer.run(_ours(k, method))
                wait(device)
            done += 1
        except Exception as problem:
            problems.append(f"{method} {experts} {tokens}: {str(problem)[:80]}")
    return done, problems
