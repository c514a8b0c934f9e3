"""Packing and the order of batches: nothing lost, nothing doubled, the same for any number of processes."""

import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quietgoose.base.errors import DataError
from quietgoose.train.data.loader import FIELDS, StepData, Terms, share_of
from quietgoose.train.data.packing import IGNORE, best_fit, pack
from quietgoose.train.data.rows import RowReport
from quietgoose.train.data.tokens import TokenSet

PAD, LENGTH = 999, 16


def documents(count, seed=0, longest=LENGTH + 1):
    """Documents of random length whose ids are all different, so that each can be found again."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, longest + 1, count)
    trained = (random.random(lengths.sum()) < 0.5).astype(np.uint8)
    ends = lengths.cumsum()
    trained[ends - 1] = 1
    return TokenSet(np.arange(lengths.sum(), dtype=np.int32) + 1000, trained, ends, RowReport(taken=count))


def expert(name, count=40, seed=0):
    return pack(name, documents(count, seed), LENGTH, PAD, seed=3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_equals_its_plain_twin(lengths):
    bins: list[list[int]] = []
    left: list[int] = []
    touched: list[int] = []
    for turn, item in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [b for b in range(len(bins)) if left[b] >= lengths[item]]
        if fitting:
            best = min(fitting, key=lambda b: (left[b], -touched[b]))  # of equals the one filled last
            bins[best].append(item)
            left[best] -= lengths[item]
            touched[best] = turn
        else:
            bins.append([item])
            left.append(20 - lengths[item])
            touched.append(turn)
    found = best_fit(np.array(lengths, dtype=np.int64), 20)
    assert sorted(i for b in found for i in b) == list(range(len(lengths)))
    assert found == bins


def test_every_document_is_in_one_row_whole_shifted_and_numbered():
    source = documents(60)
    packed = pack("e", source, LENGTH, PAD, seed=0)
    found = {}
    for row in range(packed.rows):
        segments = packed.segment_BT[row]
        used = int(packed.token_B[row])
        assert (segments[:used] > 0).all()
        assert (segments[used:] == 0).all()
        assert (np.diff(segments[:used]) >= 0).all()
        assert (packed.tokens_BT[row, used:] == PAD).all()
        assert (packed.labels_BT[row, used:] == IGNORE).all()
        for number in range(1, segments.max() + 1):
            here = segments == number
            assert (packed.position_BT[row, here] == np.arange(here.sum())).all()
            found[int(packed.tokens_BT[row, here][0])] = (
                packed.tokens_BT[row, here],
                packed.labels_BT[row, here],
            )
    assert len(found) == 60
    for index in range(60):
        ids, trained = source.document(index)
        tokens, labels = found[int(ids[0])]
        assert (tokens == ids[:-1]).all()
        assert (labels == np.where(trained[1:] == 1, ids[1:], IGNORE)).all()
    assert packed.label_B.sum() == sum(source.document(i)[1][1:].sum() for i in range(60))
    assert packed.summary()["fill"] > 0.9


def test_packing_is_deterministic_and_depends_on_the_seed():
    source = documents(60)
    one, two, other = (pack("e", source, LENGTH, PAD, seed=s) for s in (1, 1, 2))
    assert one.hash() == two.hash() != other.hash()


def rows_of(batches):
    """expert -> first tokens of its rows, in the order of the step; empty rows left out."""
    found: dict[int, list[int]] = {}
    for batch in batches:
        for row in range(len(batch.expert_B)):
            if batch.segment_BT[row].any():
                found.setdefault(int(batch.expert_B[row]), []).append(int(batch.tokens_BT[row, 0]))
    return found


def test_batches_are_a_pure_function_of_the_step():
    data, again = (StepData([expert("a"), expert("b", 30, 1)], 3, 4, seed=5) for _ in range(2))
    forward = [data.step(s) for s in range(8)]
    backward = [again.step(s) for s in (7, 2, 3, 2)]  # out of order, with and without the batch made ahead
    for found in backward:
        wanted = forward[found.step]
        assert torch.equal(found.count_E, wanted.count_E)
        for x, y in zip(found.micro, wanted.micro, strict=True):
            assert all(torch.equal(getattr(x, f), getattr(y, f)) for f in (*FIELDS, "expert_B"))
    assert rows_of(forward[0].micro) != rows_of(forward[1].micro)


def test_the_next_step_is_made_while_this_one_is_used(monkeypatch):
    """By another thread, before anybody asks for it, and only once."""
    made: list[tuple[int, bool]] = []
    begun = {step: threading.Event() for step in range(5)}
    make = StepData._make

    def seen(self, step):
        made.append((step, threading.current_thread() is threading.main_thread()))
        begun[step].set()
        return make(self, step)

    monkeypatch.setattr(StepData, "_make", seen)
    data = StepData([expert("a")], 3, 4, seed=5)
    for step in range(3):
        assert data.step(step).step == step
        assert begun[step + 1].wait(10), "nobody makes the next step"
    data.close()
    assert made == [(step, False) for step in range(4)]


def test_an_expert_sees_the_same_rows_alone_and_with_others():
    a, b = expert("a"), expert("b", 30, 1)
    together, alone = StepData([b, a], 3, 4, seed=5), StepData([a], 3, 2, seed=5)
    for step in range(20):
        t, s = together.step(step), alone.step(step)
        assert rows_of(t.micro)[1] == rows_of(s.micro)[0]
        assert t.count_E[1] == s.count_E[0]


def test_every_epoch_sees_every_row_once_in_another_order():
    a = expert("a")
    data = StepData([a], 1, 1, seed=0)
    epochs = [[int(data.row_numbers(0, e * a.rows + s)[0]) for s in range(a.rows)] for e in range(3)]
    assert all(sorted(epoch) == list(range(a.rows)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    twins = StepData([a, expert("twin")], 1, 1, seed=0)
    orders = [[int(twins.row_numbers(e, s)[0]) for s in range(a.rows)] for e in (0, 1)]
    assert orders[0] == epochs[0]
    assert orders[0] != orders[1]  # experts do not march in step
    wide = StepData([a], 3 * a.rows, 4, seed=0)  # one step of three epochs
    assert wide.row_numbers(0, 0).tolist() == [n for epoch in epochs for n in epoch]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_rows", [1, 4, 100])
def test_ranks_share_a_step_without_loss(world, micro_rows):
    experts = [expert("a"), expert("b", 30, 1), expert("c", 20, 2)]
    whole = StepData(experts, 3, 100, seed=5).step(4)
    ranks = [StepData(experts, 3, micro_rows, seed=5, rank=r, world=world).step(4) for r in range(world)]
    shapes = {(len(r.micro), *(tuple(m.tokens_BT.shape) for m in r.micro)) for r in ranks}
    assert len(shapes) == 1
    assert all(len(m.tokens_BT) <= micro_rows for m in ranks[0].micro)
    wanted = {e: sorted(rows) for e, rows in rows_of(whole.micro).items()}
    assert {e: sorted(rows) for e, rows in rows_of([m for r in ranks for m in r.micro]).items()} == wanted
    labels = torch.zeros(3, dtype=torch.float64)
    for micro in (m for r in ranks for m in r.micro):
        counts = (micro.labels_BT != IGNORE).sum(1).double()
        labels.index_add_(0, micro.expert_B, counts)
        empty = micro.segment_BT.sum(1) == 0
        assert (counts[empty] == 0).all()
    assert all(torch.equal(r.count_E, labels) for r in ranks)
    assert all(r.tokens == sum(int((m.segment_BT > 0).sum()) for q in ranks for m in q.micro) for r in ranks)


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 20))
def test_share_holds_all_rows_in_the_fewest_micro_batches(total, micro_rows, world):
    share = share_of(total, micro_rows, world)
    assert share.rows <= micro_rows
    assert share.micros * share.rows * world >= total
    assert share.micros == math.ceil(math.ceil(total / world) / micro_rows)
    assert share.micros * (share.rows - 1) * world < total


def test_types_and_hash():
    a = expert("a")
    data = StepData([a], 2, 2, seed=0)
    batch = data.step(0).micro[0]
    assert {getattr(batch, f).dtype for f in ("tokens_BT", "labels_BT", "position_BT", "expert_B")} == {torch.int64}
    assert (batch.segment_BT.dtype, data.step(0).count_E.dtype) == (torch.int32, torch.float64)
    assert data.hash() == StepData([a], 2, 1, seed=0, rank=1, world=2).hash()
    others = [
        StepData([a], 2, 2, seed=1), StepData([a], 3, 2, seed=0), StepData([expert("a", 41)], 2, 2, seed=0),
        StepData([expert("b")], 2, 2, seed=0), StepData([a, expert("b")], 2, 2, seed=0),
    ]  # fmt: skip
    assert len({data.hash(), *(other.hash() for other in others)}) == 6


def test_no_source_and_no_label_are_refused():
    with pytest.raises(DataError, match=r"DATA-003"):
        StepData([], 1, 1, seed=0)
    with pytest.raises(DataError, match=r"DATA-003 train.micro_rows is 0"):
        StepData([expert("a")], 1, 0, seed=0)
    source = documents(3)
    masked = TokenSet(source.tokens_P, np.zeros_like(source.trained_P), source.ends, source.report)
    with pytest.raises(DataError, match=r"DATA-004"):
        StepData([pack("a", masked, LENGTH, PAD, 0)], 1, 1, seed=0)


def test_rows_are_numbered_alike_for_any_number_of_processes_and_own_terms_count_all_of_them():
    """What thoughts are drawn from: a row's number is its place in the data, whoever holds it."""
    experts = [expert("a", seed=1), expert("b", seed=2)]
    seen = []
    counted = Terms(("x", "y"), lambda step, rows: torch.tensor([float(step), float((rows.labels_BT != IGNORE).sum())]))
    for world, micro_rows in ((1, 5), (3, 2)):
        numbers = {}
        for rank in range(world):
            data = StepData(experts, 4, micro_rows, seed=5, rank=rank, world=world, terms=counted)
            batch = data.step(2)
            assert data.names == ("x", "y")
            assert batch.count_E.tolist() == [
                2.0,
                float(sum(e.label_B[data.row_numbers(n, 2)].sum() for n, e in enumerate(experts))),
            ]
            for micro in batch.micro:
                assert micro.row_B is not None
                for row in range(len(micro.row_B)):
                    if bool((micro.segment_BT[row] > 0).any()):
                        numbers[int(micro.row_B[row])] = micro.tokens_BT[row].tolist()
        assert len(numbers) == 8
        seen.append(numbers)
    assert seen[0] == seen[1]
    for number, tokens in seen[0].items():
        index, place = (0, number) if number < experts[0].rows else (1, number - experts[0].rows)
        assert experts[index].tokens_BT[place].tolist() == tokens
