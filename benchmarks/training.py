"""Tokens a second of training experts and gates, next to what others do, in one run.

    python benchmarks/training.py --out results/training.json                       # all arms, about 20 minutes
    python benchmarks/training.py --arms gate peft ours --budget-seconds 500        # in pieces: --out is added to
    python benchmarks/training.py --arms peft ours gates llama3 --modes graph       # what `auto` takes, 4 minutes
    python benchmarks/training.py --arms profile                                    # what is left of a step
    python benchmarks/training.py --tiny                                            # small, also on a CPU

Arms:
    gate        four fast steps against four plain ones, losses and trained tensors; what is red reports no speed in this call
    peft        one adapter: the plain padded loop (batch 32), packed rows, packed rows compiled
    ours        SmolLM2 shape, 1, 12 and 16 experts in a pass: eager, compiled layers, CUDA graphs
    attention   compiled layers with each attention        rows   the same with more rows in a step
    gates       16 gates against one: with equally many rows in all, and with equally many of each
    llama3      four layers of LLaMA3-8B's shape: share of the measured matmul peak in model FLOPs
    profile     kernels by their share of a step, and how long the device idles

At the end `ratios` compares what one call measured: our steps in tokens a second with each loop of PEFT's, and gates in time.

A step is a whole step of the real engine: data, forward, backward, clipping, AdamW. SmolLM2 rows: 512 tokens of documents of
80, labels on the last quarter. Random weights; PyTorch's timings do not depend on them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from measure import about, elapsed_ms, heaviest_kernels, matmul_limit, wait
from training_cases import Shape, running, shapes, timed
from training_peers import peft_step

ARMS = ("gate", "peft", "ours", "attention", "gates", "llama3", "rows", "profile")
MODES = ("off", "layers", "graph")
LOSS_LIMIT, MOVED_LIMIT = 0.01, 0.15
"""What four steps of a mode may differ by from eager ones: in the loss, and in the way that trained tensors went. AdamW makes a
whole step of the rounding of a small gradient: .056 between two right modes in bf16 on an H100, .060 (gates .034) between bf16
and fp32 with --tiny on a CPU."""


Steps = tuple[list[float], dict[str, torch.Tensor]]
"""Losses, and how far every trained tensor went."""


class Bench:
    """Runs arms until the budget is spent; every line is printed and written at once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.begin = options, time.perf_counter()
        self.device = torch.device(options.device)
        self.shapes = shapes(options.tiny)
        self.red: set[str] = set()
        self.found: dict[tuple[str, str], dict[str, Any]] = {}
        self.record: dict[str, Any] = {**about(self.device), "lines": []}
        if options.out and options.out.is_file():
            self.record["lines"] = json.loads(options.out.read_text())["lines"]

    def left(self) -> float:
        return self.options.budget_seconds - (time.perf_counter() - self.begin)

    def put(self, **line: Any) -> dict[str, Any]:
        print(json.dumps(line), flush=True)
        self.record["lines"].append({**line, "hardware": self.record["hardware"]})
        if self.options.out:
            self.options.out.parent.mkdir(parents=True, exist_ok=True)
            self.options.out.write_text(json.dumps(self.record, indent=1) + "\n")
        return line

    def attempt(self, arm: str, what: str, work: Any) -> dict[str, Any] | None:
        """One measurement; a failure is a line of its own and kills nothing else."""
        if self.left() < 20:
            self.put(arm=arm, what=what, skipped="the budget is spent")
            return None
        try:
            self.found[arm, what] = self.put(arm=arm, what=what, **work())
            return self.found[arm, what]
        except Exception as error:
            traceback.print_exc(limit=8)
            self.put(arm=arm, what=what, failed=f"{type(error).__name__}: {str(error)[:300]}")
            return None

    # ------------------------------------------------------------------ arms

    def gate(self) -> None:
        """Every mode's losses and trained tensors after four steps against eager ones."""
        shape = self.shapes["smollm2"]
        modes = ("off", *(mode for mode in self.modes() if mode != "off"))
        kinds = [(kind, mode) for mode in modes for kind in ("experts", "gates")]
        plain: dict[str, Any] = {}
        for kind, mode in kinds:
            found = self.attempt(
                "gate", f"{kind} {mode}", lambda k=kind, m=mode: _four_steps(shape, k, m, self.device, plain)
            )
            if found is None or not agrees(found):
                self.red.add(mode)
                print(f"gate: {kind} {mode} differs from eager; no speed of {mode} is reported", flush=True)

    def modes(self) -> tuple[str, ...]:
        """The fastest first; graphs last, because a failed capture spoils what follows in the process."""
        known = ("layers", "off", "graph") if self.device.type == "cuda" else ("off",)
        return tuple(mode for mode in known if mode in self.options.modes and mode not in self.red)

    def peft(self) -> None:
        shape = self.shapes["smollm2"]
        for what, options in (
            ("plain loop, batch 32 padded", {"padded": True, "compiled": False}),
            ("packed rows", {"padded": False, "compiled": False}),
            ("packed rows, compiled", {"padded": False, "compiled": True}),
        ):
            self.attempt("peft", what, lambda o=options: self._peft(shape, **o))

    def _peft(self, shape: Shape, **options: bool) -> dict[str, Any]:
        rows = self.options.rows * 12 if not options["padded"] else 0
        with peft_step(shape, rows, self.device, **options) as (step, tokens):
            found = timed(step, self.device, self.options.seconds)
        return {"experts": 1, **found, "tokens_per_second": round(1e3 * tokens / found["ms"])}

    def ours(self) -> None:
        for mode in self.modes():
            for experts in (12, 16, 1):
                self._ours("ours", f"{experts} experts {mode}", "experts", experts, self.options.rows, compile=mode)

    def attention(self) -> None:
        for name in ("base", "flex", "varlen"):
            self._ours("attention", name, "experts", 12, self.options.rows, compile="layers", attention=name)

    def rows(self) -> None:
        for rows in (2, 8, 16):
            self._ours("rows", f"12 experts, {rows} rows each", "experts", 12, rows, compile="layers")

    def gates(self) -> None:
        total = 16 * self.options.rows
        for mode in self.modes():
            for experts, rows, what in (
                (16, self.options.rows, "16 gates"),
                (1, total, "1 gate, as many rows in all"),
                (1, self.options.rows, "1 gate, as many rows of it"),
            ):
                self._ours("gates", f"{what}, {mode}", "gates", experts, rows, compile=mode)

    def llama3(self) -> None:
        shape = self.shapes["llama3"]
        peak = matmul_limit(self.device, 8192 if self.device.type == "cuda" else 512) / 1e12
        self.put(arm="llama3", what="bf16 matmul peak", tflops=round(peak, 1))
        for mode, kind, experts, rows in (
            ("graph", "experts", 4, 4),
            ("graph", "gates", 4, 4),
            ("layers", "experts", 4, 4),
            ("layers", "gates", 4, 4),
            ("off", "experts", 4, 4),
        ):
            if mode in self.modes() or self.options.tiny:
                what = f"{experts} {kind} {mode if mode in self.modes() else 'off'}"
                self._ours(
                    "llama3", what, kind, experts, rows, shape, peak, compile=mode if mode in self.modes() else "off"
                )

    def _ours(
        self, arm: str, what: str, kind: str, experts: int, rows: int, shape: Shape | None = None, peak: float = 0.0,
        **settings: Any,
    ) -> None:  # fmt: skip
        chosen = shape or self.shapes["smollm2"]

        def work() -> dict[str, Any]:
            with running(kind, chosen, experts, rows, self.device, self.options.strategy, **settings) as run:
                found = timed(run.step, self.device, self.options.seconds)
                rate = 1e3 * run.tokens / found["ms"]
                more = {"tflops": round(rate * chosen.flops / 1e12, 1)}
                if peak:
                    more["share_of_peak"] = round(rate * chosen.flops / 1e12 / peak, 3)
                loss = run.last.loss if run.last is not None else float("nan")
                return {
                    "kind": kind, "experts": experts, "rows": rows * experts, **settings, **found,
                    "tokens_per_second": round(rate), **more, "loss": round(loss, 4),
                }  # fmt: skip

        self.attempt(arm, what, work)

    def ratios(self) -> None:
        """Of what this call measured, a machine with itself: tokens a second against PEFT's, sixteen gates' time against one's."""
        for mode in self.modes():
            ratios: dict[str, float] = {}
            for experts in (12, 16):
                ours = self.found.get(("ours", f"{experts} experts {mode}"))
                for (arm, what), line in self.found.items():
                    if ours and arm == "peft":
                        rate = ours["tokens_per_second"] / line["tokens_per_second"]
                        ratios[f"{experts} experts, rate against PEFT's {what}"] = round(rate, 2)
            gates = self.found.get(("gates", f"16 gates, {mode}"))
            for one in ("1 gate, as many rows in all", "1 gate, as many rows of it"):
                line = self.found.get(("gates", f"{one}, {mode}"))
                if gates and line:
                    ratios[f"16 gates, time against {one}"] = round(gates["ms"] / line["ms"], 2)
            if ratios:
                self.put(arm="ratios", what=mode, **ratios)

    def profile(self) -> None:
        """One step each of experts and gates: the twenty heaviest kernels, and the device's idle share."""
        for kind, experts in (("experts", 12), ("gates", 16)):
            self.attempt("profile", f"{experts} {kind}", lambda k=kind, e=experts: self._profile(k, e))

    def _profile(self, kind: str, experts: int) -> dict[str, Any]:
        from torch.profiler import ProfilerActivity, profile

        mode = self.options.profile_mode if self.device.type == "cuda" else "off"
        with running(
            kind, self.shapes["smollm2"], experts, self.options.rows, self.device, self.options.strategy, compile=mode
        ) as run:
            for _ in range(6):
                run.step()
            wait(self.device)
            activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 2 if self.device.type == "cuda" else 1]
            with profile(activities=activities) as seen:
                wall = elapsed_ms(lambda: [run.step() for _ in range(3)], self.device)
        return {"wall_ms": round(wall / 3, 2), **heaviest_kernels(seen, 3)}


def _four_steps(shape: Shape, kind: str, mode: str, device: torch.device, plain: dict[str, Any]) -> dict[str, Any]:
    """Four steps with two rows of three experts; what they differ by from the eager ones kept in `plain`."""
    settings = {"compile": mode, **({"attention": "base"} if mode == "off" else {})}
    with running(kind, shape, 3, 2, device, "zero1", **settings) as run:
        start = {name: tensor.clone() for name, tensor in run.engine.trainable().items()}
        losses = []
        for number in range(4):
            losses.append(run.engine.step(run.data.step(number)).loss)
        moved = {name: tensor - start[name] for name, tensor in run.engine.trainable().items()}
    if mode == "off":
        plain[kind] = (losses, moved)
        return {"losses": losses}
    return difference((losses, moved), plain[kind])


def difference(found: Steps, plain: Steps) -> dict[str, Any]:
    """The worst relative error of a loss, and of one expert's way from its start."""
    (losses, moved), (want_losses, want) = found, plain
    error = max(float((moved[name] - want[name]).norm() / want[name].norm()) for name in want)
    return {
        "losses": losses, "worst": round(max(abs(a - b) / abs(b) for a, b in zip(losses, want_losses)), 5),
        "moved": round(error, 4),
    }  # fmt: skip


def agrees(line: dict[str, Any]) -> bool:
    """Whether a mode's line of the gate is green; what is not finite is not."""
    finite = all(math.isfinite(loss) for loss in line.get("losses", [math.nan]))
    return finite and line.get("worst", 0.0) <= LOSS_LIMIT and line.get("moved", 0.0) <= MOVED_LIMIT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="of train.compile")
    parser.add_argument("--rows", type=int, default=4, help="rows of each expert in a step")
    parser.add_argument("--strategy", default="zero2")
    parser.add_argument("--profile-mode", default="graph", choices=MODES)
    parser.add_argument("--seconds", type=float, default=4.0, help="of steps in a measurement")
    parser.add_argument("--budget-seconds", type=float, default=1500.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    bench = Bench(parser.parse_args())
    for name, value in bench.record.items():
        if name != "lines":
            print(f"{name}: {value}", flush=True)
    for arm in bench.options.arms:
        getattr(bench, arm)()
    bench.ratios()


if __name__ == "__main__":
    main()
