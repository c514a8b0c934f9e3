"""Forks read their parent's packed tokens, own their tails, and freeze it while they live."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.cache import LayerState, Policy

from .state_tools import LOSSLESS_SINKS, PACKED, SCALING, TAIL, Plain, Source, check_same, filled, go_on, make


@pytest.mark.parametrize("policy", [PACKED, TAIL], ids=["packed", "tail"])
def test_children_are_copies_and_the_parent_stays(policy: Policy) -> None:
    parent, twin = filled(policy), filled(policy)
    before = parent.tensors()
    child = parent.fork(3)
    twin.repeat(3)
    for mine, theirs in zip(child.logical(), twin.logical()):
        assert torch.equal(mine, theirs)
    one, other = go_on(child, Source(2), 20), go_on(twin, Source(2), 20)
    assert child.seq_length == twin.seq_length
    assert (one - other).abs().max() < 0.3  # selection may differ once a child has flushed: its saliency sees less
    early_one, early_other = filled(policy).fork(3), filled(policy)
    early_other.repeat(3)
    assert torch.allclose(go_on(early_one, Source(2), 2), go_on(early_other, Source(2), 2), atol=1e-6)
    for name, tensor in parent.tensors().items():
        assert torch.equal(tensor, before[name]), name


def test_parent_is_frozen_while_children_live() -> None:
    parent = filled(LOSSLESS_SINKS)
    family = [parent.fork(2)]
    family.append(family[0].fork(2))
    query, key, value = Source(2)(2, 1)
    actions = (
        lambda: parent.append(key, value), lambda: parent.prefill(query, key, value, None, scaling=1.0),
        lambda: parent.crop(1), lambda: parent.select(torch.tensor([0])), lambda: parent.repeat(2), parent.reset,
        parent.flush, lambda: parent.to("meta"), lambda: family[0].crop(1),
    )  # fmt: skip
    for action in actions:
        with pytest.raises(RecipeError, match="frozen while"):
            action()
    del family[0]
    gc.collect()
    with pytest.raises(RecipeError, match="frozen while 1 fork"):
        parent.crop(1)
    family.clear()
    gc.collect()
    parent.append(key, value)


def test_forks_of_forks_and_rows_of_children() -> None:
    source, plain = Source(3), Plain(2)
    parent = make(LOSSLESS_SINKS)
    query, key, value = source(2, 17)
    parent.prefill(query, key, value, None, scaling=SCALING)
    plain.extend(key, value, None)

    def grow(state: LayerState, steps: int) -> None:
        for _ in range(steps):
            query, key, value = source(state.batch, 1)
            state.append(key, value)
            plain.extend(key, value, None)
            out = state.attend(query, scaling=SCALING)
            assert torch.allclose(out, plain.attend(query), atol=2e-5)

    child = parent.fork(2)
    plain.change(lambda t: t.repeat_interleave(2, 0))
    grow(child, 12)
    grandchild = child.fork(2)
    plain.change(lambda t: t.repeat_interleave(2, 0))
    grow(grandchild, 12)
    check_same(grandchild, plain)
    grandchild.crop(30)
    plain.crop(30)
    check_same(grandchild, plain)
    grow(grandchild, 9)
    index = torch.tensor([7, 0, 3])
    grandchild.select(index)
    plain.change(lambda t: t[index])
    check_same(grandchild, plain)
    grow(grandchild, 7)
    restored = LayerState.from_tensors(None, grandchild.tensors(), json.loads(json.dumps(grandchild.meta())))
    check_same(restored, plain)
    grow(restored, 9)


def test_fork_of_many_costs_little_more_than_one() -> None:
    policy = Policy(salient_ratio=0.6, flush_every=16)
    parent, source = make(policy), Source(4)
    query, key, value = source(2, 900)
    parent.prefill(query, key, value, None, scaling=SCALING)
    child = parent.fork(8)
    assert child.nbytes().total < 1.1 * parent.nbytes().total
    assert child.nbytes().shared > 0.9 * parent.nbytes().total
