"""Routed LoRA against the plain base and other formulations: milliseconds, share of the base, memory, error against fp64.

    python benchmarks/routed_lora.py --parts models decode --out results/routed_lora.json      # whole models
    python benchmarks/routed_lora.py --parts layer --shapes smollm2 --ours table --tokens 1 32 512 4096   # one layer, all peers
    python benchmarks/routed_lora.py --parts tune models   # prints tables of kernels/routed_lora/tiles.py, then uses them
    python benchmarks/routed_lora.py --parts tune_many models --experts 166 --model-experts 166    # the same for many experts
    python benchmarks/routed_lora.py --parts profile        # the heaviest kernels of a captured forward, base and routed
    python benchmarks/routed_lora.py --shapes tiny --device cpu --tokens 1 8 --batches 2x8      # wiring, on a CPU, eager

Random bf16 weights, gates and tokens (no quality is claimed; random gates spread tokens over all experts, the worst case
for grouping). A layer is the seven linears of one decoder layer, captured as a CUDA graph where a formulation can be
(routed_lora_layers.py). Whole models: every decoder layer compiled, the forward captured; base and routed
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
from measure import say
from quietgoose.kernels.routed_lora import tiles
from routed_lora_layers import run_layer
from routed_lora_peers import OURS, PEERS, RANK, SHAPES
from routed_lora_tune import TUNED, run_tune
from routed_lora_tune_many import TUNED_MANY, run_tune_many
from routed_lora_whole import run_decode, run_models, run_profile

PARTS = ("models", "profile", "decode", "layer", "tune", "tune_many")


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
    parser.add_argument(
        "--ours", nargs="+", default=["table", *OURS], choices=["table", *OURS],
        help="of the part `layer`; table: what the table takes",
    )  # fmt: skip
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
