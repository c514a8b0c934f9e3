"""Attention of thoughts, kernel alone: ours against the dense diagonal mask through SDPA and against FlexAttention.

    python benchmarks/thought_attention.py --out results/thought_attention.json          # SmolLM2 and Mistral shapes
    python benchmarks/thought_attention.py --cases smollm2:1024:every:4:13:4 --rows 1 --peers triton flash dense
    python benchmarks/thought_attention.py --sweep --cases smollm2:1024:every:4:13:4     # tile sizes of our kernels
    python benchmarks/thought_attention.py --tiny                                        # small sizes, also on a CPU

A case is shape:L:anchors:S:T:J, anchors one of every, nth4 (each fourth position), packed (every position of four
documents a row). Two kinds of call: the gradient pass, M = T + 2 + J - 1 positions a branch, forward and backward;
and a rollout step, M = 1 over T filled slots, forward. Nothing is timed before outputs and all gradients of the peer
are within the tolerance table of the fp32 reference (computed in chunks of anchors). FLOP counts are of visible keys
only, so a peer that computes masked ones shows a low rate. Median, p20 and p80 of consecutive calls; peak memory
beyond the inputs. A peer that fails leaves its error in the JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measure import about, attempt, mib, peak_of, say, time_steps, why_not, write
from quietgoose.kernels.testing import relative_rmse, tolerance
from quietgoose.kernels.thought_attention import fast, thought_attention
from thought_attention_peers import Case, dense, flex
from torch import Tensor

CASES = [
    "smollm2:512:every:4:13:4", "smollm2:1024:every:4:13:4", "smollm2:2048:every:4:13:4", "smollm2:1024:nth4:4:13:4",
    "smollm2:1024:packed:4:13:4", "mistral:256:every:2:9:4", "mistral:1024:every:2:13:4",
]  # fmt: skip
TINY_CASES = ["tiny:32:every:2:3:2", "tiny:33:nth4:2:3:2", "tiny:40:packed:1:2:1"]
PEERS = ("triton", "flash", "cudnn", "efficient", "dense", "flex")
SWEPT = list(product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3)))  # rows, keys, warps, stages
GATE_BYTES = 2**30  # scores of the reference that may exist at once

Run = Callable[..., Tensor]


def runs(case: Case) -> dict[str, Run]:
    """Peers by name; each takes (q, prefix k, v, own k, v) and gives the output."""
    tail = (case.anchor, case.start, case.own_length)
    stock = {"scale": case.scale, "consecutive_from": case.consecutive_from}

    def over(kernel: str | None) -> Run:
        return lambda *tensors: fast.thought_attention(*tensors, *tail, **stock, prefix_kernel=kernel)

    named = {
        "triton": lambda *tensors: thought_attention(*tensors, *tail, case.scale, implementation="triton"),
        "dense": lambda *tensors: dense(case, *tensors),
        "flex": lambda *tensors: flex(case, *tensors),
    }
    if not case.q.is_cuda:
        return {"stock": over(None), "dense": named["dense"]}
    if case.consecutive_from is not None:
        named |= {"flash": over("flash"), "cudnn": over("cudnn")}
    return named | {"efficient": over("efficient")}


def exact(case: Case) -> dict[str, Tensor]:
    """Output and, for a gradient pass, gradients in fp32 by the reference, some anchors at a time."""
    keys = case.L + case.N
    size = max(1, GATE_BYTES // (case.rows * case.H * case.S * case.M * keys * 4 * 4))
    prefix = [x.float().requires_grad_(case.backward) for x in case.tensors[1:3]]
    parts: list[list[Tensor]] = []
    total = [torch.zeros_like(x) for x in prefix]
    for first in range(0, case.A, size):
        at = slice(first, first + size)
        q, own_k, own_v = (case.tensors[i][:, :, at].float().requires_grad_(case.backward) for i in (0, 3, 4))
        out = thought_attention(
            q, *prefix, own_k, own_v, case.anchor[:, at], case.start[:, at], case.own_length, case.scale,
            implementation="reference",
        )  # fmt: skip
        found = [out.detach()]
        if case.backward:
            inputs = [q, own_k, own_v, *prefix]
            *own, dk, dv = torch.autograd.grad(out, inputs, case.grad[:, :, at].float())
            found += own
            total = [total[0] + dk, total[1] + dv]
        parts.append(found)
    names = ["out", "dq", "down_k", "down_v"] if case.backward else ["out"]
    result = {name: torch.cat(x, dim=2) for name, x in zip(names, zip(*parts))}
    return result | (dict(zip(("dprefix_k", "dprefix_v"), total)) if case.backward else {})


def gate(case: Case, run: Run, want: dict[str, Tensor]) -> dict[str, float]:
    """Relative RMSE of each result; raises where one is beyond the table."""
    inputs = [x.detach().requires_grad_(case.backward) for x in case.tensors]
    out = run(*inputs)
    got = {"out": out.detach()}
    if case.backward:
        names = ("dq", "dprefix_k", "dprefix_v", "down_k", "down_v")
        got |= dict(zip(names, torch.autograd.grad(out, inputs, case.grad)))
    errors = {name: relative_rmse(x.float(), want[name]) for name, x in got.items()}
    for name, error in errors.items():
        limit = tolerance(case.q.dtype, "forward" if name == "out" else "gradient")
        if not error <= limit:
            raise ArithmeticError(f"{name} is off by {error:.2e}, allowed are {limit:.0e}: not timed")
    return {name: float(f"{error:.2e}") for name, error in errors.items()}


def measure(case: Case, run: Run, want: dict[str, Tensor], seconds: float) -> dict[str, Any]:
    """Times and memory of one peer on one case."""
    device = case.q.device
    found: dict[str, Any] = {"error_of": gate(case, run, want)}
    inputs = [x.detach().requires_grad_(case.backward) for x in case.tensors]

    def both() -> None:
        torch.autograd.grad(run(*inputs), inputs, case.grad)

    def forward() -> None:
        with torch.no_grad():
            run(*inputs)

    _, found["forward_peak_bytes"] = peak_of(forward, device)
    found["forward_ms"] = time_steps(forward, device, 50, seconds).rounded()
    found["forward_tflops"] = round(case.flops / found["forward_ms"]["median"] / 1e9, 2)
    if case.backward:
        _, found["both_peak_bytes"] = peak_of(both, device)
        found["both_ms"] = time_steps(both, device, 50, seconds).rounded()
        found["both_tflops"] = round(3.5 * case.flops / found["both_ms"]["median"] / 1e9, 2)
    return found


def sweep(case: Case, seconds: float) -> list[dict[str, Any]]:
    """Our kernels one by one over tile sizes, best first."""
    from quietgoose.kernels.thought_attention import triton_launch as launch

    tail = (case.anchor, case.start)
    p = launch.problem((*case.tensors, *tail), case.own_length, case.scale)
    out, lse = launch.forward(p)
    grad = launch.flat(case.grad)
    _, delta = launch.query_gradient(p, out, grad, lse)
    work = {"forward": lambda: launch.forward(p)}
    if case.backward:
        work |= {
            "query_gradient": lambda: launch.query_gradient(p, out, grad, lse),
            "own_gradient": lambda: launch.own_gradient(p, grad, lse, delta),
            "prefix_gradient": lambda: launch.prefix_gradient(p, grad, lse, delta),
        }
    own = launch.tuning
    results = []
    sizes = [launch.Tuning(rows, keys, 32, warps, stages) for rows, keys, warps, stages in SWEPT]
    for kind, call in work.items():
        default = own(kind, case.q.dtype, case.D, case.q.is_cuda)
        rows = []
        for choice in [default, *sizes]:
            launch.tuning = lambda *_, choice=choice: choice
            found = attempt(lambda: {"ms": time_steps(call, case.q.device, 20, seconds).median}, case.q.device)
            rows.append({"kernel": kind, "tuning": vars(choice), "default": choice is default, **found})
        launch.tuning = own
        rows.sort(key=lambda row: row.get("ms", float("inf")))
        for row in [r for r in rows if r["default"]] + rows[:4]:
            say(
                f"  {kind:16s} {row.get('ms', float('nan')):8.3f} ms {'default ' if row['default'] else ''}{row['tuning']}"
            )
        results += rows
    return results


def table(report: dict[str, Any]) -> str:
    lines = []
    for name in dict.fromkeys(r["case"] for r in report["results"]):
        lines += [
            f"\n### {name}\n",
            "|peer|forward ms (p20-p80)|TFLOP/s|MiB|both ms (p20-p80)|TFLOP/s|MiB|",
            "|-|-|-|-|-|-|-|",
        ]
        for r in (r for r in report["results"] if r["case"] == name):
            if (reason := why_not(r)) is not None:
                lines.append(f"|{r['peer']}|{reason[:120]}||||||")
                continue
            cells = [r["peer"]]
            for kind in ("forward", "both"):
                if f"{kind}_ms" not in r:
                    cells += ["", "", ""]
                    continue
                t = r[f"{kind}_ms"]
                spread = f"{t['median']:.3f} ({t['p20']:.3f}-{t['p80']:.3f})"
                cells += [spread, f"{r[f'{kind}_tflops']:.1f}", mib(r[f"{kind}_peak_bytes"])]
            lines.append("|" + "|".join(cells) + "|")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="shape:L:anchors:S:T:J")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--peers", nargs="+", default=list(PEERS))
    parser.add_argument("--kinds", nargs="+", choices=["gradient", "rollout"], default=["gradient", "rollout"])
    parser.add_argument("--seconds", type=float, default=1.0, help="timed calls of a peer take no longer")
    parser.add_argument("--sweep", action="store_true", help="time our kernels over tile sizes instead of peers")
    parser.add_argument("--tiny", action="store_true", help="small cases; run on a CPU too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("thought_attention.json"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report: dict[str, Any] = {**about(device), "dtype": str(dtype), "rows": options.rows, "results": [], "sweep": []}
    say(report["hardware"], report["versions"])
    for name in options.cases or (TINY_CASES if options.tiny else CASES):
        for kind in options.kinds:
            case = Case(name, kind, options.rows, device, dtype)
            say(case.title)
            if options.sweep:
                report["sweep"].append({"case": case.title, "rows": sweep(case, options.seconds)})
                write(report, options.out)
                continue
            want = exact(case)
            available = runs(case)
            for peer in [*options.peers, *(p for p in available if p not in PEERS)]:
                if peer not in available:
                    found = {"not_available": f"not for this case on {device.type}"}
                else:
                    found = attempt(lambda: measure(case, available[peer], want, options.seconds), device)
                report["results"].append({"case": case.title, "peer": peer, **found})
                write(report, options.out)
                say("  ", peer, why_not(found) or f"{found['forward_ms']['median']} ms, both {found.get('both_ms')}")
    print(table(report))


if __name__ == "__main__":
    main()
