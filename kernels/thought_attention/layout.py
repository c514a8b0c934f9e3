"""What a thought may see, and the shapes of one call. Axes of this folder, beside base/axes.py:

    B  rows            A  anchors of a row       M  positions of a branch in this call (queries)
    H  query heads     S  samples of an anchor   N  positions that own keys and values have room for, N >= M
    K  KV heads        L  positions of the row   D  channels of a head
    G  query heads of a KV head, H = K * G

A branch is one sample of one anchor. Its query m sees the row's keys start .. anchor (its own document up to and with the
anchor) and its own keys n <= own_length - M + m: the queries are the last M of the `own_length` filled slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import UnsupportedShape


@dataclass(frozen=True)
class Shape:
    """Sizes of one call, checked against each other."""

    B: int
    H: int
    K: int
    A: int
    S: int
    M: int
    N: int
    L: int
    D: int

    @property
    def G(self) -> int:
        """Query heads of a KV head."""
        return self.H // self.K


def shape_of(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, own_k: Tensor, own_v: Tensor, anchor: Tensor, start: Tensor
) -> Shape:
    """The sizes, or UnsupportedShape with the tensor that does not fit the others."""
    if q.dim() != 6 or prefix_k.dim() != 4 or own_k.dim() != 6:
        raise UnsupportedShape(
            f"q {tuple(q.shape)}, prefix_k {tuple(prefix_k.shape)}, own_k {tuple(own_k.shape)}: needed are "
            "[B, H, A, S, M, D], [B, K, L, D] and [B, K, A, S, N, D]"
        )
    B, H, A, S, M, D = q.shape
    K, L = prefix_k.shape[1:3]
    N = own_k.shape[4]
    if K == 0 or H % K or M > N or L == 0:
        raise UnsupportedShape(
            f"H = {H}, K = {K}, M = {M}, N = {N}, L = {L}: H must be a multiple of K, N at least M, L at least 1"
        )
    needed = {
        "prefix_k": (prefix_k, (B, K, L, D)),
        "prefix_v": (prefix_v, (B, K, L, D)),
        "own_k": (own_k, (B, K, A, S, N, D)),
        "own_v": (own_v, (B, K, A, S, N, D)),
        "anchor": (anchor, (B, A)),
        "start": (start, (B, A)),
    }
    for name, (tensor, want) in needed.items():
        if tuple(tensor.shape) != want:
            raise UnsupportedShape(f"{name} {tuple(tensor.shape)}: needed is {want} beside q {tuple(q.shape)}")
        floating = name not in ("anchor", "start")
        if floating and tensor.dtype != q.dtype:
            raise UnsupportedShape(f"{name} of {tensor.dtype}, q of {q.dtype}: all four and q must have one dtype")
        if not floating and tensor.dtype != torch.int64:
            raise UnsupportedShape(f"{name} of {tensor.dtype}: it must be int64")
    return Shape(B, H, K, A, S, M, N, L, D)


def prefix_mask(anchor_BA: Tensor, start_BA: Tensor, length: int) -> Tensor:
    """bool [B, A, L]: the row's keys that an anchor's branches see; none for a padding anchor (anchor < 0)."""
    key_L = torch.arange(length, device=anchor_BA.device)
    return (key_L <= anchor_BA.unsqueeze(-1)) & (key_L >= start_BA.unsqueeze(-1))


def own_mask(own_length: Tensor | int | None, M: int, N: int, device: torch.device) -> Tensor:
    """bool [M, N]: own slots that each query sees; `own_length` None means N."""
    last = (N if own_length is None else own_length) - M + torch.arange(M, device=device)
    return torch.arange(N, device=device) <= last.unsqueeze(1)
