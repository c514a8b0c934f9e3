"""One channel scale for a row's values: right for tokens that come after the ones it was computed from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quietgoose.kernels.quantize import BLOCK, PackedArena, append_packed, dequantize, empty_arena, reference
from quietgoose.kernels.testing import assert_same
from torch import Tensor

WIDTH, HEADS = 32, 2


def fresh(rows: int = 1, bits: int = 4, capacity: int = 1200) -> tuple[PackedArena, PackedArena]:
    high, low = (empty_arena(b, rows, HEADS, WIDTH, capacity, 40, torch.float32, "cpu") for b in (bits, 2))
    return high, low


def flush(arenas: tuple[PackedArena, PackedArena], value: Tensor, valid: Tensor | None = None) -> None:
    """Every token to the first arena; keys are of no interest here."""
    rows, heads, n, _ = value.shape
    valid = torch.ones(rows, n, dtype=torch.bool) if valid is None else valid
    append_packed(*arenas, torch.zeros_like(value), value, valid.unsqueeze(1).expand(-1, heads, -1), valid)


def within_half_a_step(arena: PackedArena, value: Tensor) -> bool:
    """|V' - V| <= c_j s_t / 2 for all tokens of all flushes together, [B, Hk, n, D]."""
    slots = slice(0, value.shape[2])
    got = dequantize(arena, dtype=torch.float64)[1][:, :, slots]
    step = arena.value_channel.double().unsqueeze(2) * arena.value_scale[:, :, slots].double().unsqueeze(3)
    return bool(((got - value.double()).abs() <= step * (1 + 1e-5) / 2).all())


def draw(n: int, seed: int = 0, rows: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HEADS, n, WIDTH, generator=g) * torch.logspace(-1, 1, WIDTH)


def relative_error(arena: PackedArena, value: Tensor, slots: slice, channels: slice) -> float:
    got = dequantize(arena)[1][:, :, slots, channels]
    value = value[..., channels]
    return float((got - value).norm() / value.norm())


@pytest.mark.parametrize("n", [1, 7, 100, 300])
def test_the_scale_is_the_formula(n: int) -> None:
    value = draw(n)
    value[..., 3], value[..., 5] = 0.0, 1e-9
    found = reference.channel_scales(value)
    for head in range(HEADS):
        peaks = value[0, head].abs().amax(0).tolist()
        for j, peak in enumerate(peaks):
            least = max(peaks) / min(2 * n, 64 if peak else 4)
            exact = 4 * math.sqrt(max(peaks) * max(peak, least))
            assert exact * (1 - 1e-6) <= found[0, head, j].item() <= exact * (1 + 2**-10)
    assert torch.equal(found, found.half().float())
    assert float((value / found.unsqueeze(2)).abs().max()) <= 0.25


@pytest.mark.parametrize("bits", [2, 4])
def test_later_tokens_are_within_half_a_step_and_nothing_old_changes(bits: int) -> None:
    arenas, values = fresh(bits=bits), []
    for turn, (n, size) in enumerate([(150, 1.0), (1, 30.0), (128, 0.01), (77, 90.0), (200, 1.0)]):
        values.append(draw(n, turn) * size)
        values[-1][..., turn::5] *= float(turn > 1)  # channels that were zero so far wake up
        used, blocks = int(arenas[0].lengths()[0]), int(arenas[0].num_blocks[0])
        old = {name: tensor.clone() for name, tensor in arenas[0].tensors().items()}
        flush(arenas, values[-1])
        for name in ("key_codes", "value_codes", "value_scale", "value_min"):
            assert_same(name, getattr(arenas[0], name)[:, :, :used], old[name][:, :, :used])
        if blocks:
            assert_same("value_channel", arenas[0].value_channel, old["value_channel"])
        assert within_half_a_step(arenas[0], torch.cat(values, 2))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(-6e4, 6e4, width=32), min_size=WIDTH, max_size=WIDTH), min_size=2, max_size=8),
    st.sampled_from([2, 4]),
    st.floats(1e-3, 1.0),
)
def test_later_tokens_are_within_half_a_step_for_any_numbers(tokens: list[list[float]], bits: int, size: float) -> None:
    first = torch.tensor(tokens[0]).view(1, 1, 1, -1).expand(1, HEADS, 1, -1) * size
    later = torch.tensor(tokens[1:]).view(1, 1, -1, WIDTH).expand(1, HEADS, -1, -1)
    arenas = fresh(bits=bits)
    flush(arenas, first)
    flush(arenas, later)
    arena, value = arenas[0], torch.cat([first, later], 2)
    bound = reference.LIMIT * (2**bits - 1) * arena.value_channel.unsqueeze(2)
    assert within_half_a_step(arena, torch.where(value.abs() > bound, bound * value.sign(), value))
    assert float(arena.value_scale.max()) < 255
    if float(first.abs().max()):  # values up to this never saturate
        assert bool((bound >= 190 * first.abs().amax((2, 3), keepdim=True)).all())


@pytest.mark.parametrize("first", [0.0, 1e-6])
def test_a_channel_without_a_say_in_the_first_flush_does_not_spoil_the_others(first: float) -> None:
    """The reference point is a row that saw all tokens at once. 1/c of a silent channel must stay in proportion."""
    silent, others = slice(WIDTH - 1, WIDTH), slice(0, WIDTH - 1)
    early, late = draw(400), draw(200, 1)
    early[..., silent] = first * torch.randn(early[..., silent].shape, generator=torch.Generator().manual_seed(2))
    kept, whole = fresh(), fresh()
    flush(kept, early)
    flush(kept, late)
    flush(whole, torch.cat([early, late], 2))
    slots = slice(400, 600)
    for channels, slack in ((others, 1.4 if first == 0.0 else 4.5), (silent, 1.1)):
        found, wanted = (relative_error(a[0], late, slots, channels) for a in (kept, whole))
        assert found < slack * wanted


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_a_short_first_flush_serves_later_tokens(n: int) -> None:
    """Few tokens, and small ones, as the first of a text often are: the scale may not follow their accidents."""
    g = torch.Generator().manual_seed(n)
    early, late = (torch.randn(1, HEADS, m, WIDTH, generator=g) for m in (n, 300))
    early *= 0.02
    kept, whole = fresh(), fresh()
    flush(kept, early)
    flush(kept, late)
    flush(whole, late)
    found = relative_error(kept[0], late, slice(n, n + 300), slice(None))
    assert found < 1.35 * relative_error(whole[0], late, slice(0, 300), slice(None))


def test_what_is_far_beyond_the_first_flush_saturates() -> None:
    """cached_attention multiplies value_scale by up to 2^8 in fp16: it must stay finite whatever comes."""
    for bits in (2, 4):
        arenas = fresh(bits=bits)
        early, late = draw(200), draw(5, 1)
        late[:, 0, 2, 7:9] = torch.tensor([1e6, -1e6])
        late[:, 1, 3, 7] = -1e6
        flush(arenas, early)
        flush(arenas, late)
        assert 200 < float(arenas[0].value_scale.max()) < 255
        got = dequantize(arenas[0])[1]
        assert torch.isfinite(got).all()
        assert float(got[0, 0, 202, 7]) > 190 * float(early.abs().max())
        assert float(got[0, 1, 203, 7]) < -190 * float(early.abs().max())


def test_rows_begin_each_by_themselves() -> None:
    arenas, value = fresh(rows=3), draw(3 * BLOCK, 4, rows=3)
    value[1] *= 20
    valid = torch.ones(3, 3 * BLOCK, dtype=torch.bool)
    valid[1, : BLOCK + 40] = False  # nothing in its first flush, and padding in its second
    valid[2] = False
    for turn in range(3):
        part = slice(turn * BLOCK, (turn + 1) * BLOCK)
        flush(arenas, value[:, :, part], valid[:, part])
        channel = arenas[0].value_channel
        assert_same("row 0", channel[0], reference.channel_scales(value[0, :, :BLOCK]).half())
        if turn:
            assert_same("row 1", channel[1], reference.channel_scales(value[1, :, BLOCK + 40 : 2 * BLOCK]).half())
    assert arenas[0].num_blocks.tolist() == [3, 2, 0]


def test_a_row_that_was_emptied_begins_anew() -> None:
    arenas, again = fresh(), fresh()
    flush(arenas, 1000 * draw(50))
    arenas[0].num_blocks.zero_()
    arenas[0].block_start.zero_()
    value = draw(60, 1)
    for pair in (arenas, again):
        flush(pair, value)
    assert_same("value_channel", arenas[0].value_channel, again[0].value_channel)
    assert within_half_a_step(arenas[0], value)


def test_each_arena_has_its_own() -> None:
    high, low = fresh()
    value, valid = draw(100), torch.ones(1, 100, dtype=torch.bool)
    salient = torch.zeros(1, HEADS, 100, dtype=torch.bool)
    salient[..., ::3] = True
    append_packed(high, low, torch.zeros_like(value), value, salient, valid)
    for arena, member in ((high, salient), (low, ~salient)):
        for head in range(HEADS):
            want = reference.channel_scales(value[0, head][member[0, head]]).half()
            assert_same("value_channel", arena.value_channel[0, head], want)
