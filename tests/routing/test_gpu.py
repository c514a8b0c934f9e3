"""On a CUDA device: no host synchronisation in the routed forward, CUDA-graph capture, full-graph Inductor compile."""

from __future__ import annotations

import pytest
import torch
from quietgoose.kernels.routed_lora import formulation
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.model import assign_rows, attach, set_router, state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def on_gpu(model, mixed, tokens):
    return attach(model.to("cuda", torch.bfloat16), mixed), tokens.cuda()


@pytest.mark.parametrize("router", ["phatgoose", "arrow", "random", "uniform", "expert:bee", "oracle"])
def test_no_host_synchronisation(on_gpu, router: str) -> None:
    model, tokens = on_gpu
    set_router(model, router)
    with torch.no_grad(), assign_rows(model, [0, 1, 2]):
        hidden = model.model(tokens, use_cache=False).last_hidden_state
        sites = {
            n: torch.randn(5 * 3, m.in_features, device="cuda").bfloat16() for n, m in state(model).modules.items()
        }
        torch.cuda.set_sync_debug_mode("error")
        try:
            for name, module in state(model).modules.items():
                module(sites[name])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(hidden).all()


@pytest.mark.parametrize("method", ["decode", "fused", "stock", "split", "split_fused", "grouped"])
@pytest.mark.parametrize("training", [False, True])
def test_no_formulation_synchronises(on_gpu, monkeypatch, method: str, training: bool) -> None:
    model, _ = on_gpu
    monkeypatch.setattr("quietgoose.routing.shared.formulation", lambda *_: method)
    monkeypatch.setattr("quietgoose.routing.shared.by_pairs", lambda *_: method == "grouped")
    module = state(model).modules["model.layers.0.self_attn.q_proj"]
    x = torch.randn(60, 24, device="cuda").bfloat16().requires_grad_(training)
    for mode in ("default", "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.set_grad_enabled(training):
                y = module(x)
            if training:
                y.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(y).all()


def test_no_tensor_of_tokens_times_experts_times_outputs(new_model, new_expert) -> None:
    """64 experts, 4,096 tokens: the peak above what stands is far from [T, N, O] and from [T k, O]."""
    model = new_model(hidden_size=128, intermediate_size=512, num_hidden_layers=1)
    library = ExpertLibrary(new_expert(model, f"e{i}", rank=16, targets=("up_proj",)) for i in range(64))
    attach(model.to("cuda", torch.bfloat16), library, k=4)
    module = state(model).modules["model.layers.0.mlp.up_proj"]
    x = torch.randn(4096, 128, device="cuda").bfloat16()
    with torch.no_grad():
        module(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        standing = torch.cuda.memory_allocated()
        module(x)
        peak = torch.cuda.max_memory_allocated() - standing
    output = 4096 * 512 * 2
    assert peak < 2.5 * output


def test_cuda_graph_capture_replays_the_forward(on_gpu) -> None:
    model, _ = on_gpu
    module = state(model).modules["model.layers.0.self_attn.q_proj"]
    x = torch.randn(7, 24, device="cuda").bfloat16()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                module(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        x.copy_(torch.randn(7, 24))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(y, module(x), rtol=2e-2, atol=2e-2)


def test_full_graph_compile_with_inductor(on_gpu) -> None:
    model, tokens = on_gpu
    model = model.float()
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
        got = torch.compile(model, fullgraph=True)(tokens, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_layers_with_sorted_experts_compile(new_model, new_expert) -> None:
    """Seventy experts and 600 tokens: sorted by expert, in 16 bits; what chooses that is traced."""
    model = new_model(hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    library = ExpertLibrary(new_expert(model, f"e{i}", rank=16, targets=("up_proj",)) for i in range(70))
    attach(model.to("cuda", torch.bfloat16), library)
    assert formulation(600, 70 * 16, 128) == "grouped"
    x = torch.randn(600, 128, device="cuda").bfloat16()
    up = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(up, fullgraph=True)(x), up(x), rtol=2e-2, atol=2e-2)
