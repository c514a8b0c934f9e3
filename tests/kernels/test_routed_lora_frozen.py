"""What is frozen costs the backward pass neither a kernel nor a product nor memory, and the other gradients do not change."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from quietgoose.kernels.routed_lora import (
    gate_logits,
    group_shape,
    group_tables,
    masked_hidden,
    route_group,
    route_sparingly,
    split_gates,
)
from quietgoose.kernels.testing import assert_close
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANKS = [3, 0, 4, 2]
TOKENS, WIDTH, OUT, K = 21, 24, 18, 2
NAMES = ("x", "weight", "a", "b")


class Products(TorchDispatchMode):
    """Counts the operators of the passes that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return sum(self.calls[f"aten::{name}"] for name in ("mm", "addmm", "bmm", "baddbmm"))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def grouped(wanted: tuple[str, ...], dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(inputs by name, output, upstream gradient) of shrink and expand, `wanted` taking gradients; y always does."""
    inputs = {
        "x": normal(TOKENS, WIDTH, seed=1, dtype=dtype),
        "weight": normal(1, TOKENS, K, seed=2).abs(),
        "a": normal(sum(RANKS), WIDTH, seed=3, dtype=dtype),
        "b": normal(sum(RANKS), OUT, seed=4, dtype=dtype),
    }
    for name in wanted:
        inputs[name].requires_grad_()
    y = normal(TOKENS, OUT, seed=6, dtype=dtype).requires_grad_()
    return inputs, experts(y, *inputs.values()), normal(TOKENS, OUT, seed=7, dtype=dtype)


def experts(y: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + the experts of one site, by sorted pairs."""
    order, plan = torch.ops.quietgoose.sort_experts(INDEX, len(RANKS))
    places = TABLES.start_Z, TABLES.rank_Z
    hidden = torch.ops.quietgoose.shrink_experts(x, weight, order, plan, a, *places, a.shape[:1], max(RANKS))
    return torch.ops.quietgoose.expand_experts(y, hidden[0], order[0], plan[0], b, *places, max(RANKS))


TABLES = group_tables([RANKS], torch.device(DEVICE))
INDEX = normal(1, TOKENS, len(RANKS), seed=5).argsort(2)[..., :K].int().contiguous()


def counting(made: Counter[str], name: str, own: Any) -> Any:
    def counted(*given: Any) -> Any:
        made[name] += 1
        return own(*given)

    return counted


# wanted gradients: launches of shrink, expand, outer; of x, weight, a, b what is kept
CASES: dict[tuple[str, ...], tuple[tuple[int, int, int], set[str]]] = {
    (): ((0, 0, 0), set()),
    ("x",): ((1, 1, 0), {"weight", "a", "b"}),
    ("weight",): ((2, 0, 0), {"x", "a", "b"}),
    ("x", "weight"): ((2, 1, 0), {"x", "weight", "a", "b"}),
    ("a",): ((1, 0, 1), {"x", "weight", "b"}),
    ("b",): ((0, 0, 1), set()),  # and what the shrink made
    ("x", "a", "b"): ((1, 1, 2), {"x", "weight", "a", "b"}),
    NAMES: ((2, 1, 2), {"x", "weight", "a", "b"}),
}


@pytest.mark.parametrize("wanted", CASES, ids=lambda names: "+".join(names) or "y")
def test_grouped_experts_make_and_keep_only_what_is_wanted(wanted: tuple[str, ...], monkeypatch) -> None:
    from quietgoose.kernels.routed_lora import grouped as launches_of

    full, out, upstream = grouped(NAMES)
    want = dict(zip(NAMES, torch.autograd.grad(out, [full[name] for name in NAMES], upstream)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        inputs, out, upstream = grouped(wanted)
    made: Counter[str] = Counter()
    for name in ("sort_pairs", "shrink_pairs", "expand_pairs_", "outer_pairs"):
        monkeypatch.setattr(launches_of, name, counting(made, name, getattr(launches_of, name)))
    out.backward(upstream)
    launches, held = CASES[wanted]
    assert (made["shrink_pairs"], made["expand_pairs_"], made["outer_pairs"]) == launches
    assert made["sort_pairs"] == 0
    addresses = {t.data_ptr() for t in kept}
    assert {name for name in NAMES if inputs[name].data_ptr() in addresses} == held
    hidden = [
        t for t in kept if t.is_floating_point() and t.data_ptr() not in {inputs[name].data_ptr() for name in NAMES}
    ]
    assert len(hidden) == ("b" in wanted)
    for name in NAMES:
        if name in wanted:
            assert_close(name, inputs[name].grad, want[name].double(), dtype=torch.float32)
        else:
            assert inputs[name].grad is None


def test_a_compiled_step_asks_for_no_gradient_of_the_bank() -> None:
    a, b = normal(sum(RANKS), WIDTH, seed=3), normal(sum(RANKS), OUT, seed=4)
    nodes: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        nodes.extend(graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def step(x: Tensor, weight: Tensor) -> Tensor:
        return experts(x[:, :OUT].contiguous(), x, weight, a, b)

    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=backend, bw_compiler=backend))
    gradients = []
    for function in (step, compiled):
        x, weight = normal(TOKENS, WIDTH, seed=1).requires_grad_(), normal(1, TOKENS, K, seed=2).requires_grad_()
        function(x, weight).square().sum().backward()
        gradients.append((x.grad, weight.grad))
    for got, want in zip(gradients[1], gradients[0]):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    backward = {
        str(node.target).split(".")[1]: node.args[-1] for node in nodes if "experts_backward" in str(node.target)
    }
    assert backward == {"expand_experts_backward": [True, False], "shrink_experts_backward": [True, True, False]}
    assert sum("sort_experts" in str(node.target) for node in nodes) == 1


@pytest.mark.parametrize("wanted", [("x", "weight"), NAMES], ids="+".join)
def test_operators_are_what_torch_compile_takes_them_for(wanted: tuple[str, ...]) -> None:
    """Schemas, shapes without data and gradients agree with what runs (torch.library.opcheck)."""
    ops = torch.ops.quietgoose
    order, plan = ops.sort_experts(INDEX, len(RANKS))
    places = TABLES.start_Z, TABLES.rank_Z
    x, weight, a, b = (t.detach().requires_grad_(name in wanted) for name, t in grouped(())[0].items())
    hidden = ops.shrink_experts(x, weight, order, plan, a, *places, [sum(RANKS)], max(RANKS)).detach()[0].clone()
    y = normal(TOKENS, OUT).requires_grad_()
    torch.library.opcheck(ops.sort_experts.default, (INDEX, len(RANKS)))
    given = (x, weight, order, plan, a, *places, [sum(RANKS)], max(RANKS))
    torch.library.opcheck(ops.shrink_experts.default, given)
    given = (y, hidden.requires_grad_(), order[0].clone(), plan[0].clone(), b, *places, max(RANKS))
    torch.library.opcheck(ops.expand_experts.default, given)


def routed(function: str, arrow: bool, dtype: torch.dtype, x_wanted: bool, vectors_wanted: bool) -> tuple[Any, ...]:
    """(x, vectors, weights) of two sites by the kernels' operator or by plain PyTorch."""
    ranks = [[2] * 5, [3] * 5]
    x = normal(TOKENS, WIDTH, seed=8, dtype=dtype).requires_grad_(x_wanted)
    vectors = torch.nn.functional.layer_norm(normal(10, WIDTH, seed=9), (WIDTH,)).requires_grad_(vectors_wanted)
    tables = group_tables(ranks, torch.device(DEVICE))
    if function == "operator":
        gates = list(split_gates(vectors.detach(), dtype))[1:]
        weight, _ = torch.ops.quietgoose.route_experts(x, vectors, gates, list(tables), 5, 2, arrow)
    else:
        route = route_sparingly if function == "sparingly" else route_group
        weight, _ = route(x, vectors, tables.absent_Z, 5, 2, arrow)
    return x, vectors, weight


@pytest.mark.parametrize("arrow", [False, True])
@pytest.mark.parametrize("function", ["operator", "sparingly"])
@pytest.mark.parametrize(("x_wanted", "vectors_wanted"), [(True, False), (False, True), (True, True)])
def test_routing_makes_and_keeps_only_what_is_wanted(function, arrow, x_wanted, vectors_wanted) -> None:
    twin_x, twin_vectors, twin = routed("group", arrow, torch.float32, True, True)
    upstream = normal(2, TOKENS, 2, seed=10)
    want = torch.autograd.grad(twin, (twin_x, twin_vectors), upstream)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x, vectors, weight = routed(function, arrow, torch.float32, x_wanted, vectors_wanted)
    with Products() as counted:
        weight.backward(upstream)
    assert counted.products == x_wanted + vectors_wanted + arrow  # arrow: the sign of x . v
    assert ("aten::native_layer_norm_backward" in counted.calls) == (x_wanted and not arrow)
    assert "aten::zeros" not in counted.calls  # in the place of a gradient of the indices
    assert (vectors.data_ptr() in {t.data_ptr() for t in kept}) == (x_wanted or arrow)
    for leaf, wanted, exact in ((x, x_wanted, want[0]), (vectors, vectors_wanted, want[1])):
        assert (leaf.grad is not None) == wanted
        if wanted:
            assert_close("gradient", leaf.grad, exact.double(), direction="gradient")


def test_plain_routing_keeps_tokens_as_they_are() -> None:
    """Autograd keeps an fp32 copy of x, scores and probabilities; `route_sparingly` x itself and k numbers a token."""
    sizes = {}
    for function in ("group", "sparingly"):
        kept: dict[int, int] = {}
        pack: Any = lambda t: kept.update({t.data_ptr(): t.numel() * t.element_size()}) or t  # noqa: E731, B023
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            _, vectors, weight = routed(function, False, torch.float16, True, False)
        weight.sum().backward()
        sizes[function] = sum(size for place, size in kept.items() if place != vectors.data_ptr())
    assert sizes["sparingly"] == TOKENS * (2 * WIDTH + 2 * 2 * (4 + 8))
    assert sizes["group"] > 2 * sizes["sparingly"]


def test_plain_routing_compiles_whole_and_gives_the_same_gradients() -> None:
    absent = torch.zeros(10, device=DEVICE)
    vectors = normal(10, WIDTH, seed=9)

    def step(x: Tensor) -> Tensor:
        return route_sparingly(x, vectors, absent, 5, 2)[0].square().sum()

    gradients = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = normal(TOKENS, WIDTH, seed=8).requires_grad_()
        function(x).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("x_wanted", "v_wanted"), [(True, False), (False, True), (True, True)])
def test_gate_logits_make_and_keep_only_what_is_wanted(x_wanted: bool, v_wanted: bool) -> None:
    x = normal(2, 5, 6, dtype=torch.bfloat16).requires_grad_(x_wanted)
    v = normal(2, 1, 6, seed=1).requires_grad_(v_wanted)
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        logits = gate_logits(x, v)
    assert kept == [*([torch.bfloat16] if v_wanted else []), *([torch.float32] if x_wanted else [])]
    with Products() as counted:
        logits.backward(normal(2, 5, 1, seed=2))
    assert counted.products == v_wanted
    assert (x.grad is not None, v.grad is not None) == (x_wanted, v_wanted)


@pytest.mark.parametrize("frozen", [False, True])
def test_equal_ranks_need_no_weight_per_slot(frozen: bool) -> None:
    """The same numbers and gradients as with a weight per rank slot, and no tensor of such weights is kept."""
    ranks = [[3] * 4, [3] * 4]
    shape, tables = group_shape(ranks), group_tables(ranks, torch.device(DEVICE))
    index = normal(2, TOKENS, 4, seed=5).argsort(2)[..., :K]
    found, sizes = [], []
    for rank in (None, shape.rank):
        x, a, weights = normal(TOKENS, WIDTH), normal(24, WIDTH, seed=1), normal(2, TOKENS, K, seed=2)
        leaves = [leaf.double().requires_grad_() for leaf in (x, weights, a)]
        leaves[2].requires_grad_(not frozen)
        kept: dict[int, int] = {}
        pack: Any = lambda t, kept=kept: kept.update({t.data_ptr(): t.numel()}) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            hidden = masked_hidden(leaves[0], leaves[2], tables.owner_R, shape.slots, leaves[1], index, 4, rank)
        assert (leaves[0].data_ptr() in kept) == (not frozen)  # x serves the gradient of A alone
        sizes.append(sum(kept.values()))
        wanted = leaves[: 2 if frozen else 3]
        found.append((hidden, *torch.autograd.grad(hidden, wanted, normal(TOKENS, 24, seed=3).double())))
    assert shape.rank == 3
    assert group_shape([[3, 3], [3, 0]]).rank is None
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert sizes[0] - sizes[1] >= TOKENS * (24 - 8) - 100  # 24 slots, 8 weights a token; owners and indices are small
