"""What thoughts.html is filled with: the numbers of generation, at every token of a text."""

from __future__ import annotations

import math

import pytest
import torch
from quietgoose.base.errors import DataError
from quietgoose.evaluation.thoughts_trace import thought_text, thought_trace
from quietgoose.thoughts.config import ThoughtConfig
from quietgoose.thoughts.generation import ThoughtGeneration, ThoughtState, attach_thoughts
from quietgoose.thoughts.parameters import ThoughtParameters
from quietgoose.thoughts.types import PAUSE

from .conftest import tiny_llama

T, J = 3, 2


def thinking_model(**changes):
    torch.manual_seed(0)
    model = tiny_llama(0).double()
    width = model.config.hidden_size
    config = ThoughtConfig(**({"tokens": T, "lookahead": J, "anchors": "random", "share": 0.5} | changes))
    parameters = ThoughtParameters(torch.randn(width), torch.randn(width), config, 0)
    with torch.no_grad():
        for tensor in parameters.parameters():
            tensor += 0.1 * torch.randn_like(tensor)
    return attach_thoughts(model, ThoughtState(parameters, config))


@pytest.mark.parametrize(("samples", "cache"), [(1, "exact"), (3, "exact"), (3, "int4")])
def test_generated_tokens_have_the_numbers_they_were_generated_with(tokenizer, samples, cache):
    """Also where training kept thoughts in few bits, which generation does not."""
    model = thinking_model(rollout_cache=cache)
    ids = tokenizer("two words", return_tensors="pt")["input_ids"]

    def settings():
        random = torch.Generator().manual_seed(4)
        return ThoughtGeneration(samples=samples, temperature=samples - 1.0, generator=random, return_thoughts=True)

    out = model.generate(
        ids,
        thoughts=settings(),
        output_logits=True,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    before = model.config._attn_implementation
    trace = thought_trace(model, tokenizer, out.sequences, settings(), new_from=ids.shape[1], label="x")
    assert model.config._attn_implementation == before
    with torch.no_grad():
        plain = model(out.sequences).logits[0].log_softmax(-1)
    texts = [tokenizer.decode([token]) for token in out.sequences[0].tolist()]
    assert list(trace.tokens) == texts
    assert (trace.label, trace.new_from) == ("x", ids.shape[1])
    assert trace.base_nll[0] is None
    assert trace.thoughts[0] == []
    for number, logits in enumerate(out.logits):
        place = ids.shape[1] + number
        token = int(out.sequences[0, place])
        assert trace.mixed_nll[place] == pytest.approx(-float(logits[0].log_softmax(-1)[token]), abs=1e-4)
        assert trace.base_nll[place] == pytest.approx(-float(plain[place - 1, token]), abs=1e-4)
        assert trace.weight[place] == pytest.approx(float(out.thoughts.weight_BNS[0, number].mean()), abs=1e-4)
        for sample, thought in enumerate(trace.thoughts[place]):
            assert thought.text == tokenizer.decode(out.thoughts.tokens_BNST[0, number, sample].tolist())
            logprob = float(out.thoughts.logprob_BNST[0, number, sample].sum())
            assert thought.logprob == pytest.approx(logprob, abs=1e-4)
        assert len(trace.thoughts[place]) == samples
    assert all(math.isfinite(t.reward) for sampled in trace.thoughts for t in sampled)


def test_reward_is_what_the_thought_saves_over_the_lookahead(tokenizer):
    """With one thought and a lookahead of one token it is the gain; the last scored token has no further one."""
    ids = tokenizer("abcde", return_tensors="pt")["input_ids"]
    one = thought_trace(thinking_model(lookahead=1), tokenizer, ids, ThoughtGeneration())
    two = thought_trace(thinking_model(lookahead=2), tokenizer, ids, ThoughtGeneration())
    for place in range(1, 5):
        gain = one.base_nll[place] - one.mixed_nll[place]
        assert one.thoughts[place][0].reward == pytest.approx(gain, abs=1e-5)
    assert two.thoughts[4][0].reward == pytest.approx(one.thoughts[4][0].reward, abs=1e-5)
    assert two.thoughts[1][0].reward != pytest.approx(one.thoughts[1][0].reward, abs=1e-3)


def test_chunks_of_anchors_change_nothing(tokenizer, monkeypatch):
    from quietgoose.evaluation import thoughts_trace

    model = thinking_model()
    ids = tokenizer("a somewhat longer text", return_tensors="pt")["input_ids"]

    def made():
        settings = ThoughtGeneration(samples=2, temperature=1.0, generator=torch.Generator().manual_seed(1))
        return thought_trace(model, tokenizer, ids, settings)

    whole = made()
    monkeypatch.setattr(thoughts_trace, "ANCHORS_AT_ONCE", 5)
    pieces = made()
    assert [[t.text for t in sampled] for sampled in pieces.thoughts] == [[t.text for t in s] for s in whole.thoughts]
    assert pieces.mixed_nll[1:] == pytest.approx(whole.mixed_nll[1:], abs=1e-5)


def test_a_text_without_a_second_token_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"\(1, 1\)"):
        thought_trace(thinking_model(), tokenizer, torch.tensor([[3]]), ThoughtGeneration())


def test_pauses_are_spelt_out(tokenizer):
    ids = tokenizer("ab")["input_ids"]
    assert thought_text(tokenizer, ids) == "ab"
    assert thought_text(tokenizer, [PAUSE, PAUSE]) == "<pause><pause>"
