"""Distances between two sets of features, and what they say of samples. Everything in fp64 unless said otherwise.

Frechet distance of Gaussians: Dowson & Landau 1982 (FID's formula, Heusel et al. 2017, on whatever features are given).
Kernel distance: Binkowski et al. 2018, cubic polynomial kernel, unbiased. Precision and recall: Kynkaanniemi et al. 2019.
Distances at different sample counts must not be compared: all of these but the kernel distance depend on the count.
Called by judging.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CHUNK = 2048


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D, D] of features."""

    mean_D: Tensor
    covariance_DD: Tensor

    @cached_property
    def root_DD(self) -> Tensor:
        """The symmetric square root of the covariance."""
        values_D, vectors_DD = torch.linalg.eigh(_symmetric(self.covariance_DD))
        return (vectors_DD * values_D.clamp_min(0.0).sqrt()) @ vectors_DD.T

    @staticmethod
    def of(features_ND: Tensor, weight_N: Tensor | None = None) -> Moments:
        """`weight_N`: how often each row counts; by default once."""
        x_ND = features_ND.double()
        if weight_N is None:
            weight_N = torch.ones(len(x_ND), dtype=torch.float64, device=x_ND.device)
        total = weight_N.sum()
        mean_D = weight_N @ x_ND / total
        centred_ND = x_ND - mean_D
        return Moments(mean_D, centred_ND.T @ (centred_ND * weight_N[:, None]) / (total - 1.0))


def frechet(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_b^1/2 S_a S_b^1/2)^1/2), by two symmetric eigenproblems, the one of b only once; never
    below 0."""
    values_D = torch.linalg.eigvalsh(_symmetric(b.root_DD @ a.covariance_DD @ b.root_DD))
    overlap = values_D.clamp_min(0.0).sqrt().sum()
    shift = (a.mean_D - b.mean_D).square().sum()
    return max(0.0, float(shift + a.covariance_DD.trace() + b.covariance_DD.trace() - 2.0 * overlap))


def frechet_spread(features_ND: Tensor, reference: Moments, times: int, generator: torch.Generator) -> float:
    """Standard deviation of the distance over `times` bootstrap resamples of the features (the reference stays). The
    resamples' mean is no estimate of the distance: drawing twice adds to it."""
    count, device = len(features_ND), features_ND.device
    values = []
    for _ in range(times):
        drawn = torch.randint(count, (count,), generator=generator)
        weight_N = torch.bincount(drawn, minlength=count).double().to(device)
        values.append(frechet(Moments.of(features_ND, weight_N), reference))
    return float(torch.tensor(values).std()) if times > 1 else float("nan")


def kernel_distance(
    x_ND: Tensor, y_ND: Tensor, subsets: int, size: int, generator: torch.Generator
) -> tuple[float, float]:
    """(mean, standard error) of the unbiased squared MMD over random subsets; kernel (x . y / D + 1)^3. At most N / size
    subsets are independent, which the standard error counts on."""
    size = min(size, len(x_ND), len(y_ND))
    values = []
    for _ in range(subsets):
        x = x_ND[torch.randperm(len(x_ND), generator=generator)[:size].to(x_ND.device)].double()
        y = y_ND[torch.randperm(len(y_ND), generator=generator)[:size].to(y_ND.device)].double()
        xx, yy, xy = (_cubic(p, q) for p, q in ((x, x), (y, y), (x, y)))
        off = size * (size - 1)
        values.append((xx.sum() - xx.trace()) / off + (yy.sum() - yy.trace()) / off - 2.0 * xy.mean())
    found = torch.stack(values).cpu()
    independent = max(1, min(subsets, min(len(x_ND), len(y_ND)) // size))
    spread = float(found.std()) if subsets > 1 else float("nan")
    return float(found.mean()), spread / independent**0.5


def precision_recall(samples_ND: Tensor, real_ND: Tensor, neighbours: int) -> tuple[float, float]:
    """(share of samples inside a real image's ball, share of real images inside a sample's ball); a ball reaches to the
    k-th nearest of its own set."""
    precision = _covered(samples_ND, real_ND, ball_radii(real_ND, neighbours))
    recall = _covered(real_ND, samples_ND, ball_radii(samples_ND, neighbours))
    return precision, recall


def ball_radii(features_ND: Tensor, neighbours: int) -> Tensor:
    """Distance of every row to its k-th nearest other row, fp32 [N]."""
    count = min(neighbours + 1, len(features_ND))
    parts = [torch.cdist(part, features_ND).topk(count, largest=False).values[:, -1] for part in _chunks(features_ND)]
    return torch.cat(parts)


def nearest(features_ND: Tensor, others_MD: Tensor) -> tuple[Tensor, Tensor]:
    """(distance fp32 [N], index int64 [N]) of the nearest row of `others_MD`."""
    found = [torch.cdist(part, others_MD).min(dim=1) for part in _chunks(features_ND)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _covered(points_ND: Tensor, centres_MD: Tensor, radius_M: Tensor) -> float:
    inside = [(torch.cdist(part, centres_MD) <= radius_M).any(dim=1) for part in _chunks(points_ND)]
    return float(torch.cat(inside).double().mean())


def _chunks(features_ND: Tensor) -> tuple[Tensor, ...]:
    return features_ND.split(CHUNK)


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _symmetric(matrix_DD: Tensor) -> Tensor:
    return 0.5 * (matrix_DD + matrix_DD.T)
