"""ZipCache in transformers, lossless: everything generate can do gives the tokens of the stock cache."""

from __future__ import annotations

import copy

import pytest
import torch
from quietgoose.cache.hf import ZipCache
from transformers import DynamicCache

from .hf_models import GREEDY, LOSSLESS, both, draw, left_padded, llama


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.mark.parametrize("length", [1, 9, 16, 17, 50, 130])
def test_greedy(model, length):
    stock, ours = both(model, draw(1, length), max_new_tokens=60)
    assert torch.equal(stock, ours)


def test_sampling_with_a_seed(model):
    stock, ours = both(model, draw(2, 30), max_new_tokens=40, do_sample=True, temperature=1.3, top_k=40)
    assert torch.equal(stock, ours)


def test_several_sequences_of_one_prompt(model):
    stock, ours = both(model, draw(1, 30), max_new_tokens=30, do_sample=True, num_return_sequences=3)
    assert torch.equal(stock, ours)
    assert not torch.equal(ours[0], ours[1])


@pytest.mark.parametrize("length", [8, 40])
def test_beam_search_reorders_rows(model, length):
    stock, ours = both(model, draw(2, length), num_beams=4, max_new_tokens=40, length_penalty=0.5)
    assert torch.equal(stock, ours)


@pytest.mark.parametrize("length", [12, 40])
def test_left_padded_batch(model, length):
    ids, mask = left_padded(4, length, [0, 3, length - 1, 7])
    stock, ours = both(model, ids, attention_mask=mask, max_new_tokens=60)
    assert torch.equal(stock, ours)


@pytest.mark.parametrize("candidates", [4, 20, 70])  # decode kernel, pieces, and a packed chunk
def test_prompt_lookup_with_rejections(model, candidates):
    ids = draw(1, 24).repeat(1, 5)
    cache = ZipCache(model.config, LOSSLESS)
    cropped = []
    remember(cache, cropped)
    options = {"max_new_tokens": 60, "prompt_lookup_num_tokens": candidates, **GREEDY}
    ours = model.generate(ids, past_key_values=cache, **options)
    stock = model.generate(ids, max_new_tokens=60, **GREEDY)
    assert torch.equal(stock, ours)
    assert any(count < 0 for count in cropped), "no candidate was rejected: the test shows nothing"


def test_assisted_decoding_with_rejections(model):
    assistant = llama(seed=1, num_hidden_layers=1)
    cache, cropped = ZipCache(model.config, LOSSLESS), []
    remember(cache, cropped)
    options = {"max_new_tokens": 40, "assistant_model": assistant, **GREEDY}
    ours = model.generate(draw(1, 40), past_key_values=cache, **options)
    stock = model.generate(draw(1, 40), max_new_tokens=40, **GREEDY)
    assert torch.equal(stock, ours)
    assert any(count < 0 for count in cropped)


def remember(cache: ZipCache, cropped: list[int]) -> None:
    inner = cache.crop

    def crop(count: int) -> None:
        cropped.append(count)
        inner(count)

    cache.crop = crop


@pytest.mark.parametrize("chunk", [7, 16, 33, 90])
def test_chunked_prefill_in_generate(model, chunk):
    ids, mask = left_padded(2, 150, [0, 40])
    stock, ours = both(model, ids, attention_mask=mask, max_new_tokens=20, prefill_chunk_size=chunk)
    assert torch.equal(stock, ours)


@pytest.mark.parametrize("hidden", [False, True])
def test_several_turns_with_one_cache(model, hidden):
    """hidden: a later turn's mask hides tokens of an earlier answer, as padding after an answer that ended early."""
    cache, stock = ZipCache(model.config, LOSSLESS), DynamicCache(config=model.config)
    ids = expected = draw(2, 30)
    mask = torch.ones_like(ids)
    for turn, length in enumerate((5, 100, 1, 40)):
        found = model.generate(ids, past_key_values=cache, attention_mask=mask, max_new_tokens=15, **GREEDY)
        expected = model.generate(ids, past_key_values=stock, attention_mask=mask, max_new_tokens=15, **GREEDY)
        assert torch.equal(found, expected), f"turn {turn}"
        ids = torch.cat([found, draw(2, length, seed=turn + 10)], 1)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=torch.long)], 1)
        if hidden and turn == 1:
            mask[1, 35:43] = 0
    assert cache.zip_layers[0].hidden == hidden


@torch.no_grad()
def logits(model, cache, *parts, mask=None):
    """Logits of all parts, one forward each."""
    found, done = [], 0
    for part in parts:
        done += part.shape[1]
        seen = None if mask is None else mask[:, :done]
        found.append(model(part, past_key_values=cache, attention_mask=seen).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("sizes", [(30, 1, 1, 80, 5, 70), (5, 12, 90, 3), (100, 100, 1)])
def test_forward_by_forward_with_padding_inside(model, sizes):
    ids, mask = left_padded(3, sum(sizes), [0, 11, 2])
    mask[0, 20:23] = mask[1, -20:-8] = 0  # padding need not be at the left
    expected = logits(model, DynamicCache(config=model.config), *ids.split(sizes, 1), mask=mask)
    found = logits(model, ZipCache(model.config, LOSSLESS), *ids.split(sizes, 1), mask=mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("crop", [1, 10, 25, 60])
def test_crop_then_go_on(model, crop):
    ids, again = draw(2, 90), draw(2, 30, seed=3)
    cache, stock = ZipCache(model.config, LOSSLESS), DynamicCache(config=model.config)
    for kept in (cache, stock):
        logits(model, kept, ids[:, :70], *ids[:, 70:].split(1, 1))
        kept.crop(0)
        kept.crop(-crop)
    assert cache.get_seq_length() == 90 - crop
    torch.testing.assert_close(logits(model, cache, again), logits(model, stock, again), atol=1e-3, rtol=1e-3)


def test_crop_of_a_positive_count_is_refused(model):
    cache = ZipCache(model.config, LOSSLESS)
    logits(model, cache, draw(1, 20))
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)


def test_rows_are_repeated_selected_and_reordered(model):
    ids, mask = left_padded(2, 60, [0, 9])
    cache, stock = ZipCache(model.config, LOSSLESS), DynamicCache(config=model.config)
    for kept in (cache, stock):
        logits(model, kept, ids[:, :40], ids[:, 40:55], ids[:, 55:], mask=mask)
        kept.batch_repeat_interleave(3)
    mask = mask.repeat_interleave(3, 0)
    for order, step in ((None, 6), (torch.tensor([5, 0, 3]), 3), (torch.tensor([2, 2, 0]), 3)):
        for kept in (cache, stock):
            if order is not None and len(mask) == 6:
                kept.batch_select_indices(order)
            elif order is not None:
                kept.reorder_cache(order)
        mask = mask if order is None else mask[order]
        more = draw(step, 30, seed=step)
        mask = torch.cat([mask, torch.ones_like(more)], 1)
        with torch.no_grad():
            found = [model(more, past_key_values=kept, attention_mask=mask).logits for kept in (cache, stock)]
        torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)
    assert cache.batch_size == 3


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("thoughts", [12, 40])
@torch.no_grad()
def test_parallel_thoughts_with_a_4d_mask(model, additive, thoughts):
    """A thought token after every position, each seeing its prefix and itself; then a second one."""
    ids = draw(1, thoughts)
    causal = torch.tril(torch.ones(thoughts, thoughts, dtype=torch.bool))
    cache, stock = ZipCache(model.config, LOSSLESS), DynamicCache(config=model.config)
    seen = causal
    for kept in (cache, stock):
        model(ids, past_key_values=kept)
    for step in range(1, 4):
        seen = torch.cat([seen, torch.eye(thoughts, dtype=torch.bool)], 1)
        mask = seen[None, None]
        if additive:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        token, place = draw(1, thoughts, seed=step), torch.arange(step, thoughts + step)[None]
        found = [
            model(token, past_key_values=kept, attention_mask=mask, position_ids=place).logits
            for kept in (cache, stock)
        ]
        torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_4d_mask_of_the_prompt_and_padding(model):
    ids, mask = left_padded(2, 40, [0, 9])
    square = torch.tril(torch.ones(40, 40, dtype=torch.bool))[None, None] & mask.bool()[:, None, None, :]
    cache, stock = ZipCache(model.config, LOSSLESS), DynamicCache(config=model.config)
    for kept in (cache, stock):
        model(ids, past_key_values=kept, attention_mask=square)
    more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    found = [model(draw(2, 1), past_key_values=kept, attention_mask=more).logits for kept in (cache, stock)]
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_padding_is_gone_whatever_a_4d_mask_says(model):
    """Stored padding does not exist for us: a 4-D mask that shows it gives what the 2-D mask gives."""
    ids, mask = left_padded(2, 40, [0, 9])
    more, place = draw(2, 20, 1), torch.arange(40, 60).repeat(2, 1) - torch.tensor([[0], [9]])
    found = []
    for seen in (torch.cat([mask, torch.ones(2, 20, dtype=torch.long)], 1), torch.ones(2, 1, 20, 60).tril(40).bool()):
        cache = ZipCache(model.config, LOSSLESS)
        model(ids, past_key_values=cache, attention_mask=mask)
        found.append(model(more, past_key_values=cache, attention_mask=seen, position_ids=place).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


def test_fork_equals_copies(model):
    ids = draw(1, 60)
    parent = ZipCache(model.config, LOSSLESS)
    logits(model, parent, ids[:, :-1])
    rows = ids.repeat(4, 1)
    torch.manual_seed(3)
    forked = model.generate(rows, past_key_values=parent.fork(4), max_new_tokens=30, do_sample=True, pad_token_id=0)
    torch.manual_seed(3)
    copies = DynamicCache(config=model.config)
    logits(model, copies, rows[:, :-1])
    expected = model.generate(rows, past_key_values=copies, max_new_tokens=30, do_sample=True, pad_token_id=0)
    assert torch.equal(forked, expected)
    assert parent.get_seq_length() == 59


def test_fork_costs_the_tails_only(model):
    parent = ZipCache(model.config, LOSSLESS)
    logits(model, parent, draw(1, 600))
    one, forked = parent.nbytes().total, parent.fork(8).nbytes().total
    assert forked < 3 * one


def test_a_copied_cache_goes_its_own_way(model):
    ids = draw(1, 50)
    cache = ZipCache(model.config, LOSSLESS)
    logits(model, cache, ids)
    twin = copy.deepcopy(cache)
    first = model.generate(torch.cat([ids, draw(1, 3, 1)], 1), past_key_values=cache, max_new_tokens=30, **GREEDY)
    second = model.generate(torch.cat([ids, draw(1, 3, 1)], 1), past_key_values=twin, max_new_tokens=30, **GREEDY)
    assert torch.equal(first, second)


def test_reset_empties_the_cache(model):
    cache = ZipCache(model.config, LOSSLESS)
    first = logits(model, cache, draw(2, 60))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits(model, cache, draw(2, 60)), first)


def test_offload_moves_every_layer_and_keeps_the_tokens(model, monkeypatch):
    from quietgoose.cache.state import LayerState

    moves = []
    inner = LayerState.to
    monkeypatch.setattr(LayerState, "to", lambda self, device: (moves.append(str(device)), inner(self, device))[1])
    cache = ZipCache(model.config, LOSSLESS, offload=True)
    ours = model.generate(draw(1, 40), past_key_values=cache, max_new_tokens=10, **GREEDY)
    assert torch.equal(ours, model.generate(draw(1, 40), max_new_tokens=10, **GREEDY))
    assert moves.count("cpu") == 10 * len(cache.zip_layers)  # the prompt and nine more
    cache.to("cpu")


def test_capacity_is_allocated_at_once_and_gives_the_same_tokens(model):
    cache = ZipCache(model.config, LOSSLESS, capacity=256)
    assert cache.get_max_length() == 256
    ours = model.generate(draw(2, 40), past_key_values=cache, max_new_tokens=60, **GREEDY)
    assert torch.equal(ours, model.generate(draw(2, 40), max_new_tokens=60, **GREEDY))


def test_no_layer_is_compileable_and_repr_tells_bytes(model):
    cache = ZipCache(model.config, LOSSLESS)
    assert "0 columns" in repr(cache)
    logits(model, cache, draw(2, 40))
    assert not cache.is_compileable
    assert cache.is_croppable
    assert cache.is_initialized
    assert cache.nbytes().total > 0
    assert cache.bytes_per_token() > 0
    assert str(cache.nbytes().total) in repr(cache)
    assert "2 rows, 40 columns" in repr(cache)
