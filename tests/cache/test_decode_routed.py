"""A routed model in a captured decode step: both caches, compiled or not, equals the routed model's own generation.

On a CPU the step runs uncaptured (and by the interpreter where it asks for kernels), on a GPU captured.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quietgoose.base.seeding import generator
from quietgoose.cache.decode import compile_decode
from quietgoose.cache.decode_static import StaticKV
from quietgoose.cache.hf import ZipCache
from quietgoose.cache.policy import Policy
from quietgoose.kernels.testing import assert_close
from quietgoose.routing.expert import Expert, ExpertCard, SiteAdapter
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.model import attach, set_router, state
from quietgoose.routing.shared import SharedBank
from quietgoose.routing.sites import all_sites
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSSLESS = Policy(high_bits=16, low_bits=16, flush_every=8, recent_tokens=3, sink_tokens=2)


def routed(layers: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> LlamaForCausalLM:
    """A tiny model with three experts of ranks 2 to 4 whose choice of experts decides the tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=131, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(DEVICE, dtype)
    experts = []
    for number in range(3):
        g = generator(3, "decode", number)
        card = ExpertCard(f"e{number}", number + 2, 4.0, ("all-linear",))
        adapters, gates = {}, {}
        for site in all_sites(model):
            a = torch.randn(number + 2, site.in_features, generator=g) * 0.3
            b = torch.randn(site.out_features, number + 2, generator=g) * 0.3
            adapters[site.name] = SiteAdapter(a, b, 1.0)
            gates[site.name] = torch.randn(site.in_features, generator=g)
        experts.append(Expert(card, adapters).with_gates(gates))
    attach(model, ExpertLibrary(experts), **options)
    return model


def prompt(rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 130, (rows, count), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 3 * row] = 0
    return ids, mask


def cache_of(kind: str, model: nn.Module) -> Any:
    return StaticKV(model.config, capacity=64) if kind == "static" else ZipCache(model.config, LOSSLESS, capacity=96)


def reference(model: Any, ids: torch.Tensor, mask: torch.Tensor, new: int) -> torch.Tensor:
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": new}
    return model.generate(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config), **options)


def nothing_waits(model: nn.Module) -> bool:
    return all(bank._input is None for bank in model.modules() if isinstance(bank, SharedBank))


@pytest.mark.parametrize("router", ["phatgoose", "expert:e1"])
@pytest.mark.parametrize("kind", ["static", "zip"])
def test_a_routed_model_decodes_as_it_generates(kind: str, router: str) -> None:
    model = set_router(routed(), router)
    ids, mask = prompt(2, 11)
    want = reference(model, ids, mask, 14)
    decode = compile_decode(model, cache_of(kind, model), fuse=False)
    assert torch.equal(decode.generate(ids, mask, max_new_tokens=14, eos_token_id=None), want)
    assert nothing_waits(model)
    one = compile_decode(set_router(model, "expert:e0"), cache_of(kind, model), fuse=False)
    assert not torch.equal(one.generate(ids, mask, max_new_tokens=14, eos_token_id=None), want)


@pytest.mark.parametrize(
    ("kind", "fuse"),
    [("static", "model"), ("zip", "layer"), *([] if DEVICE == "cpu" else [("static", "layer"), ("zip", "model")])],
)
def test_a_compiled_step_keeps_routing_inside(kind: str, fuse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph with the routed operators in it; on a CPU the tracing is checked, on a GPU Inductor and the capture."""
    from quietgoose.cache import decode_fuse

    counted: list[Any] = []
    if DEVICE == "cpu":
        own = torch.compile

        def traced(function: Any, options: Any = None, **settings: Any) -> Any:
            return own(function, backend=lambda graph, _: counted.append(graph) or graph.forward, **settings)

        monkeypatch.setattr(decode_fuse.torch, "compile", traced)
    torch._dynamo.reset()
    model = routed()
    ids, mask = prompt(2, 9)
    want = reference(model, ids, mask, 10)
    decode = compile_decode(model, cache_of(kind, model), fuse=fuse)
    assert torch.equal(decode.generate(ids, mask, max_new_tokens=10, eos_token_id=None), want)
    assert nothing_waits(model)
    assert DEVICE != "cpu" or len(counted) == 1
    decode.close()
    assert torch.equal(reference(model, ids, mask, 10), want)


def test_other_experts_are_captured_anew() -> None:
    """The step of before would go on reading its experts, or memory that is somebody else's by now."""
    model = routed()
    ids, mask = prompt(2, 9)
    decode = compile_decode(model, cache_of("zip", model), fuse=False)
    decode.prefill(ids, mask)
    decode._graph = graph = object()  # as after a capture
    decode.reset()
    decode.prefill(ids, mask)
    assert decode._graph is graph
    attach(model, state(model).library.restrict(["e0", "e2"]))
    decode.reset()
    decode.prefill(ids, mask)
    assert decode._graph is None


@pytest.mark.parametrize("kind", ["static"] if DEVICE == "cpu" else ["static", "zip"])
def test_the_decode_kernels_give_the_logits_of_the_twin(kind: str) -> None:
    """One row, three steps; the kernels that a GPU takes by itself."""
    logits: dict[str, list[torch.Tensor]] = {"reference": [], "triton": []}
    for implementation, found in logits.items():
        model = routed(1, implementation=implementation)
        decode = compile_decode(model, cache_of(kind, model), fuse=False)
        ids, _ = prompt(1, 2)
        found.append(decode.prefill(ids).clone())
        for token in (5, 77, 23):
            found.append(decode.step(torch.tensor([token], device=DEVICE)).clone())
    for step, (got, want) in enumerate(zip(logits["triton"], logits["reference"])):
        assert_close(f"step {step}", got, want, limit=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("kind", ["static", "zip"])
def test_a_captured_step_replays_what_the_model_computes(kind: str, rows: int) -> None:
    """20 steps with given tokens: the graph's logits are the eager routed model's (fp32: in bf16 a near tie between two
    experts falls either way), and in bf16 bit for bit those of the same step uncaptured."""
    model = routed()
    ids, _ = prompt(rows, 9)
    tokens = [torch.full((rows,), 3 + step, device=DEVICE) for step in range(20)]
    decode, cache = compile_decode(model, cache_of(kind, model), fuse=False), DynamicCache(config=model.config)
    with torch.no_grad():
        got, want = decode.prefill(ids), model(ids, past_key_values=cache).logits[:, -1]
        for step, token in enumerate(tokens):
            assert_close(f"step {step}", got, want, limit=1e-3)
            got, want = decode.step(token), model(token[:, None], past_key_values=cache).logits[:, -1]
    assert decode._graph is not None
    model = routed(dtype=torch.bfloat16)
    found: list[list[torch.Tensor]] = []
    for captured in (True, False):
        decode = compile_decode(model, cache_of(kind, model), fuse=False)
        decode.prefill(ids)
        decode._warm = decode._warm if captured else -1000  # never warm enough to be captured
        found.append([decode.step(token).clone() for token in tokens])
        assert (decode._graph is not None) == captured
    assert all(torch.equal(a, b) for a, b in zip(*found))
