"""Thinking while generating: caches keep no trace, and what transformers does around the decoding stays."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.cache.hf import ZipCache
from quietgoose.cache.policy import Policy
from quietgoose.thoughts.config import ThoughtConfig
from quietgoose.thoughts.generation import ThoughtGeneration, ThoughtState, attach_thoughts
from quietgoose.thoughts.parameters import ThoughtParameters
from quietgoose.thoughts.prefix import run_prefix
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
)

from .generation_tools import (
    GREEDY,
    LOSSLESS,
    as_rows,
    padded,
    prompts,
    thinking_model,
    thoughts,
)


@pytest.fixture(scope="module")
def model():
    return thinking_model()


# caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2])
def test_no_trace_in_the_cache(model, samples):
    cache = DynamicCache(config=model.config)
    settings = ThoughtGeneration(samples=samples, temperature=1.0)
    out = model.generate(prompts(), thoughts=settings, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
    assert out.past_key_values is cache
    assert cache.get_seq_length() == 5 + 6 - 1  # as without thoughts: the last token was not read
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(out.sequences[:, :-1], past_key_values=plain)
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)


@pytest.mark.parametrize(("samples", "think_at"), [(1, "every"), (2, "every"), (1, "entropy>2.5")])
def test_zip_cache_gives_the_same_text_and_packs_no_thought(samples, think_at):
    model = thinking_model(dtype=torch.float32)
    options = GREEDY | {"max_new_tokens": 40}

    def generate(cache):
        random = torch.Generator().manual_seed(1)
        settings = thoughts(samples=samples, temperature=samples - 1.0, think_at=think_at, generator=random)
        return model.generate(prompts(2, 30), thoughts=settings, past_key_values=cache, **options)

    stock = generate(DynamicCache(config=model.config))
    cache = ZipCache(model.config, LOSSLESS)
    ours = generate(cache)
    assert torch.equal(ours.sequences, stock.sequences)
    assert torch.equal(ours.thoughts.tokens_BNST, stock.thoughts.tokens_BNST)
    assert think_at == "every" or 0 < ours.thoughts.thought_BN.float().mean() < 1
    assert cache.get_seq_length() == 30 + 40 - 1
    for layer, theirs in zip(cache.zip_layers, stock.past_key_values.layers, strict=True):
        assert layer.state.packed_length > 40
        key, value, valid = layer.state.logical()
        assert valid.all()
        torch.testing.assert_close(key, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(value, theirs.values, atol=1e-4, rtol=1e-4)


def test_a_quantised_cache_thinks_and_keeps_the_length(model):
    model = thinking_model(dtype=torch.float32)
    cache = ZipCache(model.config, Policy(flush_every=16))
    out = model.generate(prompts(2, 40), thoughts=True, past_key_values=cache, **GREEDY)
    assert out.shape == (2, 46)
    assert cache.get_seq_length() == 45


def test_a_tail_too_small_for_a_thought_is_refused():
    model = thinking_model(dtype=torch.float32)
    with pytest.raises(RecipeError, match=r"CFG-076.*flush_every >= 6"):
        model.generate(
            prompts(), thoughts=True, past_key_values=ZipCache(model.config, Policy(flush_every=5)), **GREEDY
        )
    cache = ZipCache(model.config, Policy(flush_every=6))
    assert model.generate(prompts(), thoughts=True, past_key_values=cache, **GREEDY).shape == (2, 11)


@pytest.mark.parametrize("whole", [True, False])
def test_a_cache_goes_on(model, whole):
    ids, mask = padded(prompts(2, 4), [0, 3])
    cache, four = DynamicCache(config=model.config), GREEDY | {"max_new_tokens": 4}
    first = model.generate(ids, attention_mask=mask, thoughts=True, past_key_values=cache, **four)
    more = torch.cat([mask, torch.ones(2, 4, dtype=torch.int64)], dim=1)
    new = first if whole else first[:, -1:]
    second = model.generate(new, attention_mask=more, thoughts=True, past_key_values=cache, **four)
    at_once = model.generate(ids, attention_mask=mask, thoughts=True, **(GREEDY | {"max_new_tokens": 8}))
    assert torch.equal(second[:, -4:], at_once[:, -4:])


# what transformers does around it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("think_at", ["every", "entropy>0", torch.ones(1, 10, dtype=torch.bool)])
def test_finished_rows_are_padded_and_do_not_think(model, think_at):
    ids = prompts(2)
    free = model.generate(ids, thoughts=True, **GREEDY)
    eos = int(free[0, 5 + 2])
    assert eos not in free[0, 5:7]
    row = free[1, 5:].tolist()
    stop = row.index(eos) + 1 if eos in row else 6
    out = model.generate(ids, thoughts=thoughts(think_at=think_at), **(GREEDY | {"eos_token_id": eos}))
    width = max(3, stop)
    assert out.sequences[0, 5:].tolist() == free[0, 5:8].tolist() + [0] * (width - 3)
    assert out.sequences[1, 5 : 5 + stop].tolist() == row[:stop]
    assert out.thoughts.thought_BN[0].tolist() == [True] * 3 + [False] * (width - 3)
    assert out.thoughts.thought_BN[1, :stop].all()


class Always(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids)
        return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor([self.token]), 0.0)


def test_logits_processors_see_the_text_without_thoughts(model):
    always = Always(7)
    out = model.generate(prompts(), thoughts=True, logits_processor=LogitsProcessorList([always]), **GREEDY)
    assert out[:, 5:].tolist() == [[7] * 6] * 2
    assert [seen.shape[1] for seen in always.seen] == [5, 6, 7, 8, 9, 10]
    banned = model.generate(prompts(), thoughts=True, suppress_tokens=[int(t) for t in out.unique()], **GREEDY)
    assert not set(banned[:, 5:].flatten().tolist()) & set(out.unique().tolist())


def test_stopping_criteria_and_streamer(model):
    class Heard:
        def __init__(self) -> None:
            self.values: list[Tensor] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.values.append(value)

        def end(self) -> None:
            self.ended = True

    heard = Heard()
    ids = prompts(1)
    stop = [lambda input_ids, scores: torch.tensor([input_ids.shape[1] >= 8])]
    out = model.generate(ids, thoughts=True, stopping_criteria=stop, streamer=heard, **GREEDY)
    assert out.shape == (1, 8)
    assert torch.cat([value.flatten() for value in heard.values]).tolist() == out[0].tolist()
    assert heard.ended


def test_sampling_repeats_with_the_seed(model):
    ids, options = prompts(), GREEDY | {"do_sample": True, "top_k": 0, "temperature": 1.5, "num_return_sequences": 3}
    settings = thoughts(temperature=1.0)

    def generate(seed: int):
        torch.manual_seed(seed)
        return model.generate(ids, thoughts=settings, output_scores=True, **options)

    first, second, other = generate(1), generate(1), generate(2)
    assert first.sequences.shape == (6, 11)
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(first.thoughts.tokens_BNST, second.thoughts.tokens_BNST)
    assert not torch.equal(first.sequences, other.sequences)
    assert len(first.scores) == 6
    assert first.logits is None


def test_a_generator_fixes_the_thoughts_alone(model):
    def generate(seed: int):
        settings = thoughts(temperature=1.0, generator=torch.Generator().manual_seed(seed))
        return model.generate(prompts(), thoughts=settings, **GREEDY).thoughts.tokens_BNST

    assert torch.equal(generate(1), generate(1))
    assert not torch.equal(generate(1), generate(2))


def test_shapes_of_what_is_returned(model):
    out = model.generate(prompts(), thoughts=thoughts(tokens=2, samples=3, temperature=1.0), **GREEDY)
    assert out.sequences.shape == (2, 11)
    assert out.thoughts.tokens_BNST.shape == out.thoughts.logprob_BNST.shape == (2, 6, 3, 2)
    assert out.thoughts.weight_BNS.shape == (2, 6, 3)
    assert out.thoughts.thought_BN.shape == (2, 6)
    assert (out.thoughts.logprob_BNST <= 0).all()
    hidden = model.generate(prompts(), thoughts=True, return_dict_in_generate=True, **GREEDY)
    assert not hasattr(hidden, "thoughts")
    assert isinstance(model.generate(prompts(), thoughts=True, **GREEDY), Tensor)


def test_banned_tokens_are_not_thought():
    free = thinking_model().generate(prompts(), thoughts=thoughts(), **GREEDY).thoughts.tokens_BNST
    banned = tuple(free.unique().tolist())
    model = thinking_model(banned=banned)
    for settings in (thoughts(), thoughts(temperature=2.0, samples=4)):
        tokens = model.generate(prompts(), thoughts=settings, **GREEDY).thoughts.tokens_BNST
        assert not set(tokens.unique().tolist()) & set(banned)


def test_after_a_training_pass_a_zip_cache_still_works():
    model = thinking_model(dtype=torch.float32)
    plain = model.generate(prompts(), thoughts=True, past_key_values=ZipCache(model.config, LOSSLESS), **GREEDY)
    with torch.no_grad():
        run_prefix(model, as_rows(prompts()))  # leaves its own attention switched on
    again = model.generate(prompts(), thoughts=True, past_key_values=ZipCache(model.config, LOSSLESS), **GREEDY)
    assert torch.equal(plain, again)
    cache = ZipCache(model.config, LOSSLESS)
    with torch.no_grad():
        run_prefix(model, as_rows(prompts()))
    assert torch.equal(plain, model.generate(prompts(), thoughts=True, past_key_values=cache, **GREEDY))
    assert not any(layer.blind for layer in cache.zip_layers)


def test_a_copy_of_the_model_is_its_own(model):
    twin = copy.deepcopy(model)
    assert torch.equal(
        twin.generate(prompts(), thoughts=True, **GREEDY), model.generate(prompts(), thoughts=True, **GREEDY)
    )
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    assert not torch.equal(
        twin.generate(prompts(), thoughts=True, **GREEDY), model.generate(prompts(), thoughts=True, **GREEDY)
    )
    assert not any("thought" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "num_beams=1"),
        ({"prompt_lookup_num_tokens": 2}, "decodes greedily or by sampling"),
        ({"use_cache": False}, "needs a cache"),
        ({"cache_implementation": "static"}, "cannot take thoughts back"),
        ({"inputs_embeds": torch.zeros(2, 5, 32, dtype=torch.float64)}, "leave out inputs_embeds"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "leave out output_attentions"),
        ({"custom_generate": print}, "does not go with custom_generate"),
        ({"thoughts": 3}, "thoughts is 3"),
        ({"thoughts": {"thinkat": "every"}}, "Did you mean 'think_at'"),
        ({"thoughts": {"tokens": 0}}, "tokens is 0"),
        ({"thoughts": {"samples": 2}}, "are all the same"),
        ({"thoughts": {"temperature": -1.0}}, "temperature is -1.0"),
        ({"thoughts": {"think_at": "sometimes"}}, "think_at is 'sometimes'"),
        ({"thoughts": {"think_at": "entropy>"}}, "think_at is 'entropy>'"),
        ({"thoughts": {"think_at": torch.ones(2, 10)}}, "float32 tensor"),
        ({"thoughts": {"think_at": torch.ones(2, 9, dtype=torch.bool)}}, "at least 10"),
        ({"thoughts": {"think_at": torch.ones(3, 10, dtype=torch.bool)}}, "2 rows"),
        ({"thoughts": {"think_at": lambda ids: torch.ones(1, dtype=torch.bool)}}, "(1,)"),
    ],
)
def test_what_cannot_be_is_refused(model, options, words):
    options = {"thoughts": True} | options
    with pytest.raises(RecipeError) as caught:
        model.generate(prompts() if "inputs_embeds" not in options else None, **(GREEDY | options))
    assert words in str(caught.value)


def test_models_that_cannot_think_are_refused():
    parameters = ThoughtParameters(torch.zeros(32), torch.zeros(32), ThoughtConfig(), 0)
    state = ThoughtState(parameters, ThoughtConfig())
    with pytest.raises(RecipeError, match="decoder-only"):
        attach_thoughts(torch.nn.Linear(2, 2), state)
    capped = thinking_model("Llama")
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(RecipeError, match="final_logit_softcapping"):
        attach_thoughts(capped, state)


@pytest.mark.parametrize("control", ["no_thoughts", "pause"])
def test_a_control_that_learned_no_thoughts_does_not_think(control: str):
    model = thinking_model()
    state = model.thought_state
    attach_thoughts(model, ThoughtState(state.parameters, replace(state.config, control=control)))
    if control == "pause":
        assert model.generate(prompts(), thoughts=True, **GREEDY).shape == (2, 11)
        return
    with pytest.raises(RecipeError, match=r"QG-CFG-097 .*cannot think.*no_thoughts or same_compute"):
        model.generate(prompts(), thoughts=True, **GREEDY)
    assert model.generate(prompts(), **GREEDY).shape == (2, 11)
