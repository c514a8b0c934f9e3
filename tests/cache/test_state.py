"""LayerState is exact attention at 16 bits, whatever is done to it; in few bits, what is packed stays as it is."""

from __future__ import annotations

import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.cache import PRESETS, LayerState, Policy

from .state_tools import (
    HEADS,
    KV_HEADS,
    LOSSLESS,
    LOSSLESS_SINKS,
    PACKED,
    SCALING,
    WIDTH,
    Plain,
    Source,
    check_attention,
    check_same,
    codes,
    exact_attention,
    make,
    poison,
)  # fmt: skip

PADDINGS = {
    "none": [[], []],
    "left": [range(7), range(2)],
    "right": [[], range(12, 17)],
    "holes": [[0, 3, 4, 9], [1, 16]],
    "all": [range(17), []],
}


def padded(pattern: str, tokens: int = 17) -> torch.Tensor:
    valid = torch.ones(2, tokens, dtype=torch.bool)
    for row, columns in enumerate(PADDINGS[pattern]):
        valid[row, list(columns)] = False
    return valid


def step(state: LayerState, plain: Plain, source: Source, queries: int = 1, valid: torch.Tensor | None = None) -> None:
    query, key, value = source(state.batch, queries)
    state.append(key, value, valid)
    plain.extend(key, value, valid)
    out = state.attend(query, scaling=SCALING)
    check_attention(out, plain.attend(query), plain.valid[:, -queries:])


@pytest.mark.parametrize("pattern", PADDINGS)
@pytest.mark.parametrize("policy", [LOSSLESS, LOSSLESS_SINKS], ids=["plain", "sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lossless_state_is_exact_attention(policy: Policy, pattern: str, dtype: torch.dtype) -> None:
    source, plain, state = Source(1, dtype), Plain(2, dtype), make(policy, dtype=dtype)
    query, key, value = source(2, 17)
    valid = padded(pattern)
    state.prefill(query, key, value, valid, scaling=SCALING)
    plain.extend(key, value, valid)
    check_same(state, plain)
    for queries in (1, 1, 3, 4, 1, 2, 4, 4, 1):
        step(state, plain, source, queries)
        check_same(state, plain)
    for count in (2, 3, 7):
        state.crop(count)
        plain.crop(count)
        check_same(state, plain)
        step(state, plain, source, 2)
    index = torch.tensor([1, 1, 0])
    state.select(index)
    plain.change(lambda t: t[index])
    step(state, plain, source)
    state.repeat(2)
    plain.change(lambda t: t.repeat_interleave(2, 0))
    step(state, plain, source, 2)
    child = state.fork(2)
    plain.change(lambda t: t.repeat_interleave(2, 0))
    for _ in range(9):
        step(child, plain, source, 2)
    check_same(child, plain)


@pytest.mark.parametrize("policy", [LOSSLESS, LOSSLESS_SINKS], ids=["plain", "sinks"])
def test_chunks_attend_their_history(policy: Policy) -> None:
    source, plain, state = Source(2), Plain(2), make(policy)
    for tokens, pattern in ((17, "left"), (3, "none"), (17, "holes"), (17, "none")):
        query, key, value = source(2, tokens)
        valid = padded(pattern)[:, :tokens]
        out, lse = state.attend_history(query, scaling=SCALING)
        check_attention(out, plain.attend(query, causal=False), torch.ones(2, tokens, dtype=torch.bool))
        assert lse.shape == (2, HEADS, tokens)
        state.prefill(query, key, value, valid, scaling=SCALING)
        plain.extend(key, value, valid)
        check_same(state, plain)
        step(state, plain, source)


def test_history_of_a_fork_for_long_queries() -> None:
    source, plain, state = Source(3), Plain(2), make(LOSSLESS_SINKS)
    query, key, value = source(2, 17)
    state.prefill(query, key, value, None, scaling=SCALING)
    plain.extend(key, value, None)
    child = state.fork(3)
    plain.change(lambda t: t.repeat_interleave(3, 0))
    for tokens in (2, 20):
        query, key, value = source(6, tokens)
        out, _ = child.attend_history(query, scaling=SCALING)
        check_attention(out, plain.attend(query, causal=False), torch.ones(6, tokens, dtype=torch.bool))
    child.prefill(query, key, value, None, scaling=SCALING)
    plain.extend(key, value, None)
    check_same(child, plain)
    query, _, _ = source(6, 20)
    check_attention(
        child.attend_history(query, scaling=SCALING)[0], plain.attend(query, causal=False), torch.ones(6, 20).bool()
    )


def test_empty_history_is_zero() -> None:
    out, lse = make(LOSSLESS_SINKS).attend_history(torch.randn(2, HEADS, 3, WIDTH), scaling=SCALING)
    assert not out.any()
    assert torch.isneginf(lse).all()


def test_prompt_shorter_than_everything() -> None:
    source, plain, state = Source(4), Plain(2), make(LOSSLESS_SINKS)
    query, key, value = source(2, 1)
    state.prefill(query, key, value, torch.tensor([[True], [False]]), scaling=SCALING)
    plain.extend(key, value, torch.tensor([[True], [False]]))
    for _ in range(25):
        step(state, plain, source)
    check_same(state, plain)


def test_sinks_are_each_rows_first_valid_tokens() -> None:
    state, source = make(LOSSLESS_SINKS), Source(5)
    query, key, value = source(2, 17)
    valid = padded("left")
    state.prefill(query, key, value, valid, scaling=SCALING)
    assert state.tail.valid[:, :3].all()
    assert torch.equal(state.tail.key[0, :, :3], key[0, :, 7:10])
    assert torch.equal(state.tail.key[1, :, :3], key[1, :, 2:5])
    assert state.high.lengths().tolist() == [2, 5]  # 17 less padding, recents, sinks: 3 and 8 packed, 60 %
    assert state.low.lengths().tolist() == [1, 3]


@pytest.mark.parametrize("policy", [PACKED, LOSSLESS_SINKS, PRESETS["quality"]], ids=["packed", "lossless", "quality"])
def test_unused_memory_never_matters(policy: Policy) -> None:
    clean, dirty, source = make(policy), make(policy), Source(6)
    query, key, value = source(2, 30)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, :20] = False
    for state in (clean, dirty):
        state.prefill(query, key, value, valid, scaling=SCALING)
    for _ in range(20):
        query, key, value = source(2, 1)
        poison(dirty)
        for state in (clean, dirty):
            state.append(key, value)
        assert torch.equal(clean.attend(query, scaling=SCALING), dirty.attend(query, scaling=SCALING))
    poison(dirty)
    for one, other in zip(clean.logical(), dirty.logical()):
        assert torch.equal(one, other)
    query, key, value = source(2, 20)
    one, other = (state.attend_history(query, scaling=SCALING)[0] for state in (clean, dirty))
    assert torch.equal(one, other)


@pytest.mark.parametrize("policy", [PACKED, Policy(salient_ratio=0.8, flush_every=6, sink_tokens=3, recent_tokens=4)])
def test_a_row_alone_is_the_row_in_a_padded_batch(policy: Policy) -> None:
    padding, tokens = 9, 40
    batch, alone, source = make(policy), make(policy, batch=1, sequence_id=torch.tensor([1])), Source(7)
    query, key, value = source(2, tokens)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[1, :padding] = False
    key[1, :, :padding] = float("nan")  # whatever padding holds
    value[1, :, :padding] = float("nan")
    batch.prefill(query, key, value, valid, scaling=SCALING)
    own = (t[1:, :, padding:] for t in (query, key, value))
    alone.prefill(*own, None, scaling=SCALING)
    for chunk in (1, 1, 1, 2, 3, 4, 1, 12, 1, 1, 2, 4, 4):
        query, key, value = source(2, chunk)
        if chunk > policy.max_query:
            batch.prefill(query, key, value, None, scaling=SCALING)
            alone.prefill(query[1:], key[1:], value[1:], None, scaling=SCALING)
            continue
        batch.append(key, value)
        alone.append(key[1:], value[1:])
        batch.attend(query, scaling=SCALING)
        alone.attend(query[1:], scaling=SCALING)
    batch.select(torch.tensor([1]))
    for name, arena in (("high", alone.high), ("low", alone.low)):
        slots, blocks = int(arena.lengths()), int(arena.num_blocks)
        assert slots > 0
        other = getattr(batch, name)
        assert int(other.lengths()) == slots
        assert torch.equal(other.block_start[:, : blocks + 1], arena.block_start[:, : blocks + 1])
        for field in ("key_codes", "value_codes", "value_scale", "value_min"):
            assert torch.equal(getattr(other, field)[:, :, :slots], getattr(arena, field)[:, :, :slots]), field
        for field in ("key_scale", "key_min"):
            assert torch.equal(getattr(other, field)[:, :, :blocks], getattr(arena, field)[:, :, :blocks]), field
        assert torch.equal(other.value_channel, arena.value_channel)


def test_codes_of_flushed_tokens_never_change() -> None:
    state, source = make(PACKED), Source(8)
    query, key, value = source(2, 50)
    state.prefill(query, key, value, None, scaling=SCALING)
    first = codes(state)
    for _ in range(60):
        query, key, value = source(2, 1)
        state.append(key, value)
        state.attend(query, scaling=SCALING)
    assert len(state.history.store.flushes) == 10
    for name, before in codes(state).items():
        if "block" in name:
            continue
        old = first[name]
        assert torch.equal(before[:, :, : old.shape[2]], old), name
    assert state.history.store.high.capacity > first["store0.high.key_codes"].shape[2]


def test_errors_of_packed_elements_are_within_half_a_step() -> None:
    state, source = make(PACKED), Source(9)
    query, key, value = source(2, 41)
    state.prefill(query, key, value, None, scaling=SCALING)
    near_key, near_value, _ = state.logical()
    store = state.history.store
    slots, salient = store.slots(), store.salient()
    for arena, first, member in ((store.high, 0, salient), (store.low, store.high.capacity, ~salient)):
        # one block: 25 and 16 tokens
        assert arena.num_blocks.tolist() == [1, 1]
        bound = arena.key_scale[:, :, :1].float() / 2 * 1.001 + 1e-6
        assert (((near_key - key).abs() <= bound) | ~member.unsqueeze(-1)).all()
        index = (slots - first).clamp(0, arena.capacity - 1)
        scale = arena.value_scale.float().gather(2, index)
        bound = arena.value_channel.float().unsqueeze(2) * scale.unsqueeze(-1) / 2 * 1.001 + 1e-6
        assert (((near_value - value).abs() <= bound) | ~member.unsqueeze(-1)).all()


def test_attention_equals_attention_over_the_logical_tensors() -> None:
    state, source = make(Policy(flush_every=6, sink_tokens=2, recent_tokens=3, max_query=4)), Source(10)
    query, key, value = source(2, 30)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[0, :11] = False
    state.prefill(query, key, value, valid, scaling=SCALING)
    for queries in (1, 4, 2, 3, 4):
        query, key, value = source(2, queries)
        state.append(key, value)
        out = state.attend(query, scaling=SCALING)
        check_attention(out, exact_attention(query, *state.logical(), causal=True), torch.ones(2, queries).bool())


def test_zero_rows_and_zero_tokens() -> None:
    state = make(LOSSLESS_SINKS)
    empty = torch.zeros(2, KV_HEADS, 0, WIDTH)
    state.prefill(torch.zeros(2, HEADS, 0, WIDTH), empty, empty, None, scaling=SCALING)
    state.crop(0)
    state.flush()
    assert state.seq_length == 0
    assert state.logical()[0].shape == (2, KV_HEADS, 0, WIDTH)
    with pytest.raises(RecipeError, match="crop of 1"):
        state.crop(1)


def test_reset_forgets_everything() -> None:
    state, source = make(LOSSLESS_SINKS), Source(11)
    for _ in range(2):
        plain = Plain(2)
        query, key, value = source(2, 17)
        valid = padded("left")
        state.prefill(query, key, value, valid, scaling=SCALING)
        plain.extend(key, value, valid)
        for _ in range(10):
            step(state, plain, source)
        check_same(state, plain)
        state.reset()
        assert state.seq_length == 0


def test_inference_mode_and_no_grad_mix() -> None:
    source, plain = Source(12), Plain(2)
    with torch.inference_mode():
        state = make(LOSSLESS_SINKS)
        query, key, value = source(2, 17)
        state.prefill(query, key, value, None, scaling=SCALING)
    plain.extend(key.clone(), value.clone(), None)
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            for _ in range(9):
                step(state, plain, source)
    check_same(state, plain)
