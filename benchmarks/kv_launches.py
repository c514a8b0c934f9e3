"""What one prefill launches and what its Python costs, layer by layer: counted on a CPU, kernels replaced by a counter.

    python benchmarks/kv_launches.py                     # launches a layer, ZipCache beside DynamicCache
    python benchmarks/kv_launches.py --names             # and which they are
    python benchmarks/kv_launches.py --profile           # and where the Python time goes

Sizes do not change the number of launches, so the model is tiny. Two depths give the share of a layer and what a forward
costs once. Launches are PyTorch operations that are more than a view or an allocation, and Triton kernels; a read of a
device value on the host is counted apart (`reads`). The tensors that skipped kernels should have filled hold anything.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from quietgoose.cache.hf import ZipCache
from quietgoose.kernels import quantize, saliency
from random_models import build, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from triton.runtime.jit import KernelInterface

FREE = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "lift_fresh", "set_")
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item")
DEPTHS = (2, 6)


class Launches(TorchDispatchMode):
    """Counts by name; `triton` kernels are counted by `stubbed`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in READS:
            self.found["read: " + name] += 1
        elif not func.is_view and name not in FREE and not _is_view(func):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    """Every result aliases an argument without being written to."""
    results = func._schema.returns
    return bool(results) and all(r.alias_info is not None and not r.alias_info.is_write for r in results)


@contextmanager
def stubbed(note: Callable[[str], None]) -> Iterator[None]:
    """The Triton path on a CPU, with `note` called in the place of every launch."""

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: note("triton: " + kernel.fn.__name__)

    with (
        mock.patch.object(quantize, "takes_triton", return_value=True),
        mock.patch.object(saliency, "takes_triton", return_value=True),
        mock.patch.object(KernelInterface, "__getitem__", launch),
    ):
        yield


class Prefill:
    """One kind of cache under one model: `begin` makes or empties it, calling the object is the prefill."""

    def __init__(self, kind: str, layers: int, rows: int, tokens: int, padded: bool) -> None:
        config = tiny()
        config.num_hidden_layers = layers
        self.model = build(config, torch.device("cpu"), torch.bfloat16)
        self.kind, self.rows, self.tokens = kind, rows, tokens
        self.ids = torch.zeros(rows, tokens, dtype=torch.long)
        self.mask = torch.ones(rows, tokens, dtype=torch.long)
        if padded:
            self.mask[0, : tokens // 3] = 0
        self.cache: Any = None

    def begin(self) -> None:
        name, _, policy = self.kind.partition(":")
        if name == "kept" and self.cache is not None:
            self.cache.reset()
        elif name == "dynamic":
            self.cache = DynamicCache(config=self.model.config)
        else:
            capacity = self.tokens + 64 if name == "kept" else None
            self.cache = ZipCache(self.model.config, policy or "paper", capacity)

    @torch.no_grad()
    def __call__(self) -> None:
        self.model(self.ids, attention_mask=self.mask, past_key_values=self.cache, logits_to_keep=1)


def launches(kind: str, rows: int, tokens: int, padded: bool = False) -> tuple[Counter[str], Counter[str]]:
    """(launches of one layer, launches of a forward beside its layers), the cache's making or emptying included."""
    counts = []
    for layers in DEPTHS:
        run = Prefill(kind, layers, rows, tokens, padded)
        counter = Launches()
        with stubbed(lambda name, found=counter.found: found.update([name])):
            run.begin()
            run()  # a cache that is kept is empty, not new
            counter.found.clear()
            with counter:
                run.begin()
                run()
        counts.append(counter.found)
    few, many = counts
    step = DEPTHS[1] - DEPTHS[0]
    layer = Counter({name: (many[name] - few[name]) // step for name in many | few})
    once = Counter({name: few[name] - DEPTHS[0] * layer[name] for name in few})
    return layer, once


def python_ms(kind: str, rows: int, tokens: int, padded: bool, repeats: int = 40) -> float:
    """Milliseconds of a layer on this CPU, kernels skipped: the least of several runs, per layer."""
    least = []
    for layers in DEPTHS:
        run, times = Prefill(kind, layers, rows, tokens, padded), []
        with stubbed(lambda name: None):
            for _ in range(repeats):
                start = time.process_time()
                run.begin()
                run()
                times.append(time.process_time() - start)
        least.append(min(times))
    return 1e3 * (least[1] - least[0]) / (DEPTHS[1] - DEPTHS[0])


def python_calls(kind: str, rows: int, tokens: int, padded: bool) -> int:
    """Function calls of a layer, Python's and built-in ones: what a noisy machine cannot change."""
    counts = []
    for layers in DEPTHS:
        run, profiler = Prefill(kind, layers, rows, tokens, padded), cProfile.Profile(time.process_time)
        with stubbed(lambda name: None):
            run.begin()
            run()
            profiler.enable()
            run.begin()
            run()
            profiler.disable()
        counts.append(sum(entry.callcount for entry in profiler.getstats()))
    return (counts[1] - counts[0]) // (DEPTHS[1] - DEPTHS[0])


def profile(kind: str, rows: int, tokens: int, padded: bool) -> None:
    run, profiler = Prefill(kind, DEPTHS[1], rows, tokens, padded), cProfile.Profile(time.process_time)
    with stubbed(lambda name: None):
        run.begin()
        run()
        for _ in range(10):
            profiler.enable()
            run.begin()
            run()
            profiler.disable()
    print(f"\n{kind}: 10 prefills of {DEPTHS[1]} layers")
    pstats.Stats(profiler).sort_stats("cumulative").print_stats("cache/|kernels/", 40)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["dynamic", "new:paper", "kept:paper", "kept:quality"])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--padded", action="store_true", help="the first row begins with padding")
    parser.add_argument("--names", action="store_true")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "|cache|torch a layer|triton a layer|reads a layer|torch once|Python calls a layer|ms a layer on this CPU|\n|-|-|-|-|-|-|-|"
    )
    cell = (given.rows, given.tokens, given.padded)
    for kind in given.kinds:
        layer, once = launches(kind, *cell)
        triton = sum(n for name, n in layer.items() if name.startswith("triton"))
        reads = sum(n for name, n in layer.items() if name.startswith("read"))
        rest = sum(layer.values()) - triton - reads
        calls, spent = python_calls(kind, *cell), python_ms(kind, *cell)
        print(f"|{kind}|{rest}|{triton}|{reads}|{sum(once.values())}|{calls}|{spent:.2f}|", flush=True)
        if given.names:
            print("   layer:", ", ".join(f"{n} {name}" for name, n in layer.most_common() if n))
            print("   once: ", ", ".join(f"{n} {name}" for name, n in once.most_common() if n))
    if given.profile:
        for kind in given.kinds:
            profile(kind, *cell)


if __name__ == "__main__":
    main()
