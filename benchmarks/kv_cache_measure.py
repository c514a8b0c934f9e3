"""Models of random weights, clocks, and the limit that bytes set: the instruments of the KV benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

START = time.perf_counter()


def say(*words: Any) -> None:
    """One line of progress with the seconds since the start."""
    print(f"[{time.perf_counter() - START:7.1f} s]", *words, flush=True)


def llama3_8b(layers: int = 32) -> LlamaConfig:
    """The shape of LLaMA3-8B; `layers` fewer for a smaller card."""
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072 + 1024, rope_theta=500000.0,
    )  # fmt: skip


def tiny() -> LlamaConfig:
    """Same family and group structure, small: for CPU tests and for the correctness gate."""
    return LlamaConfig(
        hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=509, max_position_embeddings=4096, initializer_range=0.1,
    )  # fmt: skip


def build(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """Random weights made where and as they are needed; 16 GB for the 8B shape in bf16."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


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


def elapsed_ms(work: Callable[[], Any], device: torch.device) -> float:
    """One call, host clock, device drained before and after."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return 1e3 * (time.perf_counter() - start)


def time_steps(step: Callable[[], Any], device: torch.device, most: int, seconds: float) -> Times:
    """Up to `most` consecutive steps without a wait between them, fewer if they would take more than `seconds`."""
    once = min(elapsed_ms(step, device) for _ in range(2))
    count = int(max(3, min(most, 1e3 * seconds / max(once, 1e-3))))
    clock = Clock(device)
    clock.stamp()
    for _ in range(count):
        step()
        clock.stamp()
    return Times.of(clock.intervals())


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large device copy, read plus written; the ceiling everything is measured against."""
    count = 2**30 if device.type == "cuda" else 2**24
    source = torch.empty(count, dtype=torch.uint8, device=device).random_(256)
    target = torch.empty_like(source)
    times = time_steps(lambda: target.copy_(source), device, 40, 2.0)
    return 2 * count / (times.median / 1e3)


def weight_bytes(model: Any) -> int:
    """Bytes of the parameters that one decode step reads: all but the table of input embeddings (a row a token)."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    return total if head is table else total - table.numel() * table.element_size()


def numbers_cached(config: Any, rows: int, tokens: int) -> int:
    """Keys and values of all layers, counted in numbers."""
    text = config.get_text_config(decoder=True)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * rows * text.num_key_value_heads * width * tokens
