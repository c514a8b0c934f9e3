"""Routed LoRA against the plain base and other formulations: milliseconds, share of the base, memory, error against fp64.

    python benchmarks/routed_lora.py --parts models decode --out results/routed_lora.json      # whole models
    python benchmarks/routed_lora.py --parts layer --shapes smollm2 llama3-8b                   # one layer, all peers
    python benchmarks/routed_lora.py --parts tune models   # prints tables of kernels/routed_lora/tiles.py, then uses them
    python benchmarks/routed_lora.py --parts tune_many models --experts 166 --model-experts 166    # the same for many experts
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
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import elapsed_ms, peak_of, say, tidy, time_steps
from quietgoose.kernels.routed_lora import tiles
from quietgoose.kernels.testing import tolerance
from routed_lora_models import captured
from routed_lora_peers import OURS, PEERS, RANK, SHAPES, Layer, base, error_of, ours, single_lora
from routed_lora_tune import TUNED, run_tune
from routed_lora_tune_many import TUNED_MANY, run_tune_many
from routed_lora_whole import run_decode, run_models, run_profile

PARTS = ("models", "profile", "decode", "layer", "tune", "tune_many")
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
    parser.add_argument("--tune-many", nargs="+", default=list(TUNED_MANY), choices=TUNED_MANY, help="of `tune_many`")
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
    """The error of `function`'s outputs."""
    return error_of(layer, k, arrow)(layer.run(function))


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


def main() -> None:
    options = parse()
    report = Report(options)
    torch.set_float32_matmul_precision("highest")
    if options.eager_copies is not None:
        tiles.EAGER_COPIES[:] = [options.eager_copies]
    options.parts.sort(key=lambda part: not part.startswith("tune"))
    works = {
        "models": run_models, "profile": run_profile, "decode": run_decode, "layer": run_layer, "tune": run_tune,
        "tune_many": run_tune_many,
    }  # fmt: skip
    for part in options.parts:
        try:
            works[part](report)
        except Exception as problem:  # the parts that follow have nothing to do with it
            report.add(part=part, failed=f"{type(problem).__name__}: {str(problem)[:300]}")
    say(f"written {options.out}")


if __name__ == "__main__":
    main()
