"""Conversations under compile_decode: what a captured step cannot follow is refused, padding and ends are remembered."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.cache.decode import compile_decode
from quietgoose.cache.decode_sampling import Sampling
from quietgoose.cache.decode_static import StaticKV
from quietgoose.cache.hf import ZipCache
from quietgoose.cache.policy import Policy
from transformers import DynamicCache

import quietgoose

from .hf_models import GREEDY, LOSSLESS, draw, left_padded, llama

OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return llama()


def made(kind: str, config: Any) -> Any:
    return StaticKV(config, capacity=200) if kind == "static" else ZipCache(config, LOSSLESS, capacity=200)


@pytest.mark.parametrize("kind", ["static", "zip"])
def test_a_turn_that_hides_stored_tokens_is_refused(model, kind) -> None:
    """As padding after an answer that ended early would; the step would see it."""
    ids, mask = left_padded(2, 20, [0, 5])
    decode = compile_decode(model, made(kind, model.config), fuse="none")
    talk = torch.cat([decode.generate(ids, mask, **OPTIONS), draw(2, 6, 1)], 1)
    whole = torch.nn.functional.pad(mask, (0, talk.shape[1] - 20), value=1)
    hiding = whole.clone()
    hiding[0, 26:32] = 0
    with pytest.raises(RecipeError, match=r"CFG-049.*hides 5 columns"):  # the last token of an answer is not stored yet
        decode.generate(talk, hiding, keep_cache=True, **OPTIONS)
    kept = decode.generate(talk, whole, keep_cache=True, **OPTIONS)
    assert torch.equal(kept, decode.generate(talk, whole, **OPTIONS))
    again = decode.generate(talk, hiding, **OPTIONS)
    stock = model.generate(
        talk,
        attention_mask=hiding,
        past_key_values=DynamicCache(config=model.config),
        **(GREEDY | {"max_new_tokens": 12}),
    )
    assert torch.equal(again, stock)


@pytest.mark.parametrize("kind", ["static", "zip"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_next_turn_after_an_answer_that_ended_early(model, kind, padded) -> None:
    """The host looks at ends now and then only; steps made beyond them are taken back, so the conversation is what is stored."""
    ids, mask = left_padded(2, 20, [0, 5]) if padded else left_padded(1, 20, [0])
    stock = model.generate(
        ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config), **(GREEDY | {"max_new_tokens": 30})
    )
    ends = stock[:, 25].tolist()
    decode = compile_decode(model, made(kind, model.config), fuse="none")
    talk = decode.generate(ids, mask if padded else None, max_new_tokens=30, eos_token_id=ends, stop_every=20)
    assert talk.shape[1] < 40
    assert decode.cache.get_seq_length() == talk.shape[1] - 1
    for turn, new in enumerate((9, 30, 1)):
        talk = torch.cat([talk, draw(len(ids), new, turn)], 1)
        mask = torch.nn.functional.pad(mask, (0, talk.shape[1] - mask.shape[1]), value=1)
        given = mask if padded else None
        found = decode.generate(talk, given, max_new_tokens=10, eos_token_id=None, keep_cache=True)
        fresh = DynamicCache(config=model.config)
        stock = model.generate(talk, attention_mask=mask, past_key_values=fresh, **(GREEDY | {"max_new_tokens": 10}))
        assert torch.equal(found, stock), f"turn {turn}"
        talk = found


@pytest.mark.parametrize("kind", ["static", "zip"])
def test_an_answer_that_ends_within_the_capacity_is_returned(model, kind) -> None:
    """Though the host looks at ends every 16 tokens, and there is room for 6."""
    ids = draw(1, 20)
    stock = model.generate(ids, past_key_values=DynamicCache(config=model.config), **(GREEDY | {"max_new_tokens": 6}))
    cache = StaticKV(model.config, capacity=26) if kind == "static" else ZipCache(model.config, LOSSLESS, capacity=26)
    decode = compile_decode(model, cache, fuse="none")
    assert torch.equal(decode.generate(ids, max_new_tokens=30, eos_token_id=int(stock[0, -1])), stock)
    with pytest.raises(RecipeError, match="capacity"):
        decode.generate(ids, max_new_tokens=30, eos_token_id=None)


def test_steps_beyond_the_end_are_never_packed(model) -> None:
    """Taken out of what is packed, they would leave arenas that nothing goes into any more, with new ones behind them."""
    policy = Policy(salient_ratio=0.6, flush_every=8)
    decode = compile_decode(model, ZipCache(model.config, policy, capacity=200), fuse="none")
    ids = draw(1, 20)
    free = decode.generate(ids, max_new_tokens=16, eos_token_id=None)
    for end in (22, 25, 28, 30):  # the first flush comes when 8 tokens are stored
        found = decode.generate(ids, max_new_tokens=16, eos_token_id=int(free[0, end]))
        assert torch.equal(found, free[:, : found.shape[1]])
        assert decode.cache.get_seq_length() == found.shape[1] - 1
        assert not any(layer.state.history.segments for layer in decode.cache.zip_layers)


def test_a_cache_with_hidden_columns_is_refused(model) -> None:
    cache = ZipCache(model.config, LOSSLESS)
    with torch.no_grad():
        model(draw(1, 30), past_key_values=cache)
        mask = torch.ones(1, 34, dtype=torch.long)
        mask[0, 3:9] = 0
        model(draw(1, 4, 1), attention_mask=mask, past_key_values=cache)
    assert cache.zip_layers[0].hidden
    decode = compile_decode(model, cache, fuse="none")
    with pytest.raises(RecipeError, match="CFG-049"):
        decode.resume(1, 34)
    cache.reset()
    assert decode.generate(draw(1, 20), **OPTIONS).shape == (1, 32)


def test_padding_of_a_cache_that_was_filled_elsewhere_is_known(model, tmp_path) -> None:
    """Restored and continued without a mask: positions still leave the padding out."""
    ids, mask = left_padded(2, 40, [0, 9])
    cache = ZipCache(model.config, LOSSLESS)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    cache.save(tmp_path / "cache")
    talk = torch.cat([ids, draw(2, 5, 1)], 1)
    whole = torch.nn.functional.pad(mask, (0, 5), value=1)
    found = [
        compile_decode(model, ZipCache.load(tmp_path / "cache", model.config), fuse="none").generate(
            talk, given, keep_cache=True, **OPTIONS
        )
        for given in (None, whole, torch.ones_like(whole))
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])  # what was stored as padding stays padding


def test_what_does_not_fit_together_is_refused(model) -> None:
    fresh, few = llama(), llama(num_hidden_layers=2)
    with pytest.raises(RecipeError, match="CFG-066"):  # before: the prompt was not stored, and nobody said so
        compile_decode(fresh, ZipCache(copy.deepcopy(fresh.config)), fuse="none").generate(draw(1, 30), **OPTIONS)
    with pytest.raises(RecipeError, match="ZipCache of 2 layers"):
        compile_decode(model, ZipCache(few.config), fuse="none").generate(draw(1, 30), **OPTIONS)
    with pytest.raises(RecipeError, match="capacity is 50"):
        compile_decode(model, ZipCache(model.config, capacity=100), capacity=50, fuse="none")
    with pytest.raises(RecipeError, match="modle"):
        compile_decode(model, fuse="none").generate(draw(1, 9), max_new_tokens=2, eos_token_id="modle")
    for bad in ({"temperature": "hot"}, {"top_k": 2.5}, {"top_p": True}):
        with pytest.raises(RecipeError, match=r"CFG-046.*must be a"):
            Sampling(**bad)
    with pytest.raises(RecipeError, match="CFG-043"):
        StaticKV(model.config, capacity=2.5)  # type: ignore[arg-type]


def test_weights_that_moved_are_noticed() -> None:
    """A captured step would read the old ones, or memory that is somebody else's by now."""
    model = llama()
    first = compile_decode(model, made("zip", model.config), fuse="layer")  # joins projections
    second = compile_decode(model, made("zip", model.config), fuse="none")
    second.generate(draw(1, 20), **OPTIONS)
    second._graph = graph = object()  # as after a capture
    second.reset()
    second.prefill(draw(1, 20))
    assert second._graph is graph
    first.close()  # gives the model's linears storage of their own
    second.reset()
    second.prefill(draw(1, 20))
    assert second._graph is None
    joined = compile_decode(model, made("zip", model.config), fuse="layer")
    model.load_state_dict(llama(seed=1).state_dict(), assign=True)
    with pytest.raises(RecipeError, match=r"CFG-047.*replaced"):
        joined.prefill(draw(1, 20))
    joined.close()


def test_what_the_guide_says() -> None:
    """The guide's block, as it stands, with a model and prompts of a user."""
    guide = Path(__file__).resolve().parents[2] / "docs" / "guide.md"
    (block,) = [
        part for part in re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL) if "compile_decode" in part
    ]
    for cache in ("ZipCache", "StaticKV"):
        model, (input_ids, attention_mask) = llama(), left_padded(2, 20, [0, 5])
        names = {"quietgoose": quietgoose, "torch": torch, "model": model, "input_ids": input_ids}
        names |= {"attention_mask": attention_mask, "more_ids": draw(2, 7)}
        code = block.replace("4096", "256").replace('fuse="layer"', 'fuse="none"')
        if cache == "StaticKV":
            code = code.replace(
                'quietgoose.ZipCache(model.config, policy="quality", capacity=256)',
                "StaticKV(model.config, capacity=256)",
            )
        exec(compile(code, "guide", "exec"), names)
        assert names["talk"].shape == (2, 20 + 64 + 7 + 64)
        assert type(names["cache"]).__name__ == cache


@pytest.mark.parametrize("shape", [(2, 9), (1, 10), (10,)])
def test_a_mask_of_another_shape_is_refused(model, shape) -> None:
    decode = compile_decode(model, capacity=64, fuse="none")
    with pytest.raises(RecipeError, match=r"CFG-047.*one shape"):
        decode.generate(draw(2, 10), torch.ones(shape, dtype=torch.long), max_new_tokens=2)
    with pytest.raises(RecipeError, match="CFG-047"):
        decode.prefill(draw(2, 10)[0])
