"""A row's scale of value channels goes wherever the row goes, and begins anew only where nothing is left of the row."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from quietgoose.cache import LayerState, Policy
from quietgoose.kernels.quantize import dequantize
from torch import Tensor

from .state_tools import KV_HEADS, PACKED, SCALING, TAIL, WIDTH, Plain, Source, make, poison

POLICIES = pytest.mark.parametrize("policy", [PACKED, TAIL, Policy(salient_ratio=1.0, flush_every=6, max_query=4)])


class Uneven(Source):
    """Channels and rows of very different sizes: another row's scale would be far off. Later values are larger."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.size = 1.0

    def __call__(self, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().__call__(batch, tokens)
        order = torch.arange(batch * KV_HEADS * WIDTH).view(batch, KV_HEADS, 1, WIDTH)
        value = value * 2.0 ** (order * 37 % 11 - 5) * self.size
        self.size *= 1.02
        return query, key, value


def steps(state: LayerState) -> Tensor:
    """c_j s_t of every column, [B, Hk, columns, D], 0 for the tail's and for sinks."""
    parts = []
    for part in state.history.parts:
        store = part.store
        step = torch.cat(
            [
                a.value_channel.double().unsqueeze(2) * a.value_scale.double().unsqueeze(3)
                for a in (store.high, store.low)
            ],
            dim=2,
        )
        step = step.gather(2, store.slots().unsqueeze(-1).expand(-1, -1, -1, WIDTH))
        step = torch.where(store.stored()[:, None, :, None], step, 0.0)
        parts.append(step.repeat_interleave(part.share, 0))
    return torch.cat([*parts, parts[0].new_zeros(state.batch, KV_HEADS, state.window.columns, WIDTH)], 2)


def check(state: LayerState, plain: Plain) -> None:
    """Every value is within half a step of what came in."""
    _, value, valid = state.logical(torch.float64)
    wanted = torch.where(plain.valid[:, None, :, None], plain.value.double(), 0.0)
    assert torch.equal(valid, plain.valid)
    assert bool(((value - wanted).abs() <= steps(state) / 2 * (1 + 1e-5)).all())


def extend(state: LayerState, plain: Plain, source: Uneven, tokens: int, valid: Tensor | None = None) -> None:
    query, key, value = source(state.batch, tokens)
    if tokens > state.policy.max_query:
        state.prefill(query, key, value, valid, scaling=SCALING)
    else:
        state.append(key, value, valid)
    plain.extend(key, value, valid)


def begun(policy: Policy, capacity: int | None = None) -> tuple[LayerState, Plain, Uneven]:
    state, plain, source = make(policy, batch=3, capacity=capacity), Plain(3), Uneven()
    valid = torch.ones(3, 25, dtype=torch.bool)
    valid[1, :20] = False
    valid[2] = False  # begins later
    extend(state, plain, source, 25, valid)
    for _ in range(10):
        extend(state, plain, source, 2)
    return state, plain, source


def restored(state: LayerState) -> LayerState:
    return LayerState.from_tensors(None, state.tensors(), json.loads(json.dumps(state.meta())))


CHANGES: dict[str, Callable[[LayerState, Plain], LayerState]] = {}


def change(function: Callable[[LayerState, Plain], LayerState]) -> Callable[[LayerState, Plain], LayerState]:
    CHANGES[function.__name__] = function
    return function


@change
def nothing(state: LayerState, plain: Plain) -> LayerState:
    return state


@change
def select(state: LayerState, plain: Plain) -> LayerState:
    index = torch.tensor([2, 0, 0, 1])
    state.select(index)
    plain.change(lambda t: t[index])
    return state


@change
def reorder(state: LayerState, plain: Plain) -> LayerState:
    index = torch.tensor([1, 2, 1])  # as many rows as before: in place
    state.reorder(index)
    plain.change(lambda t: t[index])
    return state


@change
def repeat(state: LayerState, plain: Plain) -> LayerState:
    state.repeat(2)
    plain.change(lambda t: t.repeat_interleave(2, 0))
    return state


@change
def fork(state: LayerState, plain: Plain) -> LayerState:
    plain.change(lambda t: t.repeat_interleave(2, 0))
    return state.fork(2)


@change
def crop(state: LayerState, plain: Plain) -> LayerState:
    for count in (3, 8):
        state.crop(count)
        plain.crop(count)
    return state


@change
def restore(state: LayerState, plain: Plain) -> LayerState:
    return restored(state)


@change
def crop_and_restore(state: LayerState, plain: Plain) -> LayerState:
    return restored(crop(state, plain))


@POLICIES
@pytest.mark.parametrize("capacity", [None, 200])
@pytest.mark.parametrize("name", CHANGES)
def test_values_stay_within_half_a_step_whatever_is_done(name: str, capacity: int | None, policy: Policy) -> None:
    state, plain, source = begun(policy, capacity)
    check(state, plain)
    before = state.logical()[1]
    columns = state.packed_length
    changed = CHANGES[name](state, plain)
    check(changed, plain)
    if changed is state and state.batch == 3 and name != "reorder":  # what is packed stays as it is
        kept = min(columns, state.packed_length)
        assert torch.equal(state.logical()[1][:, :, :kept], before[:, :, :kept])
    for tokens in (17, 1, 4, 3, 4, 4, 17):
        poison(changed)
        extend(changed, plain, source, tokens)
        check(changed, plain)


@POLICIES
def test_the_scale_of_a_row_is_kept_while_its_tokens_are(policy: Policy) -> None:
    state, plain, source = begun(policy)
    names = [name for name in ("high", "low") if bool((getattr(state, name).num_blocks > 0).all())]
    kept = [getattr(state, name).value_channel.clone() for name in names]
    assert kept
    for tokens in (17, 4, 4, 4, 40):
        extend(state, plain, source, tokens)
    assert state.high.capacity > 48  # arenas have grown
    for name, before in zip(names, kept):
        assert torch.equal(getattr(state, name).value_channel, before)


@POLICIES
@pytest.mark.parametrize("how", ["reset", "crop"])
def test_an_emptied_layer_is_as_good_as_new(how: str, policy: Policy) -> None:
    state, _, source = begun(policy)
    source.size = 1e-3
    if how == "reset":
        state.reset()
    else:
        state.crop(state.seq_length)
    fresh, plain, copy = make(policy, batch=3), Plain(3), Plain(3)
    query, key, value = source(3, 25)
    for one, model in ((state, plain), (fresh, copy)):
        one.prefill(query, key, value, None, scaling=SCALING)
        model.extend(key, value, None)
        check(one, model)
    for name in ("high", "low"):
        mine, theirs = getattr(state, name), getattr(fresh, name)
        assert torch.equal(mine.lengths(), theirs.lengths())
        if int(theirs.lengths().sum()):
            assert torch.equal(mine.value_channel, theirs.value_channel)
        for got, want in zip(dequantize(mine), dequantize(theirs)):
            slots = int(theirs.lengths().max())
            assert torch.equal(got[:, :, :slots], want[:, :, :slots])


def test_moving_takes_the_scale_along() -> None:
    state, _, _ = begun(PACKED)
    state.to("meta")
    assert {arena.value_channel.device.type for arena in (state.high, state.low)} == {"meta"}


def test_a_forks_own_flushes_have_their_own_scale() -> None:
    parent, plain, source = begun(PACKED)
    before = parent.high.value_channel.clone()
    child = parent.fork(2)
    plain.change(lambda t: t.repeat_interleave(2, 0))
    source.size = 300.0
    for _ in range(6):
        extend(child, plain, source, 4)
    check(child, plain)
    assert torch.equal(parent.high.value_channel, before)
    assert bool((child.high.value_channel > before.repeat_interleave(2, 0)).all())


def test_bytes_count_the_scale_once_for_every_row_that_has_tokens() -> None:
    state, _, _ = begun(PACKED)
    assert [int((arena.num_blocks > 0).sum()) for arena in (state.high, state.low)] == [3, 3]
    empty = make(PACKED, batch=3)
    assert empty.nbytes().parameters == 3 * 4 * 2 + 3 * 4 * 2 + 3 * 4  # tables only: starts, counts, skips
    for _ in range(2):  # an emptied layer has none
        found = state.nbytes()
        expected = 0
        for arena in (state.high, state.low):
            slots, blocks = int(arena.lengths().sum()), int(arena.num_blocks.sum())
            begun_rows = int((arena.num_blocks > 0).sum())
            expected += 2 * KV_HEADS * (2 * slots + 2 * WIDTH * blocks + WIDTH * begun_rows) + 4 * (blocks + 3) + 4 * 3
        assert found.parameters == expected + 4 * 3
        allocated = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.static_tensors()}
        assert sum(allocated.values()) + 3 * 8 == found.total + found.unused_capacity
        state.reset()
