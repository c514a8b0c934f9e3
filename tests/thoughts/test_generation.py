"""Thinking while generating: equal to a loop without a cache and to the training path, and where it thinks."""

from __future__ import annotations

import pytest
import torch
from quietgoose.cache.hf import ZipCache
from quietgoose.routing.expert import Expert, ExpertCard, SiteAdapter
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.model import attach
from quietgoose.routing.sites import find_sites
from quietgoose.thoughts.anchors import choose_anchors
from quietgoose.thoughts.branch import look_ahead
from quietgoose.thoughts.policy import ModelPolicy
from quietgoose.thoughts.prefix import run_prefix
from quietgoose.thoughts.rollout import rollout
from quietgoose.thoughts.types import PAUSE
from torch import Tensor
from transformers import DynamicCache

from .generation_tools import (
    GREEDY,
    LOSSLESS,
    Forwards,
    T,
    as_rows,
    padded,
    prompts,
    slow_step,
    slow_text,
    thinking_model,
    thoughts,
)


@pytest.fixture(scope="module")
def model():
    return thinking_model()


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "GPT2"])
def test_cached_and_batched_equals_a_loop_without_a_cache(name):
    model, ids = thinking_model(name), prompts()
    out = model.generate(ids, thoughts=thoughts(), output_logits=True, **GREEDY)
    for row in range(2):
        made, thought, weight = slow_text(model, ids[row : row + 1], 6)
        assert out.sequences[row, 5:].tolist() == made
        assert out.thoughts.tokens_BNST[row, :, 0].tolist() == thought
        assert out.thoughts.weight_BNS[row, :, 0].tolist() == pytest.approx(weight, abs=1e-5)
        logits, _, _ = slow_step(model, out.sequences[row : row + 1, :-1])
        torch.testing.assert_close(out.logits[-1][row], logits.float(), atol=1e-5, rtol=1e-5)
    assert out.thoughts.thought_BN.all()


def test_routed_experts_think_as_in_a_loop_without_a_cache():
    model, random = thinking_model(dtype=torch.float32), torch.Generator().manual_seed(1)
    sites = find_sites(model, ["all-linear"])

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    adapters = [
        {s.name: SiteAdapter(draw(2, s.in_features), 0.3 * draw(s.out_features, 2), 1.0) for s in sites}
        for _ in range(3)
    ]
    targets = tuple(sorted({site.name.rsplit(".", 1)[-1] for site in sites}))
    experts = [
        Expert(ExpertCard(f"e{i}", 2, 2.0, targets), each).with_gates({s.name: draw(s.in_features) for s in sites})
        for i, each in enumerate(adapters)
    ]
    plain = model.generate(prompts(), thoughts=True, **GREEDY)
    routed = attach(model, ExpertLibrary(experts), "phatgoose", 2)
    out = routed.generate(prompts(), thoughts=thoughts(), **GREEDY)
    assert not torch.equal(out.sequences, plain)
    for row in range(2):
        made, thought, _ = slow_text(routed, prompts()[row : row + 1], 6)
        assert out.sequences[row, 5:].tolist() == made
        assert out.thoughts.tokens_BNST[row, :, 0].tolist() == thought


def test_thinking_changes_the_text(model):
    ids = prompts()
    assert not torch.equal(model.generate(ids, **GREEDY), model.generate(ids, thoughts=True, **GREEDY))


@pytest.mark.parametrize("cache", ["dynamic", "zip"])
@pytest.mark.parametrize("samples", [1, 2])
def test_left_padding_changes_nothing(cache, samples):
    model = thinking_model(dtype=torch.float32 if cache == "zip" else torch.float64)

    def generate(ids: Tensor, mask: Tensor):
        settings = thoughts(samples=samples, temperature=samples - 1.0, generator=torch.Generator().manual_seed(2))
        kept = ZipCache(model.config, LOSSLESS) if cache == "zip" else DynamicCache(config=model.config)
        return model.generate(ids, attention_mask=mask, thoughts=settings, past_key_values=kept, **GREEDY)

    ids, mask = padded(prompts(3, 4), [0, 2, 5])
    out = generate(ids, mask)
    nothing = torch.zeros(3, 3, dtype=torch.int64)
    further = generate(torch.cat([nothing, ids], dim=1), torch.cat([nothing, mask], dim=1))
    assert torch.equal(out.sequences, further.sequences[:, 3:])
    assert torch.equal(out.thoughts.tokens_BNST, further.thoughts.tokens_BNST)
    for row, start in enumerate([0, 2, 5] if samples == 1 else [0]):  # what is drawn depends on the row's number
        alone = generate(ids[row : row + 1, start:], mask[row : row + 1, start:])
        assert out.sequences[row, start:].tolist() == alone.sequences[0].tolist()
        assert torch.equal(out.thoughts.tokens_BNST[row], alone.thoughts.tokens_BNST[0])


# the training path -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False])
def test_training_path_has_the_same_thoughts_and_predictions(greedy):
    model = thinking_model(samples=2, lookahead=1)
    state = model.thought_state
    temperature = 0.0 if greedy else 1.0
    settings = thoughts(samples=1 if greedy else 2, temperature=temperature, generator=torch.Generator().manual_seed(3))
    out = model.generate(prompts(), thoughts=settings, output_logits=True, **GREEDY)
    policy, rows = ModelPolicy(model, state.parameters), as_rows(out.sequences)
    with torch.no_grad():
        prefix = run_prefix(model, rows)
        anchors = choose_anchors(state.config, rows, seed=0, step=0, one_document=True)
        found = rollout(
            policy,
            policy.tensors(),
            prefix,
            rows,
            anchors,
            state.config,
            torch.Generator().manual_seed(3),
            greedy=greedy,
        )
        ahead = look_ahead(model, policy.tensors().thought, prefix, rows, found, 1)
        logits_BASV = model.lm_head(ahead.mixed_BASJD[..., 0, :])
    made = slice(4, 10)  # the last prompt token, and every new one but the last
    samples = slice(0, 1 if greedy else 2)
    assert torch.equal(found.tokens_BAST[:, made, samples], out.thoughts.tokens_BNST)
    torch.testing.assert_close(found.logprob_BAST[:, made, samples].float(), out.thoughts.logprob_BNST.float())
    torch.testing.assert_close(ahead.weight_BASJ[:, made, samples, 0], out.thoughts.weight_BNS)
    mean = logits_BASV[:, made, samples].log_softmax(-1).exp().mean(2).log()
    said = torch.stack(out.logits, dim=1).log_softmax(-1)
    torch.testing.assert_close(said, mean.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("control", ["pause", "random_thoughts"])
def test_a_control_thinks_as_it_was_trained(control):
    model = thinking_model(control=control, banned=(0, 1, 2))
    settings = thoughts(temperature=1.0, generator=torch.Generator().manual_seed(3))
    out = model.generate(prompts(), thoughts=settings, **GREEDY)
    policy, rows = ModelPolicy(model, model.thought_state.parameters), as_rows(out.sequences)
    with torch.no_grad():
        config = thoughts(temperature=1.0).applied_to(model.thought_state.config)
        anchors = choose_anchors(config, rows, seed=0, step=0, one_document=True)
        prefix = run_prefix(model, rows)
        found = rollout(policy, policy.tensors(), prefix, rows, anchors, config, torch.Generator().manual_seed(3))
    assert torch.equal(found.tokens_BAST[:, 4:10], out.thoughts.tokens_BNST)
    assert bool((out.thoughts.tokens_BNST == PAUSE).all()) == (control == "pause")


# where it thinks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [False, True])
def test_never_is_plain_generation_token_for_token(model, sample):
    ids, mask = padded(prompts(3, 4), [0, 2, 5])
    options = GREEDY | {"do_sample": sample, "attention_mask": mask}
    found = []
    for settings in ({}, {"thoughts": {"think_at": "never"}}):
        torch.manual_seed(5)
        with Forwards(model) as forwards:
            found.append((model.generate(ids, **settings, **options), forwards.count))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] == 6


def test_entropy_decides_row_by_row():
    model, ids = thinking_model(), prompts(2)
    logits = model(ids).logits[:, -1].detach()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    between = float(entropy.mean())
    one = GREEDY | {"max_new_tokens": 1}
    out = model.generate(ids, thoughts=thoughts(think_at=f"entropy>{between:.6f}"), **one)
    assert out.thoughts.thought_BN[:, 0].tolist() == (entropy > between).tolist()
    plain, every = model.generate(ids, **one), model.generate(ids, thoughts=True, **one)
    assert torch.equal(out.sequences, torch.where((entropy > between)[:, None], every, plain))
    assert torch.equal(
        model.generate(ids, thoughts=thoughts(think_at="entropy>99"), **GREEDY).sequences, model.generate(ids, **GREEDY)
    )
    assert torch.equal(
        model.generate(ids, thoughts={"think_at": "entropy>0"}, **GREEDY), model.generate(ids, thoughts=True, **GREEDY)
    )


@pytest.mark.parametrize("kind", ["tensor", "function"])
def test_a_mask_decides_row_by_row(model, kind):
    ids = prompts(2)
    think_at = torch.zeros(2, 10, dtype=torch.bool)
    think_at[0], think_at[1, 5] = True, True
    wanted = think_at if kind == "tensor" else lambda ids_BL: think_at[:, ids_BL.shape[1] - 1]
    out = model.generate(ids, thoughts=thoughts(think_at=wanted), **GREEDY)
    assert torch.equal(out.thoughts.thought_BN, think_at[:, 4:10])
    assert torch.equal(out.sequences[0], model.generate(ids[:1], thoughts=True, **GREEDY)[0])
    nothing = ~out.thoughts.thought_BN
    assert out.thoughts.weight_BNS[nothing].isnan().all()
    assert not out.thoughts.weight_BNS[~nothing].isnan().any()
    second = model.generate(ids[1:], max_new_tokens=1, do_sample=False, pad_token_id=0)
    second = torch.cat([second, torch.tensor([[slow_text(model, second, 1)[0][0]]])], dim=1)
    second = model.generate(second, **(GREEDY | {"max_new_tokens": 4}))
    assert torch.equal(out.sequences[1:], second)


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_thinking_token_costs_t_plus_one_forwards(model, length, tokens):
    with Forwards(model) as forwards:
        model.generate(prompts(2, length), thoughts=thoughts(tokens=tokens), **GREEDY)
    assert forwards.count == int(length > 1) + 6 * (tokens + 1)  # the prompt but its last token is read once


def test_forwards_of_tokens_that_are_not_thought_about(model):
    think_at = torch.zeros(1, 10, dtype=torch.bool)
    think_at[0, 6] = True
    with Forwards(model) as forwards:
        model.generate(prompts(2), thoughts={"think_at": think_at}, **GREEDY)
    assert forwards.count == 5 + T + 1
    with Forwards(model) as forwards:
        model.generate(prompts(2), thoughts={"think_at": "entropy>99"}, **GREEDY)
    assert forwards.count == 1 + 6
