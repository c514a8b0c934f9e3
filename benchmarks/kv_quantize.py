"""What one layer's prefill pays for a packed cache: probes, saliency, selection, quantise + pack; SDPA's prefill beside.

    python benchmarks/kv_quantize.py [--shapes llama3-8b smollm2] [--batch 1 8] [--tokens 4096] [--out FILE] [--tune]

One GPU, bf16, CUDA events, median with 20th and 80th percentile. Before anything is timed the kernels must agree with
the plain PyTorch twins. The byte limit is what a step has to read and write over this GPU's copy bandwidth, measured
in the same run. JSON to stdout or --out. --tune also times other tile sizes of the two saliency passes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import copy_bandwidth
from quietgoose.base.errors import ExitCode
from quietgoose.kernels.quantize import BLOCK, BitTables, append_ranked, empty_arena
from quietgoose.kernels.saliency import choose_probes, probe_saliency, select_salient
from quietgoose.kernels.testing import assert_close, assert_same
from torch.nn import functional

SHAPES = {"llama3-8b": (32, 8, 128), "smollm2": (9, 3, 64)}  # query heads, KV heads, head_dim
RATIO = 0.6
FLUSH = 128


def timed(step: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds of `step` on the device: median, p20, p80. Three calls to warm up."""
    for _ in range(3):
        step()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    spoiler = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    for start, end in events:
        spoiler.zero_()  # nothing of the last turn is in the L2 cache; also hides the launch time of short steps
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(end) for start, end in events])
    p20, median, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"median_ms": round(median, 4), "p20_ms": round(p20, 4), "p80_ms": round(p80, 4)}


class Layer:
    """Random q, k, v of one layer and what the steps hand to each other."""

    def __init__(self, shape: str, batch: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
        heads, kv_heads, width = SHAPES[shape]
        g = torch.Generator("cuda").manual_seed(0)
        make = {"generator": g, "device": "cuda", "dtype": dtype}
        self.query = torch.randn(batch, heads, tokens, width, **make)
        self.key, self.value = (torch.randn(batch, kv_heads, tokens, width, **make) for _ in range(2))
        self.valid = torch.ones(batch, tokens, dtype=torch.bool, device="cuda")
        self.valid[0, : tokens // 8] = batch == 1  # the first row of a batch is padded
        self.sequence = torch.arange(batch, device="cuda")
        self.arenas = [
            empty_arena(bits, batch, kv_heads, width, tokens, tokens // BLOCK + 1, dtype, "cuda") for bits in (4, 2)
        ]
        bits = torch.zeros(batch, kv_heads + 1, -(-tokens // 8), dtype=torch.uint8, device="cuda")
        self.tables = BitTables(bits[:, 1:].contiguous(), bits[:, 0].contiguous(), 0)
        self.probes = self.choose()
        self.rows = self.gather()
        self.scores = self.saliency()
        self.chosen = self.select()

    def choose(self) -> torch.Tensor:
        return choose_probes(self.valid, sequence_id=self.sequence)

    def gather(self) -> torch.Tensor:
        index = self.probes.clamp(min=0)[:, None, :, None]
        return self.query.gather(2, index.expand(-1, self.query.shape[1], -1, self.query.shape[3]))

    def saliency(self, **how: Any) -> torch.Tensor:
        scaling = self.key.shape[3] ** -0.5
        return probe_saliency(self.rows, self.key, self.probes, self.valid, scaling=scaling, **how)

    def select(self, **how: Any) -> torch.Tensor:
        return select_salient(self.scores, self.valid, RATIO, **how)

    def pack(self, **how: Any) -> None:
        for arena in self.arenas:  # back to empty: every timed turn writes the same blocks
            arena.block_start.zero_()
            arena.num_blocks.zero_()
        append_ranked(
            *self.arenas,
            self.tables,
            self.key,
            self.value,
            self.valid,
            self.valid,
            ratio=RATIO,
            scores=self.scores,
            **how,
        )

    def sdpa(self) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            self.query, self.key, self.value, is_causal=True, enable_gqa=self.query.shape[1] != self.key.shape[1]
        )

    def bytes_of(self) -> dict[str, int]:
        """What each step must at least read and write."""
        kv_heads, width = self.key.shape[1], self.key.shape[3]
        count = int(self.valid.sum()) * kv_heads
        kept = count * width * 2 * (4 * RATIO + 2 * (1 - RATIO)) / 8 + count * 4 + count / BLOCK * width * 4
        return {
            "saliency": 2 * self.key.numel() + 2 * self.rows.numel() + 4 * self.scores.numel(),
            "pack": int(4 * count * width + 4 * self.scores.numel() + kept),
            "sdpa_prefill": 4 * self.query.numel() + 4 * self.key.numel(),
        }


def gate(shape: str) -> None:
    """Kernels against twins at a small size; nothing is timed when this fails."""
    layer = Layer(shape, 2, 300)
    assert_close("saliency", layer.scores, layer.saliency(implementation="reference"), dtype=torch.float32)
    assert_same("selection", layer.chosen, layer.select(implementation="reference"))
    written = []
    for implementation in ("triton", "reference"):
        for arena in layer.arenas:
            for tensor in arena.tensors().values():
                tensor.zero_()
        layer.pack(implementation=implementation)
        written.append([{name: tensor.clone() for name, tensor in arena.tensors().items()} for arena in layer.arenas])
        written[-1].append({"salient": layer.tables.salient.clone(), "valid": layer.tables.valid.clone()})
    for got, want in zip(*written):
        for name in got:
            assert_same(name, got[name], want[name])


def measure(shape: str, batch: int, tokens: int, bandwidth: float, repeats: int) -> dict[str, Any]:
    layer = Layer(shape, batch, tokens)
    steps = {
        "choose_probes": layer.choose, "gather_rows": layer.gather, "saliency": layer.saliency, "pack": layer.pack,
        "sdpa_prefill": layer.sdpa,
    }  # fmt: skip
    result: dict[str, Any] = {"shape": shape, "batch": batch, "tokens": tokens, "probes": layer.probes.shape[1]}
    limits = layer.bytes_of()
    for name, step in steps.items():
        result[name] = timed(step, repeats)
        if name in limits:
            result[name]["byte_limit_ms"] = round(limits[name] / bandwidth * 1e3, 4)
    flush = Layer(shape, batch, FLUSH)
    result["flush"] = timed(flush.pack, repeats)
    total = sum(result[name]["median_ms"] for name in list(steps)[:-1])
    result["added_ms"] = round(total, 4)
    result["added_over_sdpa_prefill"] = round(total / result["sdpa_prefill"]["median_ms"], 4)
    return result


def tune(shape: str, batch: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of both passes together for other tiles of one pass at a time, fastest first."""
    from quietgoose.kernels.saliency import triton_kernels

    layer, found = Layer(shape, batch, tokens), []
    original = triton_kernels.tiles
    kept = original(layer.key.dtype, layer.key.shape[3])
    try:
        for part in (0, 1):
            for rows, columns, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3, 4)):
                candidate = triton_kernels.Tiles(rows, columns, warps, stages)
                pair = (candidate, kept[1]) if part == 0 else (kept[0], candidate)
                triton_kernels.tiles = lambda *_, pair=pair: pair
                entry = {"shape": shape, "pass": part + 1, "tiles": [rows, columns, warps, stages]}
                try:
                    found.append(entry | timed(layer.saliency, repeats))
                except triton_kernels.triton.runtime.errors.OutOfResources as error:
                    found.append(entry | {"median_ms": float("inf"), "error": str(error)})
    finally:
        triton_kernels.tiles = original
    return sorted(found, key=lambda entry: (entry["pass"], entry["median_ms"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("kv_quantize.py times GPU kernels: it needs a CUDA device, and torch sees none here", file=sys.stderr)
        return int(ExitCode.ENVIRONMENT)
    import triton

    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "ratio": RATIO,
    }  # fmt: skip
    bandwidth = copy_bandwidth(torch.device("cuda"))
    report["copy_gb_per_s"] = round(bandwidth / 1e9)
    report["rows"], report["tuning"] = [], []
    with torch.inference_mode():
        for shape in given.shapes:
            gate(shape)
            for tokens, batch in itertools.product(given.tokens, given.batch):
                report["rows"].append(measure(shape, batch, tokens, bandwidth, given.repeats))
                print(json.dumps(report["rows"][-1]), file=sys.stderr)
            if given.tune:
                report["tuning"] += tune(shape, max(given.batch), max(given.tokens), min(given.repeats, 10))
    text = json.dumps(report, indent=1)
    if given.out:
        given.out.write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
