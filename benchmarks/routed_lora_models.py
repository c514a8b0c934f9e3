"""Whole models for benchmarks/routed_lora.py: base, routed and PEFT's, as eager calls, compiled and as CUDA graphs."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from kv_cache_measure import build, llama3_8b, tiny
from quietgoose.cache.decode_fuse import call_layer, decoder_layers, replaced
from quietgoose.routing.expert import Expert, ExpertCard, SiteAdapter
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.sites import all_sites
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

RANK = 16


def smollm2(layers: int = 30) -> LlamaConfig:
    """SmolLM2-135M."""
    return LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip


def make_model(shape: str, layers: int | None, device: torch.device) -> Any:
    """Random bf16 weights; llama3-8b with few layers (its head and embeddings stay whole)."""
    if shape == "tiny":
        return build(tiny(), device, torch.bfloat16)
    config = smollm2(layers or 30) if shape == "smollm2" else llama3_8b(layers or 4)
    return build(config, device, torch.bfloat16)


def make_library(model: nn.Module, count: int) -> ExpertLibrary:
    """Random experts of rank 16 on all linears with random gates: every token's choice is its own."""
    experts = []
    sites = all_sites(model)
    device = next(model.parameters()).device
    g = torch.Generator(device).manual_seed(1)
    for number in range(count):
        adapters, gates = {}, {}
        for site in sites:
            a = torch.randn(RANK, site.in_features, generator=g, device=device, dtype=torch.bfloat16)
            b = torch.randn(site.out_features, RANK, generator=g, device=device, dtype=torch.bfloat16)
            adapters[site.name] = SiteAdapter(a.mul_(site.in_features**-0.5), b.mul_(0.01), 1.0)
            gates[site.name] = torch.randn(site.in_features, generator=g, device=device)
        card = ExpertCard(f"expert{number}", RANK, float(RANK), ("all-linear",))
        experts.append(Expert(card, adapters, gates))
    return ExpertLibrary(experts)


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Inside, all decoder layers run one compiled code (regional compilation: seconds, not minutes)."""
    torch._dynamo.reset()
    traced = torch.compile(call_layer, fullgraph=True, dynamic=False)
    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(replaced(layer, traced))
        yield


def captured(work: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of `work` as a callable; raises what capture raises."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay(graph: torch.cuda.CUDAGraph = graph) -> None:
        graph.replay()

    return replay


def median_ms(work: Callable[[], Any], seconds: float = 0.5, least: int = 5, most: int = 200) -> dict[str, float]:
    """Median, p20 and p80 of consecutive calls by CUDA events."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    count = int(max(least, min(most, 1e3 * seconds / max(start.elapsed_time(end), 1e-3))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    at = [times[round(q * (count - 1))] for q in (0.5, 0.2, 0.8)]
    return {"ms": round(at[0], 4), "p20": round(at[1], 4), "p80": round(at[2], 4)}


def without_mask(model: Any) -> Any:
    """SDPA's own causal flag in every mode. (While a stream is captured transformers builds a mask tensor, which forbids
    the flash kernel and makes compiled layers compile again inside the capture.)"""
    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    model.config._attn_implementation = "sdpa_without_mask"
    return model


def tokens_of(model: Any, rows: int, length: int) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=g).to(next(model.parameters()).device)


def forward(model: Any, ids: Tensor) -> Callable[[], Any]:
    """One forward over all tokens with all logits, no cache."""

    def work() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    return work


def peft_single(model: Any) -> Any:
    """PEFT's LoRA with one expert on all linears."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")).eval()


def peft_arrow(model: Any, count: int, k: int) -> Any:
    """PEFT's Arrow over `count` adapters saved by PEFT itself."""
    from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model

    folder = Path(tempfile.mkdtemp(prefix="arrow"))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    peer = get_peft_model(model, config)
    paths = []
    for number in range(count):
        peer.save_pretrained(str(folder / f"e{number}"))
        paths.append(str(folder / f"e{number}"))
    plain = peer.unload()
    return create_arrow_model(
        base_model=plain, task_specific_adapter_paths=paths, arrow_config=ArrowConfig(top_k=k)
    ).eval()


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
