"""Branches equal ordinary forwards of the same text; they see neither the future nor each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from quietgoose.kernels.testing import assert_close
from quietgoose.thoughts.anchors import choose_anchors
from quietgoose.thoughts.branch import look_ahead
from quietgoose.thoughts.config import ThoughtConfig, preset
from quietgoose.thoughts.parameters import ThoughtParameters
from quietgoose.thoughts.policy import ModelPolicy
from quietgoose.thoughts.prefix import run_prefix
from quietgoose.thoughts.rollout import rollout
from quietgoose.thoughts.scoring import score_thoughts
from quietgoose.thoughts.types import Thoughts

from .naive import VOCABULARY, TestRows, document_of, llama, naive_branch, packed, policy_of, qwen2

CONFIG = preset("default", tokens=3, lookahead=3, samples=2)
ROWS = packed([[6, 5], [9], []], 12)
LEFT_PADDED = TestRows(*(getattr(packed([[9], [4, 5]], 12), f.name).roll(3, 1) for f in dataclasses.fields(TestRows)))


def thoughts_of(policy: ModelPolicy, rows: TestRows, config: ThoughtConfig = CONFIG, seed: int = 0) -> Thoughts:
    tensors = policy.tensors()
    with torch.no_grad():
        prefix = run_prefix(policy.model, rows)
    anchors = choose_anchors(config, rows, seed=0, step=0, one_document=prefix.one_document)
    return rollout(policy, tensors, prefix, rows, anchors, config, torch.Generator().manual_seed(seed))


def ahead_of(policy: ModelPolicy, rows: TestRows, thoughts: Thoughts, config: ThoughtConfig = CONFIG):
    with torch.no_grad():
        prefix = run_prefix(policy.model, rows)
        thought = policy.parameters.tensors()
        return look_ahead(policy.model, thought, prefix, rows, thoughts, config.lookahead)


@pytest.mark.parametrize(
    "make", [llama, qwen2, lambda: llama(num_key_value_heads=4), lambda: llama(num_key_value_heads=1)]
)
@pytest.mark.parametrize("rows", [ROWS, packed([[9], [9]], 9), LEFT_PADDED])
def test_hidden_states_equal_an_ordinary_forward(make, rows) -> None:
    policy = policy_of(make(), CONFIG)
    thoughts = thoughts_of(policy, rows)
    ahead = ahead_of(policy, rows, thoughts)
    thought = policy.parameters.tensors()
    for row, slot in thoughts.anchors.valid_BA.nonzero().tolist():
        index = int(thoughts.anchors.index_BA[row, slot])
        for sample in range(CONFIG.samples):
            tokens = thoughts.tokens_BAST[row, slot, sample].tolist()
            _, want = naive_branch(policy.model, thought, rows, row, index, tokens, CONFIG.lookahead)
            got = ahead.branch_BASMD[row, slot, sample, : want.shape[0]]
            assert_close(f"branch {row} {index} {sample}", got, want, limit=1e-5)


def test_prefix_equals_the_document_alone() -> None:
    model = llama()
    prefix = run_prefix(model, ROWS)
    for row in (0, 1):
        for start, stop in {document_of(ROWS, row, i) for i in range(12) if ROWS.segment_BT[row, i] > 0}:
            want = model.base_model(ROWS.tokens_BT[row : row + 1, start:stop]).last_hidden_state[0]
            assert_close("prefix", prefix.hidden_BLD[row, start:stop], want)


@pytest.mark.parametrize("cache", ["exact", "int8", "int4"])
@pytest.mark.parametrize("change", [4, 7])
def test_the_future_changes_no_thought(change, cache) -> None:
    """Tokens after the anchor, in its document or another, leave tokens and probabilities of its thoughts alone, also where
    the thoughts' keys and values are rounded."""
    config = dataclasses.replace(CONFIG, rollout_cache=cache)
    policy = policy_of(llama(), config)
    other = ROWS.tokens_BT.clone()
    other[:, change:] = (other[:, change:] + 5) % VOCABULARY
    first, second = (thoughts_of(policy, rows, config) for rows in (ROWS, ROWS.with_tokens(other)))
    before = first.anchors.valid_BA & (first.anchors.index_BA < change)
    assert before.sum() > 3
    assert torch.equal(first.tokens_BAST[before], second.tokens_BAST[before])
    assert torch.equal(first.logprob_BAST[before], second.logprob_BAST[before])
    after = first.anchors.valid_BA & (first.anchors.index_BA >= change)
    assert not torch.equal(first.logprob_BAST[after], second.logprob_BAST[after])


def test_the_future_reaches_what_is_scored_only_through_teacher_forcing() -> None:
    """Position j of the lookahead reads x[i+1 .. i+j] and nothing later."""
    policy = policy_of(llama(), CONFIG)
    thoughts = thoughts_of(policy, ROWS)
    other = ROWS.tokens_BT.clone()
    other[:, 3] = (other[:, 3] + 1) % VOCABULARY
    first, second = ahead_of(policy, ROWS, thoughts), ahead_of(policy, ROWS.with_tokens(other), thoughts)
    talk = CONFIG.tokens + 1
    anchor_one = first.branch_BASMD[1, 1], second.branch_BASMD[1, 1]  # anchor 1: x[3] enters as its second true token
    assert torch.equal(anchor_one[0][:, : talk + 2], anchor_one[1][:, : talk + 2])
    assert not torch.equal(anchor_one[0][:, talk + 2], anchor_one[1][:, talk + 2])


def test_samples_do_not_see_each_other() -> None:
    policy = policy_of(llama(), CONFIG)
    thoughts = thoughts_of(policy, ROWS)
    tokens = thoughts.tokens_BAST.clone()
    tokens[:, :, 1] = (tokens[:, :, 1] + 3) % VOCABULARY
    first, second = ahead_of(policy, ROWS, thoughts), ahead_of(policy, ROWS, thoughts.with_tokens(tokens))
    assert torch.equal(first.branch_BASMD[:, :, 0], second.branch_BASMD[:, :, 0])
    assert not torch.equal(first.branch_BASMD[:, :, 1], second.branch_BASMD[:, :, 1])


def test_anchors_do_not_see_each_other() -> None:
    policy = policy_of(llama(), CONFIG)
    thoughts = thoughts_of(policy, ROWS)
    tokens = thoughts.tokens_BAST.clone()
    tokens[:, 2] = (tokens[:, 2] + 3) % VOCABULARY
    first, second = ahead_of(policy, ROWS, thoughts), ahead_of(policy, ROWS, thoughts.with_tokens(tokens))
    others = [a for a in range(tokens.shape[1]) if a != 2]
    assert torch.equal(first.branch_BASMD[:, others], second.branch_BASMD[:, others])


def test_rows_keep_their_places() -> None:
    """A wrong repeat or reshape at batch > 1 mixes rows: scoring rows one at a time must give the same."""
    policy = policy_of(llama(), CONFIG)
    thoughts = thoughts_of(policy, ROWS)
    whole = ahead_of(policy, ROWS, thoughts)
    for row in range(2):
        one = slice(row, row + 1)
        alone = TestRows(*(getattr(ROWS, f.name)[one] for f in dataclasses.fields(ROWS)))
        part = Thoughts(
            thoughts.tokens_BAST[one], thoughts.logprob_BAST[one],
            dataclasses.replace(
                thoughts.anchors,
                **{n: getattr(thoughts.anchors, n)[one] for n in ("index_BA", "start_BA", "valid_BA", "key_BA")},
            ),
        )  # fmt: skip
        valid = part.anchors.valid_BA[0]
        got = ahead_of(policy, alone, part).branch_BASMD[0, valid]
        assert_close("row alone", got, whole.branch_BASMD[row, valid], limit=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_weight_zero_the_mixed_loss_is_the_base_loss(dtype) -> None:
    config = dataclasses.replace(CONFIG, initial_weight=0.0)
    model = llama().to(dtype)
    policy = ModelPolicy(model, ThoughtParameters.from_token(model, 5, config, seed=0))
    thoughts = thoughts_of(policy, ROWS, config)
    tensors = policy.tensors()
    with torch.no_grad():
        prefix = run_prefix(model, ROWS)
    ahead = ahead_of(policy, ROWS, thoughts, config)
    assert torch.equal(ahead.mixed_BASJD, ahead.base_BAJD.unsqueeze(2).expand_as(ahead.mixed_BASJD).float())
    scores = score_thoughts(policy, tensors, prefix, ROWS, thoughts, config)
    torch.testing.assert_close(
        scores.mixed_BASJ, scores.base_BAJ.unsqueeze(2).expand_as(scores.mixed_BASJ), rtol=2e-6, atol=2e-6
    )
    assert float(scores.base_BAJ.sum()) > 1


def test_scores_in_chunks_equal_scores_at_once() -> None:
    policy = policy_of(llama(), CONFIG)
    thoughts = thoughts_of(policy, ROWS)
    tensors = policy.tensors()
    with torch.no_grad():
        prefix = run_prefix(policy.model, ROWS)
    whole = score_thoughts(policy, tensors, prefix, ROWS, thoughts, CONFIG)
    parts = score_thoughts(policy, tensors, prefix, ROWS, thoughts, CONFIG, chunk=5)
    for name in ("base_BAJ", "mixed_BASJ", "weight_BASJ"):
        valid = thoughts.anchors.valid_BA
        assert_close(name, getattr(parts, name)[valid], getattr(whole, name)[valid])
