"""Query-aware rounding: smaller errors in q . k than rounding to nearest, by the formula, the same in Triton."""

from __future__ import annotations

import pytest
import torch
from quietgoose.kernels.quantize import KeyRounding, append_packed, dequantize, empty_arena, key_rounding
from quietgoose.kernels.quantize.reference import quantize_keys
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = 2


def problem(tokens: int, width: int, batch: int = 2, groups: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries [B, H, n, D] that live near a subspace, keys [B, Hk, n, D] with channels of unequal range."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(batch, HEADS, 1, width // 4, width, generator=g)
    inside = torch.randn(batch, HEADS, groups, tokens, width // 4, generator=g) @ basis
    query = inside + 0.3 * torch.randn(inside.shape, generator=g)
    key = torch.randn(batch, HEADS, tokens, width, generator=g) * torch.rand(width, generator=g).exp()
    return query.flatten(1, 2).to(DEVICE), key.to(DEVICE)


def everywhere(key: Tensor) -> Tensor:
    return torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)


def packed(key: Tensor, valid: Tensor, bits: int, rounding: KeyRounding | None, how: str = "auto") -> Tensor:
    arenas = [
        empty_arena(b, key.shape[0], HEADS, key.shape[3], key.shape[2], 8, key.dtype, key.device) for b in (bits, 16)
    ]
    salient = valid.unsqueeze(1).expand(-1, HEADS, -1).contiguous()
    append_packed(*arenas, key, key.clone(), salient, valid, rounding=rounding, implementation=how)
    return dequantize(arenas[0])[0]


def score_error(query: Tensor, key: Tensor, found: Tensor) -> float:
    """Mean square of q . (k' - k) over all queries and keys of a head."""
    scores = query.unflatten(1, (HEADS, -1)).flatten(2, 3) @ (found - key).transpose(-1, -2)
    return scores.square().mean().item()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("tokens", "width"), [(63, 64), (200, 64), (130, 128)])
def test_scores_move_less_than_with_rounding_to_nearest(tokens: int, width: int, bits: int) -> None:
    query, key = problem(tokens, width)
    valid = everywhere(key)
    rounding = key_rounding(query, valid, key, valid)
    nearest, aware = (packed(key, valid, bits, r, "reference") for r in (None, rounding))
    assert score_error(query, key, aware) < 0.5 * score_error(query, key, nearest)
    assert (aware - key).square().mean() > (nearest - key).square().mean()  # the price: single channels are off further


def test_a_white_query_distribution_rounds_to_nearest() -> None:
    """H = identity: nothing to trade between channels."""
    _, key = problem(40, 64)
    white = torch.eye(64, device=DEVICE).repeat(1, HEADS * 3, 1, 1).expand(2, -1, -1, -1)
    rounding = key_rounding(white, torch.ones(2, 64, dtype=torch.bool, device=DEVICE), key, everywhere(key))
    assert rounding.step_BKDD.abs().max() < 1e-6
    assert torch.equal(packed(key, everywhere(key), 4, rounding), packed(key, everywhere(key), 4, None))


def test_the_formula_channel_by_channel() -> None:
    """One token, by solving for the channels that are left: the next one is moved to the minimum of e^T H e."""
    query, key = problem(5, 64, batch=1, groups=1)
    valid = everywhere(key)
    rounding = key_rounding(query, valid, key, valid, damping=0.5)
    q, k = query[0, 0].double(), key[0, 0].double()
    h = q.T @ q
    h = h / h.diagonal().mean() + 0.5 * torch.eye(64, dtype=torch.float64, device=DEVICE)
    order = rounding.order_BKD[0, 0].long()
    span = k.amax(0) - k.amin(0)
    assert torch.equal(order, (h.diagonal() * span**2).argsort(descending=True))
    w, done = k[2].clone(), []
    codes, scale, minimum = quantize_keys(key[0, :, None].float(), 4, rounding.of_row(0))
    for j, channel in enumerate(order.tolist()):
        found = minimum[0, 0, channel] + scale[0, 0, channel] * codes[0, 0, 2, channel]
        step = ((w[channel] - minimum[0, 0, channel]) / scale[0, 0, channel]).round().clamp(0, 15)
        assert codes[0, 0, 2, channel].item() == step.item()
        error = torch.zeros(64, dtype=torch.float64, device=DEVICE)
        done.append(channel)
        error[done] = (minimum[0, 0] + scale[0, 0] * codes[0, 0, 2] - k[2].float()).double()[done]
        rest = order[j + 1 :]
        # the free channels' best answer to the errors made so far: H_rr w_r = H_rr k_r - H_rd e_d
        if len(rest):
            w[rest] = k[2][rest] - torch.linalg.solve(h[rest][:, rest], h[rest][:, done] @ error[done])
        assert torch.isfinite(found)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("tokens", "width", "dtype"), [(63, 64, torch.float32), (129, 128, torch.bfloat16)])
def test_triton_gives_the_reference_codes(tokens: int, width: int, dtype: torch.dtype, bits: int) -> None:
    """Sums of products may be fused, so a value next to a boundary may take the other code; no more than that."""
    query, key = problem(tokens, width)
    key = key.to(dtype)
    valid = everywhere(key)
    valid[1, :7] = False
    rounding = key_rounding(query.to(dtype), valid, key, valid)
    slow, fast = (packed(key, valid, bits, rounding, how) for how in ("reference", "triton"))
    assert torch.isfinite(fast).all()
    assert (slow != fast).float().mean() < 0.02
    wide = key.float()[1:, :, 7:]
    errors = [score_error(query[1:, :, 7:].float(), wide, found[1:, :, : tokens - 7]) for found in (slow, fast)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_padding_and_other_rows_do_not_matter() -> None:
    query, key = problem(70, 64)
    valid = everywhere(key)
    alone = packed(key[:1], valid[:1], 4, key_rounding(query[:1], valid[:1], key[:1], valid[:1]))
    padded_key, padded_query = (torch.nn.functional.pad(t, (0, 0, 11, 0), value=1e4) for t in (key, query))
    padded_valid = torch.nn.functional.pad(valid, (11, 0), value=False)
    rounding = key_rounding(padded_query, padded_valid, padded_key, padded_valid)
    together = packed(padded_key, padded_valid, 4, rounding)
    assert (together[:1, :, :70] != alone[:, :, :70]).float().mean() < 0.02


def test_a_row_of_padding_is_harmless() -> None:
    query, key = problem(20, 64)
    valid = everywhere(key)
    valid[0] = False
    rounding = key_rounding(query, valid, key, valid)
    assert torch.isfinite(rounding.step_BKDD).all()
    assert not rounding.step_BKDD[0].any()
    assert packed(key, valid, 4, rounding)[0].eq(0).all()
