"""The kernels of a decode step against plain PyTorch: compiled on a GPU, under the interpreter on a CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from quietgoose.cache import decode_append, decode_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("rows", "heads", "width"), [(1, 1, 64), (3, 2, 128), (2, 3, 80)])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("slots_first", [True, False])
def test_one_token_lands_in_its_slot(rows: int, heads: int, width: int, per_row: bool, slots_first: bool) -> None:
    """Also for keys that are a strided view and stores with the slots before the heads; nothing else changes."""
    torch.manual_seed(0)
    capacity = 7
    stores = [torch.full((rows, capacity, heads, width), float("nan"), device=DEVICE) for _ in range(2)]
    stores = [s.transpose(1, 2) for s in stores]
    if not slots_first:
        stores = [s.contiguous() for s in stores]
    key, value = torch.randn(2, rows, 1, heads + 1, width, device=DEVICE).transpose(2, 3)[:, :, :heads]
    lengths = torch.randint(1, capacity + 1, (rows if per_row else 1,), device=DEVICE).int()
    decode_triton.write_last(key, value, *stores, lengths)
    twins = [torch.full_like(s, float("nan")) for s in stores]
    slot = (lengths.long() - 1).expand(rows)[:, None, None, None].expand_as(key)
    for twin, new in zip(twins, (key, value)):
        twin.scatter_(2, slot, new)
    for store, twin in zip(stores, twins):
        torch.testing.assert_close(store, twin, rtol=0, atol=0, equal_nan=True)


def test_a_slot_outside_the_store_is_not_written() -> None:
    store = torch.zeros(1, 1, 4, 64, device=DEVICE)
    one = torch.ones(1, 1, 1, 64, device=DEVICE)
    for length in (0, 5):
        decode_triton.write_last(one, one, store, store.clone(), torch.tensor([length], device=DEVICE).int())
    assert not store.any()


def test_the_cpu_path_is_the_kernels_twin() -> None:
    torch.manual_seed(1)
    key, value = torch.randn(2, 2, 2, 1, 64, device=DEVICE)
    lengths = torch.tensor([3, 5], dtype=torch.int32, device=DEVICE)
    stores = torch.zeros(4, 2, 2, 6, 64, device=DEVICE)
    decode_append.write_last(key, value, stores[0], stores[1], lengths)
    decode_triton.write_last(key, value, stores[2], stores[3], lengths)
    assert torch.equal(stores[:2], stores[2:])


@pytest.mark.parametrize("rows", [1, 2, 8, 16])
@pytest.mark.parametrize(("num_out", "width"), [(5, 64), (33, 200), (64, 128)])
@pytest.mark.parametrize("bias", [False, True])
def test_streamed_linear(rows: int, num_out: int, width: int, bias: bool) -> None:
    torch.manual_seed(2)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    x, weight = (torch.randn(n, width, device=DEVICE, dtype=dtype) for n in (rows, num_out))
    b = torch.randn(num_out, device=DEVICE, dtype=dtype) if bias else None
    found = decode_triton.stream_linear(x, weight, b, measure=False)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (5e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="the autotuner measures on a GPU")
@pytest.mark.parametrize("rows", [1, 8])
def test_measured_tiles_agree(rows: int) -> None:
    torch.manual_seed(3)
    x, weight = (torch.randn(n, 4096, device=DEVICE, dtype=torch.bfloat16) for n in (rows, 6144))
    found = decode_triton.stream_linear(x, weight, None)
    expected = x.double() @ weight.double().T
    assert (found.double() - expected).norm() / expected.norm() < 5e-3
