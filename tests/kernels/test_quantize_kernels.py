"""The Triton kernels write what the twin writes, byte for byte: interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from quietgoose.kernels.quantize import UnsupportedShape, append_packed, dequantize, empty_arena
from quietgoose.kernels.saliency import select_salient
from quietgoose.kernels.testing import assert_same

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# rows, KV heads, tokens, head_dim, bits
SHAPES = [
    (2, 3, 129, 64, (4, 2)),
    (1, 2, 100, 128, (4, 2)),
    (2, 1, 63, 64, (4, 4)),
    (1, 1, 1, 128, (2, 2)),
    (2, 2, 70, 32, (16, 2)),
    (1, 2, 65, 64, (16, 16)),
]


def problem(batch, heads, n, width, dtype, seed=0, ratio=0.6):
    g = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(batch, heads, n, width, generator=g) * torch.logspace(-2, 1.5, width) for _ in range(2))
    key[..., 1], value[..., 1] = 0.0, 0.0
    key[..., 2], value[..., 3] = 1.37, -0.77
    value[..., 4] *= 1e-7
    valid = torch.ones(batch, n, dtype=torch.bool)
    if batch > 1:
        valid[-1, : n // 3] = False
        valid[-1, n // 2] = False
    salient = select_salient(torch.randn(batch, heads, n, generator=g), valid, ratio)
    hide = ~valid[:, None, :, None]
    key, value = key.masked_fill(hide, float("nan")), value.masked_fill(hide, float("nan"))
    return [x.to(DEVICE) for x in (key.to(dtype), value.to(dtype), salient, valid)]


def arenas(batch, heads, width, bits, dtype, capacity=300, blocks=5):
    return [empty_arena(b, batch, heads, width, capacity, blocks, dtype, DEVICE) for b in bits]


def compare(got, want) -> None:
    for a, b in zip(got, want):
        for name, tensor in a.tensors().items():
            assert_same(f"{a.bits}-bit {name}", tensor, b.tensors()[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "heads", "n", "width", "bits"), SHAPES)
def test_the_kernels_write_what_the_twin_writes(batch, heads, n, width, bits, dtype) -> None:
    got, want = arenas(batch, heads, width, bits, dtype), arenas(batch, heads, width, bits, dtype)
    for turn in range(2):
        inputs = problem(batch, heads, n, width, dtype, seed=turn)
        append_packed(*got, *inputs, implementation="triton")
        append_packed(*want, *inputs, implementation="reference")
    compare(got, want)


def test_a_row_that_begins_later_and_channels_that_were_zero() -> None:
    """The scale of value channels: from a row's first flush, whichever that is; kept for the others."""
    got, want = arenas(3, 2, 64, (4, 2), torch.bfloat16, 900, 9), arenas(3, 2, 64, (4, 2), torch.bfloat16, 900, 9)
    for turn in range(3):
        key, value, salient, valid = problem(3, 2, 150, 64, torch.bfloat16, seed=turn)
        valid[1] = turn > 0
        salient &= valid.unsqueeze(1)
        value[..., 9:20] *= float(turn) * 50
        value[0, 0] *= float(turn)
        before = [arena.value_channel.clone() for arena in got]
        for pair, how in ((got, "triton"), (want, "reference")):
            append_packed(*pair, key, value, salient, valid, implementation=how)
        begun = [0, 2] if turn < 2 else [0, 1, 2]
        for arena, kept in zip(got, before):
            assert turn == 0 or torch.equal(arena.value_channel[begun], kept[begun])
            assert bool((arena.value_channel[1] > 0).all()) == (turn > 0)
    compare(got, want)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_an_empty_share_and_an_all_padding_row(ratio: float) -> None:
    key, value, salient, valid = problem(3, 2, 40, 64, torch.float32, ratio=ratio)
    valid[1] = False
    salient &= valid.unsqueeze(1)
    got, want = arenas(3, 2, 64, (4, 2), torch.float32), arenas(3, 2, 64, (4, 2), torch.float32)
    append_packed(*got, key, value, salient, valid, implementation="triton")
    append_packed(*want, key, value, salient, valid, implementation="reference")
    compare(got, want)
    assert got[0].lengths()[1].item() == got[1].lengths()[1].item() == 0


def test_strided_inputs_are_read_in_place() -> None:
    key, value, salient, valid = problem(2, 2, 50, 64, torch.float32)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value)]
    assert not apart[0].is_contiguous()
    got, want = arenas(2, 2, 64, (4, 2), torch.float32), arenas(2, 2, 64, (4, 2), torch.float32)
    append_packed(*got, *apart, salient, valid, implementation="triton")
    append_packed(*want, key, value, salient, valid, implementation="reference")
    compare(got, want)


@pytest.mark.parametrize(("capacity", "blocks"), [(20, 5), (300, 0), (150, 1)])
def test_what_does_not_fit_is_dropped_not_written_elsewhere(capacity: int, blocks: int) -> None:
    """The kernels can not raise; they must not write past an arena either."""
    key, value, salient, valid = problem(2, 2, 140, 64, torch.float32, ratio=1.0)
    high, low = arenas(2, 2, 64, (4, 2), torch.float32, capacity, blocks)
    append_packed(high, low, key, value, salient, valid, implementation="triton")
    want = [min(140, capacity, blocks * 128), min(int(valid[1].sum()), capacity, blocks * 128)]
    assert high.lengths().tolist() == want
    kept, _ = dequantize(high)
    assert bool(((kept[0, 0, : want[0]] - key[0, 0, : want[0]]).abs() < 10).all())


def test_slots_not_in_use_keep_their_bytes() -> None:
    high, low = arenas(2, 1, 64, (4, 2), torch.float32)
    for arena in (high, low):
        for name, tensor in arena.tensors().items():
            if name not in ("block_start", "num_blocks"):
                tensor.fill_(float("nan") if tensor.is_floating_point() else 255)
    append_packed(high, low, *problem(2, 1, 60, 64, torch.float32), implementation="triton")
    for arena in (high, low):
        for row, length in enumerate(arena.lengths().tolist()):
            assert bool((arena.key_codes[row, :, length:] == 255).all())
            assert bool(arena.value_scale[row, :, length:].isnan().all())
            assert bool(arena.key_min[row, :, 1:].isnan().all())
        assert all(bool(x.isfinite().all()) for x in dequantize(arena))


def test_unsupported_shapes_are_refused_or_take_the_twin() -> None:
    inputs = problem(1, 1, 20, 48, torch.float32)
    with pytest.raises(UnsupportedShape, match="head_dim = 48"):
        append_packed(*arenas(1, 1, 48, (4, 2), torch.float32), *inputs, implementation="triton")
    high, low = arenas(1, 1, 48, (4, 2), torch.float32)
    append_packed(high, low, *inputs)
    assert int(high.lengths() + low.lengths()) == 20
