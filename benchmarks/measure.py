"""What the benchmarks measure with: clocks that follow the device's queue, memory, the limits of the hardware in the same run,
and the report that is left. Models of random weights are in random_models.py."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

START = time.perf_counter()
PACKAGES = ("torch", "triton", "transformers")


def say(*words: Any) -> None:
    """One line of progress with the seconds since the start."""
    print(f"[{time.perf_counter() - START:7.1f} s]", *words, flush=True)


def worst(errors: Iterable[float]) -> float:
    """The largest of some errors, NaN if one is: `max` passes over a NaN that is not the first, and a gate would be green."""
    found = list(errors)
    return math.nan if any(map(math.isnan, found)) else max(found)


def about(device: torch.device) -> dict[str, Any]:
    """Date, hardware and versions, as every result carries them."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware,
        "versions": ", ".join(f"{name} {version}" for name, version in found.items()),
    }


# time ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Milliseconds of a repeated piece of work."""

    median: float
    p20: float
    p80: float
    mean: float
    longest: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Times:
        ordered = sorted(values)
        at = [ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] for q in (0.2, 0.8)]
        return cls(
            statistics.median(ordered), at[0], at[1], statistics.fmean(ordered), ordered[-1], len(ordered)
        )  # fmt: skip

    def rounded(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in vars(self).items()}

    def short(self, digits: int = 4) -> dict[str, float]:
        """Median as `ms`, p20, p80."""
        return {name: round(x, digits) for name, x in (("ms", self.median), ("p20", self.p20), ("p80", self.p80))}


class Clock:
    """Time stamps that follow the device's queue: CUDA events, or the host's clock without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.stamps: list[Any] = []

    def stamp(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.stamps.append(event)
        else:
            self.stamps.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Milliseconds between consecutive stamps; waits for the device once."""
        wait(self.device)
        pairs = list(zip(self.stamps, self.stamps[1:]))
        if self.cuda:
            return [first.elapsed_time(second) for first, second in pairs]
        return [1e3 * (second - first) for first, second in pairs]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """(milliseconds, result) of one call by the host's clock, the device drained before and after."""
    wait(device)
    start = time.perf_counter()
    result = work()
    wait(device)
    return 1e3 * (time.perf_counter() - start), result


def elapsed_ms(work: Callable[[], Any], device: torch.device) -> float:
    """The milliseconds of `elapsed`."""
    return elapsed(work, device)[0]


def intervals(step: Callable[[], Any], device: torch.device, count: int) -> list[float]:
    """Milliseconds of consecutive steps without a wait between them."""
    clock = Clock(device)
    clock.stamp()
    for _ in range(count):
        step()
        clock.stamp()
    return clock.intervals()


def time_steps(step: Callable[[], Any], device: torch.device, most: int, seconds: float, least: int = 3) -> Times:
    """Up to `most` consecutive steps without a wait between them; fewer, but `least`, if they would take more than `seconds`.
    Two steps before them warm up."""
    once = min(elapsed_ms(step, device) for _ in range(2))
    return Times.of(intervals(step, device, int(max(least, min(most, 1e3 * seconds / max(once, 1e-3))))))


def time_calls(call: Callable[[], Any], device: torch.device, seconds: float, least: int = 5) -> Times:
    """Calls that are waited for one by one, for about `seconds`. Nothing warms up."""
    taken: list[float] = []
    while len(taken) < least or sum(taken) < 1e3 * seconds:
        taken.append(elapsed_ms(call, device))
    return Times.of(taken)


def heaviest_kernels(seen: Any, steps: int, most: int = 25) -> dict[str, Any]:
    """A `torch.profiler` record of `steps` equal steps as one step's kernels: their sum, number, and the heaviest by name."""
    spent: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent.setdefault(event.name, []).append(event.device_time / 1e3)
    heavy = sorted(spent.items(), key=lambda item: -sum(item[1]))[:most]
    return {
        "device_ms": round(sum(sum(times) for times in spent.values()) / steps, 3),
        "kernels": round(sum(len(times) for times in spent.values()) / steps),
        "heaviest": [
            {"name": name[:110], "ms": round(sum(times) / steps, 3), "calls": round(len(times) / steps)}
            for name, times in heavy
        ],
    }  # fmt: skip


# the hardware's limits -----------------------------------------------------------------------------------------


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large device copy, read plus written; the ceiling everything is measured against."""
    count = 2**30 if device.type == "cuda" else 2**24
    source = torch.empty(count, dtype=torch.uint8, device=device).random_(256)
    target = torch.empty_like(source)
    times = time_steps(lambda: target.copy_(source), device, 40, 2.0)
    return 2 * count / (times.median / 1e3)


def matmul_limit(device: torch.device, side: int = 8192) -> float:
    """FLOP/s of bf16 products of square matrices, the best of ten blocks: what the hardware does at most, here and now."""
    a, b, product = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(3))
    each = 10 if device.type == "cuda" else 1  # a block is long beside the clock's steps

    def block() -> None:
        for _ in range(each):
            torch.mm(a, b, out=product)

    return 2 * side**3 * each / (min(intervals(block, device, 13)[3:]) / 1e3)


# memory --------------------------------------------------------------------------------------------------------


def tidy(device: torch.device) -> None:
    """Give back what nobody holds, so that the next reading starts clean."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def held(device: torch.device) -> int | None:
    """Bytes of all live tensors; no reading without a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def idle(device: torch.device) -> int:
    """Bytes that nobody uses and nobody else can have: the private pools of captured graphs."""
    tidy(device)
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def reset_peak(device: torch.device) -> None:
    """`peak` counts from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Bytes of all live tensors at their most since `reset_peak`; no reading without a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def peak_of(work: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """(result, bytes at the peak beyond what was held before); no reading without a GPU."""
    tidy(device)
    wait(device)
    before = held(device)
    reset_peak(device)
    result = work()
    wait(device)
    most = peak(device)
    return result, None if most is None or before is None else most - before


def gib(value: int | None) -> float | None:
    return None if value is None else round(value / 2**30, 2)


def mib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f}"


# reports -------------------------------------------------------------------------------------------------------


def attempt(work: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What `work` finds, or the text of what stopped it: a peer may fail in any way and the table goes on."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).split(". ")[0][:200]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:400]}
    finally:
        tidy(device)


def why_not(row: dict[str, Any]) -> str | None:
    """The text of a row without a measurement."""
    for key in ("not_available", "out_of_memory", "error"):
        if key in row:
            return f"{key.replace('_', ' ')}: {row[key]}"
    return None


def write(report: dict[str, Any], out: Path) -> None:
    """The whole report so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1))
