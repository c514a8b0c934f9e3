"""Tokens tried on a cache and taken back leave nothing: no column, no packed code, no saliency evidence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.cache.hf import ZipCache
from quietgoose.cache.policy import Policy
from quietgoose.cache.rollback import mark, reserve, roll_back
from transformers import DynamicCache

from .hf_models import MIXED, QUALITY, codes, draw, llama, starts_with


@pytest.fixture(scope="module")
def model():
    return llama()


@torch.no_grad()
def read(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, past_key_values=cache).logits


def try_tokens(model: Any, cache: Any, last: torch.Tensor, tried: torch.Tensor) -> None:
    """Read `last` [B, 1] with the first tried token, then the others, the final two together; take all tried back."""
    reserve(cache, 1 + tried.shape[1])
    read(model, cache, torch.cat([last, tried[:, :1]], dim=1))
    marked = mark(cache)
    for place in range(1, tried.shape[1] - 2):
        read(model, cache, tried[:, place : place + 1])
    read(model, cache, tried[:, -2:])
    roll_back(cache, marked, columns=tried.shape[1], queries=1)


def evidence(cache: ZipCache) -> list[torch.Tensor]:
    return [tensor for layer in cache.zip_layers for tensor in layer.state.window.evidence()]


@pytest.mark.parametrize("policy", [MIXED, QUALITY, Policy(flush_every=24, salient_ratio=0.5, max_query=1)])
def test_saliency_and_attention_are_as_if_nothing_had_been_tried(model, policy):
    prompt, text, tried = draw(2, 40, 1), draw(2, 12, 2), draw(2, 8, 3)
    plain, busy = ZipCache(model.config, policy), ZipCache(model.config, policy)
    for cache in (plain, busy):
        read(model, cache, prompt)
    for place in range(text.shape[1]):
        last = text[:, place : place + 1]
        reserve(plain, 9)  # flush where the other one flushes
        read(model, plain, last)
        try_tokens(model, busy, last, tried)
        assert busy.get_seq_length() == plain.get_seq_length()
        for ours, theirs in zip(evidence(busy), evidence(plain), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for layer, other in zip(busy.zip_layers, plain.zip_layers, strict=True):
        for ours, theirs in zip(layer.state.logical(), other.state.logical(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read(model, busy, text[:, :1]), read(model, plain, text[:, :1]), atol=1e-3, rtol=1e-3)


def test_a_crop_alone_keeps_what_the_tried_queries_added(model):
    """Why `mark` is there: the control of the test above."""
    prompt, text, tried = draw(2, 40, 1), draw(2, 1, 2), draw(2, 8, 3)
    found = []
    for tries in (False, True):
        cache = ZipCache(model.config, MIXED)
        read(model, cache, prompt)
        read(model, cache, text)
        if tries:
            for place in range(8):
                read(model, cache, tried[:, place : place + 1])
            cache.crop(-8)
        found.append(evidence(cache)[0])
    assert (found[1] - found[0]).abs().max() > 0.1


def test_what_is_packed_never_changes(model):
    cache = ZipCache(model.config, MIXED)
    read(model, cache, draw(2, 40, 1))
    for place in range(30):
        before = codes(cache)
        try_tokens(model, cache, draw(2, 1, place), draw(2, 8, place + 100))
        assert starts_with(codes(cache), before)
        assert cache.get_seq_length() == 41 + place


def test_other_caches_are_cropped(model):
    cache, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
    prompt, text = draw(2, 5, 1), draw(2, 1, 2)
    for each in (cache, plain):
        read(model, each, prompt)
    try_tokens(model, cache, text, draw(2, 8, 3))
    read(model, plain, text)
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)


def test_room_is_made_or_refused(model):
    cache = ZipCache(model.config, MIXED)
    read(model, cache, draw(1, 40, 1))
    for place in range(20):
        read(model, cache, draw(1, 1, place))
    state = cache.zip_layers[0].state
    reserve(cache, 4)
    assert state.window.columns == 20
    reserve(cache, 5)
    assert state.window.columns == 0
    with pytest.raises(RecipeError, match=r"CFG-076 .* 25 columns .*flush_every = 24"):
        reserve(cache, 25)
