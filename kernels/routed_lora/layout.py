"""What a group of sites that read the same input shares: one stack of A, of gates and of index tables.

Q, K and V (gate and up) of a layer have one input x, so its statistics, its router products and its shrink are made once.
Slots of all sites lie side by side on the axis R: site by site, within a site expert by expert (mixed ranks, absent
experts have none). Gates of all sites lie on the axis Z = S * N. Built once when experts are attached, never in a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..sizes import power_of_two

# finite, so that a list of k choices never names an expert twice where fewer than k are present; its weight is 0
ABSENT = -1e38


class GroupShape(NamedTuple):
    """The numbers a launch needs. slots: R of each site; widest: the largest rank of any expert."""

    num_experts: int
    slots: tuple[int, ...]
    widest: int

    @property
    def rank(self) -> int | None:
        """The rank of every expert at every site; None where they differ or an expert lacks a site."""
        return self.widest if all(count == self.num_experts * self.widest for count in self.slots) else None


class GroupTables(NamedTuple):
    """Index tables of a group, int32, on the device of the bank.

    owner_R   expert of each rank slot
    start_Z   first slot of an expert on the axis R; rank_Z its number of slots
    absent_Z  fp32, 0, or ABSENT where the expert lacks the site: added to its score
    """

    owner_R: Tensor
    start_Z: Tensor
    rank_Z: Tensor
    absent_Z: Tensor


class PreparedGates(NamedTuple):
    """Routing vectors of all sites of a group, and the two parts a 16-bit product reads.

    vectors_ZI       fp32 (fp64 stays), prepared by the router, 0 for absent experts
    high_ZI, low_ZI  their leading and next 8 (bf16) or 11 (fp16) bits in the dtype of the tokens, so that
                     x . high + x . low in fp32 equals the fp32 product to 2^-17; empty for fp32 tokens
    shift_Z          fp32 sum of the vector's entries as the kernels see it: times mean(x) it is what the mean adds
    """

    vectors_ZI: Tensor
    high_ZI: Tensor
    low_ZI: Tensor
    shift_Z: Tensor


def axis_length(count: int, least: int = 16) -> int:
    """The power of two that holds `count`: what a kernel's axis is padded to."""
    return power_of_two(count, least)


def group_shape(ranks_SN: Sequence[Sequence[int]]) -> GroupShape:
    """From the rank of every expert at every site (0: absent)."""
    slots = tuple(sum(ranks) for ranks in ranks_SN)
    return GroupShape(len(ranks_SN[0]), slots, max(max(ranks) for ranks in ranks_SN))


def group_tables(ranks_SN: Sequence[Sequence[int]], device: torch.device) -> GroupTables:
    """See GroupTables."""
    owner, start, rank, absent, first = [], [], [], [], 0
    for ranks in ranks_SN:
        for expert, count in enumerate(ranks):
            owner += [expert] * count
            start.append(first)
            rank.append(count)
            absent.append(0.0 if count else ABSENT)
            first += count
    whole = {"dtype": torch.int32, "device": device}
    return GroupTables(
        torch.tensor(owner, **whole),
        torch.tensor(start, **whole),
        torch.tensor(rank, **whole),
        torch.tensor(absent, dtype=torch.float32, device=device),
    )


def grouped_layout(
    start_Z: Tensor, rank_Z: Tensor, slots: Sequence[int], widest: int
) -> tuple[GroupShape, GroupTables]:  # fmt: skip
    """A group as the grouped kernels read it: they look at neither owners nor absence."""
    shape = GroupShape(start_Z.shape[0] // len(slots), tuple(slots), widest)
    return shape, GroupTables(start_Z, start_Z, rank_Z, start_Z)


def split_gates(vectors_ZI: Tensor, dtype: torch.dtype) -> PreparedGates:
    """Two-term split of prepared vectors for tokens of `dtype`."""
    if dtype not in (torch.bfloat16, torch.float16):
        empty = vectors_ZI.new_empty(0, vectors_ZI.shape[1])
        return PreparedGates(vectors_ZI, empty, empty, vectors_ZI.sum(1).float())
    high = vectors_ZI.to(dtype)
    both_PI = torch.cat([high, (vectors_ZI - high.to(vectors_ZI.dtype)).to(dtype)])
    high, low = both_PI[: len(high)], both_PI[len(high) :]
    return PreparedGates(vectors_ZI, high, low, (high.double() + low.double()).sum(1).float())


def both_parts(gates: PreparedGates) -> Tensor:
    """[P, I]: the gates' leading parts, their rests and, where the memory behind those is theirs too, whatever rows it takes to a
    multiple of 8 (`stack_factors` says what for). A view where the parts lie side by side, as `split_gates` and `stack_factors`
    make them; else a copy."""
    high, low = gates.high_ZI, gates.low_ZI
    rows, width = high.shape
    storage, begin = high.untyped_storage(), high.storage_offset()
    beside = low.untyped_storage().data_ptr() == storage.data_ptr() and low.storage_offset() == begin + rows * width
    if not (beside and high.is_contiguous() and low.is_contiguous()):
        return torch.cat([high, low])
    whole = 2 * rows + -2 * rows % 8
    fits = (begin + whole * width) * high.element_size() <= storage.nbytes()
    return high.as_strided((whole if fits else 2 * rows, width), (width, 1))


def stack_factors(a_RI: Tensor, gates: PreparedGates) -> tuple[Tensor, PreparedGates, Tensor]:
    """(A, gates, stack [P, I]) with the same numbers, A and both parts of the gates as views of one matrix.

    The stack's rows are A's, the gates' leading parts, their rests, and zeros up to a multiple of 8, which is what the library's
    fastest products want of their fp32 outputs. One product with it is all that routing and shrink of a group read of x beside
    its mean and variance. fp32 tokens have no parts: A and gates as they are, and an empty stack.
    """
    if not gates.high_ZI.numel():
        return a_RI, gates, a_RI.new_empty(0, a_RI.shape[1])
    parts = [a_RI, gates.high_ZI, gates.low_ZI]
    rows = [len(part) for part in parts]
    stack_PI = torch.cat([*parts, a_RI.new_zeros(-sum(rows) % 8, a_RI.shape[1])])
    a, high, low = stack_PI[: sum(rows)].split(rows)
    return a, gates._replace(high_ZI=high, low_ZI=low), stack_PI
