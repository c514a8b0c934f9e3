"""The control `shuffled`: never the own thought, always the same place in another text, and what cannot be exchanged is not scored."""

from __future__ import annotations

import pytest
import torch
from quietgoose.thoughts.anchors import choose_anchors
from quietgoose.thoughts.config import preset
from quietgoose.thoughts.prefix import run_prefix
from quietgoose.thoughts.rollout import rollout
from quietgoose.thoughts.scoring import gap_sums, score_thoughts, shuffled
from quietgoose.thoughts.stats import summarise
from quietgoose.thoughts.types import Thoughts

from .naive import TestRows, llama, packed, policy_of

CONFIG = preset("default", tokens=2, lookahead=1, samples=1)
NOTHING = -1


def marked(rows: TestRows, anchors: str = "every") -> Thoughts:
    """Thoughts whose tokens say where they come from: row * 1000 + position."""
    chosen = choose_anchors(preset("default", tokens=2, anchors=anchors, every=2, share=0.6), rows, seed=0, step=0)
    where_BA = torch.arange(chosen.index_BA.shape[0])[:, None] * 1000 + chosen.index_BA
    tokens = where_BA[..., None, None].expand(*where_BA.shape, 1, 2)
    return Thoughts(tokens, torch.zeros(tokens.shape), chosen)


def places(rows: TestRows) -> dict[int, tuple[int, int]]:
    """Mark of every position -> (its document in the batch, where the document begins)."""
    found = {}
    for row, segments in enumerate(rows.segment_BT.tolist()):
        for position, segment in enumerate(segments):
            found[row * 1000 + position] = (row * 100 + segment, segments.index(segment))
    return found


@pytest.mark.parametrize("anchors", ["every", "every_n", "random"])
@pytest.mark.parametrize("lengths", [[[12], [12]], [[12], [12], [12]], [[6, 5], [9], [3, 3, 4]], [[12], [5], []]])
def test_thoughts_come_from_the_same_place_in_another_document(lengths, anchors) -> None:
    rows = packed(lengths, 12)
    before = marked(rows, anchors)
    after = shuffled(before)
    where = places(rows)
    numbers: dict[int, int] = {}
    seen: dict[int, int] = {}
    for mark in before.tokens_BAST[..., 0, 0][before.anchors.valid_BA].tolist():
        document = where[mark][0]
        numbers[mark] = seen[document] = seen.get(document, NOTHING) + 1
    able = after.anchors.valid_BA
    assert not bool((able & ~before.anchors.valid_BA).any())
    for row, slot in before.anchors.valid_BA.nonzero().tolist():
        own, other = (int(x.tokens_BAST[row, slot, 0, 0]) for x in (before, after))
        others = [m for m in numbers if where[m][0] != where[own][0] and numbers[m] == numbers[own]]
        assert bool(able[row, slot]) == bool(others)
        assert other in others if others else other == own
    assert torch.equal(after.anchors.index_BA, before.anchors.index_BA)


@pytest.mark.parametrize("lengths", [[[12]], [[12], []], [[2]]])
def test_one_document_has_nothing_to_exchange(lengths) -> None:
    assert not bool(shuffled(marked(packed(lengths, 12))).anchors.valid_BA.any())


def test_groups_and_slots_decide() -> None:
    """Rows 0 and 1 are choices of one question: both take their thoughts from row 2, which has one place less."""
    before = marked(packed([[4], [4], [4]], 4))
    slot = torch.tensor([[0, 1, 2, 0]] * 2 + [[0, 2, 9, 9]])
    group = torch.tensor([0, 0, 1])[:, None].expand(3, 4)
    after = shuffled(before, slot, group)
    assert after.anchors.valid_BA.tolist() == [[True, False, True, False]] * 2 + [[True, True, False, False]]
    assert after.tokens_BAST[:, :3, 0, 0].tolist() == [[2000, 1, 2001], [2000, 1001, 2001], [0, 2, 2002]]


@torch.no_grad()
def test_the_gap_is_over_exchanged_anchors_only() -> None:
    rows = packed([[12], [7]], 12)
    policy = policy_of(llama(), CONFIG)
    tensors, prefix = policy.tensors(), run_prefix(policy.model, rows)
    anchors = choose_anchors(CONFIG, rows, seed=0, step=0)
    thoughts = rollout(policy, tensors, prefix, rows, anchors, CONFIG, torch.Generator().manual_seed(0))
    own, other = (score_thoughts(policy, tensors, prefix, rows, t, CONFIG) for t in (thoughts, shuffled(thoughts)))
    found = summarise(gap_sums(own, other))
    able = other.valid_BAJ[..., 0]
    assert int(able.sum()) == 12
    for name, scores in (("own_gain", own), ("shuffled_gain", other)):
        assert found[name] == pytest.approx(float(scores.reward_BAS[..., 0][able].mean()), rel=1e-5)
    assert found["own_gain"] != found["shuffled_gain"]
    one = packed([[12]], 12)
    lone = choose_anchors(CONFIG, one, seed=0, step=0)
    prefix = run_prefix(policy.model, one)
    thoughts = rollout(policy, tensors, prefix, one, lone, CONFIG, torch.Generator().manual_seed(0))
    own, other = (score_thoughts(policy, tensors, prefix, one, t, CONFIG) for t in (thoughts, shuffled(thoughts)))
    assert "own_minus_shuffled" not in summarise(gap_sums(own, other)), "left out, not passed off as shuffled"
