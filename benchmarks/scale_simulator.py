"""Time and memory of training many experts on many GPUs, from one GPU's measured cost and the links between them.

    python benchmarks/scale_simulator.py                                  # tables on stdout, from the files named in MEASURED
    python benchmarks/scale_simulator.py --into docs/scale.md             # the tables between the two marks of that page
    python benchmarks/scale_simulator.py --training T.json --scaling S.json --into docs/scale.md     # with newer measurements

Every measured number comes from JSON of training.py and scaling.py: MEASURED (scale_measured.py) names the files, --training and
--scaling take their place as far as they hold a number (a later file before an earlier one). The first table says where each comes
from, the assumed ones too. Nothing here runs a model.

A step is max(products, gathering the base, host) + optimiser + collectives. docs/scale.md says what each term is.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from quietgoose.train.parallel import gathered_again, ring_bytes
from quietgoose.train.plan import activation_bytes
from quietgoose.train.state_memory import Trained, held
from quietgoose.train.strategy import load_strategy
from scale_measured import (
    ADAM_BYTES,
    EXPERTS_TIMED,
    FIELDS,
    GIB,
    MEASURED,
    RESULTS,
    WHOLE_BYTES,
    Machine,
    lines_of,
    measured,
    standard,
)
from training_cases import Shape, shapes
from transformers import LlamaConfig

MARK, END = "<!-- simulated -->", "<!-- end of simulated -->"
ARMS = ("data:zero0", "data:zero1", "data:zero2", "data:zero3", "expert:zero0")
REUSE = 1_000_000_000
"""Entries: stage3_max_reuse_distance of train/strategy.py."""
WORKSPACE = 3 * GIB
ROW_BYTES = 4
"""Bytes a trained entry of the rows' vectors and their gradients in bf16."""


@dataclass(frozen=True)
class Plan:
    """Training `experts` LoRA experts of rank 16 on all linears; `tokens` of each in steps of `step_tokens` of each."""

    shape: Shape
    experts: int
    tokens: float = 2e6
    step_tokens: int = 8192
    micro_tokens: int = 24_576
    recomputed: bool = False


@dataclass(frozen=True)
class Estimate:
    seconds: float
    memory: float
    waves: int
    sent: float
    share_lost: float
    """Share of the time that is not products."""
    step: float = 0.0
    """Seconds of a step of the experts trained at once."""
    recomputed: bool = False


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


def flops(plan: Plan) -> float:
    """Model FLOPs of a token, and those of a second forward pass through the layers where it is recomputed."""
    return plan.shape.flops + (2 * (plan.shape.linears + plan.shape.lora) if plan.recomputed else 0)


def best(machine: Machine, plan: Plan, gpus: int, arm: str) -> Estimate | None:
    """The faster of keeping activations and recomputing them, of those that fit."""
    found = [estimate(machine, replace(plan, recomputed=again), gpus, arm) for again in (False, True)]
    return min((one for one in found if one is not None), key=lambda one: one.seconds, default=None)


def estimate(machine: Machine, plan: Plan, gpus: int, arm: str) -> Estimate | None:
    """None if it does not fit."""
    parallel = arm.partition(":")[0]
    shape, stage = plan.shape, int(arm[-1])
    users = min(gpus, plan.experts) if parallel == "expert" else gpus
    sharing = 1 if parallel == "expert" else gpus
    mine = math.ceil(plan.experts / users) if parallel == "expert" else plan.experts
    micro = _micro_tokens(machine, plan, gpus, arm)

    def memory(experts: int) -> float:
        passes = math.ceil(experts * plan.step_tokens / sharing / micro)
        return _memory(plan, experts, passes, min(micro, experts * plan.step_tokens // sharing), sharing, stage)

    at_once = _most(mine, lambda experts: memory(experts) <= machine.capacity)
    if at_once < 1:
        return None
    waves = math.ceil(mine / at_once)
    at_once = math.ceil(mine / waves)
    tokens = at_once * plan.step_tokens / sharing
    passes = math.ceil(tokens / micro)
    layers = passes * shape.config.num_hidden_layers
    products = tokens * flops(plan) / (machine.share(shape) * machine.matmul) + layers * machine.floor
    trained = at_once * shape.lora
    base_sent, sent = _sent(shape, trained, gpus, passes, stage) if parallel == "data" else (0.0, 0.0)
    busy = max(products, base_sent / machine.link(gpus), layers * machine.hooks if stage == 3 else 0.0)
    messages = sent / machine.link(gpus) + 2e-5 * math.log2(max(gpus, 2))
    step = busy + _optimiser(machine, trained, sharing if stage else 1) + messages
    steps = plan.tokens / plan.step_tokens * mine / at_once
    return Estimate(
        steps * step, memory(at_once), waves, sent + base_sent, 1 - products / step, step, plan.recomputed
    )  # fmt: skip


def _optimiser(machine: Machine, trained: float, parts: int) -> float:
    return trained * (ADAM_BYTES / parts + WHOLE_BYTES) / machine.memory


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits; what is larger needs more."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _active(plan: Plan, tokens: float) -> int:
    config = plan.shape.config
    return activation_bytes(int(tokens), config.num_hidden_layers, config.hidden_size, 2, plan.recomputed)


def _micro_tokens(machine: Machine, plan: Plan, gpus: int, arm: str) -> int:
    """Tokens of a micro-batch: halved, rather than fewer experts at once, until activations take half of what is left."""
    frozen = base_bytes(plan.shape) / (gpus if arm[-1] == "3" else 1)
    micro = plan.micro_tokens
    while micro > 2048 and _active(plan, micro) > (machine.capacity - frozen) / 2:
        micro //= 2
    return micro


@cache
def _strategy(stage: int) -> Any:
    return load_strategy(f"zero{stage}")


def _memory(plan: Plan, experts: int, passes: int, tokens: int, sharing: int, stage: int) -> float:
    """Bytes of a process at its peak: what DeepSpeed holds (train/state_memory.py), activations, and workspaces."""
    trained = experts * plan.shape.lora
    state = Trained(trained, int(base_bytes(plan.shape)), long=True, micros=passes, recomputed=plan.recomputed)
    return held(state, _strategy(stage), sharing).peak(_active(plan, tokens)) + ROW_BYTES * trained + WORKSPACE


def _sent(shape: Shape, trained: int, gpus: int, passes: int, stage: int) -> tuple[float, float]:
    """Bytes a process sends in a step of `passes` micro-batches: for the base, and for what is trained (train/parallel.py)."""
    if stage < 3:
        return 0.0, float(ring_bytes(trained, gpus, stage))
    share, entries = (gpus - 1) / gpus, base_bytes(shape) / 2
    of_base = passes * (1 + gathered_again(0, entries, REUSE)) * base_bytes(shape)
    # gathered before the base, again after it if that is far, and scattered: zero3_bytes with nothing small
    of_trained = passes * (2 + gathered_again(entries, reuse=REUSE)) * 4.0 * trained
    return share * of_base, share * of_trained


def tables(machine: Machine, notes: dict[str, str], scaling: Path | None = None) -> Iterator[str]:
    yield "### What it starts from"
    rows = [(what, f"{getattr(machine, field) / unit:.3g}", notes[field]) for field, (what, unit) in FIELDS.items()]
    yield _table(("quantity", "value", "source"), rows)
    path = scaling or RESULTS / MEASURED["scaling"]
    if checks := list(_checks(machine, path)):
        yield f"### Checked against measured steps (SmolLM2 shape, {EXPERTS_TIMED} experts)"
        yield _table(
            (
                "arm",
                "GPUs",
                "step, ms",
                "simulated",
                "times one GPU",
                "simulated",
                "GiB reserved",
                "simulated",
                "sent",
                "formula",
            ),
            checks,
        )
        yield f"Measured: {path.name}."
    yield "### Time to train all experts, 2 million tokens each"
    header = ("base", "experts", "how", *(f"{n} GPUs" for n in (8, 64, 512)))
    rows = []
    for shape in bases().values():
        for experts in (16, 166, 1000):
            for arm in ("data:zero2", "data:zero3", "expert:zero0"):
                cells = [_cell(best(machine, Plan(shape, experts), gpus, arm)) for gpus in (8, 64, 512)]
                if any(cell != "does not fit" for cell in cells):
                    rows.append((shape.name, str(experts), arm, *cells))
    yield _table(header, rows)
    yield (
        "Hours or minutes; GiB a GPU; `x2` two rounds, because the state of all experts does not fit at once; the last number is the "
        "share of the time that is not products; `r`: activations are recomputed (`train.activation_checkpointing`), which was faster "
        "or all that fits."
    )


def _checks(machine: Machine, scaling: Path) -> Iterator[Sequence[str]]:
    lines = [line for line in lines_of(scaling) if line["what"] in ARMS and standard(line)]
    ones = {line["what"]: line["tokens_per_second"] for line in lines if line["gpus"] == 1}
    for line in lines:
        gpus, arm = line["gpus"], line["what"]
        plan = Plan(bases()["135M"], EXPERTS_TIMED, step_tokens=4 * 512 * gpus)
        single, many = estimate(machine, replace(plan, step_tokens=4 * 512), 1, arm), estimate(machine, plan, gpus, arm)
        if single is None or many is None or arm not in ones:
            continue
        yield (
            arm, str(gpus), f"{line['ms']:.1f}", f"{1e3 * many.step:.1f}", f"{line['tokens_per_second'] / ones[arm]:.2f}",
            f"{single.seconds / many.seconds:.2f}", f"{line['reserved_gib']:.1f}", f"{many.memory / GIB:.1f}",
            f"{line['sent_bytes']:,}", f"{line['formula_bytes']:,}",
        )  # fmt: skip


def _cell(found: Estimate | None) -> str:
    if found is None:
        return "does not fit"
    hours = found.seconds / 3600
    time = f"{hours:.1f} h" if hours >= 2 else f"{60 * hours:.2g} min"
    rounds = (f" x{found.waves}" if found.waves > 1 else "") + (" r" if found.recomputed else "")
    return f"{time}{rounds}, {found.memory / GIB:.0f} GiB, {100 * found.share_lost:.0f} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(row) for row in (header, ["-"] * len(header), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", type=Path, nargs="+", default=[])
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
