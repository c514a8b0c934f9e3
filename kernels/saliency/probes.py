"""Which tokens are probes, and the hash that makes every random choice reproducible.

    probes of a row = its most recent 5 % valid tokens + 5 % of the others at random      (ZipCache, section 4.2)

Random means: the lowest values of hash(seed, sequence id, position among the row's valid tokens). So a row has the same
probes alone and in a padded batch, in every process and on every device; nothing is drawn twice (the authors' code
draws with replacement and without a seed).
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

import torch
from torch import Tensor

_PARTS_PER_MILLION = 1_000_000
_SIGNED_BITS = 62  # hashes lie in [0, 2^62): room for a sentinel above them
_RANK_BITS = 24  # the low bits of a hash are the position, so that no two of a row are equal


class SaliencyMode(StrEnum):
    """How attention of the probe rows becomes a score; the last four exist for controls (README.md)."""

    EQ8 = "eq8"
    ROW_LENGTH = "row_length"
    ACCUMULATED = "accumulated"
    AUTHORS_CODE = "authors_code"
    RECENT = "recent"
    RANDOM = "random"


Count = TypeVar("Count", int, Tensor)


def share(ratio: float, count: Count) -> Count:
    """ceil(ratio * count) in integers, ratio rounded to a millionth: 0.7 of 10 is 7, on every device."""
    millionths = round(ratio * _PARTS_PER_MILLION)
    return (count * millionths + (_PARTS_PER_MILLION - 1)) // _PARTS_PER_MILLION


def num_probes(n: int, *, recent_fraction: float = 0.05, random_fraction: float = 0.05, cap: int = 512) -> int:
    """P, the width of `choose_probes`' result for n tokens: a function of n only."""
    cap_recent, cap_random = _caps(recent_fraction, random_fraction, cap)
    recent = min(share(recent_fraction, n), cap_recent)
    return recent + min(share(random_fraction, n), cap_random, n - recent)


def _shares(count: Tensor, recent_fraction: float, random_fraction: float, cap: int) -> tuple[Tensor, Tensor]:
    """Recent and random probes of rows with `count` valid tokens; their sum never falls as count grows."""
    cap_recent, cap_random = _caps(recent_fraction, random_fraction, cap)
    recent = share(recent_fraction, count).clamp(max=cap_recent)
    random = torch.minimum(share(random_fraction, count).clamp(max=cap_random), count - recent)
    return recent, random


def _caps(recent_fraction: float, random_fraction: float, cap: int) -> tuple[int, int]:
    """The most recent and random probes."""
    total = recent_fraction + random_fraction
    if not (recent_fraction >= 0 and random_fraction >= 0 and 0 < total <= 1) or cap < 1:
        raise ValueError(
            f"recent_fraction = {recent_fraction}, random_fraction = {random_fraction}, cap = {cap}: fractions must be "
            "at least 0 with a sum above 0 and at most 1, the cap at least 1"
        )
    cap_recent = -int(-cap * recent_fraction // total)
    return cap_recent, cap - cap_recent


def hash_positions(rank: Tensor, sequence_id: Tensor, seed: int) -> Tensor:
    """int64 hash in [0, 2^62) of (seed, sequence id, rank); broadcasts rank against sequence_id."""
    x = rank * _signed(0x9E3779B97F4A7C15) + sequence_id * _signed(0xD1B54A32D192ED03)
    x = x + _signed(seed * 0x8CB92BA72F3D8DD7 + 0x2545F4914F6CDD1D)
    for factor, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27), (0xD6E8FEB86659FD93, 32)):
        x = (x ^ _logical_shift(x, shift)) * _signed(factor)
    return _logical_shift(x ^ _logical_shift(x, 31), 64 - _SIGNED_BITS)


def _logical_shift(x: Tensor, shift: int) -> Tensor:
    return (x >> shift) & ((1 << (64 - shift)) - 1)


def _signed(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def choose_probes(
    valid: Tensor,
    *,
    recent_fraction: float = 0.05,
    random_fraction: float = 0.05,
    cap: int = 512,
    seed: int = 0,
    sequence_id: Tensor | None = None,
    mode: SaliencyMode = SaliencyMode.EQ8,
) -> Tensor:
    """Probe rows as token indices, int64 [B, P], ascending, -1 past a row's last probe.

    valid        bool [B, n]
    sequence_id  int64 [B], what distinguishes one sequence's draw from another's; None is 0 for all
    mode         ACCUMULATED takes every valid token (fractions and cap do not apply)

    P is `num_probes(n)`. A row with c valid tokens has as many probes as an unpadded row of c tokens, the same ones.
    No synchronisation.
    """
    batch, n = valid.shape
    rank_BN = valid.long().cumsum(1) - 1
    if mode is SaliencyMode.ACCUMULATED:
        chosen_BN, width = valid, n
    else:
        fractions = {"recent_fraction": recent_fraction, "random_fraction": random_fraction, "cap": cap}
        width = num_probes(n, **fractions)
        count_B1 = rank_BN[:, -1:] + 1
        recent_B1, random_B1 = _shares(count_B1, **fractions)
        recent_BN = valid & (rank_BN >= count_B1 - recent_B1)
        if sequence_id is None:
            sequence_id = torch.zeros(batch, dtype=torch.int64, device=valid.device)
        hash_BN = hash_positions(rank_BN, sequence_id.long().unsqueeze(1), seed)
        hash_BN = (hash_BN >> _RANK_BITS << _RANK_BITS) | rank_BN
        hash_BN = torch.where(valid & ~recent_BN, hash_BN, 1 << _SIGNED_BITS)
        limit_B1 = hash_BN.sort(dim=1).values.gather(1, (random_B1 - 1).clamp(min=0))
        chosen_BN = recent_BN | (valid & ~recent_BN & (hash_BN <= limit_B1) & (random_B1 > 0))
    place_BN = torch.where(chosen_BN, chosen_BN.long().cumsum(1) - 1, width)  # column `width` takes the others
    probes = torch.full((batch, width + 1), -1, dtype=torch.int64, device=valid.device)
    index = torch.arange(n, device=valid.device).expand(batch, -1)
    return probes.scatter_(1, place_BN, index)[:, :width].contiguous()
