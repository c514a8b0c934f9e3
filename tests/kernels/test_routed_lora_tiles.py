"""Every tile shape of the routed kernels gives the same numbers, by addresses and by descriptors."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from quietgoose.kernels.routed_lora import descriptors as by_descriptor
from quietgoose.kernels.routed_lora import group_shape, group_tables, launch, operators, split_gates, tiles
from quietgoose.kernels.testing import assert_close

from .routed_lora_problems import DEVICE, GPU, OTHERS, Problem, exact, lists, problem


def test_rows_of_a_wider_tensor_and_every_tile_shape() -> None:
    """x need not be contiguous; all candidates of the tuning give the same numbers."""
    p = problem("mixed ranks", torch.float32)
    shape, tables = group_shape(p.ranks), group_tables(p.ranks, p.x.device)
    wide = torch.full((len(p.x), 50), float("nan"), device=DEVICE)
    wide[:, 5:38] = p.x
    x = wide[:, 5:38]
    gates = split_gates(p.vectors, x.dtype)
    updates = exact(p)[2]
    count = max(len(tiles.CANDIDATES[name]) for name in ("route_shrink", "masked_shrink", "linear_expand"))
    for number in range(count):
        shrink, product = (
            tiles.CANDIDATES[name][number % len(tiles.CANDIDATES[name])] for name in ("route_shrink", "linear_expand")
        )
        weight, index, hidden = launch.route(x, gates, tables, shape, p.k, False, p.a, chosen=shrink)
        thin = tiles.CANDIDATES["route_only"][number % len(tiles.CANDIDATES["route_only"])]
        alone = launch.route(x, gates, tables, shape, p.k, False, chosen=thin)
        assert_close(str(thin), alone[0], weight.double())
        assert torch.equal(alone[1], index)
        apart = tiles.CANDIDATES["masked_shrink"][number % len(tiles.CANDIDATES["masked_shrink"])]
        assert_close(
            str(apart), launch.shrink_masked(x, p.a, tables, shape, weight, index, chosen=apart), hidden.double()
        )
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tiles_of_many_tokens_give_the_same_numbers(dtype: torch.dtype) -> None:
    """What 4,096 and 32,768 tokens take, with several slot blocks and a last block of tokens that is not full."""
    OTHERS["many slots"] = (150, 96, (40, 24), [[16] * 20] * 2, 2)
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


# widths and outputs that are multiples of 8, as descriptors want them, and of nothing else; several blocks of everything
OTHERS["copied, three sites"] = (150, 136, (40, 24, 16), [[8] * 5] * 3, 2)
OTHERS["copied, many slots"] = (70, 104, (40, 24), [[16] * 20] * 2, 2)
OTHERS["copied, mixed ranks"] = (35, 72, (264,), [[1, 2, 3, 4, 6]], 3)
COPIED = [case for case in OTHERS if case.startswith("copied")]
COPYING = {name: tiles.CANDIDATES[name] for name in ("route_shrink_copies", "linear_expand_copies")}
MASKING = tiles.CANDIDATES["masked_shrink_copies"]


def ours(p: Problem, shrink: tiles.Tiles, product: tiles.Tiles, biases: list[torch.Tensor]) -> list[torch.Tensor]:
    shape, tables = group_shape(p.ranks), group_tables(p.ranks, p.x.device)
    gates = split_gates(p.vectors, p.x.dtype)
    _, _, hidden = launch.route(p.x, gates, tables, shape, p.k, False, p.a, store=False, chosen=shrink)
    return launch.linear(p.x, hidden, launch.Sites(p.weights, biases, p.b), shape, chosen=product)


def copies_of(p: Problem, shrink: tiles.Tiles, product: tiles.Tiles) -> list[Any]:
    """How both launches would read these tensors; None by addresses."""
    shape, gates = group_shape(p.ranks), split_gates(p.vectors, p.x.dtype)
    hidden = p.x.new_empty(len(p.x), sum(shape.slots))
    return [
        by_descriptor.route_way(shrink, p.x, gates, p.a, 32, shape.slots),
        by_descriptor.linear_way(product, p.x, hidden, p.weights, p.b),
    ]


@pytest.mark.parametrize("case", COPIED)
def test_copies_by_descriptor_give_the_same_numbers(case: str) -> None:
    """Every candidate in one case, some in others; with biases every other time; both loops of the product."""
    p = problem(case, torch.float16)
    updates, loops = exact(p)[2], set()
    for number, product in enumerate(COPYING["linear_expand_copies"][:: 1 if case == "copied, three sites" else 5]):
        shrink = COPYING["route_shrink_copies"][number % len(COPYING["route_shrink_copies"])]
        found = copies_of(p, shrink, product)
        assert None not in found
        loops.add(found[1].tile.loads)
        biases = p.biases if number % 2 else []
        for site, y in enumerate(ours(p, shrink, product, biases)):
            want = p.x.double() @ p.weights[site].double().t() + updates[site]
            assert_close(f"{shrink} {product}", y, want + biases[site].double() if biases else want)
    assert loops == ({"copies"} if case == "copied, many slots" else {"copies", "joined"})


@pytest.mark.parametrize("arrow", [False, True])
def test_routing_beside_copies_equals_fp64(arrow: bool) -> None:
    for case in COPIED:
        p = problem(case, torch.float16)
        shape, tables = group_shape(p.ranks), group_tables(p.ranks, p.x.device)
        want, index, _ = exact(p, arrow)
        for tile in COPYING["route_shrink_copies"][:2]:
            gates = split_gates(p.vectors, p.x.dtype)
            weight, chosen, _ = launch.route(p.x, gates, tables, shape, p.k, arrow, p.a, chosen=tile)
            assert_close("weights", weight, want, dtype=torch.float32)
            assert torch.equal(chosen.long(), index)


@pytest.mark.parametrize("case", COPIED)
def test_a_masked_shrink_of_copies_equals_the_one_beside_its_routing(case: str) -> None:
    p = problem(case, torch.float16)
    shape, tables = group_shape(p.ranks), group_tables(p.ranks, p.x.device)
    weight, index, hidden = launch.route(p.x, split_gates(p.vectors, p.x.dtype), tables, shape, p.k, False, p.a)
    for tile in MASKING:
        assert by_descriptor.masked_way(tile, p.x, p.a, shape.slots) is not None
        got = launch.shrink_masked(p.x, p.a, tables, shape, weight, index, chosen=tile)
        assert_close(str(tile), got, hidden.double())


def test_a_token_that_is_not_finite_spoils_itself_alone_in_copies() -> None:
    p = problem("copied, three sites", torch.float16)
    shrink, product = (COPYING[name][0] for name in COPYING)
    want, spoilt = ours(p, shrink, product, []), p.x.clone()
    spoilt[7, 3] = float("nan")
    others = torch.arange(len(p.x), device=DEVICE) != 7
    for y, usual in zip(ours(p._replace(x=spoilt), shrink, product, []), want):
        assert not y[7].isfinite().any()
        torch.testing.assert_close(y[others], usual[others], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("why", ["fp32", "width", "address", "distance of rows"])
def test_what_a_descriptor_refuses_goes_by_addresses(why: str) -> None:
    if why == "width":
        OTHERS["refused"] = (18, 50, (40, 24), [[8] * 5] * 2, 2)
    p = problem(
        "refused" if why == "width" else "copied, three sites", torch.float32 if why == "fp32" else torch.float16
    )
    if why in ("address", "distance of rows"):
        first, room = (1, 16) if why == "address" else (0, 3)
        wide = p.x.new_full((len(p.x), p.x.shape[1] + room), float("nan"))
        wide[:, first : first + p.x.shape[1]] = p.x
        p = p._replace(x=wide[:, first : first + p.x.shape[1]])
    shrink, product = (COPYING[name][0] for name in COPYING)
    assert copies_of(p, shrink, product) == [None, None]
    for y, w, update in zip(ours(p, shrink, product, []), p.weights, exact(p)[2]):
        assert_close(why, y, p.x.double() @ w.double().t() + update)


def test_which_calls_take_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables by size; of small eager calls the first goes both ways, so that a capture finds both kernels loaded."""
    p = problem("copied, three sites", torch.float16)
    monkeypatch.setattr(tiles, "EAGER_COPIES", [1000])
    hidden, tile = p.x.new_empty(len(p.x), 120), COPYING["linear_expand_copies"][0]
    for content, taken in ((None, False), (tile, True)):
        monkeypatch.setattr(tiles, "LINEAR_EXPAND_COPIES", [(100, 2**40, 3, None), (2**40, 2**40, 3, content)])
        assert (by_descriptor.linear_way(None, p.x, hidden, p.weights, p.b) is not None) == taken
        assert by_descriptor.linear_way(None, p.x[:100], hidden[:100], p.weights, p.b) is None
    copied, plain = (by_descriptor.Way(tile, (), block_r) for block_r in (16, 32))
    capturing, made = False, []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def ways(tokens: int, chosen: Any = None) -> list[Any]:
        like = {"shape": (tokens, 8), "stride": lambda: (8, 1), "dtype": torch.float16, "device": "cuda:0"}
        fake: Any = SimpleNamespace(is_cuda=True, **like)
        return by_descriptor.ways(lambda: made.append(tokens) or copied, plain, chosen, fake, "here")

    assert [len(ways(500)), ways(500) == [plain], len(ways(501))] == [2, True, 2]
    assert made == [500, 501], "descriptors that nobody takes are not made"
    assert [ways(1000), ways(500, tile)] == [[copied], [copied]]
    capturing = True
    assert ways(500) == [copied]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1100, 4096, 32768])
@pytest.mark.parametrize(("width", "outs"), [(576, (576, 192, 192)), (576, (1536, 1536)), (1536, (576,))])
def test_copies_of_real_sizes_equal_fp64_and_themselves(tokens: int, width: int, outs: tuple[int, ...]) -> None:
    """Every candidate, in bf16, three times: a race shows as two different answers; then a captured graph with new tokens."""
    OTHERS["real"] = (tokens, width, outs, [[16] * 16] * len(outs), 2)
    p = problem("real", torch.bfloat16)
    rows = torch.linspace(0, tokens - 1, 1024).long().to(DEVICE)
    some = p._replace(x=p.x[rows])
    want = [some.x.double() @ w.double().t() + update for w, update in zip(p.weights, exact(some)[2])]
    for number, product in enumerate(COPYING["linear_expand_copies"]):
        shrink = COPYING["route_shrink_copies"][number % len(COPYING["route_shrink_copies"])]
        assert None not in copies_of(p, shrink, product)
        first = ours(p, shrink, product, [])
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(ours(p, shrink, product, []), first)), (shrink, product)
        for y, twin in zip(first, want):
            assert_close(f"{shrink} {product}", y[rows], twin)
    x, graph, shape = p.x.clone(), torch.cuda.CUDAGraph(), group_shape(p.ranks)
    tables, gates = (
        group_tables(p.ranks, x.device),
        split_gates(p.vectors, x.dtype),
    )  # no copies from the host while capturing
    with torch.cuda.graph(graph):
        _, _, hidden = launch.route(x, gates, tables, shape, p.k, False, p.a, store=False, chosen=shrink)
        got = launch.linear(x, hidden, launch.Sites(p.weights, [], p.b), shape, chosen=product)
    x.copy_(-p.x)
    graph.replay()
    for y, twin in zip(got, ours(p._replace(x=x), shrink, product, [])):
        assert torch.equal(y, twin)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_capture_takes_descriptors_and_small_eager_calls_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    OTHERS["real"] = (2048, 576, (576, 192, 192), [[16] * 16] * 3, 2)
    p = problem("real", torch.bfloat16)
    gates, tables = lists(p)
    for name, found in COPYING.items():
        monkeypatch.setattr(tiles, name.upper(), [(tiles.LIMITLESS, tiles.LIMITLESS, 3, found[-1])])
    taken: list[bool] = []

    def ways(*given: Any, real: Any = by_descriptor.ways) -> Any:
        found = real(*given)
        taken.append(bool(found[-1].descriptors[0]))
        return found

    monkeypatch.setattr(by_descriptor, "ways", ways)

    def work() -> list[torch.Tensor]:
        return torch.ops.quietgoose.routed_linears(
            p.x, p.weights, [], p.a, p.b, gates, tables, 16, 16, p.k, False, "fused"
        )

    want, graph = work(), torch.cuda.CUDAGraph()
    work()
    with torch.cuda.graph(graph):
        got = work()
    graph.replay()
    assert taken == [False] * 4 + [True] * 2
    for y, twin in zip(got, want):
        assert_close("captured", y, twin.double())


START = {
    "": [("route", True, False), ("linear", False, True)],
    "too many experts": [("shrink_masked", True, False), ("linear", False, True)],
}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("why", START)
def test_who_begins_early_is_right_behind_one_that_lets_it(
    why: str, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch in between would end when it likes: `follows` needs the very launch that lets it begin."""
    p, calls = problem("copied, three sites", torch.float16), []
    gates, tables = lists(p)
    monkeypatch.setattr(launch, "overlap", lambda _: early)
    if why == "too many experts":
        monkeypatch.setattr(operators, "MOST_FUSED", 4)

    def call(name: str, *given: Any, real: Any, begins: bool = False, follows: bool = False, **others: Any) -> Any:
        calls.append((name, begins, follows))  # the interpreter knows no launch before this one
        return real(*given, **others)

    for name in ("route", "shrink_masked", "linear"):
        monkeypatch.setattr(launch, name, partial(call, name, real=getattr(launch, name)))
    got = torch.ops.quietgoose.routed_linears(p.x, p.weights, [], p.a, p.b, gates, tables, 5, 8, p.k, False, "fused")
    want = START[why] if early else [(name, False, False) for name, *_ in START[why]]
    assert [call for call in calls if call[0] in {name for name, *_ in want}] == want
    for y, w, update in zip(got, p.weights, exact(p)[2]):
        assert_close(why, y, p.x.double() @ w.double().t() + update)


def test_a_launch_asks_for_what_only_one_compiler_knows_where_it_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's compiler of Triton refuses options it does not know, without a value too."""
    p, asked = problem("copied, three sites", torch.float16), {}
    gates, tables = lists(p)
    for name in ("route_shrink", "masked_shrink", "linear_expand"):

        class Recorded:
            def __init__(self, name: str) -> None:
                self.name, self.kernel = name, getattr(launch, name)

            def __getitem__(self, grid: Any) -> Any:
                return lambda *given, **options: (
                    asked.setdefault(self.name, set()).update(options),
                    self.kernel[grid](*given, **options),
                )

        monkeypatch.setattr(launch, name, Recorded(name))
    for most in (tiles.MOST_FUSED, 0):
        monkeypatch.setattr(operators, "MOST_FUSED", most)
        torch.ops.quietgoose.routed_linears(p.x, p.weights, [], p.a, p.b, gates, tables, 5, 8, p.k, False, "fused")
    assert asked.keys() == {"route_shrink", "masked_shrink", "linear_expand"}
    assert all("num_warps" in options and not options & {"maxnreg", "launch_pdl"} for options in asked.values())
    shape = group_shape(p.ranks)
    limited = COPYING["route_shrink_copies"][-1]
    assert limited.registers is not None
    launch.route(
        p.x,
        split_gates(p.vectors, p.x.dtype),
        group_tables(p.ranks, p.x.device),
        shape,
        p.k,
        False,
        p.a,
        chosen=limited,
    )
    assert "maxnreg" in asked["route_shrink"]


def test_tables_say_whether_a_launch_begins_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """By size, on Hopper and newer; not where rows are copied first, which would be a launch in between."""
    monkeypatch.setattr(tiles, "OVERLAP", [(100, 64, True), (tiles.LIMITLESS, tiles.LIMITLESS, False)])
    x = torch.zeros(100, 64)
    assert not launch.overlap(x)
    monkeypatch.setattr(launch, "_overlaps", lambda _: True)
    assert [launch.overlap(x), launch.overlap(x.new_zeros(101, 64)), launch.overlap(x.t())] == [True, False, False]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [300, 4096, 32768])
def test_launches_that_overlap_give_the_same_bits(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of groups, each reading the one before, in memory that is used again: what is read too early or written too early
    is another group's. Captured and eager, by addresses and with every candidate of the products, and replayed."""
    OTHERS["chain"] = (tokens, 576, (576,), [[16] * 16], 2)
    p = problem("chain", torch.bfloat16)
    gates, tables = lists(p)
    monkeypatch.setattr(tiles, "EAGER_COPIES", [0])
    every = tiles.LIMITLESS

    def chain(x: torch.Tensor, early: bool) -> torch.Tensor:
        tiles.OVERLAP[:] = [(every, every, early)]
        for _ in range(6):
            (y,) = torch.ops.quietgoose.routed_linears(
                x, p.weights, [], p.a, p.b, gates, tables, 16, 16, p.k, False, "fused"
            )
            x = y / y.float().square().mean(1, keepdim=True).sqrt().to(y.dtype)
        return y

    monkeypatch.setattr(tiles, "OVERLAP", list(tiles.OVERLAP))
    products = [] if tokens == 300 else COPYING["linear_expand_copies"]
    for number, product in enumerate([None, *products, *products[:2]]):
        monkeypatch.setattr(operators, "MOST_FUSED", 0 if number > len(products) else tiles.MOST_FUSED)
        monkeypatch.setattr(tiles, "MASKED_SHRINK_COPIES", [(every, every, 3, MASKING[number % len(MASKING)])])
        shrink = product and COPYING["route_shrink_copies"][number % len(COPYING["route_shrink_copies"])]
        monkeypatch.setattr(tiles, "LINEAR_EXPAND_COPIES", [(every, every, 3, product)])
        monkeypatch.setattr(tiles, "ROUTE_SHRINK_COPIES", [(every, every, 3, shrink)])
        x, graph = p.x.clone(), torch.cuda.CUDAGraph()
        want = [chain(sign * p.x, False) for sign in (1, -1)]
        for _ in range(5):
            assert torch.equal(chain(p.x, True), want[0]), (shrink, product)
        with torch.cuda.graph(graph):
            got = chain(x, True)
        for replay in range(20):
            x.copy_((1, -1)[replay % 2] * p.x)
            graph.replay()
            assert torch.equal(got, want[replay % 2]), (shrink, product)
