"""Anchors and counts: a pure function of labels, seed, step and row number, equal to counting by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from quietgoose.base.errors import QuietGooseError
from quietgoose.thoughts.anchors import anchors_in_row, choose_anchors, scored, term_counts
from quietgoose.thoughts.config import ThoughtConfig, preset
from quietgoose.thoughts.gradient import Stream, thought_loss
from quietgoose.thoughts.prefix import document_mask, document_starts

from .naive import TestRows, document_of, llama, packed, policy_of

ROWS = packed([[6, 5], [9], [], [1, 1, 4]], 12, unlabelled=1)
BASE = preset("default", tokens=3, lookahead=3, samples=2)
CONFIGS = {
    "every": BASE,
    "every third": dataclasses.replace(BASE, anchors="every_n", every=3),
    "half": dataclasses.replace(BASE, anchors="random", share=0.5),
    "at most two": dataclasses.replace(BASE, limit=2),
    "entropy": dataclasses.replace(BASE, anchors="entropy", share=0.4),
    "entropy, few": dataclasses.replace(BASE, anchors="entropy", share=1.0, limit=2),
}


def by_hand(rows: TestRows, config: ThoughtConfig, row: int, index: int) -> list[int]:
    """The offsets j whose label anchor `index` is scored on."""
    if rows.segment_BT[row, index] == 0:
        return []
    _, stop = document_of(rows, row, index)
    return [j for j in range(config.lookahead) if index + j < stop and rows.labels_BT[row, index + j] != -100]


def chosen(config: ThoughtConfig, rows: TestRows, step: int = 0, ids: torch.Tensor | None = None):
    entropy = torch.rand(rows.tokens_BT.shape, generator=torch.Generator().manual_seed(step))
    return choose_anchors(config, rows, seed=1, step=step, row_ids=ids, entropy_BL=entropy)


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_equal_counting_by_hand(name) -> None:
    config = CONFIGS[name]
    for step in range(5):
        anchors = chosen(config, ROWS, step)
        tokens = thoughts = 0
        for row, slot in anchors.valid_BA.nonzero().tolist():
            offsets = by_hand(ROWS, config, row, int(anchors.index_BA[row, slot]))
            assert offsets
            tokens += len(offsets)
            thoughts += 1
        want = [int((ROWS.labels_BT != -100).sum()), 2 * tokens, 2 * 3 * thoughts, 2 * tokens]
        assert term_counts(config, ROWS, seed=1, step=step).tolist() == want
        assert thoughts > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_anchors_are_candidates_in_order(name) -> None:
    config = CONFIGS[name]
    anchors = chosen(config, ROWS)
    starts = document_starts(ROWS.segment_BT)
    assert anchors.count == anchors_in_row(config, 12)
    assert anchors.consecutive_from is None
    assert bool((anchors.index_BA[~anchors.valid_BA] == -1).all())
    for row in range(4):
        index = anchors.index_BA[row, anchors.valid_BA[row]]
        assert index.tolist() == sorted(set(index.tolist()))
        assert torch.equal(anchors.start_BA[row, anchors.valid_BA[row]], starts[row, index])
    if name == "every third":
        assert bool((anchors.index_BA[anchors.valid_BA] % 3 == 0).all())


def test_random_shares_change_with_step_and_row_not_with_layout() -> None:
    config = CONFIGS["half"]
    ids = torch.tensor([40, 41, 42, 43])
    first = chosen(config, ROWS, 0, ids)
    assert not torch.equal(first.index_BA, chosen(config, ROWS, 1, ids).index_BA)
    order = [2, 0, 3, 1]
    mixed = TestRows(*(getattr(ROWS, f.name)[order] for f in dataclasses.fields(ROWS)))
    assert torch.equal(chosen(config, mixed, 0, ids[order]).index_BA, first.index_BA[order])
    twins = packed([[12], [12]], 12)
    assert chosen(config, twins, 0, torch.tensor([3, 9])).index_BA.unique(dim=0).shape[0] == 2
    found = torch.stack([chosen(config, ROWS, step, ids).index_BA[1] for step in range(40)])
    assert set(found.unique().tolist()) >= set(range(1, 8))  # every candidate is taken at some step


def test_entropy_takes_the_most_uncertain() -> None:
    config = dataclasses.replace(BASE, anchors="entropy", share=0.4)
    rows = packed([[12]], 12)
    entropy = torch.arange(12.0)[None]
    anchors = choose_anchors(config, rows, seed=0, step=0, entropy_BL=entropy)
    # the last three positions lack a label in the lookahead of 3, so that counts stay known
    assert anchors.index_BA[anchors.valid_BA].tolist() == [5, 6, 7, 8]
    with pytest.raises(QuietGooseError, match="THT-003"):
        choose_anchors(config, rows, seed=0, step=0)


@pytest.mark.parametrize("name", ["entropy", "half"])
def test_the_loss_counts_what_was_promised(name) -> None:
    config = dataclasses.replace(CONFIGS[name], control="none")
    policy = policy_of(llama(), config)
    loss = thought_loss(policy, ROWS, config, torch.ones(4), Stream(1, 4))
    counts = term_counts(config, ROWS, seed=1, step=4)
    from quietgoose.thoughts.stats import SUMS

    found = dict(zip(SUMS, loss.stats.tolist()))
    assert [found["scored"], found["thought_tokens"]] == counts[1:3].tolist()


def test_no_thoughts_counts_base_only() -> None:
    config = dataclasses.replace(BASE, control="no_thoughts")
    assert term_counts(config, ROWS, seed=0, step=0).tolist() == [float((ROWS.labels_BT != -100).sum()), 0, 0, 0]
    policy = policy_of(llama(), config)
    loss = thought_loss(policy, ROWS, config, torch.ones(4), Stream(1, 4))
    assert loss.thoughts is None
    assert loss.sums[1:].tolist() == [0, 0, 0]
    assert loss.sums[0] == loss.total


def test_scored_labels_stay_in_the_document() -> None:
    labels, valid = scored(ROWS, 3)
    for row in range(4):
        for index in range(12):
            offsets = by_hand(ROWS, BASE, row, index)
            assert valid[row, index].nonzero().flatten().tolist() == offsets
            for j in offsets:
                assert labels[row, index, j] == ROWS.labels_BT[row, index + j]


def test_masks() -> None:
    assert document_mask(torch.ones(2, 5, dtype=torch.int32)) is None
    mask = document_mask(torch.tensor([[1, 1, 2, 0]]))
    want = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert mask[0, 0].int().tolist() == want
    assert document_starts(torch.tensor([[1, 1, 2, 2, 0], [0, 0, 1, 1, 1]])).tolist() == [
        [0, 0, 2, 2, 4],
        [0, 0, 2, 2, 2],
    ]


def test_a_limit_above_the_row_is_no_limit() -> None:
    config = dataclasses.replace(BASE, limit=99)
    assert anchors_in_row(config, 12) == 12
    limited, free = chosen(config, ROWS), chosen(BASE, ROWS)
    rows = [a.index_BA[row, a.valid_BA[row]].tolist() for row in range(4) for a in (limited, free)]
    assert rows[::2] == rows[1::2]
