"""Many experts: routing from the library's products, the sort's plan, updates of all sites in one launch a slot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from quietgoose.kernels.routed_lora import group_shape, group_tables, grouped, split_gates, tiles
from quietgoose.kernels.routed_lora.layout import both_parts, stack_factors
from quietgoose.kernels.testing import assert_close
from torch import Tensor

from .routed_lora_problems import DEVICE, GPU, OTHERS, Problem, check_grouped_gradients, exact, lists, problem

HALF = torch.bfloat16 if GPU else torch.float16
# what 64 does not hold and no power of two is
OTHERS |= {
    "166 experts": (70, 48, (40, 24), [[4] * 166] * 2, 2),
    "70 experts": (33, 40, (20,), [[1 + n % 3 for n in range(70)]], 3),
    "200 experts": (40, 32, (24,), [[2] * 200], 1),
    "65 experts, some absent": (50, 24, (18, 6), [[n % 3 for n in range(65)], [(n + 1) % 3 for n in range(65)]], 2),
}
MANY = ["166 experts", "70 experts", "200 experts", "65 experts, some absent"]


def routed(p: Problem, arrow: bool = False, **more: Any) -> tuple[Tensor, Tensor]:
    gates, tables = split_gates(p.vectors, p.x.dtype), group_tables(p.ranks, p.x.device)
    return grouped.route(p.x, gates, tables, group_shape(p.ranks), p.k, arrow, **more)


@pytest.mark.parametrize("arrow", [False, True])
@pytest.mark.parametrize("case", MANY)
def test_routing_over_many_experts_equals_fp64(case: str, arrow: bool) -> None:
    p = problem(case, HALF)
    want, chosen, _ = exact(p, arrow)
    weight, index = routed(p, arrow)
    assert torch.equal(index.long(), chosen)
    assert_close("weights", weight, want)


def test_tokens_are_routed_in_pieces_as_they_are_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem("70 experts", HALF)
    p = p._replace(x=p.x.repeat(9, 1)[:290])
    weight, index = routed(p)
    monkeypatch.setattr(tiles, "PRODUCT_BYTES", [1])
    assert tiles.product_rows(140) == 128
    pieces = routed(p)
    assert torch.equal(pieces[1], index)
    assert_close("weights", pieces[0], weight)  # the library may sum pieces in another order


def test_products_of_both_parts_of_the_gates_come_from_one_matrix() -> None:
    """A view where the parts lie side by side, up to a multiple of 8 rows where there is memory behind them; else a copy."""
    gates = split_gates(torch.randn(35, 24), torch.bfloat16)
    whole = both_parts(gates)
    assert whole.shape == (70, 24)
    assert whole.data_ptr() == gates.high_ZI.data_ptr()
    assert torch.equal(whole[35:], gates.low_ZI)
    _, stacked, stack = stack_factors(torch.randn(10, 24, dtype=torch.bfloat16), gates)
    padded = both_parts(stacked)
    assert padded.shape == (70, 24), "ten rows of A and seventy of gates are a multiple of 8: nothing lies behind them"
    _, stacked, stack = stack_factors(torch.randn(8, 24, dtype=torch.bfloat16), gates)
    padded = both_parts(stacked)
    assert padded.shape == (72, 24)
    assert padded.data_ptr() == stack[8:].data_ptr()
    apart = gates._replace(low_ZI=gates.low_ZI.clone())
    assert torch.equal(both_parts(apart), whole)


def test_vectors_that_are_trained_or_transposed_are_split_like_others() -> None:
    vectors = torch.randn(35, 24)
    want = split_gates(vectors, torch.bfloat16)
    others = (vectors.clone().requires_grad_(), torch.nn.Parameter(vectors.clone()), vectors.t().contiguous().t())
    for found in (split_gates(other, torch.bfloat16) for other in others):
        assert found.high_ZI.is_contiguous()
        assert both_parts(found).data_ptr() == found.high_ZI.data_ptr(), "a view"
        for mine, plain in zip(found[1:], want[1:]):
            assert torch.equal(mine, plain)


def test_equal_scores_go_to_the_lower_expert() -> None:
    p = problem("166 experts", HALF)
    twice = p.vectors.clone().unflatten(0, (2, 166))
    twice[:, 128:] = twice[:, :38]
    weight, index = routed(p._replace(vectors=twice.flatten(0, 1)))
    assert weight.isfinite().all()
    _, chosen, _ = exact(p._replace(vectors=twice.flatten(0, 1)))
    top = index[..., 0].long()
    assert torch.equal(top, torch.where(chosen[..., 0] >= 128, chosen[..., 0] - 128, chosen[..., 0]))
    pairs = index[top < 38]
    assert torch.equal(pairs[:, 1], pairs[:, 0] + 128), "and then comes its double"


@pytest.mark.parametrize("most", [0, 64])
def test_the_plan_holds_every_pair_once(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the counts added up by programs of the sort, or before them; some experts have no pairs, one has most."""
    monkeypatch.setattr(grouped, "MOST_UNSCANNED", most)
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, 37, (2, 301, 2), generator=g, dtype=torch.int32)
    index[0, 40:260, 1] = 5
    index[index == 3] = 4
    order, plan = grouped.sort_pairs(index.to(DEVICE), 37)
    count, rows = tiles.most_tiles(301, 37), tiles.pair_rows(301, 37)
    assert plan.shape == (4, tiles.plan_length(301, 37))
    for one, tokens, numbers in zip(index.permute(0, 2, 1).reshape(4, 301), order.cpu(), plan.cpu()):
        assert torch.equal(tokens.long(), one.long().sort(stable=True).indices)
        assert torch.equal(numbers[:37].long(), torch.bincount(one, minlength=37))
        expert, begin, end = numbers[64:].unflatten(0, (3, count))
        live = int((expert < 37).sum())
        assert (expert[live:] == 37).all()
        places: list[int] = []
        for e, b, until in zip(expert[:live].tolist(), begin.tolist(), end.tolist()):
            mine = list(range(b, min(b + rows, until)))
            assert mine
            assert (one[tokens[mine].long()] == e).all()
            places += mine
        assert places == list(range(301))


def linears(
    p: Problem,
    biases: list[Tensor] | None = None,
    method: str = "grouped",
    known: tuple[list[Tensor], list[Tensor]] | None = None,
) -> list[Tensor]:
    """known: gates and tables made before, as a capture needs them (tables come from the host)."""
    gates, tables = known or lists(p)
    shape = group_shape(p.ranks)
    return torch.ops.quietgoose.routed_linears(
        p.x, p.weights, biases or [], p.a, p.b, gates, tables, shape.num_experts, shape.widest, p.k, False, method
    )


@pytest.mark.parametrize(
    ("case", "method"), [*((case, "grouped") for case in MANY), (MANY[1], "stock"), (MANY[3], "stock")]
)
def test_many_experts_equal_fp64(case: str, method: str) -> None:
    p = problem(case, HALF)
    got = linears(p, p.biases, method)
    for site, (y, w, bias, update) in enumerate(zip(got, p.weights, p.biases, exact(p)[2])):
        assert_close(f"site {site}", y, p.x.double() @ w.double().t() + bias.double() + update)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one(tokens: int) -> None:
    p = problem("70 experts", HALF)
    p = p._replace(x=p.x[:tokens])
    (y,) = linears(p, p.biases)
    assert y.shape == (tokens, 20)
    assert_close("y", y, p.x.double() @ p.weights[0].double().t() + p.biases[0].double() + exact(p)[2][0])


def test_every_tile_of_routing_gives_the_same_numbers() -> None:
    p = problem("65 experts, some absent", HALF)
    want, chosen, _ = exact(p)
    for tile in tiles.CANDIDATES["choose_products"]:
        weight, index = routed(p, chosen=tile)
        assert torch.equal(index.long(), chosen), tile
        assert_close(str(tile), weight, want)


def test_every_tile_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem("k is N", HALF)  # few experts: many make the interpreter slow, and no difference to these kernels
    plain = [p.x.double() @ w.double().t() + bias.double() for w, bias in zip(p.weights, p.biases)]
    want = [base + update for base, update in zip(plain, exact(p)[2])]
    every = tiles.LIMITLESS
    for name in ("grouped_shrink", "grouped_expand"):
        for tile in tiles.CANDIDATES[name]:
            with monkeypatch.context() as change:
                change.setattr(tiles, name.upper(), [(every, every, tile)])
                for y, exactly in zip(linears(p, p.biases), want):
                    assert_close(f"{name} {tile}", y, exactly)
    for choice in tiles.PAIR_ROWS_CHOICES:
        monkeypatch.setattr(tiles, "PAIR_ROWS", choice)
        for y, exactly in zip(linears(p, p.biases), want):
            assert_close(f"pair_rows {choice}", y, exactly)


@pytest.mark.parametrize("case", ["70 experts", "65 experts, some absent"])
def test_gradients_over_many_experts_equal_fp64(case: str) -> None:
    check_grouped_gradients(problem(case, HALF), HALF)


def test_a_token_that_is_not_finite_spoils_itself_alone_among_many_experts() -> None:
    p = problem("65 experts, some absent", HALF)
    want, spoilt = linears(p), p.x.clone()
    spoilt[7, 3], spoilt[49, 0] = float("nan"), float("inf")
    others = torch.ones(len(p.x), dtype=torch.bool, device=p.x.device)
    others[[7, 49]] = False
    for y, usual in zip(linears(p._replace(x=spoilt)), want):
        assert not y[[7, 49]].isfinite().any()
        assert torch.equal(y[others], usual[others])
    _, index = routed(p._replace(x=spoilt))
    assert 0 <= int(index.min()) <= int(index.max()) < 65


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1100, 4096, 32768])
@pytest.mark.parametrize(("width", "outs"), [(576, (576, 192, 192)), (576, (1536, 1536)), (1536, (576,))])
def test_real_sizes_equal_fp64_and_themselves_captured_or_not(tokens: int, width: int, outs: tuple[int, ...]) -> None:
    """166 experts, three times eagerly and three times from a graph: a race shows as two different answers."""
    OTHERS["real"] = (tokens, width, outs, [[16] * 166] * len(outs), 2)
    p = problem("real", torch.bfloat16)
    rows = torch.linspace(0, tokens - 1, 512).long().to(DEVICE)
    some = p._replace(x=p.x[rows])
    weights, updates = exact(some._replace(k=3))[0], exact(some)[2]
    clear = (weights[..., 1] / weights[..., 2]).log() > 1e-4  # a nearly level choice may turn
    known = lists(p)
    first = linears(p, known=known)
    for y, w, update, sure in zip(first, p.weights, updates, clear):
        assert_close("y", y[rows][sure], (some.x.double() @ w.double().t() + update)[sure])
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, linears(p, known=known)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = linears(p, known=known)
    kept: list[Tensor] = []
    for _ in range(3):
        for y in replayed:
            y.fill_(float("nan"))
        graph.replay()
        kept = kept or [y.clone() for y in replayed]
        assert all(torch.equal(a, b) for a, b in zip(kept, replayed))
    for a, b in zip(first, kept):  # the library may take another product on another stream
        torch.testing.assert_close(b, a, rtol=2**-6, atol=2e-2)
