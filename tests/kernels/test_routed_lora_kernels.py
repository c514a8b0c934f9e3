"""The routed kernels equal fp64 arithmetic: every formulation, forward and every gradient; interpreter on a CPU, compiled
on a GPU (where bf16 joins in: the interpreter's matrix product does not know it)."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from quietgoose.kernels.routed_lora import (
    gate_scores,
    group_shape,
    group_tables,
    masked_hidden,
    operators,
    route_group,
    split_gates,
    tiles,
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
# the interpreter is slow: one case in fp16 says what there is to say about it
PAIRS = [(case, dtype) for case in CASES for dtype in DTYPES if GPU or dtype == torch.float32 or case == "mixed ranks"]


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
    tokens, width, outs, ranks, k = CASES[case]
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


def exact(p: Problem, arrow: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(weights, index, update of every site) by the plain twin in fp64, on the very numbers the kernels read."""
    shape, tables = group_shape(p.ranks), group_tables(p.ranks, p.x.device)
    weights, index = route_group(
        p.x.double(), p.vectors.double(), tables.absent_Z.double(), shape.num_experts, p.k, arrow
    )
    hidden = masked_hidden(p.x.double(), p.a.double(), tables.owner_R, shape.slots, weights, index, shape.num_experts)
    parts = hidden.split(list(shape.slots), dim=1)
    return weights, index, [h @ b.double() for h, b in zip(parts, p.b)]


@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_every_formulation_equals_fp64(case: str, dtype: torch.dtype) -> None:
    p = problem(case, dtype)
    gates, tables = lists(p)
    shape = group_shape(p.ranks)
    updates = exact(p)[2]
    methods = [
        "stock",
        "fused",
        "grouped",
        *(["decode"] if len(p.x) <= 64 else []),
    ]
    biases = p.biases if case == "three sites" else []
    plain = [p.x.double() @ w.double().t() for w in p.weights]
    plain = [y + b.double() for y, b in zip(plain, biases)] if biases else plain
    for method in methods:
        got = torch.ops.quietgoose.routed_linears(
            p.x, p.weights, biases, p.a, p.b, gates, tables, shape.num_experts, shape.widest, p.k, False, method
        )
        for site, (y, base, update) in enumerate(zip(got, plain, updates)):
            assert y.is_contiguous()
            assert_close(f"{method}, site {site}", y, base + update)


@pytest.mark.parametrize("arrow", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_routing_equals_fp64_whatever_the_dtype_of_the_tokens(case: str, arrow: bool) -> None:
    """Weights are within fp32's table entry although 16-bit products make them: gates are split in two parts."""
    for dtype in DTYPES:
        p = problem(case, dtype)
        gates, tables = lists(p)
        count = len(p.ranks[0])
        want, index, _ = exact(p, arrow)
        weight, chosen = torch.ops.quietgoose.route_experts(p.x, p.vectors, gates[1:], tables, count, p.k, arrow)
        assert_close("weights", weight, want, dtype=torch.float32)
        agree = (chosen == index) | (want == 0)
        assert bool(agree.all()), f"{(~agree).sum()} of {agree.numel()} choices differ"


def test_scores_from_the_raw_input_equal_standardised_products() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(20, 33, generator=g, dtype=torch.float64) * 3 + 7
    v = torch.randn(5, 33, generator=g, dtype=torch.float64)  # its mean is not zero: the shift matters
    standard = torch.nn.functional.layer_norm(x, (33,), eps=1e-5)
    torch.testing.assert_close(gate_scores(x, v), standard @ v.t(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gate_scores(x, v, arrow=True), (x @ v.t()).abs(), rtol=0, atol=0)


@pytest.mark.parametrize("arrow", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["three sites", "mixed ranks", *(["SmolLM2 qkv"] if GPU else [])])
def test_gradients_of_routing_equal_fp64(case: str, dtype: torch.dtype, arrow: bool) -> None:
    p = problem(case, dtype)
    gates, tables = lists(p)
    count = len(p.ranks[0])
    x, vectors = p.x.clone().requires_grad_(), p.vectors.clone().requires_grad_()
    weight, _ = torch.ops.quietgoose.route_experts(x, vectors, gates[1:], tables, count, p.k, arrow)
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    got = torch.autograd.grad(weight, (x, vectors), upstream)
    x64, v64 = p.x.double().requires_grad_(), p.vectors.double().requires_grad_()
    want = torch.autograd.grad(
        route_group(x64, v64, tables[3].double(), count, p.k, arrow)[0], (x64, v64), upstream.double()
    )
    assert_close("x", got[0], want[0], direction="gradient")
    assert_close("gates", got[1], want[1], dtype=torch.float32, direction="gradient")


@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_gradients_of_grouped_experts_equal_fp64(case: str, dtype: torch.dtype) -> None:
    """One shrink of all sites, an expand a site."""
    check_grouped_gradients(problem(case, dtype), dtype)


@pytest.mark.parametrize("tokens", [513, 1100])
def test_gradients_of_grouped_experts_of_many_tokens_equal_fp64(tokens: int) -> None:
    """More tokens than one program holds, of every expert; the last blocks are not full."""
    CASES["many tokens"] = (tokens, 33, (20, 50), [[1, 2, 3, 4, 5], [2, 2, 0, 7, 1]], 2)
    check_grouped_gradients(problem("many tokens", torch.float32), torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [600, 4096, 16384])
@pytest.mark.parametrize(("width", "outs"), [(576, (576, 192, 192)), (4096, (1024, 1024)), (1536, (576,))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_real_sizes_equal_fp64_and_themselves(tokens: int, width: int, outs: Any, dtype: Any) -> None:
    """Every row and every entry of every gradient; three times, because a race shows as two different answers."""
    CASES["many tokens"] = (tokens, width, outs, [[16] * 16] * len(outs), 2)
    p = problem("many tokens", dtype)
    first = check_grouped_gradients(p, dtype)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(check_grouped_gradients(p, dtype), first))


def check_grouped_gradients(p: Problem, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of shrink and expand against fp64; the gradients of x, weights, A and every B."""
    shape, tables = group_shape(p.ranks), group_tables(p.ranks, p.x.device)
    weights, index, _ = exact(p)
    order, total = torch.ops.quietgoose.sort_experts(index.int(), shape.num_experts)
    leaves = [t.clone().requires_grad_() for t in (p.x, weights.float(), p.a, *p.b)]
    hidden = torch.ops.quietgoose.shrink_experts(
        *leaves[:2], order, total, leaves[2], tables.start_Z, tables.rank_Z, shape.slots, shape.widest
    )
    twins = [t.detach().double().requires_grad_() for t in leaves]
    hidden_twin = masked_hidden(twins[0], twins[2], tables.owner_R, shape.slots, twins[1], index, shape.num_experts)
    outs, want_outs, upstreams, ys = [], [], [], []
    for site, part in enumerate(hidden_twin.split(list(shape.slots), 1)):
        own = group_tables(p.ranks[site : site + 1], p.x.device)
        ys.append(torch.zeros(len(p.x), p.b[site].shape[1], dtype=dtype, device=DEVICE, requires_grad=True))
        outs.append(
            torch.ops.quietgoose.expand_experts(
                ys[-1], hidden[site], order[site], total[site], leaves[3 + site], own.start_Z, own.rank_Z, shape.widest
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


def test_an_expert_that_no_token_chose_gets_gradient_zero() -> None:
    p = problem("three sites", torch.float32)
    shape, tables = group_shape(p.ranks[:1]), group_tables(p.ranks[:1], p.x.device)
    index = torch.tensor([[[0, 3]]], dtype=torch.int32, device=DEVICE).expand(1, len(p.x), 2).contiguous()
    a, b = p.a[:16].clone().requires_grad_(), p.b[0].clone().requires_grad_()
    weight = torch.full((1, len(p.x), 2), 0.5, device=DEVICE)
    order, total = torch.ops.quietgoose.sort_experts(index, 4)
    places = tables.start_Z, tables.rank_Z
    hidden = torch.ops.quietgoose.shrink_experts(p.x, weight, order, total, a, *places, shape.slots, 4)
    y = torch.ops.quietgoose.expand_experts(
        torch.zeros(len(p.x), 40, device=DEVICE), hidden[0], order[0], total[0], b, *places, 4
    )
    da, db = torch.autograd.grad(y.sum(), (a, b))
    assert da[4:12].abs().max() == 0
    assert db[4:12].abs().max() == 0
    assert da[12:].abs().max() > 0
    want = 0.5 * p.x @ (a[:4].t() @ b[:4] + a[12:].t() @ b[12:])
    assert_close("y", y, want.detach())


def test_a_long_shrink_is_split_over_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from quietgoose.kernels.routed_lora import launch

    monkeypatch.setattr(launch, "FUSED_DECODE_BYTES", 10)
    monkeypatch.setattr(launch, "DECODE_SPLIT", 20)
    for case in ("one token", "k beyond those present"):
        p = problem(case, torch.float32)
        gates, tables = lists(p)
        shape = group_shape(p.ranks)
        got = torch.ops.quietgoose.routed_linears(
            p.x, p.weights, [], p.a, p.b, gates, tables, shape.num_experts, shape.widest, p.k, False, "decode"
        )
        for y, w, update in zip(got, p.weights, exact(p)[2]):
            assert_close(case, y, p.x.double() @ w.double().t() + update)


@pytest.mark.parametrize("case", ["three sites", "mixed ranks"])
def test_more_experts_than_fit_beside_a_shrink(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing by the kernel, then product and weighting in plain PyTorch: with a weight per expert or per rank slot."""
    monkeypatch.setattr(operators, "MOST_FUSED", 2)
    p = problem(case, torch.float32)
    gates, tables = lists(p)
    shape = group_shape(p.ranks)
    got = torch.ops.quietgoose.routed_linears(
        p.x, p.weights, [], p.a, p.b, gates, tables, shape.num_experts, shape.widest, p.k, False, "fused"
    )
    for y, w, update in zip(got, p.weights, exact(p)[2]):
        assert_close(case, y, p.x.double() @ w.double().t() + update)


def test_rows_of_a_wider_tensor_and_every_tile_shape() -> None:
    """x need not be contiguous; all candidates of the tuning give the same numbers."""
    from quietgoose.kernels.routed_lora import launch

    p = problem("mixed ranks", torch.float32)
    shape, tables = group_shape(p.ranks), group_tables(p.ranks, p.x.device)
    wide = torch.full((len(p.x), 50), float("nan"), device=DEVICE)
    wide[:, 5:38] = p.x
    x = wide[:, 5:38]
    gates = split_gates(p.vectors, x.dtype)
    updates = exact(p)[2]
    count = max(len(tiles.CANDIDATES[name]) for name in ("route_shrink", "linear_expand"))
    for number in range(count):
        shrink, product = (
            tiles.CANDIDATES[name][number % len(tiles.CANDIDATES[name])] for name in ("route_shrink", "linear_expand")
        )
        _, _, hidden = launch.route(x, gates, tables, shape, p.k, False, p.a, store=False, chosen=shrink)
        got = launch.linear(x, hidden, launch.Sites(p.weights, [], p.b), shape, chosen=product)
        for y, w, update in zip(got, p.weights, updates):
            assert_close(f"{shrink} {product}", y, p.x.double() @ w.double().t() + update)


@pytest.mark.parametrize("name", ["decode_one", "decode_update"])
def test_every_tile_of_one_token_gives_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem("one token", torch.float32)
    gates, tables = lists(p)
    shape, want = group_shape(p.ranks), p.x.double() @ p.weights[0].double().t() + exact(p)[2][0]
    assert {entry[2] for entry in getattr(tiles, name.upper())} <= set(tiles.CANDIDATES[name])
    for tile in tiles.CANDIDATES[name]:
        monkeypatch.setattr(tiles, name.upper(), [(tiles.LIMITLESS, tiles.LIMITLESS, tile)])
        got = torch.ops.quietgoose.routed_linears(
            p.x, p.weights, [], p.a, p.b, gates, tables, shape.num_experts, shape.widest, p.k, False, "decode"
        )
        assert_close(str(tile), got[0], want)


def test_pieces_of_the_library_product_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "STOCK_PIECE", [16, 7])
    p = problem("mixed ranks", torch.float32)
    gates, tables = lists(p)
    shape = group_shape(p.ranks)
    got = torch.ops.quietgoose.routed_linears(
        p.x, p.weights, p.biases, p.a, p.b, gates, tables, shape.num_experts, shape.widest, p.k, False, "stock"
    )
    for y, w, bias, update in zip(got, p.weights, p.biases, exact(p)[2]):
        assert_close("y", y, p.x.double() @ w.double().t() + bias.double() + update)


def test_the_sort_is_stable_and_complete() -> None:
    from quietgoose.kernels.routed_lora import launch

    index = torch.randint(0, 37, (2, 301, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    order, total = launch.sort_pairs(index.to(DEVICE), 37)
    for one, tokens, counts in zip(index.permute(0, 2, 1).reshape(6, 301), order.cpu(), total.cpu()):
        assert torch.equal(tokens.long(), one.long().sort(stable=True).indices)
        assert torch.equal(counts[:37].long(), torch.bincount(one, minlength=37))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [4096, 32768])
@pytest.mark.parametrize(("width", "outs"), [(576, (576, 192, 192)), (4096, (1024, 1024)), (1536, (576,))])
def test_many_tokens_equal_fp64_and_themselves(tokens: int, width: int, outs: tuple[int, ...]) -> None:
    """As many programs at a time as a GPU holds, in bf16, five times: a race shows as two different answers."""
    CASES["many tokens"] = (tokens, width, outs, [[16] * 16] * len(outs), 2)
    p = problem("many tokens", torch.bfloat16)
    gates, tables = lists(p)
    ends = torch.cat([torch.arange(512), torch.arange(tokens - 512, tokens)])
    rows = torch.cat([ends, torch.linspace(512, tokens - 513, 1024).long()]).to(DEVICE)
    updates = exact(p._replace(x=p.x[rows]))[2]
    for method in ("fused", "stock", "grouped"):
        first: list[Tensor] = []
        for _ in range(5):
            got = torch.ops.quietgoose.routed_linears(
                p.x, p.weights, [], p.a, p.b, gates, tables, 16, 16, p.k, False, method
            )
            first = first or got
            assert all(torch.equal(a, b) for a, b in zip(got, first)), method
        for y, w, update in zip(first, p.weights, updates):
            assert_close(method, y[rows], p.x[rows].double() @ w.double().t() + update)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tiles_of_many_tokens_give_the_same_numbers(dtype: torch.dtype) -> None:
    """What 4,096 and 32,768 tokens take, with several slot blocks and a last block of tokens that is not full."""
    from quietgoose.kernels.routed_lora import launch

    CASES["many slots"] = (150, 96, (40, 24), [[16] * 20] * 2, 2)
    p = problem("many slots", dtype)
    shape, tables = group_shape(p.ranks), group_tables(p.ranks, p.x.device)
    gates, updates = split_gates(p.vectors, dtype), exact(p)[2]
    for tokens in (4096, 32768):
        tile = tiles.choose(tiles.ROUTE_SHRINK, tokens, 96)
        _, _, hidden = launch.route(p.x, gates, tables, shape, p.k, False, p.a, store=False, chosen=tile)
        product = tiles.choose(tiles.LINEAR_EXPAND, tokens, 96)
        got = launch.linear(p.x, hidden, launch.Sites(p.weights, [], p.b), shape, chosen=product)
        for y, w, update in zip(got, p.weights, updates):
            assert_close(f"{tokens} tokens", y, p.x.double() @ w.double().t() + update)
