"""A frozen linear with every row's own adapter: which product goes first, and what a sum of its own costs, site by site.

    python benchmarks/training_products.py --out results/products.json      # SmolLM2's sites, 48 rows of 512 tokens, half a minute
    python benchmarks/training_products.py --tiny                           # small, also on a CPU

adapters_first is what rows.py takes (base_first where the linear has a bias); apart: two products and their sum, as plain PyTorch
and a compiler leave it. Each is compared with fp64 before it is timed, twenty calls in a CUDA graph. `least_us`: the bytes of x
once and of y three times, at the measured rate of copies.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import about, copy_bandwidth, time_steps
from quietgoose.kernels.routed_lora import rows
from torch import Tensor

SITES = {"q, o": (576, 576), "k, v": (576, 192), "gate, up": (576, 1536), "down": (1536, 576)}
CALLS = 20
LIMIT = 5e-3
"""Relative error of a site's output in bf16."""


def apart(x: Tensor, weight: Tensor, h: Tensor, b: Tensor) -> Tensor:
    y = x @ weight.t()
    return y + torch.bmm(h, b.transpose(1, 2)).view_as(y)


def ways(x: Tensor, weight: Tensor, h: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {
        "base alone": lambda: x @ weight.t(),
        "adapters_first": lambda: rows.adapters_first(x, weight, h, b, 1.0),
        "base_first": lambda: rows.base_first(x, weight, None, h, b, 1.0),
        "apart": lambda: apart(x, weight, h, b),
    }


def twenty(work: Callable[[], Tensor], device: torch.device) -> Callable[[], object]:
    """Calls one after another, without the host between them on a GPU."""
    if device.type != "cuda":
        return lambda: [work() for _ in range(CALLS)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work()
    return graph.replay


def site(
    name: str, tokens: int, groups: int, rank: int, device: torch.device, seconds: float, rate: float
) -> dict[str, Any]:
    g = torch.Generator(device).manual_seed(0)
    inputs, outputs = SITES[name]

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).mul_(shape[-1] ** -0.5).bfloat16()

    x, weight = numbers(tokens, inputs) * inputs**0.5, numbers(outputs, inputs)
    h, b = numbers(groups, tokens // groups, rank), numbers(groups, outputs, rank)
    want = apart(*(t.double() for t in (x, weight, h, b)))
    line: dict[str, Any] = {"site": name, "least_us": round(2e6 * tokens * (inputs + 3 * outputs) / rate, 1)}
    for way, work in ways(x, weight, h, b).items():
        if way != "base alone":
            error = float((work().double() - want).norm() / want.norm())
            if error > LIMIT:
                line[way] = f"red: error {error:.1e}"
                continue
        line[way] = round(1e3 * time_steps(twenty(work, device), device, 100, seconds).median / CALLS, 1)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="of calls of each way")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    record: dict[str, Any] = {**about(device), "unit": "us a call", "lines": []}
    rate = copy_bandwidth(device)
    for name in SITES:
        tokens, groups = (24, 3) if options.tiny else (24576, 12)
        record["lines"].append(site(name, tokens, groups, 4 if options.tiny else 16, device, options.seconds, rate))
        print(json.dumps(record["lines"][-1]), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
