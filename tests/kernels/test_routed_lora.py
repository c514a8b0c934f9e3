"""The fast formulations equal the naive loop, forward and backward, at odd sizes and mixed ranks."""

from __future__ import annotations

import pytest
import torch
from quietgoose.kernels.routed_lora import (
    add_routed_lora,
    add_row_lora,
    by_pairs,
    dense_weights,
    formulation,
    gate_logits,
    naive,
    routed_lora,
    slot_weights,
)
from quietgoose.kernels.routed_lora.operators import SPLIT
from torch import Tensor

SHAPES = [(1, 8, 6, (4,)), (63, 24, 16, (3, 3, 3)), (100, 12, 30, (1, 64, 7, 2)), (5, 8, 8, (4, 4))]


def problem(tokens: int, width_in: int, width_out: int, ranks: tuple[int, ...], seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width_in, generator=g, dtype=torch.float64)
    adapters = [
        (
            torch.randn(r, width_in, generator=g, dtype=torch.float64),
            torch.randn(width_out, r, generator=g, dtype=torch.float64),
            0.5 + i,
        )
        for i, r in enumerate(ranks)
    ]
    k = min(2, len(ranks))
    index = torch.stack([torch.randperm(len(ranks), generator=g)[:k] for _ in range(tokens)])
    weights = dense_weights(torch.rand(tokens, k, generator=g, dtype=torch.float64), index, len(ranks))
    return x, adapters, weights


def bank(adapters):
    return torch.cat([a for a, _, _ in adapters]), torch.cat([s * b for _, b, s in adapters], dim=1)


@pytest.mark.parametrize(("tokens", "width_in", "width_out", "ranks"), SHAPES)
def test_masked_concat_equals_naive_forward_and_backward(tokens, width_in, width_out, ranks) -> None:
    x, adapters, weights = problem(tokens, width_in, width_out, ranks)
    a, b = bank(adapters)
    owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
    leaves = [t.clone().requires_grad_() for t in (x, a, b, weights)]
    fast = routed_lora(leaves[0], leaves[1], leaves[2], slot_weights(leaves[3], owner))
    twin_leaves = [t.clone().requires_grad_() for t in (x, a, b, weights)]
    parts_a, parts_b = twin_leaves[1].split(list(ranks)), twin_leaves[2].split(list(ranks), dim=1)
    slow = naive(twin_leaves[0], [(p, q, 1.0) for p, q in zip(parts_a, parts_b)], twin_leaves[3])
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-11)
    upstream = torch.randn(slow.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for got, want in zip(torch.autograd.grad(fast, leaves, upstream), torch.autograd.grad(slow, twin_leaves, upstream)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(naive(x, adapters, weights), slow.detach(), rtol=1e-12, atol=1e-11)


def test_equal_ranks_take_one_weight_per_expert() -> None:
    x, adapters, weights = problem(17, 8, 5, (3, 3, 3, 3))
    a, b = bank(adapters)
    torch.testing.assert_close(routed_lora(x, a, b, weights), naive(x, adapters, weights), rtol=1e-12, atol=1e-11)


def test_adding_in_place_and_out_of_place_agree() -> None:
    x, adapters, weights = problem(9, 8, 5, (2, 2))
    a, b = bank(adapters)
    y = torch.randn(9, 5, dtype=torch.float64)
    kept = add_routed_lora(y, x, a, b, weights)
    with torch.no_grad():
        changed = y.clone()
        assert add_routed_lora(changed, x, a, b, weights) is changed
    torch.testing.assert_close(kept, changed, rtol=1e-14, atol=1e-12)
    torch.testing.assert_close(kept - y, naive(x, adapters, weights), rtol=1e-11, atol=1e-11)


def test_rows_equal_masked_concat_with_one_hot_rows() -> None:
    x, adapters, _ = problem(3 * 7, 8, 5, (4, 4, 4))
    a, b = bank(adapters)
    expert_B = torch.tensor([2, 0, 2])
    gate = torch.rand(3, 7, 1, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(expert_B, 3).double().repeat_interleave(7, dim=0) * gate.reshape(-1, 1)
    want = routed_lora(x, a, b, one_hot).view(3, 7, 5)
    stacked_a = torch.stack([q for q, _, _ in adapters])[expert_B]
    stacked_b = torch.stack([q * s for _, q, s in adapters])[expert_B]
    y = torch.randn(3, 7, 5, dtype=torch.float64)
    got = add_row_lora(y, x.view(3, 7, 8), stacked_a, stacked_b, gate)
    torch.testing.assert_close(got - y, want, rtol=1e-11, atol=1e-11)
    doubled = add_row_lora(y, x.view(3, 7, 8), stacked_a, stacked_b / 2, gate, scale=2.0)
    torch.testing.assert_close(doubled, got, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sites", [1, 3])
def test_gate_logits_gradients_and_saved_bytes(sites: int) -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, sites, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gate_logits, (x, v))
    half = torch.randn(2, 5, 6, dtype=torch.bfloat16, requires_grad=True)
    single = torch.randn(2, sites, 6, requires_grad=True)
    saved: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        logits = gate_logits(half, single)
    assert logits.dtype == torch.float32
    assert saved == [torch.bfloat16, torch.float32]
    want = (half.float()[:, :, None] * single[:, None]).sum(-1)
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(logits.shape)
    (grad,) = torch.autograd.grad(logits, half, upstream)
    exact = torch.einsum("bts,bsi->bti", upstream, single.detach())
    assert torch.equal(grad, exact.bfloat16()) if sites == 1 else (grad - exact).norm() < 4e-3 * exact.norm()


def test_what_was_measured_for_inference_in_16_bits_leaves_training_and_fp32_alone() -> None:
    assert formulation(32, 1024, 576) == "split"
    assert formulation(32, 1024, 576, wide=True) == formulation(32, 2656, 576) == "decode"
    for tokens, width, name in ((512, 576, "split_fused"), (4096, 14336, "persistent")):
        assert formulation(tokens, 1024, width) == name
        assert formulation(tokens, 1024, width, wide=True) == "grouped"
        assert by_pairs(tokens, 1024, width)
    assert formulation(4096, 1024, 4096) == "grouped"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_choice_of_a_formulation_is_traced(dtype: torch.dtype) -> None:
    """torch.compile's tracer reads it with the numbers of a call; torch 2.11 refuses a truth value as an index, for one."""

    def chosen(x: Tensor) -> Tensor:
        name = formulation(x.shape[0], 2656, x.shape[1], x.dtype == torch.float32, 16)
        return x + ("grouped", "stock").index(name)

    x = torch.zeros(4096, 8, dtype=dtype)
    assert torch.equal(torch.compile(chosen, fullgraph=True, backend="eager")(x), chosen(x))


def test_every_call_has_a_formulation() -> None:
    assert formulation(1, 16, 576) == "decode"
    assert formulation(10**6, 10**6, 10**6) == "grouped"
    known = {"decode", "fused", "stock", "split", "split_fused", "persistent", "grouped"}
    for tokens in (1, 64, 65, 4096, 32768):
        for slots in (16, 256, 1024, 2656):
            for width in (192, 4096):
                assert formulation(tokens, slots, width) in known
                assert formulation(tokens, slots, width, wide=True) in known - {"fused", *SPLIT}


@pytest.mark.parametrize(("wide", "widest"), [(False, 256), (True, 128)])
def test_experts_too_wide_for_a_program_are_not_taken_by_pairs(wide: bool, widest: int) -> None:
    assert by_pairs(4096, 2048, 576, wide, widest)
    assert formulation(4096, 2048, 576, wide, widest) == "grouped"
    assert not by_pairs(4096, 2048, 576, wide, widest + 1)
    assert formulation(4096, 2048, 576, wide, widest + 1) == "stock"
