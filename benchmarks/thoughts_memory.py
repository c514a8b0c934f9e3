"""Memory and text tokens per second of a training step of thoughts, each fix switched on in turn, from the authors' loop to ours.

    python benchmarks/thoughts_memory.py --out results/thoughts_memory.json               # SmolLM2-135M's shape
    python benchmarks/thoughts_memory.py --cells 512:9:2 1024:13:4 --rows 1 4 16 --arms loop captured --branch-tokens 2048 32768
    python benchmarks/thoughts_memory.py --model FOLDER --text FILE --arms captured int8 int4   # real weights: the KL counts
    python benchmarks/thoughts_memory.py --tiny                                           # small, also on a CPU
    python benchmarks/thoughts_memory.py --estimate 0 8192 --rows 1 --cells 512:4:2       # a GPU's memory, told without one

A cell is L:T:S. Arms, each with everything before it:

    loop           the authors' loop (thoughts_authors_loop.py)     lookup    no one-hot product for embeddings
    one_head       logits only where they are read                  fused     no logits retained
    phases_dense   sampling without gradients, then one teacher-forced pass, under the dense diagonal mask
    prefix_once    kernels/thought_attention: prefix stored once, no mask
    chunks         the gradient pass in chunks of --branch-tokens (each of them in turn; 0: all at once)
    graphs         rollout steps captured in a CUDA graph
    captured       the gradient pass and the prefix captured, too
    int8, int4     thought keys and values in 8 or 4 bits while sampling
    recomputed     as captured (16 bits), the branches' layers run again in the backward pass

Every arm runs with each number of rows until it no longer fits; the table names the best rate and the memory at one row.
One step is forward, backward, no optimiser; `--train head` freezes the model. Memory is the peak beyond weights, and in
all. Nothing is timed before loop and thoughts/ agree on losses and gradients. Random weights unless --model is given.
--estimate takes no step: it traces those of captured, int8, int4 and recomputed (thoughts_estimate.py), seconds a cell on a CPU.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import quietgoose.thoughts.attention as thoughts_attention
import torch
from measure import about, attempt, elapsed_ms, held, idle, mib, peak_of, say, tidy, time_steps, why_not, write
from quietgoose.thoughts import stats
from quietgoose.thoughts.anchors import term_counts
from quietgoose.thoughts.config import ThoughtConfig
from quietgoose.thoughts.gradient import Stream, thought_loss
from quietgoose.thoughts.policy import ModelPolicy
from quietgoose.thoughts.rollout import RolloutGraphs
from quietgoose.thoughts.storage import ThoughtStore
from random_models import build, smollm2, weight_bytes
from thought_attention_peers import DenseAttention
from thoughts_authors_loop import (
    AuthorsLoop,
    Fixes,
    Text,
    captured_gate,
    captures,
    is_green,
    parameters_of,
    small_gate,
    small_model,
)
from thoughts_estimate import estimate_all, estimate_table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

LOOP_ARMS = {
    "loop": Fixes(),
    "lookup": Fixes(lookup=True),
    "one_head": Fixes(lookup=True, one_head=True),
    "fused": Fixes(lookup=True, one_head=True, fused_loss=True),
}
WHOLE_ARMS = (*LOOP_ARMS, "phases_dense", "prefix_once")
ARMS = (*WHOLE_ARMS, "chunks", "graphs", "captured", "int8", "int4", "recomputed")
CAPTURED_ARMS = ("captured", "int8", "int4", "recomputed")
GRAPH_ARMS = ("graphs", *CAPTURED_ARMS)
CELLS = ["512:9:2", "512:13:4", "1024:13:4", "2048:13:4"]
TINY_CELLS = ["12:2:2", "16:3:2"]


class Bench:
    """A model, its thought parameters and text; one step of any arm."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.tokenizer = None
        if options.tiny:
            self.model: Any = small_model().to(self.device, dtype)
        elif options.model:
            loaded: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
            self.model = loaded.to(self.device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        else:
            self.model = build(smollm2(), self.device, dtype)
        self.model.requires_grad_(options.train == "full")
        self.parameters = parameters_of(self.model, ThoughtConfig())
        self.text = None
        if options.text:
            if self.tokenizer is None:
                raise SystemExit("--text needs --model with a tokenizer")
            words = Path(options.text).read_text()[: 2**22]
            self.text = torch.tensor(self.tokenizer(words)["input_ids"], device=self.device)

    def tokens(self, rows: int, length: int) -> Tensor:
        """int64 [rows, length], the same for every arm."""
        if self.text is not None:
            return self.text[: rows * length].view(rows, length)
        g = torch.Generator(self.device).manual_seed(0)
        return torch.randint(self.model.config.vocab_size, (rows, length), generator=g, device=self.device)

    def trained(self) -> list[Tensor]:
        return [p for p in (*self.parameters.parameters(), *self.model.parameters()) if p.requires_grad]

    def step(self, arm: str, cell: tuple[int, int, int], rows: int, branch: int) -> Callable[[], Tensor | None]:
        """Forward and backward of one micro-batch; returns the statistics of thoughts/ where there are any."""
        length, thought, samples = cell
        config = ThoughtConfig(tokens=thought, samples=samples, ratio_cap=None, lookahead=self.options.ahead)
        text = Text(self.tokens(rows, length))
        counts = term_counts(config, text, seed=0, step=0)
        weights = (torch.tensor(config.coefficients()) / counts.cpu().clamp(min=1)).float().to(self.device)

        def backward(total: Tensor) -> None:
            for parameter in self.trained():
                parameter.grad = None
            total.backward()

        if arm in LOOP_ARMS:
            loop = AuthorsLoop(self.model, self.parameters, config, LOOP_ARMS[arm])

            def run_loop() -> None:
                backward((weights[:3] * loop(text.tokens_BT).sums).sum())

            return run_loop
        if arm in ("int8", "int4"):
            config = replace(config, rollout_cache=arm)
        options: dict[str, Any] = {"recompute": arm == "recomputed"}
        if arm in GRAPH_ARMS:
            options |= captures() if arm in CAPTURED_ARMS else {"graphs": RolloutGraphs()}
        if branch:
            options["chunk"] = max(1, branch // (rows * samples * config.branch_length))
        policy = ModelPolicy(self.model, self.parameters)

        def run_ours() -> Tensor:
            loss = thought_loss(policy, text, config, weights, Stream(0, 0), **options)
            backward(loss.total)
            return loss.stats

        return run_ours

    def store_bytes(self, arm: str, cell: tuple[int, int, int], rows: int) -> int:
        """Bytes of the thoughts' keys and values while sampling."""
        length, thought, samples = cell
        config = self.model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (rows, config.num_key_value_heads, length, samples, thought, width)
        kind = arm if arm in ("int8", "int4") else "exact"
        return ThoughtStore(kind, config.num_hidden_layers, shape, self.model.dtype, torch.device("meta")).nbytes()


@contextmanager
def attention_of(arm: str) -> Iterator[None]:
    """The dense mask in the place of our kernel, for the arm that has it."""
    own = thoughts_attention.thought_attention
    if arm == "phases_dense":
        thoughts_attention.thought_attention = DenseAttention()
    try:
        yield
    finally:
        thoughts_attention.thought_attention = own


def measure(bench: Bench, arm: str, cell: tuple[int, int, int], rows: int, branch: int) -> dict[str, Any]:
    """Time and memory of one arm on one cell with so many rows."""
    device, options = bench.device, bench.options
    tidy(device)
    before = held(device)
    with attention_of(arm):
        step = bench.step(arm, cell, rows, branch)
        found: dict[str, Any] = {"first_ms": round(elapsed_ms(step, device), 1)}
        if found["first_ms"] > 1e3 * options.patience_seconds:
            return {**found, "not_available": f"the first step took {found['first_ms'] / 1e3:.0f} s"}
        kept = held(device)
        sums, peak = peak_of(step, device)
        if peak is not None and before is not None and kept is not None:
            # what the arm keeps from step to step, and what its captured graphs keep to themselves
            found["graph_bytes"] = idle(device) if arm in GRAPH_ARMS else 0
            peak += kept - before + found["graph_bytes"]
            found["total_peak_bytes"] = before + peak
        found["peak_bytes"] = peak
        times = time_steps(step, device, 20, options.seconds)
        found["step_ms"] = times.rounded()
        found["tokens_per_second"] = round(1e3 * rows * cell[0] / times.median, 1)
    if sums is not None:
        means = stats.summarise(sums)
        found |= {name: means[name] for name in ("rollout_kl", "rollout_dlogp") if name in means}
    for parameter in bench.trained():
        parameter.grad = None
    return found


def cells_of(options: argparse.Namespace) -> list[str]:
    return options.cells or (TINY_CELLS if options.tiny else CELLS)


def collect(bench: Bench, report: dict[str, Any]) -> None:
    """All arms on all cells; an arm that runs out of memory starts no larger number of rows."""
    options, began = bench.options, time.perf_counter()
    for text in cells_of(options):
        for arm in options.arms:
            for branch in (0,) if arm in WHOLE_ARMS else options.branch_tokens:
                for rows in options.rows:
                    if time.perf_counter() - began > options.budget_seconds:
                        say("the budget is spent; what is missing was not measured")
                        return
                    if not one(bench, report, (text, arm, branch, rows)):
                        break


def one(bench: Bench, report: dict[str, Any], where: tuple[str, str, int, int]) -> bool:
    """Measure and write one cell, arm, chunk and number of rows; whether it could be."""
    text, arm, branch, rows = where
    cell: Any = tuple(int(x) for x in text.split(":"))
    found = attempt(lambda: measure(bench, arm, cell, rows, branch), bench.device)
    if arm not in LOOP_ARMS:
        found["thought_kv_bytes"] = bench.store_bytes(arm, cell, rows)
    report["results"].append({"cell": text, "arm": arm, "branch_tokens": branch, "rows": rows, **found})
    write(report, bench.options.out)
    reason = why_not(found)
    told = reason or f"{found['tokens_per_second']} tokens/s, {mib(found['peak_bytes'])} MiB"
    say(f"{text} {label(report['results'][-1])} x{rows}", told)
    tidy(bench.device)
    return reason is None


def label(row: dict[str, Any]) -> str:
    """The arm, and its chunk where it has one."""
    return f"{row['arm']} {row['branch_tokens']:,}" if row["branch_tokens"] else str(row["arm"])


def table(report: dict[str, Any]) -> str:
    """One section a cell: memory at the fewest rows, the best rate, both against the loop's."""
    lines = []
    for cell in dict.fromkeys(r["cell"] for r in report["results"]):
        lines += [
            f"\n### L:T:S = {cell}\n",
            "|arm|rows|MiB beyond weights|of loop|step ms (p20-p80)|best tokens/s|at rows|of loop|thought KV MiB|KL a token|",
            "|-|-|-|-|-|-|-|-|-|-|",
        ]
        rows = [r for r in report["results"] if r["cell"] == cell]
        base: dict[str, float | None] = {"peak": None, "rate": None}
        for arm in dict.fromkeys(label(r) for r in rows):
            good = [r for r in rows if label(r) == arm and why_not(r) is None]
            if not good:
                lines.append(f"|{arm}|{why_not(next(r for r in rows if label(r) == arm))}|" + "|" * 8)
                continue
            first, best = good[0], max(good, key=lambda r: r["tokens_per_second"])
            if arm == "loop":
                base = {"peak": first["peak_bytes"], "rate": best["tokens_per_second"]}
            less = f"{base['peak'] / first['peak_bytes']:.1f}x less" if base["peak"] and first["peak_bytes"] else "-"
            more = f"{best['tokens_per_second'] / base['rate']:.1f}x" if base["rate"] else "-"
            t = first["step_ms"]
            kl = f"{first['rollout_kl']:.1e}" if "rollout_kl" in first else "-"
            lines.append(
                f"|{arm}|{first['rows']}|{mib(first['peak_bytes'])}|{less}|{t['median']:.0f} ({t['p20']:.0f}-{t['p80']:.0f})|"
                f"{best['tokens_per_second']:,.0f}|{best['rows']}|{more}|{mib(first.get('thought_kv_bytes'))}|{kl}|"
            )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", help="L:T:S")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--rows", nargs="+", type=int, default=None, help="rows of a micro-batch, ascending")
    parser.add_argument("--ahead", type=int, default=4, help="J, true tokens scored after a thought")
    parser.add_argument(
        "--branch-tokens", nargs="+", type=int, default=[32768],
        help="branch positions of a chunk, over all rows; 0: all at once",
    )  # fmt: skip
    parser.add_argument("--budget-seconds", type=float, default=1e9, help="nothing is started after so long")
    parser.add_argument(
        "--estimate", nargs="+", type=int, metavar="BRANCH_TOKENS",
        help="only estimate memory, in chunks of so many branch positions each; 0: all at once",
    )  # fmt: skip
    parser.add_argument("--train", choices=["full", "head"], default="full", help="the model's parameters too, or not")
    parser.add_argument("--seconds", type=float, default=4.0, help="timed steps of an arm take no longer")
    parser.add_argument("--patience-seconds", type=float, default=20.0, help="an arm with a slower first step is left")
    parser.add_argument("--model", help="folder of a Hugging Face causal LM")
    parser.add_argument("--text", help="text file to train on; needs --model")
    parser.add_argument("--tiny", action="store_true", help="a 2-layer model; runs on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("thoughts_memory.json"))
    options = parser.parse_args()
    options.rows = options.rows or ([1, 2] if options.tiny else [1, 4, 16])
    return options


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    warnings.filterwarnings("error", message="QG-THT-007")  # an arm that went on uncaptured is not that arm
    report: dict[str, Any] = {
        **about(device), "model": options.model or ("tiny" if options.tiny else "SmolLM2-135M's shape, random weights"),
        "train": options.train, "ahead": options.ahead,
    }  # fmt: skip
    if options.estimate:
        report |= {"estimate": "of a step in bf16 on a GPU, traced on a CPU without numbers", "results": []}
        estimate_all(options, cells_of(options), report)
        print(estimate_table(report))
        return
    report |= {"branch_tokens": options.branch_tokens, "gate": small_gate(device), "results": []}
    say(report["hardware"], report["versions"], "gate:", report["gate"])
    write(report, options.out)
    if not is_green(report["gate"]):
        raise SystemExit("loop and thoughts/ differ: nothing is timed")
    if set(options.arms) & set(CAPTURED_ARMS):
        report["captured_gate"] = attempt(lambda: captured_gate(device), device)
        say("captured:", report["captured_gate"])
        if why_not(report["captured_gate"]) or not is_green(report["captured_gate"]):
            say("what is captured differs from the loop: none of it is timed")
            options.arms = [arm for arm in options.arms if arm not in CAPTURED_ARMS]
    bench = Bench(options)
    report["weight_bytes"] = weight_bytes(bench.model)
    collect(bench, report)
    print(table(report))


if __name__ == "__main__":
    main()
