"""Token losses of a head in pieces, by recomputation and with the gradient made at once, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from quietgoose.kernels import linear_loss
from quietgoose.kernels.linear_loss import num_pieces, token_divergence, token_nll
from quietgoose.kernels.testing import assert_close
from torch import nn
from torch.nn import functional


def problem(dtype: torch.dtype = torch.float32, bias: bool = False, tokens: int = 13):
    torch.manual_seed(0)
    head = nn.Linear(8, 11, bias=bias).to(dtype)
    hidden = (torch.randn(tokens, 8) * 2).to(dtype).requires_grad_()
    return head, hidden, torch.randint(0, 11, (tokens,)), torch.randn(tokens)


def plain(head, hidden, labels, temperature=1.0, banned=()):
    logits = head(hidden).float() / temperature
    logits = logits.index_fill(-1, torch.tensor(banned, dtype=torch.long), -torch.inf)
    logp = logits.log_softmax(-1)
    p = logp.exp()
    return -logp[range(len(labels)), labels], -(p * logp).nan_to_num(0.0).sum(-1)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("temperature", "banned"), [(1.0, ()), (0.6, (0, 3)), (3.0, (10,))])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_plain(recompute, temperature, banned, bias, monkeypatch) -> None:
    monkeypatch.setattr(linear_loss, "LOGITS_AT_ONCE", 11 * 4)
    head, hidden, labels, scale = problem(bias=bias)
    labels = torch.where((labels[:, None] == torch.tensor([*banned, -1])).any(1), 5, labels)
    assert num_pieces(13, head) == 4
    nll, entropy = token_nll(
        head, hidden, labels, temperature=temperature, recompute=recompute,
        banned=torch.tensor(banned, dtype=torch.long) if banned else None,
    )  # fmt: skip
    want, want_entropy = plain(head, hidden, labels, temperature, banned)
    assert_close("nll", nll, want)
    assert_close("entropy", entropy, want_entropy.detach())
    assert not entropy.requires_grad
    inputs = [hidden, *head.parameters()] if recompute else [hidden]
    got = torch.autograd.grad((nll * scale).sum(), inputs)
    for name, one, two in zip("hwb", got, torch.autograd.grad((want * scale).sum(), inputs)):
        assert_close(name, one, two, direction="gradient")


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("temperature", "banned"), [(1.0, ()), (0.6, (0, 3)), (3.0, (10,))])
def test_the_entropy_may_have_a_gradient(recompute, temperature, banned, monkeypatch) -> None:
    monkeypatch.setattr(linear_loss, "LOGITS_AT_ONCE", 11 * 4)
    head, hidden, labels, scale = problem()
    labels = torch.where((labels[:, None] == torch.tensor([*banned, -1])).any(1), 5, labels)
    found = token_nll(
        head, hidden, labels, temperature=temperature, recompute=recompute, entropy_gradient=True,
        banned=torch.tensor(banned, dtype=torch.long) if banned else None,
    )  # fmt: skip
    logits = head(hidden) / temperature
    entropy = torch.distributions.Categorical(logits=logits[:, [i for i in range(11) if i not in banned]]).entropy()
    want = plain(head, hidden, labels, temperature, banned)[0], entropy
    inputs = [hidden, *head.parameters()] if recompute else [hidden]
    for weights in ((scale, scale.flip(0)), (0 * scale, scale)):
        totals = [sum((x * w).sum() for x, w in zip(pair, weights)) for pair in (found, want)]
        got, wanted = (torch.autograd.grad(total, inputs, retain_graph=True) for total in totals)
        for name, one, two in zip("hw", got, wanted):
            assert_close(name, one, two, direction="gradient")
    assert_close("entropy", found[1].detach(), entropy.detach())


@pytest.mark.parametrize("recompute", [True, False])
def test_bf16_inputs_give_fp32_losses(recompute) -> None:
    head, hidden, labels, scale = problem(torch.bfloat16)
    nll, _ = token_nll(head, hidden, labels, recompute=recompute)
    want, _ = plain(head, hidden, labels)
    assert nll.dtype == torch.float32
    assert_close("nll", nll, want)
    got = torch.autograd.grad((nll * scale).sum(), hidden)[0]
    assert_close("h", got, torch.autograd.grad((want * scale).sum(), hidden)[0], direction="gradient")


@pytest.mark.parametrize("recompute", [True, False])
def test_divergence(recompute, monkeypatch) -> None:
    monkeypatch.setattr(linear_loss, "LOGITS_AT_ONCE", 11 * 4)
    head, hidden, _, scale = problem()
    teacher = torch.randn(13, 8, requires_grad=True)
    found = token_divergence(head, teacher, hidden, recompute=recompute)
    target = head(teacher).detach().log_softmax(-1)
    want = functional.kl_div(head(hidden).log_softmax(-1), target, log_target=True, reduction="none").sum(-1)
    assert_close("kl", found, want)
    assert bool((found > 0).all())
    inputs = [hidden, head.weight] if recompute else [hidden]
    got = torch.autograd.grad((found * scale).sum(), inputs, retain_graph=True)
    for name, one, two in zip("hw", got, torch.autograd.grad((want * scale).sum(), inputs)):
        assert_close(name, one, two, direction="gradient")
    assert torch.autograd.grad(found.sum(), teacher, allow_unused=True)[0] is None


@pytest.mark.parametrize("recompute", [True, False])
def test_no_tokens(recompute) -> None:
    head, hidden, labels, _ = problem(tokens=0)
    nll, entropy = token_nll(head, hidden, labels, recompute=recompute)
    assert nll.shape == entropy.shape == (0,)
    assert torch.autograd.grad(nll.sum(), hidden)[0].shape == (0, 8)


def test_without_gradients_no_graph() -> None:
    head, hidden, labels, _ = problem()
    with torch.no_grad():
        nll, entropy = token_nll(head, hidden, labels, entropy=False)
    assert not nll.requires_grad
    assert bool((entropy == 0).all())


@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_the_compiled_way_is_the_plain_one(tokens, monkeypatch) -> None:
    """Uncompiled here: the same function, and it is taken only where nothing but the loss is asked for."""
    calls = []
    monkeypatch.setattr(
        linear_loss, "_compiler", lambda: lambda *args: calls.append(1) or linear_loss.plain_slope(*args)
    )
    head, hidden, labels, scale = problem(tokens=tokens)
    options = {"recompute": False, "entropy": False}
    found = [token_nll(head, hidden, labels, compiled=compiled, **options)[0] for compiled in (True, False)]
    assert_close("nll", *found)
    got, want = (torch.autograd.grad((nll * scale).sum(), hidden)[0] for nll in found)
    assert_close("h", got, want, direction="gradient")
    assert len(calls) == 1
    token_nll(head, hidden, labels, compiled=True, recompute=False)  # with the entropy
    assert len(calls) == 1
