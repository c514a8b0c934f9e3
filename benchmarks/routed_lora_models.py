"""Whole models for benchmarks/routed_lora.py: base, routed and PEFT's, as eager calls, compiled and as CUDA graphs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from quietgoose.cache.decode_fuse import call_layer, decoder_layers, replaced
from quietgoose.routing.expert import Expert, ExpertCard, SiteAdapter
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.sites import all_sites
from random_models import build, llama3_8b, smollm2, tiny
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

RANK = 16


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


def captured(work: Callable[[], Any], warm_up: int = 3) -> Callable[[], Any]:
    """A CUDA graph of `work` as a callable, after `warm_up` calls; raises what capture raises."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay(graph: torch.cuda.CUDAGraph = graph) -> None:
        graph.replay()

    return replay


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
