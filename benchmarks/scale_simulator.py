"""Time and memory of training many experts on many GPUs, from one GPU's measured cost and the links between them.

    python benchmarks/scale_simulator.py                                              # tables on stdout
    python benchmarks/scale_simulator.py --training T.json --scaling S.json --into docs/scale.md

Measured numbers come from the JSON of training.py and scaling.py; what they do not hold is taken from SOURCES and marked so in
the first table. The tables replace what stands between the two marks in the file named by --into. Nothing here runs a model.

A step's time is max(products, base gathered) + optimiser + collectives: nothing is overlapped but ZeRO-3's gathering of the
base. See docs/scale.md for what each term is.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quietgoose.train.parallel import gathered_again, ring_bytes
from training_cases import Shape, shapes
from transformers import LlamaConfig

MARK, END = "<!-- simulated -->", "<!-- end of simulated -->"
GIB = 2**30
STATE_BYTES = {"data:zero0": (16, 0), "data:zero2": (8, 16), "data:zero3": (8, 16), "expert:zero0": (16, 0)}
"""Bytes a trained entry: held by every process that trains it, and divided over the processes (train/plan.py). An expert is read
whole and its gradient is whole when backward ends, so weight and gradient are whole at that moment whatever the stage."""
REUSE, PREFETCH = 1_000_000_000, 50_000_000
"""Entries: stage3_max_reuse_distance and stage3_prefetch_bucket_size of train/strategy.py."""
STEP_BYTES = 28 + 52
"""Bytes of memory traffic a trained entry and step: AdamW reads 16 and writes 12; gathering rows' vectors, their gradients,
clipping and norms pass over it about thirteen times in fp32."""
KEPT_BYTES = 34
"""Bytes a token, layer and unit of width that a forward keeps (Korthikanti et al. 2022, eq. 2, fused attention)."""


@dataclass(frozen=True)
class Machine:
    """One kind of GPU and its links. `share`: model FLOPs of training as a share of `matmul`, by base."""

    matmul: float = 790e12
    memory: float = 3.0e12
    capacity: float = 78 * GIB
    host: float = 370e9
    network: float = 45e9
    per_host: int = 8
    share_small: float = 0.075
    share_large: float = 0.40

    def link(self, gpus: int) -> float:
        """Bytes a second that a process can send in a ring of `gpus`: a ring is as fast as its slowest link."""
        return self.host if gpus <= self.per_host else self.network

    def share(self, shape: Shape) -> float:
        return self.share_small if shape.config.hidden_size < 2048 else self.share_large


SOURCES = {
    "matmul": ("bf16 matmul, TFLOP/s", 1e12, "measured 2026-11 (phatgoose.md section 4 used the same)"),
    "memory": ("device memory, TB/s", 1e12, "measured 2026-11, copy"),
    "capacity": ("memory a GPU, GiB", GIB, "datasheet less the driver's"),
    "host": ("link in a host, GB/s a process", 1e9, "assumed: 82 % of NVLink 4's 450"),
    "network": ("link between hosts, GB/s a process", 1e9, "assumed: 90 % of one 400 Gb/s port a GPU"),
    "share_small": (
        "training, share of the matmul rate, SmolLM2",
        1.0,
        "measured 2026-11-24, eager, 12 experts, 48 rows",
    ),
    "share_large": ("the same, LLaMA3-8B and 70B shapes", 1.0, "assumed: the aim of 40 %"),
}
"""Field -> (what, unit, where the default comes from)."""


@dataclass(frozen=True)
class Plan:
    """Training `experts` LoRA experts of rank 16 on all linears; `tokens` of each in steps of `step_tokens` of each."""

    shape: Shape
    experts: int
    tokens: float = 2e6
    step_tokens: int = 8192
    micro_tokens: int = 24_576


@dataclass(frozen=True)
class Estimate:
    seconds: float
    memory: float
    waves: int
    sent: float
    share_lost: float
    """Share of the time that is not products."""


def llama(name: str, hidden: int, mlp: int, layers: int, heads: int) -> Shape:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    return Shape(name, config, 2048, 512)


def bases() -> dict[str, Shape]:
    return {
        "135M": replace(shapes()["smollm2"], name="135M"),
        "8B": llama("8B", 4096, 14336, 32, 32),
        "70B": llama("70B", 8192, 28672, 80, 64),
    }


def base_bytes(shape: Shape) -> float:
    """The frozen base in bf16, embedding and head included (one if tied)."""
    tables = 1 if shape.config.tie_word_embeddings else 2
    return 2.0 * (shape.linears + tables * shape.config.vocab_size * shape.config.hidden_size)


def estimate(machine: Machine, plan: Plan, gpus: int, arm: str) -> Estimate | None:
    """None if it does not fit."""
    parallel = arm.partition(":")[0]
    shape, stage = plan.shape, int(arm[-1])
    users = min(gpus, plan.experts) if parallel == "expert" else gpus
    frozen = base_bytes(shape) / (gpus if stage == 3 else 1)
    gathered = _live(shape) if stage == 3 else 0.0
    kept = float(KEPT_BYTES) * shape.config.num_hidden_layers * shape.config.hidden_size
    micro = plan.micro_tokens
    free = machine.capacity - frozen - gathered
    while micro > 2048 and kept * micro > free / 2:
        micro //= 2  # smaller micro-batches before fewer experts at once
    free -= kept * micro + 4 * GIB  # workspaces, logits, fragments
    whole, divided = STATE_BYTES[arm]
    one = shape.lora * (whole + divided / gpus) + 2 * 2 * shape.lora  # and the rows' vectors and gradients in bf16
    mine = math.ceil(plan.experts / users) if parallel == "expert" else plan.experts
    at_once = min(mine, int(free // one))
    if at_once < 1:
        return None
    waves = math.ceil(mine / at_once)
    at_once = math.ceil(mine / waves)
    steps = plan.tokens / plan.step_tokens * mine / at_once
    tokens = at_once * plan.step_tokens / (1 if parallel == "expert" else gpus)
    products = tokens * shape.flops / (machine.share(shape) * machine.matmul)
    passes = math.ceil(tokens / micro)
    trained = at_once * shape.lora
    base_sent, sent = _sent(shape, trained, gpus, passes, stage) if parallel == "data" else (0.0, 0.0)
    local = at_once * shape.lora / (gpus if parallel == "data" and stage else 1)
    optimiser = local * STEP_BYTES / machine.memory
    messages = sent / machine.link(gpus) + 2e-5 * math.log2(max(gpus, 2))
    seconds = max(products, base_sent / machine.link(gpus)) + optimiser + messages
    return Estimate(
        steps * seconds, machine.capacity - free - 4 * GIB + at_once * one, waves, sent + base_sent, 1 - products / seconds,
    )  # fmt: skip


def _live(shape: Shape) -> float:
    """Bytes of the base that ZeRO-3 holds gathered at its fullest, when forward turns into backward: what lies within reach of
    its reuse, what it fetches ahead, and a layer."""
    within = 2 * (REUSE / 2 + PREFETCH) + base_bytes(shape) / shape.config.num_hidden_layers
    return min(base_bytes(shape), within)


def _sent(shape: Shape, trained: int, gpus: int, passes: int, stage: int) -> tuple[float, float]:
    """Bytes a process sends in a step of `passes` micro-batches: for the base, and for what is trained (train/parallel.py)."""
    if stage < 3:
        return 0.0, float(ring_bytes(trained, gpus, stage))
    share, entries = (gpus - 1) / gpus, base_bytes(shape) / 2
    of_base = passes * (1 + gathered_again(0, entries, REUSE)) * base_bytes(shape)
    # gathered before the base, again after it if that is far, and scattered: zero3_bytes with nothing small
    of_trained = passes * (2 + gathered_again(entries, reuse=REUSE)) * 4.0 * trained
    return share * of_base, share * of_trained


def measured(training: Path | None, scaling: Path | None) -> tuple[Machine, dict[str, str]]:
    """The machine, with what the files hold instead of the defaults, and where each number comes from."""
    machine, notes = Machine(), {name: note for name, (_, _, note) in SOURCES.items()}
    found: dict[str, tuple[float, str]] = {}
    for line in _lines(training):
        if line.get("what") == "bf16 matmul peak":
            found["matmul"] = (line["tflops"] * 1e12, f"measured, {line['hardware']}")
    matmul = found.get("matmul", (machine.matmul, ""))[0]
    for arm, field in (("ours", "share_small"), ("llama3", "share_large")):
        rates = [x for x in _lines(training) if x.get("arm") == arm and x.get("kind") == "experts" and x["experts"] > 1]
        rates = [x for x in rates if math.isfinite(x.get("tflops", math.nan)) and x["tflops"] > 0]  # --tiny rounds to 0
        if rates:
            best = max(rates, key=lambda line: line["tflops"])
            found[field] = (
                best["tflops"] * 1e12 / matmul,
                f"measured, {best['what']}, {best['rows']} rows, {best['hardware']}",
            )
    links = [line for line in _lines(scaling) if line.get("what") == "link" and line["gigabytes_per_second"] > 0]
    if links:
        worst = min(links, key=lambda line: line["gigabytes_per_second"])
        found["host"] = (worst["gigabytes_per_second"] * 1e9, f"measured, all-reduce over {worst['gpus']} GPUs")
    for field, (value, note) in found.items():
        machine, notes[field] = replace(machine, **{field: value}), note
    return machine, notes


def _lines(path: Path | None) -> list[dict[str, Any]]:
    return [] if path is None else json.loads(path.read_text())["lines"]


def tables(machine: Machine, notes: dict[str, str], scaling: Path | None) -> Iterator[str]:
    yield "### What it starts from"
    rows = [(what, f"{getattr(machine, field) / unit:.3g}", notes[field]) for field, (what, unit, _) in SOURCES.items()]
    yield _table(("quantity", "value", "source"), rows)
    checks = list(_checks(machine, scaling))
    if checks:
        yield "### Checked against measured steps (SmolLM2 shape, 12 experts)"
        yield _table(("arm", "GPUs", "measured, times one GPU", "simulated", "sent, formula"), checks)
    yield "### Time to train all experts, 2 million tokens each"
    header = ("base", "experts", "how", *(f"{n} GPUs" for n in (8, 64, 512)))
    rows = []
    for shape in bases().values():
        for experts in (16, 166, 1000):
            for arm in ("data:zero2", "data:zero3", "expert:zero0"):
                cells = [_cell(estimate(machine, Plan(shape, experts), gpus, arm)) for gpus in (8, 64, 512)]
                if any(cell != "does not fit" for cell in cells):
                    rows.append((shape.name, str(experts), arm, *cells))
    yield _table(header, rows)
    yield (
        "Hours or minutes; GiB a GPU; `x2` two rounds, because the state of all experts does not fit at once; the last number is the "
        "share of the time that is not products."
    )


def _checks(machine: Machine, scaling: Path | None) -> Iterator[Sequence[str]]:
    lines = [line for line in _lines(scaling) if "tokens_per_second" in line]
    ones = {line["what"]: line["tokens_per_second"] for line in lines if line["gpus"] == 1}
    for line in lines:
        if line["gpus"] == 1 or line["what"] not in STATE_BYTES or line["what"] not in ones:
            continue
        plan = Plan(bases()["135M"], 12, step_tokens=4 * 512 * line["gpus"])
        single = estimate(machine, replace(plan, step_tokens=4 * 512), 1, line["what"])
        many = estimate(machine, plan, line["gpus"], line["what"])
        if single is None or many is None:
            continue
        yield (
            line["what"], str(line["gpus"]), f"{line['tokens_per_second'] / ones[line['what']]:.2f}",
            f"{single.seconds / many.seconds:.2f}", f"{line['sent_bytes']:,}, {line['formula_bytes']:,}",
        )  # fmt: skip


def _cell(found: Estimate | None) -> str:
    if found is None:
        return "does not fit"
    hours = found.seconds / 3600
    time = f"{hours:.1f} h" if hours >= 2 else f"{60 * hours:.2g} min"
    rounds = f" x{found.waves}" if found.waves > 1 else ""
    return f"{time}{rounds}, {found.memory / GIB:.0f} GiB, {100 * found.share_lost:.0f} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(row) for row in (header, ["-"] * len(header), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", type=Path)
    parser.add_argument("--scaling", type=Path)
    parser.add_argument("--into", type=Path)
    options = parser.parse_args()
    machine, notes = measured(options.training, options.scaling)
    text = "\n\n".join(tables(machine, notes, options.scaling))
    if options.into is None:
        print(text)
        return
    before, _, rest = options.into.read_text().partition(MARK)
    after = rest.partition(END)[2]
    options.into.write_text(f"{before}{MARK}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
