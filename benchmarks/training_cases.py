"""Models of random weights, packed rows and the engine's real steps: what training.py and scaling.py measure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import random_models
import torch
from measure import Times, elapsed_ms, gib, peak, reset_peak, tidy
from quietgoose.base.distributed import broadcast
from quietgoose.routing.expert import Expert, ExpertCard, SiteAdapter
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.sites import all_sites
from quietgoose.train.compiled import choose_speed
from quietgoose.train.data.loader import StepData
from quietgoose.train.data.packing import IGNORE, PackedExpert
from quietgoose.train.data.rows import RowReport
from quietgoose.train.engine import Engine
from quietgoose.train.jobs.experts import ExpertJob
from quietgoose.train.jobs.gates import GateJob
from quietgoose.train.recipe import ExpertSettings, GateSettings, OptimizerSettings, RowTrainSettings
from quietgoose.train.strategy import load_strategy
from random_models import llama3_8b, smollm2
from transformers import LlamaConfig, LlamaForCausalLM

WARM_UP, BLOCK = 4, 4
RANK = 16


@dataclass(frozen=True)
class Shape:
    """A model, and the rows it is trained on. Documents are `document` tokens long, a label on the last quarter."""

    name: str
    config: LlamaConfig
    length: int
    document: int

    @property
    def linears(self) -> int:
        """Entries of all linears but the head."""
        c = self.config
        head_size = c.hidden_size // c.num_attention_heads
        attention = c.hidden_size * head_size * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
        return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    @property
    def lora(self) -> int:
        """Entries of one expert on all linears."""
        c = self.config
        head_size = c.hidden_size // c.num_attention_heads
        kv = c.num_key_value_heads * head_size
        widths = 2 * 2 * c.hidden_size + 2 * (c.hidden_size + kv) + 3 * (c.hidden_size + c.intermediate_size)
        return RANK * c.num_hidden_layers * widths

    @property
    def flops(self) -> float:
        """Model FLOPs a token of training one expert over a frozen base: 2 a weight forward, 2 backward (no gradient of
        weights), 6 an adapter entry; the head at labels only; attention within documents, half of it masked."""
        c = self.config
        head = 4 * c.hidden_size * c.vocab_size / 4
        attention = 3 * 2 * 2 * (self.document / 2) * c.hidden_size * c.num_hidden_layers
        return 4 * self.linears + 6 * self.lora + head + attention


def shapes(tiny: bool = False) -> dict[str, Shape]:
    if tiny:
        config = LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=256, tie_word_embeddings=True,
        )  # fmt: skip
        return {"smollm2": Shape("smollm2", config, 64, 20), "llama3": Shape("llama3", config, 64, 20)}
    return {"smollm2": Shape("smollm2", smollm2(), 512, 80), "llama3": Shape("llama3", llama3_8b(4), 2048, 512)}


def build(shape: Shape, device: torch.device, attention: str = "sdpa") -> LlamaForCausalLM:
    """Random weights, bf16 on a GPU, as they are trained over."""
    shape.config._attn_implementation = attention
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return random_models.build(shape.config, device, dtype).train()


def packed(shape: Shape, name: str, rows: int, seed: int) -> PackedExpert:
    """One expert's rows, as the packer leaves them."""
    random = np.random.default_rng(seed)
    place = np.arange(shape.length)
    position, segment = place % shape.document, place // shape.document + 1
    tokens = random.integers(3, shape.config.vocab_size, (rows, shape.length), dtype=np.int32)
    labels = random.integers(3, shape.config.vocab_size, (rows, shape.length), dtype=np.int32)
    labels[:, position < shape.document * 3 // 4] = IGNORE
    both = (rows, shape.length)
    return PackedExpert(
        name, tokens, labels, np.broadcast_to(position, both).astype(np.int32),
        np.broadcast_to(segment, both).astype(np.int32), (labels != IGNORE).sum(1), np.full(rows, shape.length),
        rows * int(segment.max()), RowReport(rows),
    )  # fmt: skip


def library(model: LlamaForCausalLM, names: list[str]) -> ExpertLibrary:
    """Random experts of rank 16 on every linear."""
    sites = all_sites(model)
    experts = []
    for number, name in enumerate(names):
        g = torch.Generator().manual_seed(number)
        adapters = {
            s.name: SiteAdapter(
                torch.randn(RANK, s.in_features, generator=g) * s.in_features**-0.5,
                torch.randn(s.out_features, RANK, generator=g) * 0.02, 1.0,
            )
            for s in sites
        }  # fmt: skip
        experts.append(Expert(ExpertCard(name, RANK, float(RANK), ("all-linear",), False), adapters))
    return ExpertLibrary(experts)


@dataclass
class Run:
    """A job under the engine with its data; `step()` is one of the loop's steps, one report behind where it may be."""

    job: Any
    engine: Engine
    data: StepData
    tokens: int
    number: int = 0

    def __post_init__(self) -> None:
        self.waiting: deque[Any] = deque()
        self.last: Any = None

    def step(self) -> None:
        self.waiting.append(self.engine.submit(self.data.step(self.number)))
        self.number += 1
        while len(self.waiting) > self.engine.lag:
            self.last = self.engine.report(self.waiting.popleft())

    def close(self) -> None:
        while self.waiting:
            self.last = self.engine.report(self.waiting.popleft())
        self.data.close()
        self.engine.destroy()


@contextmanager
def running(
    kind: str, shape: Shape, experts: int, rows: int, device: torch.device, strategy: str = "zero2", *,
    micro_rows: int = 0, rank: int = 0, world: int = 1, job_options: dict[str, Any] | None = None, **settings: Any,
) -> Iterator[Run]:  # fmt: skip
    """Experts or gates of `shape` in training, `rows` of each expert a step."""
    torch._dynamo.reset()
    model = build(shape, device)
    names = [f"e{i}" for i in range(experts)]
    train = RowTrainSettings(
        rows_per_expert=rows, micro_rows=micro_rows or rows * experts, strategy=strategy, **settings
    )
    by_expert = train.parallel == "expert"
    packs = [packed(shape, name, 4 * rows, seed) for seed, name in enumerate(names)]
    data = StepData(packs, rows, train.micro_rows, 0, rank, world, 0, by_expert=by_expert)
    speed = choose_speed(model, "sdpa", train, device, strategy)
    more = job_options or {}
    if kind == "experts":
        job: Any = ExpertJob(
            model,
            speed.attention,
            names,
            ExpertSettings(rank=RANK, alpha=float(RANK), train=train),
            0,
            speed.mode,
            **more,
        )
    else:
        job = GateJob(model, speed.attention, library(model, names), GateSettings(train), speed.mode, **more)
    job.to(device)
    engine = Engine(
        job, job.parameter_groups(), OptimizerSettings(lr=1e-3), 10_000, data.micro_count, load_strategy(strategy),
        data.names, device, micro_rows=data.share.rows,
    )  # fmt: skip
    run = Run(job, engine, data, rows * experts * shape.length)
    try:
        yield run
    finally:
        run.close()
        del run, job, engine, model
        tidy(device)


def timed(step: Callable[[], Any], device: torch.device, seconds: float = 4.0, most: int = 40) -> dict[str, Any]:
    """Milliseconds a step over blocks of four steps that the device is waited for after: median, p20, p80; peak GiB. Steps
    run for about `seconds`. The first call compiles; its time is told apart."""
    first = elapsed_ms(step, device)
    one = elapsed_ms(lambda: [step() for _ in range(WARM_UP)], device) / WARM_UP
    # all processes take equally many steps
    blocks = broadcast(min(max(3, int(1e3 * seconds / (BLOCK * one))), most // BLOCK))
    reset_peak(device)
    taken = [elapsed_ms(lambda: [step() for _ in range(BLOCK)], device) / BLOCK for _ in range(blocks)]
    return {
        **Times.of(taken).short(2), "steps": BLOCK * blocks, "first_seconds": round(first / 1e3, 1), "peak_gib": gib(peak(device)),
        "reserved_gib": gib(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else None,
    }  # fmt: skip
