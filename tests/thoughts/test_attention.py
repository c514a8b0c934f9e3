"""The switch leaves a model as it was, and what thoughts can not follow is refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from quietgoose.base.errors import QuietGooseError, RecipeError
from quietgoose.cache.hf import ZipCache
from quietgoose.thoughts.attention import NAME, PrefixState, restore, switch, thought_inputs
from quietgoose.thoughts.branch import language_head
from quietgoose.thoughts.generation import check_model
from quietgoose.thoughts.prefix import run_prefix
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from .naive import SHAPE, llama, packed, qwen2

ROWS = packed([[6, 5], [9]], 12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, qwen2])
def test_a_switched_model_is_the_model(make, attention) -> None:
    model = make()
    model.set_attn_implementation(attention)
    ids = ROWS.tokens_BT
    mask = (ROWS.segment_BT > 0).long()
    want, want_text = model(ids, attention_mask=mask).logits, model.generate(ids, max_new_tokens=6, do_sample=False)
    switch(model)
    switch(model)
    assert model.config._attn_implementation == NAME
    assert torch.equal(model(ids, attention_mask=mask).logits, want)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), want_text)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids, attention_mask=mask).logits, want)
    restore(model)
    assert model.config._attn_implementation == attention
    assert torch.equal(model(ids, attention_mask=mask).logits, want)
    restore(model)


def test_prefix_and_plain_calls_alternate() -> None:
    model = llama()
    want = model(ROWS.tokens_BT).logits
    run_prefix(model, ROWS)
    assert torch.equal(model(ROWS.tokens_BT).logits, want)


@pytest.mark.parametrize("cache_first", [True, False])
def test_beside_a_zip_cache(cache_first) -> None:
    """Either switch may come first; generation over the cache is what it is without thoughts."""
    ids = ROWS.tokens_BT[:1, :6]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    model = llama(head_dim=64)
    want = model.generate(ids, past_key_values=ZipCache(model.config), **options)
    model = llama(head_dim=64)
    cache = ZipCache(model.config) if cache_first else None
    prefix = run_prefix(model, ROWS)
    cache = cache or ZipCache(model.config)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), want)
    assert torch.equal(run_prefix(model, ROWS).hidden_BLD, prefix.hidden_BLD)


def test_a_closed_prefix_keeps_nothing_that_is_recomputed() -> None:
    model, state = llama(), PrefixState()
    switch(model)
    inputs = thought_inputs(state, torch.device("cpu"))
    model.base_model(ROWS.tokens_BT, **inputs)
    keys, values = state.close()
    assert len(keys) == len(values) == 2
    model.base_model(ROWS.tokens_BT, **inputs)
    assert state.kept == {}


def test_sliding_windows_are_refused() -> None:
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)).eval()
    with pytest.raises(RecipeError, match="CFG-103"):
        run_prefix(model, ROWS)


def test_a_model_that_keeps_keywords_to_itself_is_refused() -> None:
    model = llama()
    layer = model.base_model.layers[1]
    own = layer.self_attn.forward
    layer.self_attn.forward = lambda *args, thought_branch=None, **kwargs: own(*args, **kwargs)
    with pytest.raises(RecipeError, match=r"CFG-103.*thought_branch"):
        run_prefix(model, ROWS)


def test_dropout_is_refused() -> None:
    model = llama(attention_dropout=0.1).train()
    with pytest.raises(QuietGooseError, match="THT-002"):
        run_prefix(model, ROWS)


def test_dropout_outside_the_attention_is_refused_too() -> None:
    """Else the thoughts are drawn by one network and differentiated through another."""
    shape = {"n_embd": 24, "n_layer": 1, "n_head": 4, "vocab_size": 23, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.1)).train()
    with pytest.raises(QuietGooseError, match=r"THT-002.*drops 0\.1"):
        run_prefix(model, ROWS)
    assert run_prefix(model.eval(), ROWS).hidden_BLD.isfinite().all()


def test_what_is_no_causal_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="CFG-103"):
        switch(nn.Linear(2, 2))


def test_a_head_with_more_than_a_product_is_refused() -> None:
    model = llama()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(RecipeError, match="CFG-103"):
        language_head(model)


def test_an_encoder_is_not_switched_into_something_wrong() -> None:
    """Its attention is not causal, so its own prefix pass must not be taken for one."""
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    with pytest.raises(RecipeError, match="CFG-103"):
        run_prefix(BertModel(BertConfig(**shape, vocab_size=23)).eval(), ROWS)


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
LENGTH_DEPENDENT = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "longrope": {**LONG, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("kind", list(LENGTH_DEPENDENT))
def test_rotary_positions_that_depend_on_the_length_are_refused(kind: str) -> None:
    """With them a key's rotation changes once the sequence grows, so a prefix and the branches behind it would not fit."""
    model = llama(rope_parameters=LENGTH_DEPENDENT[kind])
    with pytest.raises(RecipeError, match=f"QG-CFG-105 .*type '{kind}'.*thoughts need a base with fixed ones"):
        run_prefix(model, ROWS)
    model.config.rope_parameters = {"full_attention": LENGTH_DEPENDENT[kind], "other": {"rope_type": "default"}}
    with pytest.raises(RecipeError, match="QG-CFG-105"):
        check_model(model)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_fixed_rotary_positions_are_taken(kind: str) -> None:
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16, **more}
    model = llama(rope_parameters=rope)
    check_model(model)
    run_prefix(model, ROWS)
