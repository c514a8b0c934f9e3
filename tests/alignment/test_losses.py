"""Velocity, token and manifold losses: against plain numpy, and the traps of u-repa.md 1.4, each with the mistake it catches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quietgoose.alignment import losses
from quietgoose.alignment.projector import resize
from quietgoose.kernels.testing import assert_close
from torch import Tensor


def draw(rows: int, tokens: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def units(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def naive(teacher: Tensor, student: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cosines [B], intra [B], inter [B]) in fp64, entry by entry where it matters."""
    y, p = teacher.double().numpy(), student.double().numpy()
    cosine = (units(y) * units(p)).sum(-1).mean(-1)
    rows, tokens, _ = y.shape
    intra = np.zeros(rows)
    for b in range(rows):
        for i in range(tokens):
            for j in range(tokens):
                a = units(y[b, i]) @ units(y[b, j]) - units(p[b, i]) @ units(p[b, j])
                intra[b] += a * a / tokens**2
    ym, pm = y.mean(1), p.mean(1)
    ym, pm = units(ym - ym.mean(0)), units(pm - pm.mean(0))
    return cosine, intra, ((ym @ ym.T - pm @ pm.T) ** 2).mean(1)


@pytest.mark.parametrize(("rows", "tokens", "width"), [(5, 1, 3), (3, 12, 7), (4, 25, 16)])
def test_losses_equal_numpy(rows: int, tokens: int, width: int) -> None:
    teacher, student = draw(rows, tokens, width), draw(rows, tokens, width, 1)
    cosine, intra, inter = naive(teacher, student)
    assert_close("cosine", losses.cosines(teacher, student), torch.from_numpy(cosine).float())
    if tokens > 1:
        assert_close("intra", losses.intra(teacher, student), torch.from_numpy(intra).float())
    assert_close("inter", losses.inter(teacher, student), torch.from_numpy(inter).float())


def test_velocity_is_a_mean_within_an_image_and_a_sum_over_images() -> None:
    v, target = torch.randn(3, 2, 4, 6), torch.randn(3, 2, 4, 6)
    want = sum(float(np.mean((v[b].numpy() - target[b].numpy()) ** 2)) for b in range(3))
    assert float(losses.velocity_sum(v, target)) == pytest.approx(want, rel=1e-5)


def test_a_step_on_the_manifold_loss_alone_brings_the_matrices_closer() -> None:
    """The printed sign, minus an expected distance, would push them apart."""
    teacher, student = draw(2, 9, 8), draw(2, 9, 8, 1).requires_grad_()
    before = losses.intra(teacher, student).sum()
    before.backward()
    assert student.grad is not None
    after = losses.intra(teacher, student.detach() - 0.1 * student.grad).sum()
    assert float(after) < float(before.detach())
    assert float(losses.intra(teacher, student.detach() + 0.1 * student.grad).sum()) > float(before.detach())


def test_manifold_is_a_mean_so_repeating_tokens_changes_nothing() -> None:
    """A sum over entries (a Frobenius norm) would be four times as large."""
    teacher, student = draw(2, 6, 5), draw(2, 6, 5, 1)
    once = losses.intra(teacher, student)
    twice = losses.intra(torch.cat([teacher, teacher], 1), torch.cat([student, student], 1))
    assert_close("repeated", twice, once)
    assert float(once.max()) < 4.0


def test_inter_compares_images_and_is_centred() -> None:
    """Uncentred pooled vectors of a common direction would have cosines near one, hence no loss."""
    common = 50.0 * torch.ones(8)
    teacher, student = draw(6, 4, 8) + common, draw(6, 4, 8, 1) + common
    assert float(losses.inter(teacher, student).mean()) > 0.05
    permuted = torch.randperm(4)
    assert_close("tokens within an image", losses.inter(teacher[:, permuted], student), losses.inter(teacher, student))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_tokens_in_half_precision_give_no_nan(dtype: torch.dtype) -> None:
    teacher, student = draw(2, 5, 8).to(dtype), (1e-4 * draw(2, 5, 8, 1)).to(dtype)
    teacher[0, 0], student[1, 2] = 0, 0
    student.requires_grad_()
    total = losses.cosines(teacher, student).sum() + losses.intra(teacher, student).sum()
    total = total + losses.inter(teacher, student).sum()
    total.backward()
    assert total.dtype == torch.float32
    assert student.grad is not None
    assert bool(torch.isfinite(total))
    assert bool(torch.isfinite(student.grad).all())


def test_similarity_never_exceeds_one() -> None:
    """Normalising in bf16 leaves lengths off by parts in a hundred, hence cosines above one."""
    tokens = (100 * draw(1, 64, 192)).bfloat16()
    assert float(losses.cosines(tokens, tokens).max()) <= 1 + 1e-5
    lengths = losses.unit(tokens).square().sum(-1)
    assert float((lengths - 1).abs().max()) < 1e-5
    half = torch.nn.functional.normalize(tokens, dim=-1)
    assert float((half.float().square().sum(-1) - 1).abs().max()) > 1e-4


def test_autocast_does_not_reach_the_products() -> None:
    teacher, student = draw(2, 16, 32), draw(2, 16, 32, 1)
    outside = losses.intra(teacher, student)
    with torch.autocast("cpu", torch.bfloat16):
        inside = losses.intra(teacher, student)
    assert torch.equal(outside, inside)


def test_spatial_normalisation() -> None:
    tokens = draw(3, 10, 4) * 5 + 2
    made = losses.normalise_space(tokens)
    assert float(made.mean(1).abs().max()) < 1e-5
    assert float((made.std(1, correction=0) - 1).abs().max()) < 1e-4


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic", "area"])
def test_resizing_between_grids_that_are_not_square(mode: str) -> None:
    """Bilinear against weights by hand; every mode keeps rows apart from columns and leaves a constant alone."""
    tokens = torch.arange(6.0).reshape(1, 6, 1)  # rows 2, columns 3
    target = (1, 3) if mode == "area" else (4, 3)
    made = resize(tokens, (2, 3), target, mode).reshape(target)
    if mode == "bilinear":
        want = np.array([[0.0, 0.75, 2.25, 3.0]]).T + np.arange(3)
        np.testing.assert_allclose(made.numpy(), want, atol=1e-6)
    assert torch.allclose(made[:, 1] - made[:, 0], torch.ones(target[0]), atol=0.3)
    assert torch.allclose(resize(torch.ones(1, 6, 2), (2, 3), target, mode), torch.ones(1, target[0] * 3, 2))
    assert resize(tokens, (2, 3), (2, 3), mode) is tokens
