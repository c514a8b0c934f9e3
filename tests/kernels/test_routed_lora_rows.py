"""Row adapters as operators: the reference's numbers and gradients, nothing made that nobody wants, kept whole by a compiler."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from quietgoose.kernels.routed_lora import add_row_lora, linear_rows, shrink_rows
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

GROUPS, ROWS, LENGTH, WIDTH, RANK, OUT = 3, 6, 7, 10, 4, 9


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


def problem(
    dtype: torch.dtype = torch.float32, bias: bool = False, lead: tuple[int, ...] = (ROWS, LENGTH), device: str = "cpu"
) -> list:
    """x, W, bias, A, B, gate; A and B lie side by side in one row a group, as a bank gathers them."""
    g = torch.Generator().manual_seed(0)
    flat = (torch.randn(GROUPS, 5 + RANK * WIDTH + OUT * RANK, generator=g) * 0.3).to(device, dtype)
    a, b = flat[:, 5 : 5 + RANK * WIDTH].view(GROUPS, RANK, WIDTH), flat[:, 5 + RANK * WIDTH :].view(GROUPS, OUT, RANK)
    tokens = ROWS * LENGTH // GROUPS
    made = [torch.randn(*lead, WIDTH, generator=g), torch.randn(OUT, WIDTH, generator=g), torch.randn(OUT, generator=g)]
    x, weight, shift = (t.to(dtype) for t in made)
    gate = torch.rand(GROUPS, tokens, 1, generator=g).to(dtype)
    leaves = [t.to(device).detach().requires_grad_() for t in (x, a, b, gate)]
    return [leaves[0], weight.to(device), shift.to(device) if bias else None, *leaves[1:]]


def ours(x, weight, bias, a, b, gate, scale: float) -> Tensor:
    return linear_rows(x, weight, bias, shrink_rows(x, a) * gate, b, scale)


def plain(x, weight, bias, a, b, gate, scale: float) -> Tensor:
    y, groups = functional.linear(x, weight, bias), a.shape[0]
    x_GTI, y_GTO = x.reshape(groups, -1, x.shape[-1]), y.reshape(groups, -1, y.shape[-1])
    return add_row_lora(y_GTO, x_GTI, a, b, gate, scale).view_as(y)


def gradients(make, given: list, scale: float) -> list[Tensor]:
    y = make(*given, scale)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    wanted = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, upstream)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lead", [(ROWS, LENGTH), (1, ROWS * LENGTH)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("bias", "scale"), [(False, 1.0), (True, 0.5)])
def test_numbers_and_gradients_are_the_references(device, lead, dtype, close: float, bias: bool, scale: float) -> None:
    got = gradients(ours, problem(dtype, bias, lead, device), scale)
    exact = problem(torch.float64, bias, lead)
    for name, found, want in zip(("y", "x", "a", "b", "gate"), got, gradients(plain, exact, scale)):
        assert found.dtype == dtype
        assert found.shape == want.shape
        error = float((found.double().cpu() - want).norm() / want.norm())
        assert error < close, (name, error)


def test_gradients_by_finite_differences() -> None:
    x, weight, bias, a, b, gate = problem(torch.float64, bias=True)
    assert torch.autograd.gradcheck(lambda x, a, b, gate: ours(x, weight, bias, a, b, gate, 0.5), (x, a, b, gate))


def test_the_operators_are_what_they_claim() -> None:
    """Schemas, shapes without numbers, gradients registered: PyTorch's own checks."""
    x, weight, bias, a, b, _ = problem(bias=True)
    hidden = shrink_rows(x, torch.cat([a, a], dim=1)).detach().narrow(2, RANK, RANK).requires_grad_()
    torch.library.opcheck(shrink_rows, (x, a))
    torch.library.opcheck(linear_rows, (x, weight, bias, hidden, b, 0.5))
    for frozen in (0, 3, 4):
        given = [x, weight, bias, hidden, b, 0.5]
        given[frozen] = given[frozen].detach()
        torch.library.opcheck(linear_rows, tuple(given))


PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")
PASSES = (
    "add",
    "add_",
    "mul",
    "mul_",
    "clone",
)  # not copy_: products onto y call it of y to itself, which returns at once


def operators(work: Callable[[], object]) -> Counter[str]:
    """How often each product was called, and each pass over something as large as y, within the operators too."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        work()
    found: Counter[str] = Counter()
    for event in seen.events() or []:
        name = event.name.removeprefix("aten::")
        large = bool(event.input_shapes) and math.prod(event.input_shapes[0]) >= ROWS * LENGTH * OUT
        found[name] += name in PRODUCTS or (name in PASSES and large)
    return +found


@pytest.mark.parametrize("biased", [False, True])
def test_the_sum_is_the_products_own_and_nothing_is_copied(biased: bool) -> None:
    x, weight, bias, a, b, _ = problem(bias=biased)
    kept: list[Tensor] = []
    forward = operators(lambda: kept.append(linear_rows(x, weight, bias, shrink_rows(x, a), b, 1.0)))
    assert forward == {"bmm": 1, "baddbmm_": 1, "addmm" if biased else "addmm_": 1}
    upstream = torch.ones_like(kept[0])
    backward = operators(lambda: torch.autograd.grad(kept[0], (x, a, b), upstream))
    sums = backward.pop("add", 0) + backward.pop("add_", 0)
    assert backward == {"mm": 1, "bmm": 4}  # dx; dh, dB, dx, dA
    assert sums <= 1, "the two parts of dx, which a compiler fuses into what reads it"


@pytest.mark.parametrize(
    ("frozen", "want"),
    [("x", {"bmm": 3}), ("adapter", {"mm": 1, "bmm": 2})],  # dh, dB, dA of a first layer; dx, dh, dx under gates
)
def test_what_is_frozen_costs_no_product(frozen: str, want: dict[str, int]) -> None:
    x, weight, _, a, b, gate = problem()
    if frozen == "x":
        x = x.detach()
    else:
        a, b = a.detach(), b.detach()
    y = ours(x, weight, None, a, b, gate, 1.0)
    upstream, leaves = torch.ones_like(y), [t for t in (x, a, b, gate) if t.requires_grad]
    backward = operators(lambda: torch.autograd.grad(y, leaves, upstream))
    assert {name: count for name, count in backward.items() if name in PRODUCTS} == want


def test_a_compiler_keeps_them_whole() -> None:
    """Forward and backward as one graph each, in which no product and no copy is left to the compiler."""
    graphs: list[list[str]] = []

    def keep(module, _):
        graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return make_boxed_func(module.forward)

    given = problem()
    torch._dynamo.reset()
    fast = torch.compile(ours, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True, dynamic=False)
    for found, want in zip(gradients(fast, given, 1.0), gradients(ours, given, 1.0)):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    forward, backward = graphs
    assert sum("linear_rows" in name for name in forward) == 1
    assert sum("linear_rows_backward" in name for name in backward) == 1
    left = ("aten.mm", "aten.bmm", "aten.baddbmm", "aten.clone", "auto_functionalized")
    assert not [name for name in (*forward, *backward) if name.startswith(left)]
    torch._dynamo.reset()


def test_what_memory_held_before_counts_for_nothing() -> None:
    """The first product writes onto memory that nobody filled; here it is full of NaN."""
    want = gradients(ours, problem(), 0.5)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = gradients(ours, problem(), 0.5)
    finally:
        torch.use_deterministic_algorithms(before)
    for got, right in zip(found, want):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-6)
