"""The saliency and selection kernels equal the twin: interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from quietgoose.kernels.quantize import UnsupportedShape
from quietgoose.kernels.saliency import SaliencyMode, choose_probes, probe_saliency, select_salient
from quietgoose.kernels.testing import assert_close, assert_same

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# rows, heads, KV heads, tokens, head_dim
SHAPES = [(2, 6, 2, 129, 64), (1, 4, 1, 100, 128), (2, 2, 2, 63, 64), (1, 8, 1, 1, 64), (1, 9, 3, 300, 64)]


def problem(batch, heads, kv_heads, n, width, dtype, mode=SaliencyMode.EQ8, seed=0):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, n, width, generator=g)
    key = torch.randn(batch, kv_heads, n, width, generator=g)
    valid = torch.ones(batch, n, dtype=torch.bool)
    if batch > 1:
        valid[-1, : n // 3] = False
        valid[-1, n // 2] = False
    query[~valid.unsqueeze(1).expand(batch, heads, n)] = float("nan")
    key[~valid.unsqueeze(1).expand(batch, kv_heads, n)] = float("nan")
    query, key, valid = query.to(DEVICE, dtype), key.to(DEVICE, dtype), valid.to(DEVICE)
    probes = choose_probes(valid, random_fraction=0.1, mode=mode)
    return rows_of(query, probes), key, probes, valid


def rows_of(query, probes):
    return query.gather(2, probes.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_saliency_equals_the_twin(shape, dtype) -> None:
    inputs = problem(*shape, dtype)
    got = probe_saliency(*inputs, scaling=0.125, implementation="triton")
    want = probe_saliency(*inputs, scaling=0.125, implementation="reference")
    # inputs are the same numbers on both sides and sums are fp32: the fp32 entry holds for every dtype
    assert_close("saliency", got, want, dtype=torch.float32)


@pytest.mark.parametrize("mode", [SaliencyMode.ROW_LENGTH, SaliencyMode.ACCUMULATED, SaliencyMode.AUTHORS_CODE])
def test_every_mode_equals_the_twin_with_and_without_a_known_lse(mode) -> None:
    inputs = problem(2, 6, 2, 70, 64, torch.float32, mode)
    want = probe_saliency(*inputs, scaling=0.125, mode=mode, implementation="reference")
    got = probe_saliency(*inputs, scaling=0.125, mode=mode, implementation="triton")
    assert_close(mode, got, want)
    rows, key, probes, valid = inputs
    seen = (torch.arange(70, device=DEVICE) <= probes.unsqueeze(2)) & valid.unsqueeze(1)
    scores = 0.125 * rows @ key.nan_to_num(0).repeat_interleave(3, 1).transpose(2, 3)
    lse = scores.masked_fill(~seen.unsqueeze(1), float("-inf")).logsumexp(-1)
    assert_close(mode, probe_saliency(*inputs, scaling=0.125, mode=mode, lse=lse, implementation="triton"), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_left_padded_row_has_the_same_scores_bit_for_bit(dtype) -> None:
    rows, key, probes, valid = problem(1, 4, 2, 200, 64, dtype)
    alone = probe_saliency(rows, key, probes, valid, scaling=0.125, implementation="triton")
    pad = 77
    both = torch.ones(2, 200 + pad, dtype=torch.bool, device=DEVICE)
    both[0, :pad] = False
    key_two = torch.randn(2, 2, 200 + pad, 64, device=DEVICE).to(dtype)
    key_two[0, :, :pad], key_two[0, :, pad:] = float("nan"), key[0]
    probes_two = choose_probes(both, random_fraction=0.1)
    rows_two = torch.randn(2, 4, probes_two.shape[1], 64, device=DEVICE).to(dtype)
    rows_two[0, :, : rows.shape[2]] = rows[0]
    together = probe_saliency(rows_two, key_two, probes_two, both, scaling=0.125, implementation="triton")
    assert_same("saliency", together[0, :, pad:], alone[0])
    assert bool((together[0, :, :pad] == float("-inf")).all())


def test_probes_in_any_order_and_strided_tensors_give_the_same_scores() -> None:
    rows, key, probes, valid = problem(2, 4, 2, 90, 64, torch.float32)
    want = probe_saliency(rows, key, probes, valid, scaling=0.125, implementation="reference")
    order = torch.randperm(probes.shape[1], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    apart = key.transpose(1, 2).contiguous().transpose(1, 2)
    got = probe_saliency(
        rows[:, :, order], apart, probes[:, order], valid, scaling=0.125, implementation="triton"
    )  # fmt: skip
    assert_close("shuffled", got, want)


def test_no_probes_at_all() -> None:
    rows, key, probes, valid = problem(2, 2, 1, 20, 64, torch.float32)
    got = probe_saliency(rows[:, :, :0], key, probes[:, :0], valid, scaling=1.0, implementation="triton")
    assert bool((got == torch.where(valid.unsqueeze(1), 0.0, float("-inf"))).all())


@pytest.mark.parametrize(("batch", "heads", "n"), [(1, 1, 1), (2, 3, 63), (2, 2, 129), (1, 2, 5000)])
def test_selection_equals_the_twin(batch: int, heads: int, n: int) -> None:
    g = torch.Generator().manual_seed(n)
    valid = torch.rand(batch, n, generator=g) < 0.8
    forced = torch.rand(batch, n, generator=g) < 0.1
    scores = torch.randn(batch, heads, n, generator=g)
    scores[..., ::5] = (scores[..., ::5] * 2).round()  # ties, -0 among them
    scores[..., ::7] = scores[..., ::7] * 1e-40  # subnormal
    scores[0, 0, n // 2 :: 11] = float("nan")
    scores[0, -1, n // 3 :: 13] = float("-inf")
    valid, forced, scores = valid.to(DEVICE), forced.to(DEVICE), scores.to(DEVICE)
    for ratio, first in ((0.0, None), (0.6, None), (0.6, forced), (1.0, forced)):
        got = select_salient(scores, valid, ratio, forced=first, implementation="triton")
        want = select_salient(scores, valid, ratio, forced=first, implementation="reference")
        assert_same(f"ratio {ratio}", got, want)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_minus_zero_ties_with_zero(implementation: str) -> None:
    scores = torch.tensor([[[-0.0, 0.0, -0.0, 0.0, 1.0, -1.0]]], device=DEVICE)
    valid = torch.ones(1, 6, dtype=torch.bool, device=DEVICE)
    chosen = select_salient(scores, valid, 0.5, implementation=implementation)
    assert chosen[0, 0].tolist() == [True, True, False, False, True, False]


def test_unsupported_shapes_are_refused_or_take_the_twin() -> None:
    inputs = problem(1, 2, 1, 20, 48, torch.float32)
    with pytest.raises(UnsupportedShape, match="head_dim = 48"):
        probe_saliency(*inputs, scaling=1.0, implementation="triton")
    assert probe_saliency(*inputs, scaling=1.0).shape == (1, 1, 20)
    rows, *others = problem(1, 2, 1, 20, 64, torch.float32)
    with pytest.raises(UnsupportedShape, match="the same for both"):
        probe_saliency(rows.half(), *others, scaling=1.0, implementation="triton")
