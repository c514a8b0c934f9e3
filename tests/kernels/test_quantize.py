"""The quantiser's bounds, guards and block tables, on the plain PyTorch twin; each guard's test goes red for its flaw."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quietgoose.kernels.quantize import (
    BLOCK,
    UnsupportedShape,
    append_packed,
    dequantize,
    empty_arena,
    pack_codes,
    reference,
    unpack_codes,
)
from quietgoose.kernels.testing import assert_same

CPU = torch.device("cpu")


def everything(batch: int, heads: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(salient, valid): every token salient, so that all go to the first arena."""
    return torch.ones(batch, heads, n, dtype=torch.bool), torch.ones(batch, n, dtype=torch.bool)


def stored(key, value, bits=4, salient=None, valid=None, low_bits=2):
    """Fresh arenas after one append."""
    batch, heads, n, width = key.shape
    all_salient, all_valid = everything(batch, heads, n)
    high = empty_arena(bits, batch, heads, width, n, -(-n // BLOCK), key.dtype, CPU)
    low = empty_arena(low_bits, batch, heads, width, n, -(-n // BLOCK), key.dtype, CPU)
    append_packed(
        high, low, key, value, all_salient if salient is None else salient, all_valid if valid is None else valid
    )
    return high, low


def rough(batch: int, heads: int, n: int, width: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """Gaussian with channels of very different size, a zero channel, constant channels and an outlier token."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, heads, n, width, generator=g) * torch.logspace(-3, 2, width)
    x[..., 1] = 0.0
    x[..., 2] = 0.3137
    x[..., 3] = -77.77
    x[..., 5] = 1e-6 * x[..., 5]
    x[:, :, n // 2] *= 9
    return x.to(dtype)


def per_slot(arena, parameter: torch.Tensor) -> torch.Tensor:
    """Block parameters [B, Hk, N, D] spread over slots, all rows filled to capacity alike."""
    sizes = arena.block_start[0].long().diff()
    return parameter.double().repeat_interleave(sizes, dim=2)


def check_bounds(key: torch.Tensor, value: torch.Tensor, bits: int) -> None:
    arena, _ = stored(key, value, bits)
    got_key, got_value = dequantize(arena, dtype=torch.float64)
    assert torch.isfinite(got_key).all()
    assert torch.isfinite(got_value).all()
    slack = 1 + 1e-5  # the codes are computed in fp32
    assert bool(((got_key - key.double()).abs() <= slack * per_slot(arena, arena.key_scale) / 2).all())
    step = arena.value_channel.double().unsqueeze(2) * arena.value_scale.double().unsqueeze(-1)
    assert bool(((got_value - value.double()).abs() <= slack * step / 2).all())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("n", [1, 63, 100, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_half_a_step(bits: int, n: int, dtype: torch.dtype) -> None:
    check_bounds(rough(2, 3, n, 64, dtype), rough(2, 3, n, 64, dtype, seed=1), bits)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-6e4, 6e4, width=32), min_size=8, max_size=96), st.sampled_from([2, 4]), st.floats(1e-6, 1.0))
def test_error_is_at_most_half_a_step_for_any_numbers(numbers: list[float], bits: int, size: float) -> None:
    x = torch.tensor(numbers[: len(numbers) // 8 * 8]).view(1, 1, -1, 8) * size
    check_bounds(x, x.flip(-1), bits)


def test_zero_channels_spoil_nothing() -> None:
    key, value = rough(1, 2, 70, 64), rough(1, 2, 70, 64, seed=1)
    value[:, 0] = 0.0  # a whole head
    check_bounds(key, value, 2)
    arena, _ = stored(key, value, 2)
    _, got = dequantize(arena)
    assert bool((got[:, 0] == 0).all())
    assert bool((arena.value_channel[:, 0] == 1).all())
    assert bool((arena.value_channel > 0).all())
    assert bool((arena.value_scale > 0).all())
    assert bool((arena.key_scale > 0).all())


def test_the_zero_channel_flaw_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dividing by c as it stands makes the whole block NaN (compress_function.py:657)."""

    def flawed(value):
        return value.abs().amax(-2).sqrt()

    monkeypatch.setattr(reference, "channel_scales", flawed)
    with pytest.raises(AssertionError):
        check_bounds(rough(1, 1, 40, 64), rough(1, 1, 40, 64), 4)


@settings(max_examples=200, deadline=None)
@given(st.floats(-7e4, 7e4, width=32))
def test_directed_rounding_brackets_a_number(number: float) -> None:
    x = torch.tensor([number])
    down, up = reference.round_down(x), reference.round_up(x)
    assert torch.equal(down, down.half().float())
    assert torch.equal(up, up.half().float())
    inside = x.clamp(-reference.FP16_MAX, reference.FP16_MAX)
    assert down.item() <= inside.item() <= up.item()
    if down.item() != up.item():  # neighbours: no fp16 lies between
        next_up = torch.nextafter(down.half(), torch.tensor([float("inf")], dtype=torch.float16))
        assert next_up.float().item() == up.item()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.sampled_from([2, 4]), st.sampled_from([8, 64, 128]), st.integers(0, 2**31))
def test_unpacking_undoes_packing(tokens: int, bits: int, width: int, seed: int) -> None:
    codes = torch.randint(2**bits, (tokens, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (tokens, width * bits // 8)
    assert_same("codes", unpack_codes(packed, bits, width), codes)


def test_packing_is_planar() -> None:
    codes = torch.arange(8, dtype=torch.uint8) % 4
    assert pack_codes(codes, 2).tolist() == [0 | 2 << 2 | 0 << 4 | 2 << 6, 1 | 3 << 2 | 1 << 4 | 3 << 6]
    codes = torch.arange(8, dtype=torch.uint8)
    assert pack_codes(codes, 4).tolist() == [j | (j + 4) << 4 for j in range(4)]


@pytest.mark.parametrize("n", [1, 63, 100, 129, 300])
def test_one_flush_after_another_opens_new_blocks_and_changes_no_old_byte(n: int) -> None:
    g = torch.Generator().manual_seed(n)
    high = empty_arena(4, 2, 2, 64, 1000, 16, torch.float32, CPU)
    low = empty_arena(2, 2, 2, 64, 1000, 16, torch.float32, CPU)
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, : n // 3] = False
    tables: list[list[int]] = [[0], [0]]
    before = None
    for turn in range(3):
        key, value = (torch.randn(2, 2, n, 64, generator=g) for _ in range(2))
        salient = torch.zeros(2, 2, n, dtype=torch.bool)
        for row in range(2):
            for head in range(2):
                order = torch.randperm(n, generator=g)
                order = order[valid[row, order]]
                salient[row, head, order[: (len(order) + turn) // 2]] = True
        append_packed(high, low, key, value, salient, valid)
        for row in range(2):
            count = int(salient[row, 0].sum())
            start = tables[row][-1]
            tables[row] += [start + min(count, BLOCK * (i + 1)) for i in range(-(-count // BLOCK))]
            blocks = int(high.num_blocks[row])
            assert high.block_start[row].tolist() == tables[row] + [tables[row][-1]] * (16 - blocks)
            assert blocks == len(tables[row]) - 1
            # this flush's tokens, in position order, stand at the end
            for head in range(2):
                want = key[row, head][salient[row, head]]
                got, _ = dequantize(high)
                assert bool(((got[row, head, start : start + count] - want).abs() < 0.6).all())
        if before is not None:
            lengths, codes, scales, blocks_before = before
            for row in range(2):
                assert_same("codes", high.key_codes[row, :, : lengths[row]], codes[row, :, : lengths[row]])
                old = slice(0, int(blocks_before[row]))
                assert_same("scales", high.key_scale[row, :, old], scales[row, :, old])
        before = (high.lengths(), high.key_codes.clone(), high.key_scale.clone(), high.num_blocks.clone())
    assert torch.equal(high.lengths() + low.lengths(), 3 * valid.sum(1).int())


def test_sixteen_bits_keep_the_values() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        key, value = rough(2, 2, 130, 64, dtype), rough(2, 2, 130, 64, dtype, seed=3)
        arena, _ = stored(key, value, 16)
        assert arena.key_scale.numel() == arena.value_scale.numel() == 0
        got_key, got_value = dequantize(arena)
        assert_same("key", got_key, key)
        assert_same("value", got_value, value)


def poison(arena) -> None:
    for name, tensor in arena.tensors().items():
        if name not in ("block_start", "num_blocks"):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 255)


@pytest.mark.parametrize("bits", [2, 4, 16])
def test_memory_not_in_use_never_matters(bits: int) -> None:
    arena = empty_arena(bits, 2, 1, 64, 200, 3, torch.float32, CPU)
    low = empty_arena(2, 2, 1, 64, 200, 3, torch.float32, CPU)
    poison(arena)
    key, value = rough(2, 1, 70, 64), rough(2, 1, 70, 64, seed=1)
    salient, valid = everything(2, 1, 70)
    valid[1] = False  # a row of nothing but padding
    key[1], value[1] = float("nan"), float("nan")
    append_packed(arena, low, key, value, salient & valid.unsqueeze(1), valid)
    assert arena.lengths().tolist() == [70, 0]
    for got in dequantize(arena):
        assert bool((got[1] == 0).all())
        assert bool((got[0, :, 70:] == 0).all())
        assert torch.isfinite(got).all()


def compare_row_alone_with_row_in_batch(bits: int) -> None:
    n, padding = 100, 37
    key, value = rough(3, 2, n, 64), rough(3, 2, n, 64, seed=1)
    key[0] *= 10
    valid = torch.ones(3, n, dtype=torch.bool)
    valid[1, :padding] = False
    together, _ = stored(key, value, bits, valid.unsqueeze(1).expand(-1, 2, -1), valid)
    alone, _ = stored(key[1:2, :, padding:], value[1:2, :, padding:], bits)
    used = n - padding
    for name in ("key_codes", "value_codes", "value_scale", "value_min"):
        assert_same(name, getattr(together, name)[1, :, :used], getattr(alone, name)[0, :, :used])
    for name in ("key_scale", "key_min"):
        assert_same(name, getattr(together, name)[1, :, :1], getattr(alone, name)[0, :, :1])
    assert_same("value_channel", together.value_channel[1], alone.value_channel[0])


@pytest.mark.parametrize("bits", [2, 4])
def test_a_row_has_the_same_codes_alone_and_in_a_padded_batch(bits: int) -> None:
    compare_row_alone_with_row_in_batch(bits)


def test_the_batch_wide_range_flaw_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One range for all rows of the batch (compress_function.py:81, 657)."""
    rows: dict[str, torch.Tensor] = {}

    def whole_batch(high, low, key, value, salient, valid, rounding=None):
        rows["range"] = key.float().amin((0, 2)), key.float().amax((0, 2))
        return original(high, low, key, value, salient, valid, rounding)

    def flawed(key, bits, rounding=None):
        low, high = (x[:, None, :] for x in rows["range"])
        minimum = reference.round_down(low.expand(-1, key.shape[1], -1))
        scale = reference._scale(high.expand(-1, key.shape[1], -1), minimum, bits)
        return reference._codes(key, minimum.unsqueeze(-2), scale.unsqueeze(-2), bits), scale, minimum

    original = reference.append_packed
    monkeypatch.setattr(reference, "append_packed", whole_batch)
    monkeypatch.setattr(reference, "quantize_keys", flawed)
    with pytest.raises(AssertionError, match="key_"):
        compare_row_alone_with_row_in_batch(4)


def compare_heads_after_permuting_one() -> None:
    key, value = rough(1, 3, 90, 64), rough(1, 3, 90, 64, seed=1)
    shuffled = value.clone()
    shuffled[:, 1] = value[:, 1, torch.randperm(90, generator=torch.Generator().manual_seed(0))] * 5
    before, _ = stored(key, value)
    after, _ = stored(key, shuffled)
    for head in (0, 2):
        for name in ("value_codes", "value_scale", "value_min", "value_channel"):
            assert_same(name, getattr(after, name)[:, head], getattr(before, name)[:, head])


def test_permuting_one_head_leaves_the_codes_of_the_others() -> None:
    compare_heads_after_permuting_one()


def test_the_token_row_across_heads_flaw_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One minimum and scale for a token of all heads, though each head gathered its own tokens."""

    def flawed(value, channel, bits):
        y = value / channel.unsqueeze(-2)
        minimum = reference.round_down(y.amin((0, -1)).expand(y.shape[:-1]))
        scale = reference._scale(y.amax((0, -1)).expand(y.shape[:-1]), minimum, bits)
        return reference._codes(y, minimum.unsqueeze(-1), scale.unsqueeze(-1), bits), scale, minimum

    monkeypatch.setattr(reference, "quantize_values", flawed)
    with pytest.raises(AssertionError, match="value_"):
        compare_heads_after_permuting_one()


def test_bad_input_is_named() -> None:
    with pytest.raises(UnsupportedShape, match="supported are 2, 4 and 16"):
        empty_arena(3, 1, 1, 64, 10, 1, torch.float32, CPU)
    with pytest.raises(UnsupportedShape, match="multiple of 4"):
        empty_arena(2, 1, 1, 66, 10, 1, torch.float32, CPU)
    x = torch.randn(1, 2, 20, 64)
    salient, valid = everything(1, 2, 20)
    high, low = (empty_arena(b, 1, 2, 64, 10, 1, torch.float32, CPU) for b in (4, 2))
    with pytest.raises(ValueError, match="do not fit"):
        append_packed(high, low, x, x, salient, valid)
    with pytest.raises(UnsupportedShape, match="arena is for"):
        append_packed(high, low, x[:, :1], x[:, :1], salient[:, :1], valid)
    salient[0, 1, 3] = False
    with pytest.raises(ValueError, match="must be equal"):
        append_packed(high, low, x, x, salient, valid)
    with pytest.raises(UnsupportedShape, match="value has shape"):
        append_packed(high, low, x, x[:, :, :3], salient, valid)
