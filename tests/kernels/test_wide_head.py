"""Logits that are not rounded to 16 bits: numbers, gradients and what falls back, on the CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch
from quietgoose.kernels import wide_head
from quietgoose.kernels.linear_loss import token_divergence, token_nll
from quietgoose.kernels.testing import assert_close
from quietgoose.kernels.wide_head import WideHead, unrounded
from torch import nn

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def problem(device="cpu", dtype=torch.bfloat16, bias=True, tokens=37, width=64, vocabulary=129):
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=bias).to(device, dtype)
    with torch.no_grad():
        head.weight.mul_(8)
    return (
        head,
        (torch.randn(tokens, width, device=device) * 2).requires_grad_(),
        torch.randn(tokens, vocabulary).to(device),
    )


def exact(head, hidden) -> torch.Tensor:
    bias = None if head.bias is None else head.bias.double()
    return nn.functional.linear(hidden.double(), head.weight.double(), bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_have_the_digits_of_fp32(device, dtype, narrow, bias, monkeypatch) -> None:
    """Whatever the inputs' dtype; the module itself is wrong by a thousand times as much."""
    monkeypatch.setattr(wide_head, "WIDENED_AT_ONCE", 64 * 50)
    head, hidden, scale = problem(device, dtype, bias)
    if narrow:
        hidden = hidden.detach().to(dtype).requires_grad_()
    logits, want = WideHead(head)(hidden), exact(head, hidden)
    assert logits.dtype == torch.float32
    assert_close("logits", logits.double(), want, limit=1e-5)
    rounded = head(hidden.to(dtype)).detach().double()
    assert float((rounded - want.detach()).norm() / rounded.norm()) > (1e-4 if dtype == torch.float16 else 1e-3)
    inputs = [hidden, *head.parameters()]
    got = torch.autograd.grad((logits * scale).sum(), inputs)
    wanted = torch.autograd.grad((want * scale).sum(), inputs)
    for name, one, two, source in zip("hwb", got, wanted, inputs):
        assert one.dtype == source.dtype
        assert_close(name, one.double(), two.double(), limit=5e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_any_shape_and_no_rows(device) -> None:
    head, hidden, _ = problem(device)
    wide = WideHead(head)
    flat = wide(hidden)
    assert torch.equal(wide(hidden[:36].view(3, 12, 64)), flat[:36].view(3, 12, -1))
    assert wide(hidden[:0]).shape == (0, 129)
    assert wide.out_features == 129
    assert [p is q for p, q in zip(wide.parameters(), head.parameters())] == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_over_wide_weights_it_is_the_module(dtype) -> None:
    head, hidden, _ = problem(dtype=dtype)
    assert torch.equal(WideHead(head)(hidden.to(dtype)), head(hidden.to(dtype)))


def test_a_head_that_is_more_than_a_product_is_called_as_it_is() -> None:
    head, hidden, _ = problem()
    handle = head.register_forward_hook(lambda module, inputs, logits: logits / 2)
    assert torch.equal(WideHead(head)(hidden), head(hidden.bfloat16()))
    handle.remove()
    subclass = type("Own", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x) + 1})(64, 9).bfloat16()
    assert torch.equal(WideHead(subclass)(hidden), subclass(hidden.bfloat16()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [True, False])
def test_losses_over_it_see_the_unrounded_logits(device, recompute) -> None:
    """token_nll and token_divergence, both ways back; over the bare module neither comes near."""
    head, hidden, _ = problem(device, bias=False)
    labels, teacher = torch.randint(0, 129, (37,), device=device), hidden.detach().flip(0)
    logp = exact(head, hidden).log_softmax(-1)
    target = exact(head, teacher).log_softmax(-1)
    want = -logp[range(37), labels], (target.exp() * (target - logp)).sum(-1)

    def found(of, hidden):
        nll = token_nll(of, hidden, labels, recompute=recompute, pieces=4, entropy=False)[0]
        return nll, token_divergence(of, teacher.to(hidden.dtype), hidden, recompute=recompute)

    for name, one, two, rounded in zip(
        ("nll", "kl"), found(WideHead(head), hidden), want, found(head, hidden.bfloat16())
    ):
        assert_close(name, one.double(), two, limit=1e-5)
        assert float((rounded.double() - two).detach().norm() / two.detach().norm()) > 1e-3
        (got,) = torch.autograd.grad(one.sum(), hidden, retain_graph=True)
        (wanted,) = torch.autograd.grad(two.sum(), hidden, retain_graph=True)
        assert_close(f"gradient of {name}", got, wanted, limit=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_the_module_itself_for_a_while(device) -> None:
    """Hooks stay, and afterwards it is what it was."""
    head, hidden, _ = problem(device)
    want, narrow = exact(head, hidden.bfloat16()), hidden.bfloat16()
    before = head(narrow)
    handle = head.register_forward_hook(lambda module, inputs, logits: logits / 2)
    with torch.no_grad(), unrounded(head):
        assert_close("logits", head(narrow).double(), want / 2, limit=1e-5)
        assert head(narrow.view(1, 37, 64)).shape == (1, 37, 129)
    handle.remove()
    assert torch.equal(head(narrow), before)
    assert "forward" not in vars(head)
    wide = head.float()
    with unrounded(wide):
        assert torch.equal(wide(hidden), nn.functional.linear(hidden, wide.weight, wide.bias))
