"""The decode step outside the graph's magic: what a capture would replay equals the model's own decoding.

On a CPU the step runs uncaptured, on a GPU captured; the assertions are the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.cache.decode import compile_decode
from quietgoose.cache.decode_fuse import inductor_options
from quietgoose.cache.decode_linear import (
    JoinedLinear,
    few_rows_linear,
    join_projections,
    restore_linears,
    stream_linears,
)
from quietgoose.cache.decode_sampling import Sampling, choose, distribution
from quietgoose.cache.decode_static import StaticKV
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 131, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip


def tiny(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).eval().to(DEVICE)


def prompt(rows: int, count: int) -> torch.Tensor:
    return torch.randint(3, 130, (rows, count), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def left_padded(rows: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(rows, count, dtype=torch.long, device=DEVICE)
    for row in range(1, rows):
        mask[row, : 3 * row + 1] = 0
    return prompt(rows, count), mask


def reference(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, new: int, **more: Any) -> torch.Tensor:
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": new, **more}
    return model.generate(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config), **options)


def assert_steps_equal(
    model: LlamaForCausalLM, decode: Any, cache: Any, ids: Any, mask: Any, *, steps: int, tolerance: float
) -> None:
    """Prefill and every greedy step of `decode` give the logits of the model's own forward over `cache`."""
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
    torch.testing.assert_close(decode.prefill(ids, mask), out.logits[:, -1])
    for _ in range(steps):
        token = out.logits[:, -1].argmax(-1)
        mask = nn.functional.pad(mask, (0, 1), value=1)
        with torch.no_grad():
            place = mask.sum(1, keepdim=True) - 1
            out = model(token[:, None], attention_mask=mask, position_ids=place, past_key_values=cache)
        torch.testing.assert_close(decode.step(token), out.logits[:, -1], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny()


@pytest.mark.parametrize("padded", [False, True])
def test_static_decode_equals_generate(model: LlamaForCausalLM, padded: bool) -> None:
    ids, mask = left_padded(3, 17) if padded else (prompt(2, 11), None)
    decode = compile_decode(model, StaticKV(model.config, capacity=64), fuse=False)
    made = decode.generate(ids, mask, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
    assert torch.equal(made, reference(model, ids, mask, 20))
    again = decode.generate(ids, mask, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
    assert torch.equal(made, again)


def test_static_logits_equal_the_models(model: LlamaForCausalLM) -> None:
    ids, mask = left_padded(3, 17)
    decode = compile_decode(model, StaticKV(model.config, capacity=64), fuse=False)
    cache = DynamicCache(config=model.config)
    assert_steps_equal(model, decode, cache, ids, mask, steps=6, tolerance=1e-4)


def test_continuing_after_generation(model: LlamaForCausalLM) -> None:
    """A second turn over the kept cache equals one long conversation, also when a row is padded."""
    ids, mask = left_padded(2, 9)
    decode = compile_decode(model, StaticKV(model.config, capacity=64), fuse=False)
    first = decode.generate(ids, mask, max_new_tokens=5, eos_token_id=None)
    talk = torch.cat([first, prompt(2, 4)], 1)
    whole = torch.cat([mask, torch.ones(2, 9, dtype=torch.long, device=DEVICE)], 1)
    made = decode.generate(talk, whole, max_new_tokens=7, eos_token_id=None, keep_cache=True)
    assert torch.equal(made, reference(model, talk, whole, 7))
    with pytest.raises(RecipeError, match="in the cache already"):
        decode.generate(ids, mask, max_new_tokens=2, keep_cache=True)


def test_a_row_stops_at_its_end_and_the_loop_at_the_last(model: LlamaForCausalLM) -> None:
    ids = prompt(2, 11)
    free = reference(model, ids, None, 24)[:, 11:]
    ends = [int(free[0, 3]), int(free[1, 8])]
    decode = compile_decode(model, StaticKV(model.config, capacity=64), fuse=False)
    made = decode.generate(ids, max_new_tokens=24, eos_token_id=ends, pad_token_id=0, stop_every=4)
    assert torch.equal(made, reference(model, ids, None, 24, eos_token_id=ends))


@pytest.mark.parametrize("fuse", ["model", "layer"])
def test_compiled_step_traces_whole_and_equals(fuse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is one graph (no break) with the projections joined; `eager` stands in for inductor off a GPU."""
    import quietgoose.cache.decode_fuse as room

    if DEVICE == "cpu":
        own = torch.compile
        counted: list[Any] = []

        def backend(graph: Any, inputs: Any) -> Any:
            counted.append(graph)
            return graph.forward

        def traced(function: Any, options: Any = None, **settings: Any) -> Any:
            return own(function, backend=backend, **settings)

        monkeypatch.setattr(room.torch, "compile", traced)
    torch._dynamo.reset()
    model, ids = tiny(), prompt(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = reference(model, ids, mask, 12)
    decode = compile_decode(model, StaticKV(model.config, capacity=48), fuse=fuse)
    assert torch.equal(decode.generate(ids, mask, max_new_tokens=12, eos_token_id=None), expected)
    if DEVICE == "cpu":
        assert len(counted) == 1  # one traced code: for the model, or for all layers
        products = sum("linear" in str(node.target) for node in counted[0].graph.nodes)
        assert products == (3 * 4 + 1 if fuse == "model" else 4)  # qkv, o, gate+up, down (and the head)
    decode.close()
    assert torch.equal(reference(model, ids, mask, 12), expected)


def test_joining_keeps_parameters_and_can_be_undone() -> None:
    model = tiny(attention_bias=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    parameter = model.model.layers[0].self_attn.k_proj.weight
    changed = join_projections(model)
    assert len(changed) == 3 * 5
    assert model.model.layers[0].self_attn.k_proj.weight is parameter
    assert parameter.untyped_storage().data_ptr() == changed[0].weight.untyped_storage().data_ptr()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    restore_linears(changed)
    assert not any(isinstance(m, JoinedLinear) for m in model.modules())
    assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_adapters_are_not_joined() -> None:
    class Adapter(nn.Linear):
        pass

    model = tiny()
    model.model.layers[0].self_attn.k_proj.__class__ = Adapter
    changed = join_projections(model)
    assert len(changed) == 3 * 5 - 3


def test_the_compiler_is_never_asked_for_its_own_graphs() -> None:
    known = torch._inductor.list_options()
    for tune in (False, True):
        assert inductor_options(tune)["triton.cudagraphs"] is False
        assert set(inductor_options(tune)) <= set(known)


def test_sampling_keeps_the_right_tokens() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]]).log()
    kept = distribution(logits, Sampling(1.0, top_p=0.6)) > 0
    assert kept.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert (distribution(logits, Sampling(1.0, top_k=3)) > 0).sum(1)[0] == 3
    draws = torch.stack([choose(logits, Sampling(1.0), torch.Generator().manual_seed(seed)) for seed in range(2000)])
    share = torch.bincount(draws[:, 0], minlength=4) / 2000
    torch.testing.assert_close(share, logits[0].exp(), rtol=0, atol=0.04)
    assert choose(logits, Sampling()).tolist() == [1, 0]
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"temperature": float("nan")}):
        with pytest.raises(RecipeError, match="sampling"):
            Sampling(**bad)


def test_bad_input_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(RecipeError, match="exceed the capacity 8"):
        compile_decode(model, StaticKV(model.config, capacity=8), fuse=False).generate(prompt(1, 7), max_new_tokens=4)
    with pytest.raises(RecipeError, match="allowed: model, layer, none"):
        compile_decode(model, StaticKV(model.config, capacity=8), fuse="lyer")
    with pytest.raises(RecipeError, match="capacity is 0"):
        StaticKV(model.config, capacity=0)
    with pytest.raises(RecipeError, match="call prefill"):
        compile_decode(model, StaticKV(model.config, capacity=8), fuse=False).step(torch.zeros(1, dtype=torch.long))


def test_without_a_cache_it_makes_a_zipcache_that_grows(model: LlamaForCausalLM) -> None:
    made = compile_decode(model, fuse=False).generate(prompt(2, 9), max_new_tokens=12, eos_token_id=None)
    given = compile_decode(model, zip_cache(model, {}, 64), fuse=False)
    assert torch.equal(made, given.generate(prompt(2, 9), max_new_tokens=12, eos_token_id=None))


def test_short_sliding_windows_are_refused() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SHAPE, sliding_window=16)
    mistral = MistralForCausalLM(config).eval()
    with pytest.raises(RecipeError, match="sliding window 16 is shorter than the capacity 32"):
        compile_decode(mistral, StaticKV(config, capacity=32), fuse=False)


# ZipCache ----------------------------------------------------------------------------------------------------------

LOSSLESS = {"high_bits": 16, "low_bits": 16, "flush_every": 8, "recent_tokens": 3, "sink_tokens": 2}
PACKED = {"salient_ratio": 0.6, "flush_every": 8, "recent_tokens": 3, "sink_tokens": 2}


def zip_cache(model: Any, settings: dict[str, Any], capacity: int | None = 96) -> Any:
    from quietgoose.cache.hf import ZipCache
    from quietgoose.cache.policy import Policy

    return ZipCache(model.config, Policy(**settings), capacity=capacity)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("capacity", [96, None])
def test_lossless_zip_equals_the_model_over_flushes(padded: bool, capacity: int | None) -> None:
    """30 tokens through a window of 8: four flushes between steps; None: arenas grow, so storage moves."""
    model = tiny()
    ids, mask = left_padded(3, 17) if padded else (prompt(2, 11), None)
    expected = reference(model, ids, mask, 30)
    decode = compile_decode(model, zip_cache(model, LOSSLESS, capacity), fuse=False)
    for _ in range(2):  # the second time over storage that holds the first
        assert torch.equal(decode.generate(ids, mask, max_new_tokens=30, eos_token_id=None), expected)


@pytest.mark.parametrize("settings", [PACKED, {**PACKED, "high_bits": 4, "low_bits": 4, "sink_tokens": 0}])
def test_packed_decode_equals_eager_packed_decode(settings: dict[str, Any]) -> None:
    """Same codes, same logits, same bytes as the step that transformers runs by itself."""
    model = tiny()
    ids, mask = left_padded(2, 19)
    eager = zip_cache(model, settings)
    decode = compile_decode(model, zip_cache(model, settings), fuse=False)
    assert_steps_equal(model, decode, eager, ids, mask, steps=22, tolerance=1e-3)
    assert decode.cache.get_seq_length() == eager.get_seq_length() == 19 + 22
    assert decode.cache.nbytes() == eager.nbytes()
    for ours, theirs in zip(decode.cache.layers, eager.layers):
        for name, tensor in theirs.state.tensors().items():
            if "codes" in name:
                assert torch.equal(ours.state.tensors()[name], tensor), name


def test_a_step_that_dies_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between counting a column on the device and writing it: the next text starts from none."""
    from quietgoose.cache import decode_zip

    model, ids = tiny(), prompt(2, 11)
    settings = {**LOSSLESS, "recent_tokens": 0, "sink_tokens": 0}
    decode = compile_decode(model, zip_cache(model, settings), fuse=False)
    expected = reference(model, ids, None, 20)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decode_zip.ZipDecodable, "attend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode.generate(ids, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(decode.generate(ids, max_new_tokens=20, eos_token_id=None), expected)


def test_zip_continues_after_generation_and_beside_generate() -> None:
    """Kept cache, second turn; then transformers' own generate goes on from the very same cache."""
    model = tiny()
    ids, mask = left_padded(2, 9)
    decode = compile_decode(model, zip_cache(model, LOSSLESS), fuse=False)
    first = decode.generate(ids, mask, max_new_tokens=12, eos_token_id=None)
    talk = torch.cat([first, prompt(2, 4)], 1)
    whole = nn.functional.pad(mask, (0, 16), value=1)
    second = decode.generate(talk, whole, max_new_tokens=7, eos_token_id=None, keep_cache=True)
    assert torch.equal(second, reference(model, talk, whole, 7))
    third = model.generate(
        second, attention_mask=nn.functional.pad(whole, (0, 7), value=1), past_key_values=decode.cache,
        max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert torch.equal(third, reference(model, second, nn.functional.pad(whole, (0, 7), value=1), 9))
    longer = nn.functional.pad(whole, (0, 16), value=1)
    unaware = compile_decode(model, decode.cache, fuse=False)  # has not seen which columns were padding
    fourth = unaware.generate(third, longer, max_new_tokens=5, eos_token_id=None, keep_cache=True)
    assert torch.equal(fourth, reference(model, third, longer, 5))


def test_a_fork_decodes_from_its_parents_tokens() -> None:
    """fork(2) of a filled cache: the captured step goes on over shared arenas, also after the fork's own flush."""
    model = tiny()
    ids = prompt(2, 13)
    parent = zip_cache(model, {**LOSSLESS, "flush_every": 4}, None)
    with torch.no_grad():
        first = model(ids, past_key_values=parent).logits[:, -1].argmax(-1).repeat_interleave(2)
    decode = compile_decode(model, parent.fork(2), fuse=False)
    decode.resume(4, 13)
    made = [first]
    for _ in range(14):
        made.append(decode.step(made[-1]).argmax(-1))
    assert torch.equal(torch.stack(made, 1)[::2], reference(model, ids, None, 15)[:, 13:])
    assert torch.equal(made[-1][::2], made[-1][1::2])


def test_signature_tells_when_a_captured_step_is_stale() -> None:
    """Static storage: never. Growing arenas, a fork that flushes, another number of rows: yes."""
    model, ids = tiny(), prompt(2, 150)
    settings = {**LOSSLESS, "flush_every": 4}

    def signatures(cache: Any, rows: int, steps: int) -> list[Any]:
        decode, found = compile_decode(model, cache, fuse=False), []
        if not cache.get_seq_length():
            decode.prefill(ids)
        decode.resume(rows, 150)
        for _ in range(steps):
            found.append(decode._signature)
            decode.step(torch.zeros(rows, dtype=torch.long, device=DEVICE))
        return found

    static = zip_cache(model, settings, 300)
    assert len(set(signatures(static, 2, 12))) == 1
    assert len(set(signatures(StaticKV(model.config, capacity=300), 2, 6))) == 1
    assert len(set(signatures(zip_cache(model, settings, None), 2, 140))) > 1
    parent = zip_cache(model, settings, None)
    with torch.no_grad():
        model(ids, past_key_values=parent)
    assert len(set(signatures(parent.fork(2), 4, 7))) > 1


def test_another_batch_size_is_another_capture() -> None:
    model = tiny()
    for cache in (StaticKV(model.config, capacity=64), zip_cache(model, LOSSLESS)):
        decode = compile_decode(model, cache, fuse=False)
        for rows in (2, 3, 2):
            ids = prompt(rows, 9)
            made = decode.generate(ids, max_new_tokens=11, eos_token_id=None)
            assert torch.equal(made, reference(model, ids, None, 11))


def test_streamed_linears_apply_in_a_step_only() -> None:
    model = tiny().to(torch.bfloat16)
    changed = join_projections(model) + stream_linears(model)
    assert len(changed) == 3 * 7 + 1
    own, x = model.model.layers[0].mlp.down_proj, torch.randn(2, 1, 96, dtype=torch.bfloat16, device=DEVICE)
    expected = nn.functional.linear(x, own.weight)
    torch.testing.assert_close(few_rows_linear(x, own.weight, None), expected, rtol=2e-2, atol=2e-2)
    assert few_rows_linear(x.expand(2, 30, 96), own.weight, None).shape == (2, 30, 64)
    assert torch.equal(own(x), expected)
    restore_linears(changed)
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))


def test_sampling_with_a_seed_repeats() -> None:
    model = tiny()
    decode = compile_decode(model, zip_cache(model, PACKED), fuse=False)
    made = [
        decode.generate(
            prompt(2, 9), max_new_tokens=12, eos_token_id=None, sampling=Sampling(0.9, top_p=0.9),
            generator=torch.Generator(DEVICE).manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_routed_model_decodes_without_the_compiler() -> None:
    """Routed LoRA linears keep their adapters in a captured step (and are never joined)."""
    from quietgoose.routing.routed_linear import RoutedLinear

    class Shift(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return y + 0.1 * x.sum(-1, keepdim=True).tanh()

    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.q_proj = RoutedLinear("q", layer.self_attn.q_proj)
        layer.self_attn.q_proj.adapter = Shift()
    ids = prompt(2, 11)
    expected = reference(model, ids, None, 14)
    decode = compile_decode(model, zip_cache(model, LOSSLESS), fuse=False)
    assert torch.equal(decode.generate(ids, max_new_tokens=14, eos_token_id=None), expected)
    assert len(join_projections(model)) == 3 * 2


def test_a_cache_without_static_room_for_the_step_says_so() -> None:
    model = tiny()
    decode = compile_decode(model, zip_cache(model, LOSSLESS, 24), fuse=False)
    with pytest.raises(RecipeError, match="capacity"):
        decode.generate(prompt(1, 20), max_new_tokens=20, eos_token_id=None)
    with pytest.raises(RecipeError, match="hold no packed state"):
        compile_decode(model, zip_cache(model, LOSSLESS, 24), fuse=False).resume(1, 3)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU replays for real in every other test here")
@pytest.mark.parametrize("kind", ["static", "lossless", "packed"])
def test_a_replay_that_runs_no_python_equals(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the CUDA graph: the step is traced once to bare tensor operations on the cache's own tensors, and
    only these run afterwards. Anything the host would have to redo in a step shows as a wrong token."""
    from quietgoose.cache import decode_step
    from torch.fx.experimental.proxy_tensor import make_fx
    from transformers import AttentionInterface

    def inlined(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        return decode_step.decode_attention._init_fn(query, key, value, scaling), None

    model = tiny()
    ids, mask = left_padded(3, 17)
    settings = {**(PACKED if kind == "packed" else LOSSLESS), "flush_every": 16}

    def made() -> Any:
        cache = StaticKV(model.config, capacity=64) if kind == "static" else zip_cache(model, settings)
        return compile_decode(model, cache, fuse=False)

    expected = made().generate(ids, mask, max_new_tokens=40, eos_token_id=None)
    if kind != "packed":
        assert torch.equal(expected, reference(model, ids, mask, 40))
    decode, graphs = made(), []
    own = decode._step

    def replayed() -> torch.Tensor:
        if graphs:
            return graphs[0]()
        first: list[torch.Tensor] = []
        graphs.append(make_fx(lambda: first.append(own()) or first[0])())  # tracing runs the operations, too
        return first[0]

    monkeypatch.setattr(decode, "_step", replayed)
    AttentionInterface.register(decode_step.IMPLEMENTATION, inlined)
    try:
        assert torch.equal(decode.generate(ids, mask, max_new_tokens=40, eos_token_id=None), expected)
    finally:
        AttentionInterface.register(decode_step.IMPLEMENTATION, decode_step.attention_forward)
    assert not any("quietgoose" in str(node.target) for node in graphs[0].graph.nodes)
