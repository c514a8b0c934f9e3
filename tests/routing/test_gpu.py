"""On a CUDA device: no host synchronisation in the routed forward, CUDA-graph capture, full-graph Inductor compile."""

from __future__ import annotations

import pytest
import torch
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
