"""Any sequence of operations on a lossless layer equals the same on plain lists of columns."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quietgoose.cache import LayerState, Policy

from .state_tools import SCALING, Plain, Source, check_attention, check_same, exact_attention, make

POLICIES = [
    Policy(
        salient_ratio=ratio, high_bits=16, low_bits=16, flush_every=flush, max_query=4, sink_tokens=sinks,
        recent_tokens=recents, saliency=mode,
    )
    for ratio, flush, sinks, recents, mode in (
        (0.6, 5, 0, 0, "eq8"),
        (0.5, 3, 2, 4, "eq8"),
        (0.7, 4, 3, 0, "row_length"),
        (0.4, 6, 0, 3, "random"),
        (1.0, 5, 2, 2, "eq8"),
        (0.0, 1, 1, 0, "recent"),
    )
]  # fmt: skip

OPERATION = st.one_of(
    st.tuples(st.just("prefill"), st.integers(1, 14), st.integers(0, 2**16)),
    st.tuples(st.just("append"), st.integers(1, 4), st.integers(0, 2**16)),
    st.tuples(st.just("decode"), st.integers(1, 9), st.just(0)),
    st.tuples(st.just("crop"), st.integers(0, 12), st.just(0)),
    st.tuples(st.just("select"), st.integers(0, 3), st.integers(0, 80)),
    st.tuples(st.just("repeat"), st.integers(1, 2), st.just(0)),
    st.tuples(st.just("fork"), st.integers(1, 2), st.just(0)),
    st.tuples(st.just("restore"), st.just(0), st.just(0)),
    st.tuples(st.just("history"), st.integers(1, 18), st.just(0)),
)


class Pair:
    """A layer and its plain model, and the parents that forks have frozen."""

    def __init__(self, policy: Policy, seed: int, capacity: int | None) -> None:
        self.state, self.plain, self.source = make(policy, capacity=capacity), Plain(2), Source(seed)
        self.parents: list[LayerState] = []

    def valid(self, tokens: int, pattern: int) -> torch.Tensor:
        bits = torch.arange(self.state.batch * tokens).view(self.state.batch, tokens)
        return ((pattern * 2654435761 >> (bits % 31)) & 3) != 0

    def prefill(self, tokens: int, pattern: int) -> None:
        query, key, value = self.source(self.state.batch, tokens)
        valid = self.valid(tokens, pattern)
        self.state.prefill(query, key, value, valid, scaling=SCALING)
        self.plain.extend(key, value, valid)

    def append(self, tokens: int, pattern: int | None) -> None:
        query, key, value = self.source(self.state.batch, tokens)
        valid = None if pattern is None else self.valid(tokens, pattern)
        self.state.append(key, value, valid)
        self.plain.extend(key, value, valid)
        out = self.state.attend(query, scaling=SCALING)
        check_attention(out, self.plain.attend(query), self.plain.valid[:, -tokens:])

    def decode(self, steps: int, _: int) -> None:
        for _step in range(steps):
            self.append(1, None)

    def crop(self, count: int, _: int) -> None:
        count = min(count, self.state.seq_length)
        self.state.crop(count)
        self.plain.crop(count)

    def select(self, rows: int, choice: int) -> None:
        index = torch.tensor([(choice + 7 * i) % self.state.batch for i in range(rows or self.state.batch)])
        self.state.select(index)
        self.plain.change(lambda t: t[index])

    def repeat(self, times: int, _: int) -> None:
        if self.state.batch * times <= 8:
            self.state.repeat(times)
            self.plain.change(lambda t: t.repeat_interleave(times, 0))

    def fork(self, times: int, _: int) -> None:
        if self.state.batch * times <= 8:
            self.parents.append(self.state)
            self.state = self.state.fork(times)
            self.plain.change(lambda t: t.repeat_interleave(times, 0))

    def restore(self, *_: int) -> None:
        meta = json.loads(json.dumps(self.state.meta()))
        self.state = LayerState.from_tensors(None, self.state.tensors(), meta)

    def history(self, tokens: int, _: int) -> None:
        query, _key, _value = self.source(self.state.batch, tokens)
        out, _lse = self.state.attend_history(query, scaling=SCALING)
        everywhere = torch.ones(self.state.batch, tokens, dtype=torch.bool)
        check_attention(out, self.plain.attend(query, causal=False), everywhere)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.sampled_from(POLICIES),
    st.integers(0, 1000),
    st.sampled_from([None, 400]),
    st.lists(OPERATION, min_size=3, max_size=12),
)
def test_any_sequence_of_operations(
    policy: Policy, seed: int, capacity: int | None, operations: list[tuple[str, int, int]]
) -> None:
    pair = Pair(policy, seed, capacity)
    for name, amount, detail in operations:
        operation: Callable[[int, int], None] = getattr(pair, name)
        operation(amount, detail)
        check_same(pair.state, pair.plain)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.sampled_from([(4, 2), (4, 4), (2, 2), (16, 2)]),
    st.sampled_from([(0, 0), (2, 3)]),
    st.integers(0, 1000),
    st.lists(
        OPERATION.filter(lambda item: item[0] in ("prefill", "append", "crop", "restore")), min_size=3, max_size=10
    ),
)
def test_what_is_packed_never_changes(
    bits: tuple[int, int], kept: tuple[int, int], seed: int, operations: list[tuple[str, int, int]]
) -> None:
    policy = Policy(
        salient_ratio=0.6, high_bits=bits[0], low_bits=bits[1], flush_every=5, max_query=4, sink_tokens=kept[0],
        recent_tokens=kept[1],
    )  # fmt: skip
    state, source = make(policy), Source(seed)
    key = value = torch.zeros(2, 2, 0, 8)
    for name, amount, _ in operations:
        packed = state.packed_length
        if name in ("prefill", "append"):
            query, fresh_key, fresh_value = source(2, amount)
            if name == "prefill":
                state.prefill(query, fresh_key, fresh_value, None, scaling=SCALING)
            else:
                state.append(fresh_key, fresh_value)
                out = state.attend(query, scaling=SCALING)
                expected = exact_attention(query, *state.logical(), causal=True)
                check_attention(out, expected, torch.ones(2, amount, dtype=torch.bool))
        elif name == "crop":
            state.crop(min(amount, state.seq_length))
        else:
            state = LayerState.from_tensors(None, state.tensors(), state.meta())
        kept_columns = min(packed, state.packed_length)
        new_key, new_value, _ = state.logical()
        assert torch.equal(new_key[:, :, :kept_columns], key[:, :, :kept_columns])
        assert torch.equal(new_value[:, :, :kept_columns], value[:, :, :kept_columns])
        key, value = new_key, new_value
