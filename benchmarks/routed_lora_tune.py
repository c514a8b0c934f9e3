"""The part `tune` of benchmarks/routed_lora.py: what the tables of kernels/routed_lora/tiles.py should say.

Kernels by descriptors are tuned group by group (one input width, one number of sites), everything else on a whole layer. First
other processes compile all candidates (Triton keeps them on disk). Nothing is timed before it is right, called and captured.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from measure import say, time_steps
from quietgoose.kernels.routed_lora import formulation, operators, tiles
from quietgoose.kernels.routed_lora.layout import axis_length
from quietgoose.kernels.testing import tolerance
from routed_lora_models import captured
from routed_lora_peers import OURS, RANK, SHAPES, Layer, base, error_of, ours, single_lora
from torch import Tensor

TUNED = (
    "decode_one", "decode_update", "linear_expand", "linear_expand_copies", "route_shrink", "route_shrink_copies", "overlap",
    "masked_shrink", "masked_shrink_copies", "route_only", "weigh_products", "stock_piece", "beside", "formulations",
    "crossovers",
)  # fmt: skip
TOGETHER = ("linear_expand_copies", "route_shrink_copies")
BY_GROUP = (*TOGETHER, "masked_shrink_copies")
EVERY = tiles.LIMITLESS
EXPERTS = 16
COMPILERS = 12
REPLAYS = 5
STEPS, STEP_SECONDS = 50, 0.08


def run_tune(report: Any) -> None:
    """Tiles by number of tokens and width, where launches overlap, pieces of `stock`, and the fastest formulation."""
    options, device = report.options, torch.device(report.options.device)
    found: dict[str, list[Any]] = {}
    with _content("eager_copies", [0]):  # the gate is an eager call and is to see what is timed
        _compile_ahead(options)
        for shape in options.shapes:
            for tokens in options.tune_tokens:
                if report.late():
                    break
                layer = Layer(
                    shape, EXPERTS, tokens, 8 if tokens == 1 and shape == "smollm2" else 1, device, torch.bfloat16
                )
                best = _tune_one(report, layer, shape) if tokens == 1 else _tune_many(report, layer, shape, tokens)
                limit, width = _limit(tokens), 2048 if shape == "smollm2" else EVERY
                for name, content in best.items():
                    lines = content if name in BY_GROUP else [(width, content)]
                    found.setdefault(name, []).extend((limit, *line) for line in lines)
                del layer
    for name, entries in found.items():
        table = getattr(tiles, name.upper())
        entries.sort(key=lambda entry: entry[:-1])
        print(name.upper(), "=", *(f"    {entry}," for entry in entries), sep="\n", flush=True)
        fewer = [entry for entry in table if entry[0] < entries[0][0]]
        table[:] = [*fewer, *entries, *table]  # the parts that follow in this run use what was measured
    if "crossovers" in options.tune_what:
        crossovers(report, device)


def _limit(tokens: int) -> int:
    """Tokens up to which a table may take what was measured with so many."""
    return next(
        most for least, most in ((16384, EVERY), (2048, 8192), (256, 1024), (2, 256), (0, EVERY)) if tokens >= least
    )


@contextmanager
def _content(name: str, content: list[Any]) -> Iterator[None]:
    """Inside, a table of tiles.py has other lines."""
    table = getattr(tiles, name.upper())
    kept = list(table)
    table[:] = content
    try:
        yield
    finally:
        table[:] = kept


@contextmanager
def _apart() -> Iterator[None]:
    """Inside, routing and shrink are two launches, as with more experts than one launch can hold."""
    kept, operators.MOST_FUSED = operators.MOST_FUSED, 0
    try:
        yield
    finally:
        operators.MOST_FUSED = kept


def _tables(name: str) -> list[Any]:
    """One table of one line for each candidate; for launches by descriptors also the one without."""
    if name in BY_GROUP:
        return [[(EVERY, EVERY, 3, candidate)] for candidate in (None, *tiles.CANDIDATES[name])]
    if name == "overlap":
        return [[(EVERY, EVERY, early)] for early in (False, True)]
    return [[(EVERY, EVERY, candidate)] for candidate in tiles.CANDIDATES[name]]


# compiling ahead -----------------------------------------------------------------------------------------------


def _compile_ahead(options: Any) -> None:
    """Every candidate by descriptors, as Triton specialises it for this number of sites, in other processes."""
    shapes = [shape for shape in options.shapes if any(tokens > 1 for tokens in options.tune_tokens)]
    jobs = [
        (shape, group, name, number)
        for shape in shapes[:1]  # widths and tokens are numbers, not code
        for name in BY_GROUP if name in options.tune_what
        for group in range(3) for number in range(1, len(_tables(name)))
    ]  # fmt: skip
    if not jobs:
        return
    workers = min(COMPILERS, max(1, (os.cpu_count() or 2) - 2))
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            failed = [
                problem
                for problem in pool.map(_compile_some, [jobs[n::workers] for n in range(min(workers, len(jobs)))])
                if problem
            ]
        say(f"compiled {len(jobs)} candidates in {workers} processes", *failed[:3])
    except Exception as problem:  # they are compiled when they are timed, then
        say("compiling ahead:", type(problem).__name__, str(problem)[:200])


def _compile_some(jobs: list[tuple[str, int, str, int]]) -> str:
    """What failed."""
    problems = ""
    tiles.EAGER_COPIES[:] = [0]
    layer = Layer(jobs[0][0], EXPERTS, 256, 1, torch.device("cuda"), torch.bfloat16)
    for _, group, name, number in jobs:
        try:
            apart = _apart if name == "masked_shrink_copies" else nullcontext
            for early in _tables("overlap"):  # the code of a launch that begins early is another
                with apart(), _content(name, _tables(name)[number]), _content("overlap", early):
                    layer.only(group).run(ours(2, "fused"))
        except Exception as problem:
            problems += f"{name} {number}: {str(problem)[:80]} "
    return problems


# one table after the other -------------------------------------------------------------------------------------


def _tune_one(report: Any, layer: Layer, shape: str) -> dict[str, Any]:
    """Of each table the fastest content, one token."""
    names = [name for name in ("decode_one", "decode_update") if name in report.options.tune_what]
    tuned = {name: _tune(report, layer, "decode", name, _tables(name), shape=shape, tokens=1) for name in names}
    return {name: best[0][2] for name, best in tuned.items() if best}


def _tune_many(report: Any, layer: Layer, shape: str, tokens: int) -> dict[str, Any]:
    """Of each table the fastest content: one for the layer, or a list by width and sites. What was tuned stays in its table until
    all are: a kernel by descriptors is timed against the fastest tiles of the one by addresses."""
    what, found, where = report.options.tune_what, {}, {"shape": shape, "tokens": tokens}
    method = formulation(tokens, EXPERTS * RANK, SHAPES[shape][0])
    method = method if method in ("fused", "stock") else "stock"
    kept: dict[str, list[Any]] = {}

    def tune(name: str, how: str = method, options: list[Any] | None = None) -> None:
        if name in what and (best := _tune(report, layer, how, name, options or _tables(name), **where)):
            keep(name, best)
            found[name] = best[0][2] if isinstance(best[0], tuple) else best

    def keep(name: str, content: list[Any]) -> None:
        kept.setdefault(name, list(getattr(tiles, name.upper())))
        getattr(tiles, name.upper())[:] = content

    def groups(name: str) -> None:
        if name in what and (lines := _tune_groups(report, layer, name, **where)):
            found[name] = lines
            keep(name, [*((EVERY, *line) for line in lines), (EVERY, EVERY, 3, None)])

    try:
        tune("linear_expand", "fused")
        tune("route_shrink")
        tune("overlap", "fused")  # which tiles are best depends on it, and it on them
        for name in TOGETHER:
            groups(name)
        tune("overlap", "fused")
        with _apart():
            tune("masked_shrink")
            groups("masked_shrink_copies")
            tune("route_only")
        tune("weigh_products", "split")
        if method == "stock":
            tune("beside", "stock", [[(EVERY, EVERY, False)], [(EVERY, EVERY, True)]])
            # What has a branch has no pieces. A wide layer by itself says little (the card's clock drifts): routed_lora_wide.py
            with _content("beside", [(EVERY, EVERY, False)]):
                tune("stock_piece", "stock", [[(EVERY, EVERY, piece)] for piece in tiles.STOCK_PIECES])
            for name in ("beside", "stock_piece"):
                found.pop(name, None)  # printed with its times
        if "formulations" in what:
            time_formulations(report, layer, **where)
    finally:
        for name, content in kept.items():
            getattr(tiles, name.upper())[:] = content
    return found


def _tune_groups(report: Any, layer: Layer, name: str, **where: Any) -> list[tuple[int, int, Any]]:
    """Lines (width up to, sites up to, tiles), narrow first."""
    lines = []
    for number, (width, outs) in enumerate(layer.plan):
        group = {"width": width, "sites": len(outs)}
        best = _tune(report, layer.only(number), "fused", name, _tables(name), **where, **group)
        if best:
            lines.append((axis_length(width), len(outs), best[0][3]))
    return sorted(lines, key=lambda line: line[:2])


def _tune(report: Any, layer: Layer, method: str, name: str, options: list[Any], **where: Any) -> list[Any] | None:
    """Time `method` with each content of the table `name` that is right; the fastest content. The table is as before afterwards."""
    found, check = {}, error_of(layer)
    for option in options:
        if report.late():
            break
        choice = str(option[0][-1] if isinstance(option[0], tuple) else option)
        with _content(name, option):
            try:
                ms, error = _timed(layer, method, check)
            except Exception as problem:
                report.add(part="tune", **where, what=name, choice=choice, failed=str(problem)[:120])
                continue
        if ms is None:
            report.add(part="tune", **where, what=name, choice=choice, refused=error)
            continue
        found[ms] = option
        report.add(part="tune", **where, what=name, choice=choice, ms=round(ms, 4))
    return found[min(found)] if found else None


def _timed(layer: Layer, method: str, check: Callable[[list[Tensor]], float]) -> tuple[float | None, float]:
    """(milliseconds of a copy of the layer, captured; its error). None where it is wrong: called, or in one of several replays,
    each of which finds outputs full of NaN and has to make the bits of the first."""
    kept: list[Tensor] = []

    def work() -> None:
        kept[:] = layer.run(ours(2, method))

    work()
    if not (error := check(kept)) <= tolerance(layer.dtype):
        return None, error
    call, first = captured(work), []
    for _ in range(REPLAYS):
        for y in kept:
            y.fill_(math.nan)
        call()
        first = first or [y.clone() for y in kept]
        if not all(torch.equal(y, same) for y, same in zip(kept, first)):
            return None, math.nan
    if not (error := check(first)) <= tolerance(layer.dtype):
        return None, error
    return time_steps(call, layer.inputs[0].device, STEPS, STEP_SECONDS).median / len(layer.copies), error


# formulations --------------------------------------------------------------------------------------------------


def time_formulations(report: Any, layer: Layer, shape: str, tokens: int) -> None:
    """By width of the input, all groups of that width together: milliseconds of each formulation that is right, with the tables as
    they are, and the fastest; beside them the base alone and PEFT's LoRA of one expert. One line a width is what CROSSOVERS is to
    say."""
    groups = [(number, width, error_of(layer.only(number))) for number, (width, _) in enumerate(layer.plan)]
    for width in sorted({width for _, width, _ in groups}):
        found: dict[str, Any] = {}
        for name in OURS:
            if (name == "decode" and tokens > 64) or report.late():
                continue
            try:
                times = [_timed(layer.only(n), name, check)[0] for n, wide, check in groups if wide == width]
            except Exception as problem:
                say(name, width, str(problem)[:120])
                continue
            if None not in times:
                found[name] = round(sum(ms for ms in times if ms is not None), 4)
        if found:
            report.add(
                part="formulation", shape=shape, experts=layer.experts, tokens=tokens, width=width,
                fastest=min(found, key=found.__getitem__), table=formulation(tokens, layer.experts * RANK, width), **found,
                **{
                    name: round(sum(_plain(layer.only(n), function) for n, wide, _ in groups if wide == width), 4)
                    for name, function in (("base", base), ("peft_single_lora", single_lora))
                },
            )  # fmt: skip


def _plain(layer: Layer, function: Any) -> float:
    """Milliseconds of a copy of the layer, captured; nobody's formulation of ours, so there is nothing to compare."""
    call = captured(lambda: layer.run(function))
    return time_steps(call, layer.inputs[0].device, STEPS, STEP_SECONDS).median / len(layer.copies)


def crossovers(report: Any, device: torch.device) -> None:
    """Which formulation is fastest where, whole layers, by number of experts; CROSSOVERS is to agree with it."""
    cells = [
        (s, n, t)
        for s in report.options.shapes
        for n in report.options.experts
        for t in (16, 64, 128, 512, 4096, 32768)
    ]
    for shape, experts, tokens in cells:
        if report.late():
            return
        layer = Layer(shape, experts, tokens, 1, device, torch.bfloat16)
        found, check = {}, error_of(layer)
        for name in OURS:
            if (name == "decode" and tokens > 128) or (name == "fused" and experts > 64):
                continue
            try:
                ms, _ = _timed(layer, name, check)
                if ms is not None:
                    found[name] = round(ms, 4)
            except Exception as problem:
                say(name, str(problem)[:120])
        if found:
            fastest, now = min(found, key=found.__getitem__), formulation(tokens, experts * RANK, SHAPES[shape][0])
            report.add(
                part="crossover", shape=shape, experts=experts, tokens=tokens, fastest=fastest, table=now, **found
            )
