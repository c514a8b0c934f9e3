"""Routing and shrink from one product of the library: `split`, `split_fused` and `persistent` equal fp64 arithmetic.

16-bit tokens only, bf16 under the interpreter too: the kernel behind the library's product has no product of its own (the one
that `split_fused` ends with has).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from quietgoose.kernels.routed_lora import formulation, group_shape, launch, masked_hidden, operators, persistent, tiles
from quietgoose.kernels.routed_lora.launch import Sites
from quietgoose.kernels.routed_lora.layout import GroupTables, PreparedGates
from quietgoose.kernels.testing import assert_close
from torch import Tensor

from .routed_lora_problems import CASES, DEVICE, GPU, OTHERS, Problem, exact, problem, stacked

HALF = torch.float16
METHODS = operators.SPLIT


def linears(p: Problem, method: str, biases: list[Tensor] | None = None, arrow: bool = False) -> list[Tensor]:
    return call(p, method, biases or [], arrow)()


def call(p: Problem, method: str, biases: list[Tensor], arrow: bool = False) -> Callable[[], list[Tensor]]:
    """The operator's call with index tables already on the device, as a capture needs them."""
    p, gates, tables = stacked(p)
    shape = group_shape(p.ranks)
    return lambda: torch.ops.quietgoose.routed_linears(
        p.x, p.weights, biases, p.a, p.b, gates, tables, shape.num_experts, shape.widest, p.k, arrow, method
    )


def wanted(p: Problem, rows: Any = slice(None), arrow: bool = False) -> list[Tensor]:
    some = p._replace(x=p.x[rows])
    return [some.x.double() @ w.double().t() + update for w, update in zip(p.weights, exact(some, arrow)[2])]


def hidden(p: Problem, arrow: bool = False, chosen: tiles.Tiles | None = None) -> Tensor:
    p, gates, tables = stacked(p)
    prepared, shape = PreparedGates(*gates[:4]), group_shape(p.ranks)
    return launch.route_split(p.x, gates[4], prepared, GroupTables(*tables), shape, p.k, arrow, chosen)


@pytest.mark.parametrize("arrow", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_all_equal_fp64(case: str, arrow: bool) -> None:
    for dtype in (torch.bfloat16, HALF):
        p = problem(case, dtype)
        biases = p.biases if case == "three sites" else []
        for method in METHODS:
            if method == "split_fused" and dtype == torch.bfloat16 and not GPU:
                continue
            for site, (y, want) in enumerate(zip(linears(p, method, biases, arrow), wanted(p, arrow=arrow))):
                assert y.is_contiguous()
                assert_close(f"{method}, site {site}", y, want + biases[site].double() if biases else want, dtype=dtype)


@pytest.mark.parametrize("arrow", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_choices_are_those_of_fp64_and_the_rest_is_zero(case: str, arrow: bool) -> None:
    """hm is weights times A x at the chosen experts: rounded once, nothing else."""
    p = problem(case, HALF)
    weights, index, _ = exact(p, arrow)
    _, _, tables = stacked(p)
    shape = group_shape(p.ranks)
    want = masked_hidden(p.x.double(), p.a.double(), tables[0], shape.slots, weights, index, shape.num_experts)
    got = hidden(p, arrow)
    assert torch.equal(got != 0, want.to(HALF) != 0)
    assert_close("hm", got, want, limit=4e-4)


@pytest.mark.parametrize("number", range(len(tiles.CANDIDATES["weigh_products"]) + len(tiles.WEIGH_PRODUCTS)))
def test_every_tile_gives_the_same_numbers(number: int) -> None:
    """Of x in the columns of a wider tensor, too; a token's sums are made in another order, so not the same bits."""
    found = [*tiles.CANDIDATES["weigh_products"], *(entry[2] for entry in tiles.WEIGH_PRODUCTS)][number]
    OTHERS["few, mixed ranks"] = (11, 33, (20, 50), [[1, 2, 3, 4, 5], [2, 2, 0, 7, 1]], 3)
    p = problem("few, mixed ranks", HALF)
    wide = torch.full((len(p.x), 50), float("nan"), device=DEVICE, dtype=HALF)
    wide[:, 5:38] = p.x
    want = hidden(p)
    for depth, columns in ((found.depth, found.columns), (16, 16)):  # loops of one step, and of several
        tile = found._replace(depth=depth, columns=columns)
        assert_close(str(tile), hidden(p._replace(x=wide[:, 5:38]), chosen=tile), want.double(), limit=4e-4)


def test_rests_of_the_gates_count() -> None:
    """Two gates whose leading 8 bits are alike: the rests alone say which is larger."""
    OTHERS["close gates"] = (19, 32, (18,), [[2, 2]], 1)
    p = problem("close gates", torch.bfloat16)
    p.vectors[0] = p.vectors[0].bfloat16().float()
    p.vectors[1] = p.vectors[0] * (1 + 2**-10)
    assert torch.equal(p.vectors[0].bfloat16(), p.vectors[1].bfloat16())
    _, index, _ = exact(p)
    assert set(index.flatten().tolist()) == {0, 1}
    assert torch.equal(hidden(p)[:, ::2] != 0, index[0] == torch.tensor([[0, 1]], device=DEVICE))


def test_ties_go_to_the_lower_index() -> None:
    """Whole numbers, so that equal gates have equal sums in whatever order they are made."""
    OTHERS["equal gates"] = (19, 32, (18,), [[2, 2, 2]], 2)
    p = problem("equal gates", HALF)
    p.x.round_()
    p.vectors[:] = torch.arange(-16, 16, device=DEVICE)
    assert torch.equal(hidden(p)[:, ::2] != 0, torch.tensor([[True, True, False]], device=DEVICE).expand(19, 3))


@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_input_is_read_as_what_it_is(method: str) -> None:
    p = problem("k is N", HALF)
    turned = p._replace(x=p.x.t().contiguous().t())
    for y, want in zip(linears(turned, method), wanted(p)):
        assert_close(method, y, want)


@pytest.mark.parametrize("method", METHODS)
def test_a_token_that_is_not_finite_spoils_itself_alone(method: str) -> None:
    p = problem("k is N", HALF)
    want, spoilt = linears(p, method), p.x.clone()
    spoilt[7, 3] = float("nan")
    others = torch.arange(len(p.x), device=DEVICE) != 7
    for y, usual in zip(linears(p._replace(x=spoilt), method), want):
        assert not y[7].isfinite().any()
        torch.testing.assert_close(y[others], usual[others], rtol=2e-3, atol=2e-3)


def test_one_matrix_holds_a_and_both_parts_of_the_gates() -> None:
    """Nothing is kept twice; the number of rows is what the library's products like."""
    p = problem("mixed ranks", HALF)
    one, gates, _ = stacked(p)
    stack = gates[4]
    assert len(stack) % 8 == 0
    assert torch.equal(stack[: len(p.a)], p.a)
    for part in (one.a, gates[1], gates[2]):
        assert part.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()
    used = len(p.a) + 2 * len(p.vectors)
    whole = stack[len(p.a) : len(p.a) + len(p.vectors)].double() + stack[len(p.a) + len(p.vectors) : used].double()
    torch.testing.assert_close(whole, p.vectors.double(), rtol=2**-20, atol=1e-6)
    assert not stack[used:].any()


def test_without_the_matrix_it_is_said_what_is_missing() -> None:
    """fp32 tokens have none, and no table hands them to these formulations."""
    p, gates, tables = stacked(problem("one expert", torch.float32))
    assert gates[4].numel() == 0
    for some in (gates, gates[:4]):
        with pytest.raises(ValueError, match="one matrix"):
            operators.linears(p.x, p.weights, [], p.a, p.b, some, tables, 1, 4, 1, False, "split")


@pytest.mark.parametrize("method", METHODS)
def test_tables_hand_no_fp32_to_it(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CROSSOVERS", [(tiles.LIMITLESS, tiles.LIMITLESS, tiles.LIMITLESS, method)])
    assert formulation(100, 256, 4096) == method
    assert formulation(100, 256, 4096, wide=True) == "stock"


@pytest.mark.parametrize("method", METHODS)
def test_the_operator_is_one_that_compilers_may_trust(method: str) -> None:
    p, gates, tables = stacked(problem("k is N", HALF))
    given = (p.x, p.weights, [], p.a, p.b, gates, tables, 3, 64, p.k, False, method)
    torch.library.opcheck(torch.ops.quietgoose.routed_linears.default, given)


SIZES = [(4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (14336, (4096,)), (576, (576, 192, 192))]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [17, 64, 512, 1024, 4096])
@pytest.mark.parametrize(("width", "outs"), SIZES)
def test_real_sizes_equal_fp64_and_themselves(
    tokens: int, width: int, outs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, rows spread over all tokens against fp64, three times the same bits; captured, replays read new tokens and give the
    same bits, also where launches overlap."""
    OTHERS["real"] = (tokens, width, outs, [[16] * 16] * len(outs), 2)
    p = problem("real", torch.bfloat16)
    x = p.x.clone()
    rows = torch.linspace(0, tokens - 1, min(tokens, 1024)).long().to(DEVICE)
    want = [wanted(p, rows), wanted(p._replace(x=-p.x), rows)]
    on_hopper = torch.cuda.get_device_capability()[0] == 9
    assert persistent.takes(x, Sites(p.weights, [], p.b)) == on_hopper
    for method, early in (("split", False), ("split_fused", False), ("split_fused", True), ("persistent", False)):
        monkeypatch.setattr(tiles, "OVERLAP", [(tiles.LIMITLESS, tiles.LIMITLESS, early)])
        work, graph = call(p._replace(x=x), method, []), torch.cuda.CUDAGraph()
        first = work()
        for y, twin in zip(first, want[0]):
            assert_close(method, y[rows], twin)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(work(), first)), method
        with torch.cuda.graph(graph):
            got = work()
        kept: list[list[Tensor]] = [[], []]
        for replay in range(6):
            x.copy_((1, -1)[replay % 2] * p.x)
            for y in got:
                y.fill_(float("nan"))
            graph.replay()
            same = kept[replay % 2] or [y.clone() for y in got]
            kept[replay % 2] = same
            assert all(torch.equal(a, b) for a, b in zip(got, same)), method
        x.copy_(p.x)
        for sign in (0, 1):
            for y, twin in zip(kept[sign], want[sign]):
                assert_close(f"{method}, captured", y[rows], twin)
