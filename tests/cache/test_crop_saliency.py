"""A crop undoes what the dropped queries added to the saliency: the cache is as one that never saw them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quietgoose.cache.decode import compile_decode
from quietgoose.cache.decode_static import StaticKV
from quietgoose.cache.decode_zip import ZipDecodable
from quietgoose.cache.hf import ZipCache
from quietgoose.cache.policy import Policy
from quietgoose.cache.rollback import reserve

from .hf_models import MIXED, QUALITY, codes, draw, left_padded, llama

NARROW = Policy(flush_every=24, salient_ratio=0.5, max_query=6)
ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.fixture(scope="module", params=["cpu", ON_GPU])
def model(request) -> Any:
    return llama().to(request.param)


@torch.no_grad()
def read(model: Any, cache: ZipCache, ids: torch.Tensor) -> torch.Tensor:
    return model(ids.to(model.device), past_key_values=cache).logits


def evidence(cache: ZipCache) -> list[torch.Tensor]:
    return [t for layer in cache.zip_layers if layer.state.saliency for t in layer.state.window.evidence()]


def assert_same_evidence(ours: ZipCache, theirs: ZipCache, tolerance: float) -> None:
    for found, wanted in zip(evidence(ours), evidence(theirs), strict=True):
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def assert_packed_alike(model: Any, ours: ZipCache, theirs: ZipCache) -> None:
    """What both pack next are the same codes; on a GPU, where a product of more rows rounds otherwise, as many."""
    before = ours.zip_layers[0].state.packed_length
    for seed in range(30):
        for cache in (ours, theirs):
            read(model, cache, draw(2, 1, 100 + seed))
    assert ours.zip_layers[0].state.packed_length > before
    pairs = list(zip(codes(ours), codes(theirs), strict=True))
    assert all(found.shape == wanted.shape for found, wanted in pairs)
    assert model.device.type == "cuda" or all(torch.equal(*pair) for pair in pairs)


# forwards in several calls of attention ---------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 5, 6, 7, 15, 16, 17, 20])
@pytest.mark.parametrize("policy", [MIXED, QUALITY, NARROW])
def test_crop_within_one_forward(model, policy, kept) -> None:
    """As after assisted decoding: more tokens than the kernel's longest query, all but the first few rejected."""
    prompt, text, tried = draw(2, 40, 1), draw(2, 3, 2), draw(2, 21, 3)
    plain, busy = ZipCache(model.config, policy), ZipCache(model.config, policy)
    for cache in (plain, busy):
        read(model, cache, prompt)
        read(model, cache, text)
        reserve(cache, 21)
    read(model, busy, tried)
    busy.crop(kept - 21)
    if kept:
        read(model, plain, tried[:, :kept])
    assert busy.get_seq_length() == plain.get_seq_length() == 43 + kept
    tolerance = 1e-5 if model.device.type == "cpu" else 1e-3
    assert_same_evidence(busy, plain, tolerance)
    if kept > 2:  # what is left can be taken back as well, in portions
        busy.crop(-2)
        busy.crop(2 - kept)
        plain.crop(-kept)
        assert_same_evidence(busy, plain, tolerance)
    assert_packed_alike(model, busy, plain)


def test_columns_without_queries_take_no_others_along(model) -> None:
    """As those of a dense forward under a mask of its own, which measures nothing: a crop of them undoes no earlier query."""
    caches = [ZipCache(model.config, MIXED) for _ in range(2)]
    for cache in caches:
        read(model, cache, draw(2, 40, 1))
        reserve(cache, 21)
        read(model, cache, draw(2, 18, 2))
    for layer in caches[0].zip_layers:
        new = torch.randn(2, 2, 3, 64, device=model.device)
        layer.state.append(new, new)
        layer.state.crop(2)
        layer.state.crop(1)
    assert_same_evidence(*caches, tolerance=1e-6)
    for cache in caches:
        cache.crop(-5)
    assert_same_evidence(*caches, tolerance=1e-6)


def test_what_is_kept_for_a_crop_is_bounded_counted_and_let_go(model) -> None:
    cache = ZipCache(model.config, MIXED)
    read(model, cache, draw(2, 40, 1))
    windows = [layer.state.window for layer in cache.zip_layers]
    for count in (64, 65, 17, 16):
        read(model, cache, draw(2, count, count))
        calls = {64: 3, 65: 0, 17: 1, 16: 0}[count]  # 65 are packed at once
        assert all(len(window.calls) <= calls for window in windows)
        held = sum(t.nbytes for w in windows for call in w.calls for t in vars(call.before).values())
        with_calls = cache.nbytes()
        for window in windows:
            window.calls = []
        assert with_calls.total - cache.nbytes().total == with_calls.saliency - cache.nbytes().saliency == held
        assert (held > 0) == (calls > 0)
    for change in (
        lambda: read(model, cache, draw(2, 1)),
        lambda: [layer.state.flush() for layer in cache.zip_layers],
        lambda: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda: [layer.state.advance(1) for layer in cache.zip_layers],
    ):
        cache.reset()
        read(model, cache, draw(2, 40, 1))
        read(model, cache, draw(2, 17, 2))
        assert all(len(layer.state.window.calls) == 1 for layer in cache.zip_layers)
        change()
        assert not any(layer.state.window.calls for layer in cache.zip_layers)


# steps beyond the end ---------------------------------------------------------------------------------------------


def answered(model: Any, policy: Any, ends: list[int], stop_every: int, steps: list[int]) -> tuple[Any, torch.Tensor]:
    ids, mask = left_padded(2, 20, [0, 5])
    decode = compile_decode(model, ZipCache(model.config, policy, capacity=400), fuse="none")
    inner, count = decode.step, 0

    def step(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return inner(tokens)

    decode.step = step
    out = decode.generate(
        ids.to(model.device), mask.to(model.device), max_new_tokens=60, eos_token_id=ends, stop_every=stop_every
    )
    steps.append(count)
    return decode, out


@pytest.mark.parametrize("last", [0, 1, 7, 14])
@pytest.mark.parametrize(
    "policy",
    [
        Policy(salient_ratio=0.6, flush_every=40),
        Policy(salient_ratio=0.6, flush_every=40, sink_tokens=3, recent_tokens=5, sixteen_bit_layers=(1,)),
    ],
)
def test_steps_beyond_the_end_leave_no_evidence(model, policy, last) -> None:
    """The host looks every 30 tokens; a host that looks at every token makes no such step."""
    _, free = answered(model, policy, [-1], 30, [])
    ends = free[:, 20 + last].tolist()
    steps: list[int] = []
    late, talk = answered(model, policy, ends, 30, steps)
    prompt, at_once = answered(model, policy, ends, 1, steps)
    assert torch.equal(talk, at_once)
    assert steps[0] > steps[1] + 10, "no step was made beyond the end: the test shows nothing"
    assert late.cache.get_seq_length() == prompt.cache.get_seq_length() == talk.shape[1] - 1
    assert_same_evidence(late.cache, prompt.cache, 1e-6)
    more = torch.cat([talk, draw(2, 6, 4).to(model.device)], 1)
    again = [decode.generate(more, max_new_tokens=60, eos_token_id=None, keep_cache=True) for decode in (late, prompt)]
    assert torch.equal(*again)
    assert_same_evidence(late.cache, prompt.cache, 1e-6)
    assert all(torch.equal(*pair) for pair in zip(codes(late.cache), codes(prompt.cache), strict=True))
    assert min(layer.state.packed_length for layer in late.cache.zip_layers) > 40


def test_a_row_that_goes_on_keeps_the_evidence_of_all(model) -> None:
    """A step counts while any row goes on, for the columns of the ended ones stay too."""
    cache = ZipCache(model.config, MIXED)
    read(model, cache, draw(2, 40, 1))
    read(model, cache, draw(2, 1, 2))
    target, accepted = ZipDecodable(cache), [layer.state.saliency.accepted for layer in cache.zip_layers]
    target.uncount(torch.tensor([True, False], device=model.device))
    assert [int(a) for a in accepted] == [1] * len(accepted)
    if model.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        finished = torch.ones(2, dtype=torch.bool, device=model.device)
        target.uncount(finished)
    finally:
        if model.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert [int(a) for a in accepted] == [0] * len(accepted)


def test_caches_without_evidence_have_nothing_to_forget(model) -> None:
    ids = draw(2, 20).to(model.device)
    caches = [
        StaticKV(model.config, capacity=100),
        ZipCache(model.config, "lossless", capacity=100),
        ZipCache(model.config, Policy(salient_ratio=1.0), capacity=100),
    ]
    for cache in caches:
        decode = compile_decode(model, cache, fuse="none")
        free = decode.generate(ids, max_new_tokens=20, eos_token_id=None)
        found = decode.generate(ids, max_new_tokens=20, eos_token_id=free[:, 22].tolist())
        assert torch.equal(found, free[:, : found.shape[1]])
