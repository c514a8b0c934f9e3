"""What scale_simulator.py starts from: one place for every number that was measured, with its source.

MEASURED names the files of benchmarks/results, written by training.py and scaling.py. To bring docs/scale.md up to date, name newer
ones and run `python benchmarks/scale_simulator.py --into docs/scale.md`; tests/benchmarks/test_scaling.py compares the page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from training_cases import Shape, shapes

GIB = 2**30
RESULTS = Path(__file__).with_name("results")
MEASURED = {
    "training": ["2026-11-26_training_graphs_h100.json", "2026-11-27_training_rows_h100.json"],
    "scaling": "2026-11-27_scaling_h100.json",
}
"""Files of RESULTS that the numbers come from: to bring the page up to date, name newer ones."""
ADAM_BYTES, WHOLE_BYTES = 28, 52
"""Bytes of memory traffic a trained entry and step: AdamW, of a process's own part, reads 16 and writes 12; gathering rows' vectors,
their gradients, clipping and norms pass over all of it about thirteen times in fp32."""


@dataclass(frozen=True)
class Machine:
    """One kind of GPU and its links; SI units. `share_small`, `share_large`: model FLOPs of a token over its time as a share of
    `matmul`, by base. `floor`: what a layer and micro-batch takes however few its tokens. `hooks`: what the host takes for one under
    ZeRO-3, which is not compiled."""

    matmul: float
    host: float
    share_small: float
    share_large: float
    floor: float
    hooks: float
    memory: float = 3.0e12
    capacity: float = 78 * GIB
    port: float = 45e9
    per_host: int = 8

    def link(self, gpus: int) -> float:
        """Bytes a second that a process sends in a collective of `gpus`. Across hosts there is a ring for each port, each with an
        equal share of the bytes: all ports of a host together carry what one process sends."""
        return self.host if gpus <= self.per_host else min(self.host, self.per_host * self.port)

    def share(self, shape: Shape) -> float:
        return self.share_small if shape.config.hidden_size < 2048 else self.share_large


FIELDS = {
    "matmul": ("bf16 matmul, TFLOP/s", 1e12),
    "memory": ("device memory, TB/s", 1e12),
    "capacity": ("memory a GPU, GiB", GIB),
    "host": ("link in a host, GB/s a process", 1e9),
    "port": ("port between hosts, GB/s", 1e9),
    "share_small": ("training, share of the matmul rate, SmolLM2", 1.0),
    "share_large": ("the same, LLaMA3-8B and 70B shapes", 1.0),
    "floor": ("least a layer and micro-batch takes, ms", 1e-3),
    "hooks": ("the host for one under ZeRO-3, ms", 1e-3),
}
"""Field -> (what, unit)."""
ASSUMED = {
    "memory": "measured 2026-11, copy",
    "capacity": "datasheet less the driver's",
    "port": "assumed: 90 % of 400 Gb/s, a port a GPU",
}
"""Where the numbers come from that are in no file."""


Found = dict[str, tuple[float, str]]
Line = dict[str, Any]
EXPERTS_TIMED = 12
LARGE_MEBIBYTES = 64
"""Of scaling.py; --tiny sends less."""


def measured(training: Sequence[Path] = (), scaling: Path | None = None) -> tuple[Machine, dict[str, str]]:
    """The machine, and where each of its numbers comes from: these files, and for what they do not hold those of MEASURED."""
    runs = [RESULTS / name for name in MEASURED["training"]] + list(training)
    links = [RESULTS / MEASURED["scaling"]] + ([] if scaling is None else [scaling])
    peak, matmul = _last(
        runs, lambda lines: [x for x in lines if x.get("what") == "bf16 matmul peak" and x["tflops"] > 0]
    )
    found: Found = {"matmul": (matmul[0]["tflops"] * 1e12, f"measured, {matmul[0]['hardware']}, {peak.name}")}
    found |= _rates(runs, found["matmul"][0])
    found |= _links(links)
    values = {field: value for field, (value, _) in found.items()}
    return Machine(**values), {**ASSUMED, **{field: note for field, (_, note) in found.items()}}


def _last(paths: Sequence[Path], pick: Callable[[list[Line]], list[Line]]) -> tuple[Path, list[Line]]:
    """The last file of which `pick` takes lines, and those."""
    return next((path, lines) for path in reversed(paths) if (lines := pick(lines_of(path))))


def _rates(runs: Sequence[Path], matmul: float) -> Found:
    """What captured steps of experts say, of which a step is its optimiser, a floor for each layer, and its tokens: the small
    base's by a line through several numbers of tokens, the large one's with the same floor."""
    small, large = shapes()["smollm2"], shapes()["llama3"]
    path, lines = _last(runs, _several)
    slope, least = _fitted([_point(small, x) for x in lines])
    floor = least / small.config.num_hidden_layers
    rows = ", ".join(str(n) for n in sorted(x["rows"] for x in lines))
    note = f"measured, {lines[0]['hardware']}, {path.name}, a line through {rows} rows"
    path, lines = _last(runs, lambda found: _steps(found, "llama3"))
    one = max(lines, key=lambda x: x["tflops"])
    tokens, seconds = _point(large, one)
    share = large.flops * tokens / ((seconds - floor * large.config.num_hidden_layers) * matmul)
    return {
        "floor": (floor, note), "share_small": (small.flops / (slope * matmul), note),
        "share_large": (share, f"measured, {one['hardware']}, {path.name}, {one['what']}, {one['rows']} rows"),
    }  # fmt: skip


def _several(lines: list[Line]) -> list[Line]:
    """Steps of the small base with several numbers of tokens."""
    found = _steps(lines, "ours")
    return found if len({x["rows"] for x in found}) > 1 else []


def _steps(lines: list[Line], arm: str) -> list[Line]:
    """Captured steps of several experts or one; what --tiny leaves, whose rates round to 0, is none."""
    found = [x for x in lines if x.get("arm") == arm and x.get("kind") == "experts" and x.get("compile") == "graph"]
    return [x for x in found if x.get("tflops", 0) > 0]


def _point(shape: Shape, line: Line) -> tuple[float, float]:
    """(tokens, seconds less the optimiser's) of a measured step."""
    spent = line["experts"] * shape.lora * (ADAM_BYTES + WHOLE_BYTES) / Machine.memory
    return line["rows"] * shape.length, line["ms"] / 1e3 - spent


def _fitted(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(seconds a token, seconds without any) by least squares."""
    count = len(points)
    mean_x, mean_y = (sum(values) / count for values in zip(*points))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return slope, max(0.0, mean_y - slope * mean_x)


def _links(paths: Sequence[Path]) -> Found:
    """The slowest all-reduce within a host, and a ZeRO-3 step of one GPU, which waits for the host, a layer."""
    path, links = _last(
        paths, lambda lines: [x for x in lines if x.get("what") == "link" and x["mebibytes"] >= LARGE_MEBIBYTES]
    )
    worst = min(links, key=lambda line: line["gigabytes_per_second"])
    found: Found = {
        "host": (worst["gigabytes_per_second"] * 1e9, f"measured, all-reduce over {worst['gpus']} GPUs, {path.name}")
    }
    path, lines = _last(
        paths, lambda lines: [x for x in lines if (x.get("what"), x["gpus"]) == ("data:zero3", 1) and standard(x)]
    )
    seconds = lines[-1]["ms"] / 1e3 / shapes()["smollm2"].config.num_hidden_layers
    return found | {"hooks": (seconds, f"measured, one GPU's ZeRO-3 step, {path.name}")}


def standard(line: Line) -> bool:
    """A step of scaling.py as it runs without options: twelve experts of SmolLM2, 48 rows a GPU; not --tiny, --strong, other rows."""
    size = (line.get("trained"), line.get("rows_a_gpu"))
    return size == (EXPERTS_TIMED * shapes()["smollm2"].lora, 48) and line.get("reserved_gib") is not None


@cache
def lines_of(path: Path) -> list[Line]:
    return json.loads(path.read_text())["lines"]
