"""Training through a routed model whose bank is frozen: milliseconds, memory and kernel launches of one step.

    python benchmarks/routed_lora_training.py --out results/routed_lora_training.json          # one GPU, about 3 minutes
    python benchmarks/routed_lora_training.py --shapes tiny --batches 2x8 --device cpu         # wiring, on a CPU

A step is the decoder's forward and backward to its input embeddings (what a soft prompt, thoughts or a head below would
need), eager, random bf16 weights, top-2. `base` is the plain model, `reference` plain PyTorch, `auto` and `triton` as
routing.attach takes them: up to 512 rank slots a site masked concatenation, above it sorted pairs. Launches are those beyond
the base's, divided by the number of linears. Nothing is timed before the gradients of one layer agree with plain PyTorch's.
JSON is rewritten after every cell; a cell that fails leaves its error there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import about, attempt, elapsed_ms, peak_of, say, time_steps, wait, worst, write
from quietgoose.kernels.testing import relative_rmse, tolerance
from quietgoose.routing.model import attach, detach, state
from quietgoose.routing.sites import all_sites
from routed_lora_models import make_library, make_model
from torch import Tensor


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["smollm2"], choices=["tiny", "smollm2", "llama3-8b"])
    parser.add_argument("--layers", type=int, default=None, help="default: all 30 of smollm2, 4 of llama3-8b")
    parser.add_argument("--experts", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--batches", nargs="+", default=["8x512"], help="rows x tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget-seconds", type=float, default=300.0, help="no cell starts later than this")
    parser.add_argument("--out", type=Path, default=Path("routed_lora_training.json"))
    return parser.parse_args()


def stepper(model: Any, x: Tensor) -> Callable[[], None]:
    """Forward and backward to x."""

    def step() -> None:
        x.grad = None
        model.model(inputs_embeds=x, use_cache=False).last_hidden_state.float().square().mean().backward()

    return step


def gradients(model: Any, tokens: int) -> list[Tensor]:
    """Of the inputs of the first layer's linears, each fed its own."""
    found = []
    for number, module in enumerate(list(state(model).modules.values())[:7]):
        g = torch.Generator().manual_seed(number)
        x = torch.randn(tokens, module.in_features, generator=g).to(module.weight).requires_grad_()
        module(x).float().square().mean().backward()
        found.append(x.grad)
    return found


def launches(step: Callable[[], Any], device: torch.device) -> int:
    """Kernels that one step starts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        wait(device)
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels)


def measured(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"ms": round(elapsed_ms(step, device), 3)}
    step()
    peak = peak_of(step, device)[1]
    times = time_steps(step, device, 30, 1.0).short(3)
    return {**times, "peak_mib": round((peak or 0) / 2**20, 1), "launches": launches(step, device)}


def cell(
    model: Any, library: Any, name: Any, step: Callable[[], None], want: list[Tensor], tokens: int
) -> dict[str, Any]:
    """One implementation, after its gradients have agreed with `want` (empty: these are filled in)."""
    attach(model, library, implementation=name)
    model.requires_grad_(False)
    got = gradients(model, tokens)
    want.extend([] if want else got)
    error = worst(relative_rmse(g, w) for g, w in zip(got, want, strict=True))
    if not error <= tolerance(torch.bfloat16, "gradient"):
        return {"error": f"the gradient is not plain PyTorch's: relative RMSE {error:.2e}"}
    return {**measured(step, got[0].device), "gradient_rmse": error}


def run_shape(shape: str, options: argparse.Namespace, add: Callable[..., None], late: Callable[[], bool]) -> None:
    """The base, then every number of experts by every implementation, plain PyTorch first: its gradient is the measure."""
    device = torch.device(options.device)
    model = make_model(shape, options.layers, device).requires_grad_(False)
    linears = len(all_sites(model))
    for batch in options.batches:
        rows, length = map(int, batch.split("x"))
        g = torch.Generator().manual_seed(2)
        x = torch.randn(rows, length, model.config.hidden_size, generator=g).to(device, torch.bfloat16).requires_grad_()
        step = stepper(model, x)
        base = attempt(lambda step=step: measured(step, device), device)
        add(shape=shape, batch=batch, what="base", **base)
        for count in options.experts:
            library, want = make_library(model, count), []
            for name in ("reference", "auto", "triton")[: 3 if device.type == "cuda" else 2]:
                if late():
                    return
                work = (model, library, name, step, want, rows * length)
                found = attempt(lambda work=work: cell(*work), device)
                if "ms" in found and "ms" in base:
                    found["share"] = round(found["ms"] / base["ms"], 3)
                if "launches" in found and "launches" in base:
                    found["launches_a_linear"] = round((found["launches"] - base["launches"]) / linears, 2)
                add(shape=shape, batch=batch, experts=count, what=name, **found)
                detach(model)


def main() -> None:
    options, start = parse(), time.perf_counter()
    report: dict[str, Any] = {**about(torch.device(options.device)), "dtype": "bfloat16", "cells": []}

    def add(**row: Any) -> None:
        report["cells"].append(row)
        write(report, options.out)
        say(" ".join(f"{key}={value}" for key, value in row.items()))

    for shape in options.shapes:
        run_shape(shape, options, add, lambda: time.perf_counter() - start > options.budget_seconds)


if __name__ == "__main__":
    main()
