"""ZipCache in transformers with quantised tokens: the same calls run, logits stay close, packed codes never change."""

from __future__ import annotations

import copy

import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.cache.hf import ZipCache
from quietgoose.cache.policy import Policy
from transformers import DynamicCache

from .hf_models import GREEDY, LOSSLESS, MIXED, QUALITY, both, codes, draw, left_padded, llama, starts_with

POLICIES = {"mixed": MIXED, "quality": QUALITY, "4 bit": Policy(salient_ratio=1.0, flush_every=24)}
# mean KL of the next-token distribution to the stock cache, nats; these random models are far from sharp or robust
CLOSE = {"mixed": 0.5, "quality": 0.25, "4 bit": 0.1}


@pytest.fixture(scope="module")
def model():
    return llama(initializer_range=0.1)


@torch.no_grad()
def drift(model, cache, *parts, mask=None) -> float:
    """Mean KL to the stock cache over all valid positions, one forward each part."""
    stock, done, total = DynamicCache(config=model.config), 0, []
    for part in parts:
        done += part.shape[1]
        seen = None if mask is None else mask[:, :done]
        exact = model(part, past_key_values=stock, attention_mask=seen).logits.log_softmax(-1)
        ours = model(part, past_key_values=cache, attention_mask=seen).logits.log_softmax(-1)
        kl = (exact.exp() * (exact - ours)).sum(-1)
        total.append(kl if seen is None else kl[seen[:, -part.shape[1] :].bool()])
    return torch.cat([k.flatten() for k in total]).mean().item()


@pytest.mark.parametrize("name", POLICIES)
def test_logits_are_close_and_codes_never_change(model, name):
    ids, mask = left_padded(2, 260, [0, 17])
    cache = ZipCache(model.config, POLICIES[name])
    assert drift(model, cache, ids[:, :90], *ids[:, 90:140].split(1, 1), mask=mask) < CLOSE[name]
    before = codes(cache)
    assert sum(part.numel() for part in before)
    with torch.no_grad():
        for part in (*ids[:, 140:200].split(1, 1), ids[:, 200:]):  # several flushes, then a chunk
            model(part, past_key_values=cache, attention_mask=mask[:, : cache.get_seq_length() + part.shape[1]])
    assert starts_with(codes(cache), before)


def test_precision_orders_the_error(model):
    ids = draw(1, 200)
    parts = ids[:, :120], *ids[:, 120:].split(1, 1)
    policies = [
        Policy(salient_ratio=1.0, high_bits=16, low_bits=16),
        Policy(salient_ratio=1.0),
        Policy(salient_ratio=0.6),
        Policy(salient_ratio=1.0, high_bits=2),
    ]
    found = [drift(model, ZipCache(model.config, policy), *parts) for policy in policies]
    assert found == sorted(found)
    assert found[0] < 1e-6


OPTIONS = {
    "sampling": {"do_sample": True},
    "beam": {"num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 6},
    "chunks": {"prefill_chunk_size": 40},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_generate_runs(model, name):
    ids = draw(1, 20).repeat(1, 5)
    stock, ours = both(model, ids, MIXED, max_new_tokens=30, **OPTIONS[name])
    assert stock.shape == ours.shape


def test_assisted_decoding_runs(model):
    cache = ZipCache(model.config, MIXED)
    assistant = llama(seed=1, num_hidden_layers=1)
    ids = model.generate(draw(1, 60), past_key_values=cache, assistant_model=assistant, max_new_tokens=30, **GREEDY)
    assert ids.shape == (1, 90)


@torch.no_grad()
def test_a_row_does_not_feel_its_neighbours(model):
    """Same codes alone and in a padded batch (sequence 0 in both)."""
    ids, mask = left_padded(2, 80, [20, 0])
    batch, alone = ZipCache(model.config, MIXED), ZipCache(model.config, MIXED)
    model(ids, attention_mask=mask, past_key_values=batch, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    model(ids[:1, 20:], past_key_values=alone)
    first, other = batch.zip_layers[0].state, alone.zip_layers[0].state
    for name in ("high", "low"):
        used = getattr(other, name).lengths()[0]
        assert getattr(first, name).lengths()[0] == used
        both_rows = [getattr(state, name).key_codes[0, :, :used].int() for state in (first, other)]
        assert (both_rows[0] - both_rows[1]).ne(0).float().mean() < 1e-3  # fp32 sums in another order


@torch.no_grad()
def test_crop_keeps_surviving_codes(model):
    cache, ids = ZipCache(model.config, MIXED), draw(1, 140)
    model(ids, past_key_values=cache)
    before = codes(cache)
    cache.crop(-70)
    after = codes(cache)
    assert starts_with(before, after)
    assert sum(p.numel() for p in after) < sum(p.numel() for p in before)
    model(draw(1, 30), past_key_values=cache)
    assert cache.get_seq_length() == 100


@torch.no_grad()
def test_rows_and_fork(model):
    cache = ZipCache(model.config, MIXED)
    model(draw(2, 100), past_key_values=cache)
    before = codes(cache)
    forked = cache.fork(3)
    more = draw(6, 60)
    shared = [model(part, past_key_values=forked).logits for part in more.split(1, 1)]
    assert all(torch.equal(a, b) for a, b in zip(codes(cache), before, strict=True)), "the parent changed"
    with pytest.raises(RecipeError, match="fork"):
        cache.crop(-1)
    del forked
    cache.batch_repeat_interleave(3)
    copied = [model(part, past_key_values=cache).logits for part in more.split(1, 1)]
    torch.testing.assert_close(torch.cat(shared[:20], 1), torch.cat(copied[:20], 1), atol=1e-4, rtol=1e-4)
    cache.batch_select_indices(torch.tensor([4, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    model(draw(2, 30), past_key_values=cache)


@torch.no_grad()
def test_rows_are_kept_by_a_mask_and_all_may_go(model):
    cache, stock = ZipCache(model.config, LOSSLESS), DynamicCache(config=model.config)
    for kept in (cache, stock):
        model(draw(3, 60), past_key_values=kept)
        kept.batch_select_indices(torch.tensor([True, False, True]))
    found = [model(draw(2, 5, 1), past_key_values=kept).logits for kept in (cache, stock)]
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)
    with pytest.raises(RecipeError, match=r"CFG-053.*2 rows"):
        cache.batch_select_indices(torch.tensor([True]))
    cache.batch_select_indices(torch.zeros(2, dtype=torch.bool))
    assert (cache.batch_size, cache.nbytes().tokens) == (0, 0)


@torch.no_grad()
def test_a_copy_of_a_forked_cache_is_free(model):
    """The prompt that others continue is copied (transformers' way to reuse one): nobody reads the copy."""
    cache = ZipCache(model.config, MIXED)
    model(draw(1, 100), past_key_values=cache)
    forked = cache.fork(2)
    twin = copy.deepcopy(cache)
    logits = model(draw(1, 40, 1), past_key_values=twin).logits
    with pytest.raises(RecipeError, match="fork"):
        model(draw(1, 40, 1), past_key_values=cache)
    del forked
    assert torch.equal(model(draw(1, 40, 1), past_key_values=cache).logits, logits)


@torch.no_grad()
def test_thoughts_with_a_4d_mask(model):
    ids, n = draw(1, 40), 40
    seen = torch.cat([torch.tril(torch.ones(n, n)), torch.eye(n)], 1).bool()[None, None]
    found = []
    for cache in (DynamicCache(config=model.config), ZipCache(model.config, QUALITY)):
        model(ids, past_key_values=cache)
        place = torch.arange(1, n + 1)[None]
        found.append(model(draw(1, n, 1), past_key_values=cache, attention_mask=seen, position_ids=place).logits)
    kl = torch.nn.functional.kl_div(
        found[1].log_softmax(-1), found[0].log_softmax(-1), log_target=True, reduction="none"
    )
    assert kl.sum(-1).mean() < CLOSE["quality"]


@torch.no_grad()
def test_two_caches_of_one_model_interleaved(model):
    """No state outside the cache: interleaving changes nothing."""
    ids = [draw(1, 120, seed) for seed in (1, 2)]
    expected = []
    for rows in ids:
        cache = ZipCache(model.config, MIXED)
        expected.append([model(part, past_key_values=cache).logits for part in rows.split(20, 1)])
    caches = [ZipCache(model.config, MIXED) for _ in ids]
    for step, parts in enumerate(zip(*(rows.split(20, 1) for rows in ids), strict=True)):
        for which, part in enumerate(parts):
            assert torch.equal(model(part, past_key_values=caches[which]).logits, expected[which][step])


def test_smaller_than_sixteen_bits(model):
    ids = draw(1, 600)
    sizes = {}
    for name, policy in {"exact": Policy(salient_ratio=1.0, high_bits=16, low_bits=16), "mixed": Policy()}.items():
        cache = ZipCache(model.config, policy)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        sizes[name] = cache.nbytes().total
    assert sizes["mixed"] < sizes["exact"] / 3  # fp32 against 3.6 bits, with a tail on both sides
