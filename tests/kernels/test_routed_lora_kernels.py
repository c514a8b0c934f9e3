"""The routed kernels equal fp64 arithmetic: every formulation, forward and every gradient; interpreter on a CPU, compiled
on a GPU (where bf16 joins in: the interpreter's matrix product does not know it)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from quietgoose.kernels.routed_lora import (
    gate_scores,
    group_shape,
    group_tables,
    grouped,
    launch,
    operators,
    route_group,
    tiles,
)
from quietgoose.kernels.testing import assert_close
from torch import Tensor

from .routed_lora_problems import CASES, DEVICE, DTYPES, GPU, check_grouped_gradients, exact, lists, problem

# the interpreter is slow: one case in fp16 says what there is to say about it
PAIRS = [(case, dtype) for case in CASES for dtype in DTYPES if GPU or dtype == torch.float32 or case == "mixed ranks"]


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


def test_an_expert_that_no_token_chose_gets_gradient_zero() -> None:
    p = problem("three sites", torch.float32)
    shape, tables = group_shape(p.ranks[:1]), group_tables(p.ranks[:1], p.x.device)
    index = torch.tensor([[[0, 3]]], dtype=torch.int32, device=DEVICE).expand(1, len(p.x), 2).contiguous()
    a, b = p.a[:16].clone().requires_grad_(), p.b[0].clone().requires_grad_()
    weight = torch.full((1, len(p.x), 2), 0.5, device=DEVICE)
    order, plan = torch.ops.quietgoose.sort_experts(index, 4)
    places = tables.start_Z, tables.rank_Z
    hidden = torch.ops.quietgoose.shrink_experts(p.x, weight, order, plan, a, *places, shape.slots, 4)
    y = torch.ops.quietgoose.expand_experts(
        torch.zeros(len(p.x), 40, device=DEVICE), hidden[0], order[0], plan[0], b, *places, 4
    )
    da, db = torch.autograd.grad(y.sum(), (a, b))
    assert da[4:12].abs().max() == 0
    assert db[4:12].abs().max() == 0
    assert da[12:].abs().max() > 0
    want = 0.5 * p.x @ (a[:4].t() @ b[:4] + a[12:].t() @ b[12:])
    assert_close("y", y, want.detach())


def test_a_long_shrink_is_split_over_launches(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["fused", "stock"])
def test_routing_and_shrink_apart(case: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As more experts than one launch can hold take it."""
    p = problem(case, torch.float32)
    gates, tables = lists(p)
    shape = group_shape(p.ranks)
    called = []
    monkeypatch.setattr(
        launch,
        "shrink_masked",
        lambda *given, real=launch.shrink_masked, **more: called.append(1) or real(*given, **more),
    )
    monkeypatch.setattr(operators, "MOST_FUSED", 0)
    got = torch.ops.quietgoose.routed_linears(
        p.x, p.weights, [], p.a, p.b, gates, tables, shape.num_experts, shape.widest, p.k, False, method
    )
    for y, w, update in zip(got, p.weights, exact(p)[2]):
        assert_close(case, y, p.x.double() @ w.double().t() + update)
    assert len(called) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_captured_graph_gives_the_base_products_a_branch_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with biases; replays read new tokens, and nothing races: a hundred replays give the same numbers."""
    p = problem("SmolLM2 qkv", torch.bfloat16)
    gates, tables = lists(p)
    shape = group_shape(p.ranks)
    called = []
    monkeypatch.setattr(
        launch, "linear_beside", lambda *given, real=launch.linear_beside: called.append(1) or real(*given)
    )

    def work(x: Tensor, biases: list[Tensor]) -> list[Tensor]:
        return torch.ops.quietgoose.routed_linears(
            x, p.weights, biases, p.a, p.b, gates, tables, shape.num_experts, shape.widest, p.k, False, "stock"
        )

    for biases in ([], p.biases):
        x = p.x.clone()
        work(x, biases)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = work(x, biases)
        for sign in (1.0, -1.0):
            x.copy_(sign * p.x)
            want = work(x, biases)
            for _ in range(100):
                graph.replay()
                for mine, plain in zip(got, want):
                    assert_close("captured", mine, plain.double())
    assert len(called) == 2


def test_pieces_of_the_library_product_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "STOCK_PIECE", [(tiles.LIMITLESS, tiles.LIMITLESS, (16, 7))])
    p = problem("mixed ranks", torch.float32)
    gates, tables = lists(p)
    shape = group_shape(p.ranks)
    got = torch.ops.quietgoose.routed_linears(
        p.x, p.weights, p.biases, p.a, p.b, gates, tables, shape.num_experts, shape.widest, p.k, False, "stock"
    )
    for y, w, bias, update in zip(got, p.weights, p.biases, exact(p)[2]):
        assert_close("y", y, p.x.double() @ w.double().t() + bias.double() + update)


def test_the_sort_is_stable_and_complete() -> None:
    index = torch.randint(0, 37, (2, 301, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    order, plan = grouped.sort_pairs(index.to(DEVICE), 37)
    for one, tokens, counts in zip(index.permute(0, 2, 1).reshape(6, 301), order.cpu(), plan.cpu()):
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
