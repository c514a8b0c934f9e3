"""Problems of every shape for the tests of the routed kernels, and what fp64 arithmetic makes of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from quietgoose.kernels.routed_lora import (
    group_shape,
    group_tables,
    masked_hidden,
    route_group,
    split_gates,
    stack_factors,
)
from quietgoose.kernels.testing import assert_close
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]

# tokens, input width, output widths, ranks of every expert at every site, k
CASES = {
    "one token": (1, 40, (30,), [[3, 0, 5]], 2),
    "three sites": (18, 48, (40, 24, 24), [[4, 4, 4, 4]] * 3, 2),
    "mixed ranks": (35, 33, (20, 50), [[1, 2, 3, 4, 5], [2, 2, 0, 7, 1]], 3),
    "one expert": (5, 24, (7,), [[4]], 1),
    "k is N": (17, 16, (18,), [[2, 64, 1]], 3),
    "k beyond those present": (9, 16, (18, 6), [[2, 0, 0], [1, 3, 2]], 3),
}
ON_GPU = {
    "SmolLM2 qkv": (300, 576, (576, 192, 192), [[16] * 16] * 3, 2),
    "SmolLM2 down": (100, 1536, (576,), [[16] * 16], 2),
    "64 tokens": (64, 576, (1536, 1536), [[16] * 16] * 2, 4),
    "many experts": (257, 192, (96,), [[16] * 166], 2),
    "k is 8": (130, 576, (576,), [[16] * 16], 8),
    "wide, one token": (1, 14336, (4096,), [[16] * 16], 2),
}
if GPU:
    CASES |= ON_GPU
OTHERS: dict[str, tuple[int, int, tuple[int, ...], list[list[int]], int]] = {}
"""Problems of one test file; not every test's, as those of CASES are."""


class Problem(NamedTuple):
    x: Tensor
    vectors: Tensor
    a: Tensor
    b: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor]
    ranks: list[list[int]]
    k: int


def problem(case: str, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Numbers of size one; gates point at rows of x, so that near ties are rare and every expert is chosen somewhere."""
    tokens, width, outs, ranks, k = CASES[case] if case in CASES else OTHERS[case]
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    count = len(ranks[0])
    raw = normal(len(outs) * count, width)
    vectors = torch.nn.functional.layer_norm(raw, (width,)).div_(width**0.5).float()
    vectors[torch.tensor([rank == 0 for site in ranks for rank in site])] = 0
    x = normal(tokens, width) * 2 + 0.5
    a, b = normal(sum(map(sum, ranks)), width) / width**0.5, [normal(sum(r), o) for r, o in zip(ranks, outs)]
    weights, biases = [normal(o, width) / width**0.5 for o in outs], [normal(o) for o in outs]
    cast: Any = lambda t: t.to(DEVICE, dtype)  # noqa: E731
    return Problem(
        cast(x), vectors.to(DEVICE), cast(a), [*map(cast, b)], [*map(cast, weights)], [*map(cast, biases)], ranks, k
    )


def lists(p: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """(gates, tables) as the operators take them."""
    return list(split_gates(p.vectors, p.x.dtype)), list(group_tables(p.ranks, p.x.device))


def stacked(p: Problem) -> tuple[Problem, list[Tensor], list[Tensor]]:
    """(problem, gates, tables) with A and both parts of the gates in one matrix, the last of `gates`; 16 bits."""
    a_RI, gates, stack = stack_factors(p.a, split_gates(p.vectors, p.x.dtype))
    return p._replace(a=a_RI), [*gates, stack], list(group_tables(p.ranks, p.x.device))


def exact(p: Problem, arrow: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(weights, index, update of every site) by the plain twin in fp64, on the very numbers the kernels read."""
    shape, tables = group_shape(p.ranks), group_tables(p.ranks, p.x.device)
    weights, index = route_group(
        p.x.double(), p.vectors.double(), tables.absent_Z.double(), shape.num_experts, p.k, arrow
    )
    hidden = masked_hidden(p.x.double(), p.a.double(), tables.owner_R, shape.slots, weights, index, shape.num_experts)
    parts = hidden.split(list(shape.slots), dim=1)
    return weights, index, [h @ b.double() for h, b in zip(parts, p.b)]


def check_grouped_gradients(p: Problem, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of shrink and expand against fp64; the gradients of x, weights, A and every B."""
    shape, tables = group_shape(p.ranks), group_tables(p.ranks, p.x.device)
    weights, index, _ = exact(p)
    order, plan = torch.ops.quietgoose.sort_experts(index.int(), shape.num_experts)
    leaves = [t.clone().requires_grad_() for t in (p.x, weights.float(), p.a, *p.b)]
    hidden = torch.ops.quietgoose.shrink_experts(
        *leaves[:2], order, plan, leaves[2], tables.start_Z, tables.rank_Z, shape.slots, shape.widest
    )
    twins = [t.detach().double().requires_grad_() for t in leaves]
    hidden_twin = masked_hidden(twins[0], twins[2], tables.owner_R, shape.slots, twins[1], index, shape.num_experts)
    outs, want_outs, upstreams, ys = [], [], [], []
    for site, part in enumerate(hidden_twin.split(list(shape.slots), 1)):
        own = group_tables(p.ranks[site : site + 1], p.x.device)
        ys.append(torch.zeros(len(p.x), p.b[site].shape[1], dtype=dtype, device=DEVICE, requires_grad=True))
        outs.append(
            torch.ops.quietgoose.expand_experts(
                ys[-1], hidden[site], order[site], plan[site], leaves[3 + site], own.start_Z, own.rank_Z, shape.widest
            )
        )
        want_outs.append(part @ twins[3 + site])
        assert_close(f"y, site {site}", outs[-1], want_outs[-1])
        g = torch.Generator().manual_seed(3 + site)
        upstreams.append(torch.randn(outs[-1].shape, generator=g).to(DEVICE, dtype))
    got = torch.autograd.grad(outs, (*leaves, *ys), upstreams)
    want = torch.autograd.grad(want_outs, twins, [u.double() for u in upstreams])
    assert all(torch.equal(y, u) for y, u in zip(got[len(leaves) :], upstreams))
    keep = weights > 0  # an absent expert's weight has no gradient to speak of
    assert_close("weights", got[1][keep], want[1][keep], dtype=dtype, direction="gradient")
    for name, mine, twin in zip(
        ("x", "A", *(f"B of site {i}" for i in range(3))), got[:1] + got[2:], want[:1] + want[2:]
    ):
        assert_close(name, mine, twin, dtype=dtype, direction="gradient")
    return list(got[: len(leaves)])
