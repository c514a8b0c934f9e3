"""Models of random weights, packed rows and the engine's real steps: what training.py and scaling.py measure."""

from __future__ import annotations

import gc
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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
from transformers import LlamaConfig, LlamaForCausalLM

WARM_UP = 4
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
    smollm2 = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True,
    )  # fmt: skip
    llama3 = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0,
    )  # fmt: skip
    return {"smollm2": Shape("smollm2", smollm2, 512, 80), "llama3": Shape("llama3", llama3, 2048, 512)}


def build(shape: Shape, device: torch.device, attention: str = "sdpa") -> LlamaForCausalLM:
    """Random weights, bf16 on a GPU, made where they are needed."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    shape.config._attn_implementation = attention
    try:
        with torch.device(device):
            return LlamaForCausalLM(shape.config).requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


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
        tidy()


def tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Callable[[], Any], seconds: float = 4.0, most: int = 40) -> dict[str, float]:
    """Milliseconds a step over blocks of four steps that the device is waited for after: median, p20, p80; peak GiB. Steps
    run for about `seconds`. The first call compiles; its time is told apart."""
    begin = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    wait()
    one_block = (time.perf_counter() - begin) * 4 / WARM_UP
    blocks = broadcast(min(max(3, int(seconds / one_block)), most // 4))  # all processes take equally many steps
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    for _ in range(blocks):
        start = time.perf_counter()
        for _ in range(4):
            step()
        wait()
        times.append((time.perf_counter() - start) / 4)
    cuts = statistics.quantiles(times, n=5)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")
    return {
        "ms": round(1e3 * statistics.median(times), 2), "p20": round(1e3 * cuts[0], 2), "p80": round(1e3 * cuts[-1], 2),
        "steps": 4 * len(times), "first_seconds": round(first, 1), "peak_gib": round(peak, 2),
    }  # fmt: skip


def matmul_peak(size: int = 8192) -> float:
    """TFLOP/s of bf16 products of square matrices, best of ten: what the hardware does at most here."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for turn in range(13):
        wait()
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        wait()
        if turn > 2:
            best = max(best, 10 * 2 * size**3 / (time.perf_counter() - start) / 1e12)
    return best
