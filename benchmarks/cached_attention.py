"""Decode attention over a packed cache against 16-bit flash decoding: milliseconds, and GB/s against a plain copy.

    python benchmarks/cached_attention.py [--out result.json] [--cases llama3:32768:8 smollm2:8192:1]

One query per row. 60 % of the tokens at 4 bits, 40 % at 2, plus a 16-bit tail of 64 slots; the peers read the same
number of tokens at 16 bits. Everything is timed as CUDA graphs of 20 launches over rotating buffers (more than the L2
holds), interleaved in rounds; median, p20, p80. A case whose check against fp64 fails reports no time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from measure import copy_bandwidth
from quietgoose.kernels.cached_attention import SaliencyBuffers, Tail, cached_attention
from quietgoose.kernels.quantize import PackedArena, empty_arena
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SHAPES = {"llama3": (32, 8, 128), "smollm2": (9, 3, 64)}  # query heads, KV heads, head size
CASES = [
    f"{shape}:{context}:{batch}"
    for shape in SHAPES
    for context in (4096, 8192, 32768, 131072)
    for batch in (1, 8)
    if (shape, context, batch) != ("llama3", 131072, 8)
]
RATIO = 0.6
TAIL = 64
LAUNCHES = 20
ROUNDS = 15
ROTATION_BYTES = 128 * 2**20
DTYPE = torch.bfloat16


def random_arena(bits: int, batch: int, kv_heads: int, head_dim: int, length: int) -> PackedArena:
    """`length` slots in full blocks: random codes and parameters like those of unit normal keys and values."""
    blocks = -(-length // 128)
    arena = empty_arena(bits, batch, kv_heads, head_dim, max(length, 1), max(blocks, 1), DTYPE, "cuda")
    starts = (torch.arange(arena.block_capacity + 1, device="cuda") * 128).clamp_max(length)
    arena.block_start.copy_(starts.int())
    arena.num_blocks.fill_(blocks)
    if bits == 16:
        arena.key_codes.normal_()
        arena.value_codes.normal_()
        return arena
    for codes in (arena.key_codes, arena.value_codes):
        codes.random_(0, 256)
    for scale, minimum in ((arena.key_scale, arena.key_min), (arena.value_scale, arena.value_min)):
        scale.uniform_(0.8, 1.2).mul_(4 / (2**bits - 1))
        minimum.uniform_(-2.2, -1.8)
    arena.value_channel.uniform_(0.5, 1.5)
    return arena


class Case:
    """One shape: queries, a packed cache, a cache of our own kernel at 16 bits, and plain keys and values."""

    def __init__(self, shape: str, context: int, batch: int) -> None:
        self.heads, self.kv_heads, self.head_dim = SHAPES[shape]
        self.name, self.context, self.batch = f"{shape}:{context}:{batch}", context, batch
        self.scaling = self.head_dim**-0.5
        self.query = torch.randn(batch, self.heads, 1, self.head_dim, device="cuda", dtype=DTYPE)
        self.tail = Tail(
            *(torch.randn(batch, self.kv_heads, TAIL, self.head_dim, device="cuda", dtype=DTYPE) for _ in range(2)),
            torch.ones(batch, TAIL, dtype=torch.uint8, device="cuda"),
            torch.tensor([TAIL], dtype=torch.int32, device="cuda"),
        )

    def saliency(self) -> SaliencyBuffers:
        total = torch.zeros(self.batch, self.kv_heads, TAIL, device="cuda")
        return SaliencyBuffers(total, torch.zeros(*total.shape[:2], 16, TAIL, device="cuda"), self.tail.length * 0)

    def packed(self, ratio: float = RATIO, bits: tuple[int, int] = (4, 2)) -> tuple[PackedArena, PackedArena]:
        tokens = self.context - TAIL
        high = round(ratio * tokens)
        parts = zip(bits, (high, tokens - high))
        return tuple(random_arena(b, self.batch, self.kv_heads, self.head_dim, n) for b, n in parts)

    def plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.batch, self.kv_heads, self.context, self.head_dim)
        return tuple(torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(2))

    def attend(self, arenas: tuple[PackedArena, PackedArena], **options: Any) -> torch.Tensor:
        return cached_attention(self.query, *arenas, self.tail, scaling=self.scaling, **options)

    def error(self, arenas: tuple[PackedArena, PackedArena]) -> float:
        """Relative RMSE of the kernel against the reference in fp64, on the first row."""
        first = tuple(
            replace(a, **{name: t[:1] if t.shape[0] == self.batch else t for name, t in a.tensors().items()})
            for a in arenas
        )
        tail = Tail(self.tail.key[:1], self.tail.value[:1], self.tail.valid[:1], self.tail.length)
        want = cached_attention(self.query[:1].double(), *first, tail, scaling=self.scaling)
        got = self.attend(arenas, implementation="triton")[:1].double()
        return ((got - want).square().mean() / want.square().mean()).sqrt().item()


def arena_bytes(arenas: tuple[PackedArena, ...]) -> int:
    return sum(t.numel() * t.element_size() for a in arenas for t in a.tensors().values())


def peers(case: Case, key: torch.Tensor, value: torch.Tensor) -> dict[str, Callable[..., Any]]:
    """16-bit decode attention as libraries offer it; each takes (key, value)."""
    group = case.heads // case.kv_heads
    grouped = case.query.view(case.batch, case.kv_heads, group, case.head_dim)

    def sdpa(backend: SDPBackend, query: torch.Tensor, gqa: bool) -> Callable[..., Any]:
        def run(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, k, v, scale=case.scaling, enable_gqa=gqa)

        return run

    names = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    found = {f"sdpa {name} gqa": sdpa(backend, case.query, True) for name, backend in names.items()}
    # without a mask the heads of a group may stand beside each other as queries of one head
    found |= {f"sdpa {name} grouped": sdpa(backend, grouped, False) for name, backend in names.items()}
    found["sdpa efficient grouped"] = sdpa(SDPBackend.EFFICIENT_ATTENTION, grouped, False)
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        pass
    else:
        query = case.query.transpose(1, 2)
        found["flash_attn_with_kvcache"] = lambda k, v: flash_attn_with_kvcache(
            query, k.transpose(1, 2), v.transpose(1, 2), softmax_scale=case.scaling
        )
    usable = {}
    for name, run in found.items():
        try:
            run(key, value)
            usable[name] = run
        except RuntimeError as error:
            print(f"# {case.name}: {name} does not run: {str(error).splitlines()[0]}", flush=True)
    return usable


def graph_of(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A graph of LAUNCHES calls that rotate through `calls`."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            calls[i % len(calls)]()
    return graph


def time_graphs(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Microseconds of one call: median, p20, p80 over `rounds` interleaved replays."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(begin.elapsed_time(end) * 1e3 / LAUNCHES)
    result = {}
    for name, values in times.items():
        fifths = statistics.quantiles(values, n=5)
        result[name] = {"us": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}
    return result


def copies_needed(size: int) -> int:
    return max(1, min(LAUNCHES, -(-ROTATION_BYTES // size)))


def measure(name: str, copy: float) -> dict[str, Any]:
    shape, context, batch = name.split(":")
    case = Case(shape, int(context), int(batch))
    variants = {"zip 4/2": (4, 2), "own 16 bit": (16, 16)}
    result: dict[str, Any] = {"case": name, "error": {}, "runs": {}}
    graphs, sizes, kept = {}, {}, []
    for label, bits in variants.items():
        caches = [case.packed(bits=bits)]
        sizes[label] = arena_bytes(caches[0])
        result["error"][label] = case.error(caches[0])
        if not result["error"][label] < 5e-3:
            raise SystemExit(f"{name}: {label} is wrong (relative RMSE {result['error'][label]:.2e}): nothing is timed")
        caches += [case.packed(bits=bits) for _ in range(copies_needed(sizes[label]) - 1)]
        kept.append(caches)
        graphs[label] = graph_of([lambda c=c: case.attend(c, implementation="triton") for c in caches])
        if bits == (4, 2):  # with the bookkeeping of a decode step
            sums, sizes["zip 4/2 + saliency"] = case.saliency(), sizes[label]
            graphs["zip 4/2 + saliency"] = graph_of(
                [lambda c=c: case.attend(c, implementation="triton", saliency=sums) for c in caches]
            )
    plain = [case.plain()]
    size = 2 * plain[0][0].numel() * plain[0][0].element_size()
    plain += [case.plain() for _ in range(copies_needed(size) - 1)]
    for label, run in peers(case, *plain[0]).items():
        sizes[label] = size
        graphs[label] = graph_of([lambda p=p, run=run: run(*p) for p in plain])
    for label, times in time_graphs(graphs).items():
        result["runs"][label] = {
            **times, "bytes": sizes[label], "GB/s": sizes[label] / times["us"] / 1e3,
            "of copy": sizes[label] / times["us"] / 1e3 / copy,
        }  # fmt: skip
    best = min((r["us"], label) for label, r in result["runs"].items() if not label.startswith("zip"))
    result["best 16 bit"], result["speedup"] = best[1], best[0] / result["runs"]["zip 4/2"]["us"]
    values = 2 * case.batch * case.kv_heads * (case.context - TAIL) * case.head_dim
    result["bits per value"] = 8 * sizes["zip 4/2"] / values
    return result


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['case']}  {result['bits per value']:.2f} bits a value, {result['speedup']:.2f}x the best 16 bit")
    for label, r in sorted(result["runs"].items(), key=lambda item: item[1]["us"]):
        spread = f"p20 {r['p20']:8.1f}  p80 {r['p80']:8.1f}"
        print(
            f"  {label:26s} {r['us']:9.1f} us  {spread}  {r['GB/s']:7.0f} GB/s  {r['of copy']:.2f} of copy", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", default=CASES, help="shape:context:batch, shape one of " + ", ".join(SHAPES)
    )
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    torch.manual_seed(0)
    copy = copy_bandwidth(torch.device("cuda")) / 1e9
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "copy GB/s": copy, "cases": [],
    }  # fmt: skip
    print(f"{report['gpu']}, torch {report['torch']}, triton {report['triton']}, copy {copy:.0f} GB/s", flush=True)
    for name in arguments.cases:
        report["cases"].append(measure(name, copy))
        show(report["cases"][-1])
        torch.cuda.empty_cache()
        if arguments.out:
            with open(arguments.out, "w") as file:
                json.dump(report, file, indent=1)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
