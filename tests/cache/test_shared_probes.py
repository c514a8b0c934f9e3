"""A prefill chooses its probe rows once, in its first layer; what is packed is the same as if every layer did."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from quietgoose.cache import columns
from quietgoose.cache.columns import SharedTables
from quietgoose.cache.hf import ZipCache

from .hf_models import MIXED, codes, draw, left_padded, llama

LAYERS = 4


@pytest.fixture(scope="module")
def model():
    return llama(num_hidden_layers=LAYERS)


@pytest.fixture
def chosen(monkeypatch) -> list[tuple[int, ...]]:
    """The shape of every choice of probes."""
    found: list[tuple[int, ...]] = []
    choose = columns.choose_probes

    def noted(valid: torch.Tensor, **options) -> torch.Tensor:
        found.append(tuple(valid.shape))
        return choose(valid, **options)

    monkeypatch.setattr(columns, "choose_probes", noted)
    return found


def apart(cache: ZipCache) -> ZipCache:
    """The same cache without anything handed down."""
    for layer in cache.zip_layers:
        layer.tables = None
    return cache


@torch.no_grad()
def feed(model, cache: ZipCache, rows: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """A prompt, a chunk of the same size that is packed at once, a few tokens; the codes afterwards."""
    seen = 0
    for part in rows.split([70, 70, 3], dim=1):
        seen += part.shape[1]
        model(part, past_key_values=cache, attention_mask=None if mask is None else mask[:, :seen])
    return codes(cache)


@pytest.mark.parametrize("padding", [None, [0, 41]])
@pytest.mark.parametrize("skipped", [(), (0, 2)])
def test_one_choice_a_prefill_and_the_same_codes(model, chosen, padding, skipped) -> None:
    ids, mask = (draw(2, 143), None) if padding is None else left_padded(2, 143, padding)
    policy = replace(MIXED, sixteen_bit_layers=skipped)
    handed_down = feed(model, ZipCache(model.config, policy), ids, mask)
    assert chosen == [(2, 70), (2, 70)]
    chosen.clear()
    each = feed(model, apart(ZipCache(model.config, policy)), ids, mask)
    assert len(chosen) == 2 * (LAYERS - len(skipped))
    for one, other in zip(handed_down, each, strict=True):
        assert torch.equal(one, other)


def test_the_next_forward_chooses_anew(model, chosen) -> None:
    """Same shapes, other padding: after a reset, in a fork and in a copy."""
    ids, mask = left_padded(2, 143, [41, 0])
    want = feed(model, ZipCache(model.config, MIXED), ids, mask)
    cache = ZipCache(model.config, MIXED)
    feed(model, cache, *left_padded(2, 143, [0, 30]))
    twin = copy.deepcopy(cache)
    for make in (lambda: twin, lambda: cache, lambda: cache.fork(1)):
        again = make()
        again.reset()
        chosen.clear()
        assert all(torch.equal(a, b) for a, b in zip(feed(model, again, ids, mask), want, strict=True))
        assert len(chosen) == 2
    probes = [one.zip_layers[0].tables for one in (cache, twin, again)]
    assert len({id(one) for one in probes}) == 3, "copies and forks have their own"


def test_a_layer_that_differs_gets_its_own() -> None:
    shared, made = SharedTables(), iter(range(10))

    def of(layer: int, what: str) -> int:
        return int(shared.of(layer, what, lambda: torch.tensor(next(made))))

    assert [of(0, "cpu"), of(1, "cpu"), of(2, "cuda"), of(3, "cuda"), of(3, "cuda"), of(0, "cuda")] == [
        0,
        0,
        1,
        1,
        2,
        3,
    ]
