"""Routed LoRA against the plain base and other formulations: milliseconds, share of the base, memory, error against fp64.

    python benchmarks/routed_lora.py --parts models decode --out results/routed_lora.json      # whole models
    python benchmarks/routed_lora.py --parts layer --shapes smollm2 llama3-8b                   # one layer, all peers
    python benchmarks/routed_lora.py --parts tune models   # prints tables of kernels/routed_lora/tiles.py, then uses them
    python benchmarks/routed_lora.py --parts profile        # the heaviest kernels of a captured forward, base and routed
    python benchmarks/routed_lora.py --shapes tiny --device cpu --tokens 1 8 --batches 2x8      # wiring, on a CPU, eager

Random bf16 weights, gates and tokens (no quality is claimed; random gates spread tokens over all experts, the worst case
for grouping). A layer is the seven linears of one decoder layer, captured as a CUDA graph where a formulation can be
(not: r_three, which waits for the host). Whole models: every decoder layer compiled, the forward captured; base and routed
in the same mode in the same run. Nothing is timed before its gate against fp64 is green. JSON is rewritten after every
cell; a peer that fails leaves its error there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import elapsed_ms, peak_of, say, tidy, time_steps, worst
from quietgoose.kernels.routed_lora import formulation, tiles
from quietgoose.kernels.testing import relative_rmse, tolerance
from routed_lora_models import captured
from routed_lora_peers import OURS, PEERS, RANK, SHAPES, Layer, base, ours, single_lora
from routed_lora_whole import run_decode, run_models, run_profile

TUNED = (
    "decode_one", "decode_update", "linear_expand", "linear_expand_copies", "route_shrink", "route_shrink_copies",
    "masked_shrink", "route_only", "stock_piece", "beside", "crossovers",
)  # fmt: skip
PARTS = ("models", "profile", "decode", "layer", "tune")
ROTATION_BYTES = 128 * 2**20
MOST_BYTES = 40 * 2**30  # a peer whose largest intermediate would need more is left out


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["models", "decode", "layer"])
    parser.add_argument("--shapes", nargs="+", default=["smollm2", "llama3-8b"], choices=list(SHAPES))
    parser.add_argument("--experts", nargs="+", type=int, default=[4, 16, 64, 166])
    parser.add_argument("--k", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 32, 512, 4096, 32768])
    parser.add_argument("--tune-tokens", nargs="+", type=int, default=[1, 128, 512, 4096, 32768])
    parser.add_argument("--tune-what", nargs="+", default=list(TUNED), choices=TUNED, help="of the part `tune`")
    parser.add_argument("--eager-copies", type=int, default=None, help="tokens from which eager calls make descriptors")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), help="of the part `layer`")
    parser.add_argument("--batches", nargs="+", default=["8x512", "64x512", "1x1"], help="of the part `models`")
    parser.add_argument("--model-experts", nargs="+", type=int, default=[16, 166])
    parser.add_argument("--caches", nargs="+", default=["static", "zip"], help="of the part `decode`")
    parser.add_argument("--fuse", nargs="+", default=["layer"], choices=["none", "layer", "model"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1], help="of the part `decode`")
    parser.add_argument("--layers", type=int, default=None, help="of llama3-8b's model (default 4) and smollm2's (30)")
    parser.add_argument(
        "--implementation", choices=["auto", "triton"], default="auto",
        help="of whole models; triton: also formulations that no GPU has confirmed yet (kernels/routed_lora/tiles.py)",
    )  # fmt: skip
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget-seconds", type=float, default=500.0, help="no cell starts later than this")
    parser.add_argument("--out", type=Path, default=Path("routed_lora.json"))
    return parser.parse_args()


class Report:
    """Results by part, on disk after every addition."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.start = options, time.perf_counter()
        name = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor()
        self.data: dict[str, Any] = {
            "device": name, "torch": torch.__version__, "transformers": transformers.__version__, "rank": RANK,
            "dtype": "bfloat16", "cells": [],
        }  # fmt: skip

    def add(self, **cell: Any) -> None:
        self.data["cells"].append(cell)
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(json.dumps(self.data, indent=1))
        say(" ".join(f"{key}={value}" for key, value in cell.items()))

    def late(self) -> bool:
        return time.perf_counter() - self.start > self.options.budget_seconds


def timed(work: Any, device: torch.device, copies: int, capture: bool = True) -> dict[str, Any]:
    """Milliseconds of one layer, captured or as plain calls; peak memory above what stands."""
    if device.type != "cuda":
        return {"ms": round(elapsed_ms(work, device) / copies, 3), "mode": "cpu"}
    _, peak = peak_of(work, device)
    call, mode = (captured(work), "graph") if capture else (work, "calls")
    times = {name: round(x / copies, 4) for name, x in time_steps(call, device, 60, 0.15).short(6).items()}
    return {**times, "mode": mode, "peak_mib": round((peak or 0) / 2**20, 1)}


def too_large(name: str, shape: str, experts: int, k: int, tokens: int) -> bool:
    ff = SHAPES[shape][1]
    need = {"peft_arrow": experts * ff, "mttl": 2 * RANK * ff, "grouped_mm": 3 * k * ff}.get(name, ff)
    return 2 * tokens * need > MOST_BYTES


def gate(layer: Layer, function: Any, k: int, arrow: bool) -> float:
    """Relative RMSE of the last copy's tokens against fp64, the worst of the seven linears: of all of them up to 1,024, beyond
    that of as many spread over all."""
    rows = layer.checked_rows()
    return worst(relative_rmse(y[rows], want) for y, want in zip(layer.run(function), layer.exact(k, arrow, rows)))


def run_cell(report: Report, shape: str, experts: int, tokens: int, ks: list[int]) -> None:
    """All formulations of one shape, number of experts and tokens; the peers at the first k only."""
    device = torch.device(report.options.device)
    d, ff, q, kv = SHAPES[shape]
    weights = 2 * (d * (2 * q + 2 * kv + 3 * ff))
    small = tokens <= 512 and device.type == "cuda"
    copies = max(1, min(24, -(-ROTATION_BYTES // weights))) if small else 1
    tidy(device)
    layer = Layer(shape, experts, tokens, copies, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    where = {"part": "layer", "shape": shape, "experts": experts, "tokens": tokens}
    plain = timed(lambda: layer.run(base), device, copies)
    report.add(**where, k=0, what="base", **plain)
    report.add(
        **where, k=0, what="peft_single_lora", **shared(timed(lambda: layer.run(single_lora), device, copies), plain)
    )
    for k in ks:
        functions: dict[str, Any] = {}
        if device.type == "cuda":
            functions |= {name: ours(k, name) for name in OURS if name != "decode" or tokens <= 64}
        functions |= {name: PEERS[name](k) for name in report.options.peers if k == ks[0]}
        for name, function in functions.items():
            if report.late():
                return
            if too_large(name, shape, experts, k, tokens) or (name == "fused" and experts > 64):
                continue
            try:
                error = None if name == "mttl" else gate(layer, function, k, name == "peft_arrow")
                if name in OURS and not error <= tolerance(layer.dtype):
                    report.add(**where, k=k, what=name, error=error, refused="the gate against fp64 is red")
                    continue
                found = timed(lambda f=function: layer.run(f), device, copies, name != "r_three")
                report.add(**where, k=k, what=name, **shared(found, plain), error=error)
            except Exception as problem:
                report.add(**where, k=k, what=name, failed=f"{type(problem).__name__}: {str(problem)[:200]}")
                tidy(device)


def shared(found: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    return {**found, "share": round(found["ms"] / max(plain["ms"], 1e-6), 3)}


def run_layer(report: Report) -> None:
    """First the cells of the targets, then the rest; all peers at k = 2, ours alone at other k."""
    options = report.options
    cells = [(s, n, t) for s in options.shapes for n in options.experts for t in options.tokens]
    cells.sort(key=lambda c: (c[1] != 16, c[1] != 166))
    for shape, experts, tokens in cells:
        if report.late():
            return
        ks = sorted((k for k in options.k if k <= experts), key=lambda k: k != 2)
        try:
            run_cell(report, shape, experts, tokens, ks)
        except Exception as problem:
            report.add(part="layer", shape=shape, experts=experts, tokens=tokens, failed=str(problem)[:200])


def run_tune(report: Report) -> None:
    """Tiles by number of tokens and width, pieces of `stock`, and the fastest formulation: what tiles.py should say."""
    device = torch.device("cuda")
    found: dict[str, list[Any]] = {}
    eager = list(tiles.EAGER_COPIES)
    tiles.EAGER_COPIES[:] = [0]  # the gate is an eager call and is to see what is timed
    for shape in report.options.shapes:
        width = 2048 if shape == "smollm2" else tiles.LIMITLESS
        for tokens, limit in ((1, 1), (128, 256), (512, 1024), (4096, 8192), (32768, tiles.LIMITLESS)):
            if report.late():
                break
            if tokens not in report.options.tune_tokens:
                continue
            layer = Layer(shape, 16, tokens, 8 if tokens == 1 and shape == "smollm2" else 1, device, torch.bfloat16)
            best = _tune_one(report, layer, shape) if tokens == 1 else _tune_many(report, layer, shape, tokens)
            for name, content in best.items():
                found.setdefault(name, []).append((limit if tokens > 1 else tiles.LIMITLESS, width, content))
    tiles.EAGER_COPIES[:] = eager
    for name, entries in found.items():
        table = getattr(tiles, name.upper())
        entries.sort(key=lambda entry: entry[:2])
        print(name.upper(), "=", *(f"    {entry}," for entry in entries), sep="\n", flush=True)
        fewer = [entry for entry in table if entry[0] < entries[0][0]]
        table[:] = [*fewer, *entries, *table]  # the parts that follow in this run use what was measured
    if "crossovers" in report.options.tune_what:
        crossovers(report, device)


def _tune_one(report: Report, layer: Layer, shape: str) -> dict[str, Any]:
    """Of each table the fastest content, one token."""
    names = [name for name in ("decode_one", "decode_update") if name in report.options.tune_what]
    tuned = {name: _tune(report, layer, "decode", name, _tables(name), shape, 1)[1] for name in names}
    return {name: best[0][2] for name, best in tuned.items() if best}


def _tune_many(report: Report, layer: Layer, shape: str, tokens: int) -> dict[str, Any]:
    """Of each table the fastest content. A kernel by descriptors is timed against the fastest tiles of the one by addresses."""
    every, what, found = tiles.LIMITLESS, report.options.tune_what, {}
    fused = formulation(tokens, 16 * RANK, SHAPES[shape][0]) == "fused"
    method, kept = "fused" if fused else "stock", {}
    fast = math.inf

    def tune(name: str, how: str = method, options: list[Any] | None = None) -> float:
        """Its milliseconds; the content stays in the table until all are tuned."""
        if name not in what:
            return math.inf
        ms, best = _tune(report, layer, how, name, options or _tables(name), shape, tokens)
        if best:
            kept.setdefault(name, list(getattr(tiles, name.upper())))
            getattr(tiles, name.upper())[:] = best
            found[name] = best[0][2] if isinstance(best[0], tuple) else best
        return ms

    try:
        tune("linear_expand", "fused")
        tune("linear_expand_copies", "fused")
        fast = min(tune("route_shrink"), tune("route_shrink_copies"))
        kept["shrink_apart"] = list(tiles.SHRINK_APART)
        tiles.SHRINK_APART[:] = [(every, every, True)]
        apart = min(tune("masked_shrink"), tune("route_only"))
        if math.isfinite(fast) and math.isfinite(apart):
            found["shrink_apart"] = apart < fast
        tiles.SHRINK_APART[:] = [(every, every, found.get("shrink_apart", False))]
        if method == "stock":
            for name, options in (("stock_piece", tiles.STOCK_PIECES), ("beside", [[0], [every]])):
                tune(name, "stock", options)
                found.pop(name, None)  # printed with its times; not a table by size
    finally:
        for name, content in kept.items():
            getattr(tiles, name.upper())[:] = content
    return found


def _tables(name: str) -> list[Any]:
    """One table of one line for each candidate; for launches by descriptors also the one without."""
    candidates = [*([None] if name.endswith("_copies") else []), *tiles.CANDIDATES[name]]
    return [[(tiles.LIMITLESS, tiles.LIMITLESS, candidate)] for candidate in candidates]


def _tune(
    report: Report, layer: Layer, method: str, name: str, options: list[Any], shape: str, tokens: int
) -> tuple[float, list[Any] | None]:
    """Time `method` with each content of the table `name` that is right; the least milliseconds and their content. The table is
    as before afterwards."""
    table, found = getattr(tiles, name.upper()), {}
    kept = list(table)
    for option in options:
        if report.late():
            break
        table[:] = option
        try:
            if not (error := gate(layer, ours(2, method), 2, False)) <= tolerance(layer.dtype):
                report.add(part="tune", shape=shape, tokens=tokens, what=name, choice=str(option), refused=error)
                continue
            call = captured(lambda: layer.run(ours(2, method)))
            ms = time_steps(call, layer.inputs[0].device, 50, 0.1).median / len(layer.copies)
        except Exception as problem:
            say(name, option, str(problem)[:120])
            continue
        found[ms] = option
        choice = str(option[0][2] if isinstance(option[0], tuple) else option)
        report.add(part="tune", shape=shape, tokens=tokens, what=name, choice=choice, ms=round(ms, 4))
    table[:] = kept
    return (min(found), found[min(found)]) if found else (math.inf, None)


def crossovers(report: Report, device: torch.device) -> None:
    """Which formulation is fastest where, one line a cell; CROSSOVERS is to agree with it."""
    for shape in report.options.shapes:
        for experts in report.options.experts:
            for tokens in (16, 64, 128, 512, 4096, 32768):
                if report.late():
                    return
                layer = Layer(shape, experts, tokens, 1, device, torch.bfloat16)
                found = {}
                for name in OURS:
                    if (name == "decode" and tokens > 128) or (name == "fused" and experts > 64):
                        continue
                    try:
                        call = captured(lambda n=name: layer.run(ours(2, n)))
                        found[name] = time_steps(call, device, 30, 0.05).short()["ms"]
                    except Exception as problem:
                        say(name, str(problem)[:120])
                if found:
                    fastest = min(found, key=lambda name: found[name])
                    now = formulation(tokens, experts * RANK, SHAPES[shape][0])
                    report.add(
                        part="crossover",
                        shape=shape,
                        experts=experts,
                        tokens=tokens,
                        fastest=fastest,
                        table=now,
                        **found,
                    )


def main() -> None:
    options = parse()
    report = Report(options)
    torch.set_float32_matmul_precision("highest")
    if options.eager_copies is not None:
        tiles.EAGER_COPIES[:] = [options.eager_copies]
    options.parts.sort(key=lambda part: part != "tune")
    works = {"models": run_models, "profile": run_profile, "decode": run_decode, "layer": run_layer, "tune": run_tune}
    for part in options.parts:
        try:
            works[part](report)
        except Exception as problem:  # the parts that follow have nothing to do with it
            report.add(part=part, failed=f"{type(problem).__name__}: {str(problem)[:300]}")
    say(f"written {options.out}")


if __name__ == "__main__":
    main()
