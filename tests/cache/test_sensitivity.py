"""The layers that suffer most from packing are found, measured against a plain forward, and can be left at 16 bits."""

from __future__ import annotations

import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.cache import ZipCache, layer_sensitivity, sensitive_layers

from .hf_models import draw, llama

TWO_BITS = {"salient_ratio": 0.5, "flush_every": 24}


def of_layers(share: tuple[float, ...]):
    """A model whose layers' attention weighs as much as told."""
    model = llama(num_hidden_layers=len(share))
    for layer, factor in zip(model.model.layers, share, strict=True):
        layer.self_attn.o_proj.weight.data *= factor
    return model


def test_the_layers_whose_packing_costs_most_are_named() -> None:
    model, ids = of_layers((0.0, 1.0, 0.02, 1.0)), draw(2, 90)
    loss = layer_sensitivity(model, ids, TWO_BITS, continuation=20)
    assert list(loss) == [0, 1, 2, 3]
    assert loss[0] == 0.0
    assert 0.0 < loss[2] < 0.1 * min(loss[1], loss[3])
    assert sensitive_layers(model, ids, 2, TWO_BITS, continuation=20) == (1, 3)
    named = sensitive_layers(model, ids, 3, {**TWO_BITS, "sixteen_bit_layers": (1,)}, continuation=20)
    assert named == (1, 2, 3), "a layer the policy leaves at 16 bits is measured all the same"
    assert ZipCache(model.config, {**TWO_BITS, "sixteen_bit_layers": named}).policy.sixteen_bit_layers == named


def test_the_divergence_is_the_one_of_the_predictions() -> None:
    """Against a forward without any cache, for the plain side, and the packed one token by token."""
    model, ids = llama(num_hidden_layers=2), draw(1, 70)
    found = layer_sensitivity(model, ids, TWO_BITS, continuation=10)[1]
    with torch.no_grad():
        wanted = model(ids).logits[:, 60:].log_softmax(-1)
        cache = ZipCache(model.config, {**TWO_BITS, "sixteen_bit_layers": [0]})
        model(ids[:, :60], past_key_values=cache)
        packed = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(60, 70)], 1)
    by_hand = (wanted.exp() * (wanted - packed.log_softmax(-1))).sum(-1).mean()
    assert found > 1e-4
    assert found == pytest.approx(float(by_hand), rel=2e-2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: sensitive_layers(m, draw(1, 40), 0, continuation=8), r"count = 0: 1 to 2"),
        (lambda m: sensitive_layers(m, draw(1, 40), 3, continuation=8), r"count = 3: 1 to 2"),
        (lambda m: sensitive_layers(m, draw(1, 40), 3, continuation=99), r"count = 3: 1 to 2"),  # before any forward
        (lambda m: layer_sensitivity(m, draw(1, 40), continuation=40), r"continuation = 40: 1 to 39"),
        (lambda m: layer_sensitivity(m, draw(1, 40)[0], continuation=8), r"shape \(40,\): \[B, T\]"),
    ],
)
def test_impossible_questions_are_refused(call, words: str) -> None:
    with pytest.raises(RecipeError, match=rf"CFG-050.*{words}"):
        call(llama(num_hidden_layers=2))
