"""Velocity, token and manifold losses as sums over images, so that the engine can divide by the images of a whole step.

    L_tok = - mean_bn cos(y_bn, p_bn)
    L_ml  = + mean_bij ((Y Y^T)_ij - (P P^T)_ij)^2             Y, P: L2-normalised tokens of an image (intra)

Deviations from the printed U-REPA, each tested: the manifold loss has a plus sign (minimising the printed one would push the
matrices apart) and is a mean over all N^2 entries, diagonal included. `inter` compares images instead of tokens: i, j run over
the images of the step, whose vectors are token means, centred over the step and normalised (u-repa.md 1.4). Norms, products and
sums are fp32 whatever the inputs are. Called by train/jobs/urepa.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..base import distributed

EPS = 1e-6


def velocity_sum(v_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Sum over images of the mean squared error of an image, fp32 scalar."""
    return (v_BCHW.float() - target_BCHW.float()).square().flatten(1).mean(1).sum()


def unit(tokens: Tensor) -> Tensor:
    """fp32 tokens of length one along the last axis; a zero token stays zero and gets no gradient (1 / length would overflow)."""
    tokens = tokens.float()
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    alive = length > EPS
    return torch.where(alive, tokens / torch.where(alive, length, 1.0), 0.0)


def cosines(teacher_BND: Tensor, student_BND: Tensor) -> Tensor:
    """Mean cosine of an image's tokens, fp32 [B], within [-1, 1] but for rounding."""
    return (unit(teacher_BND) * unit(student_BND)).sum(-1).mean(-1)


def intra(teacher_BND: Tensor, student_BND: Tensor) -> Tensor:
    """Mean squared difference of an image's two N x N cosine matrices, fp32 [B]."""
    teacher_BND, student_BND = unit(teacher_BND), unit(student_BND)
    with torch.autocast(teacher_BND.device.type, enabled=False):
        difference_BNN = teacher_BND @ teacher_BND.mT - student_BND @ student_BND.mT
    return difference_BNN.square().mean((-2, -1))


def inter(teacher_BND: Tensor, student_BND: Tensor) -> Tensor:
    """Row i of the squared difference of the two cosine matrices between images, averaged over all images of all ranks: fp32
    [B] for this rank's images. Collective; differentiable through the other ranks' vectors."""
    everyone = [gather_rows(tokens.float().mean(1)) for tokens in (teacher_BND, student_BND)]
    rank, rows = distributed.world().rank, len(teacher_BND)
    own = slice(rank * rows, (rank + 1) * rows) if distributed.active() else slice(None)
    teacher_GD, student_GD = (unit(vectors - vectors.mean(0)) for vectors in everyone)
    with torch.autocast(teacher_GD.device.type, enabled=False):
        difference_BG = teacher_GD[own] @ teacher_GD.mT - student_GD[own] @ student_GD.mT
    return difference_BG.square().mean(1)


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks in rank order; backward: what every rank's loss says of this rank's rows, summed."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:  # type: ignore[override]
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        whole = distributed.all_reduce_sum(gradient.contiguous().clone())
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        rows = len(whole) // size
        return whole[rank * rows : (rank + 1) * rows]


def gather_rows(rows_BD: Tensor) -> Tensor:
    """[B, D] of every rank as [world * B, D], alike on all ranks; every rank has as many rows. Collective."""
    return _outside_graphs(rows_BD) if distributed.active() else rows_BD


def _gather(rows_BD: Tensor) -> Tensor:
    gathered = _GatherRows.apply(rows_BD)
    assert isinstance(gathered, Tensor)
    return gathered


# a collective ends a compiled graph; in one process there is none
_outside_graphs: Callable[[Tensor], Tensor] = torch.compiler.disable(_gather)  # type: ignore[assignment]


def normalise_space(teacher_BND: Tensor, gamma: float = 1.0) -> Tensor:
    """Teacher tokens with an image's spatial mean taken off (`gamma` of it) and its spatial deviation made one, per channel, fp32
    (iREPA, Singh et al. 2025)."""
    tokens_BND = teacher_BND.float()
    centred_BND = tokens_BND - gamma * tokens_BND.mean(1, keepdim=True)
    return centred_BND / (tokens_BND.std(1, keepdim=True, correction=0) + EPS)
