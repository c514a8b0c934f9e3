"""Routed LoRA in plain PyTorch: masked concatenation, per-row adapters, and the naive twin both are tested against.

    y_t = sum_i w_ti s_i B_i (A_i x_t)          (PHATGOOSE, section "inference"; w is 0 for unselected experts)

The maths, shapes and costs are in README.md. Callers: routing/. No function here synchronises with the host or forms
a [T, N, O] tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

EPSILON_NORM = 1e-5
EPSILON_SUM = 1e-6


def routed_lora(x_TI: Tensor, a_RI: Tensor, b_OR: Tensor, weights_TN: Tensor) -> Tensor:
    """The routed sum [T, O] by masked concatenation: two products and one pointwise step.

    x_TI        tokens
    a_RI        the experts' A, one below the other; slot order = expert order
    b_OR        the experts' s_i B_i side by side (scale folded in)
    weights_TN  weight of each expert for each token, 0 if unselected; N must divide R (all experts have R/N slots).
                Mixed ranks: one column per rank slot, that is N = R (see `slot_weights`). T may be 1 (same for all).
    """
    return functional.linear(_weighted_shrink(x_TI, a_RI, weights_TN), b_OR)


def add_routed_lora(y_TO: Tensor, x_TI: Tensor, a_RI: Tensor, b_OR: Tensor, weights_TN: Tensor | None = None) -> Tensor:
    """y + routed_lora(x, ...) with the sum inside the second product; no weights means 1 everywhere.

    Without gradients y itself is updated.
    """
    h_TR = functional.linear(x_TI, a_RI) if weights_TN is None else _weighted_shrink(x_TI, a_RI, weights_TN)
    if torch.is_grad_enabled():
        return torch.addmm(y_TO, h_TR, b_OR.t())
    return y_TO.addmm_(h_TR, b_OR.t())


def slot_weights(weights_TN: Tensor, owner_R: Tensor) -> Tensor:
    """Weights per rank slot [T, R] for mixed ranks; owner_R int64 names the expert of each slot."""
    return weights_TN.index_select(1, owner_R)


def dense_weights(weights_TK: Tensor, index_TK: Tensor, num_experts: int) -> Tensor:
    """[..., K] weights and indices scattered into [..., N]; unselected experts get 0."""
    zeros_TN = weights_TK.new_zeros(*weights_TK.shape[:-1], num_experts)
    return zeros_TN.scatter_(-1, index_TK.long(), weights_TK)


def add_row_lora(
    y_BTO: Tensor,
    x_BTI: Tensor,
    a_BRI: Tensor,
    b_BOR: Tensor,
    gate_BT1: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """y + scale * g * B_e (A_e x) where row b has its own adapter a_BRI[b], b_BOR[b]; two batched products.

    This is masked concatenation with one-hot rows without the zeros: cost of one expert, whatever N is.
    gate_BT1 is the gate training's sigmoid, or None for 1.
    """
    h_BTR = torch.bmm(x_BTI, a_BRI.transpose(1, 2))
    if gate_BT1 is not None:
        h_BTR = h_BTR * gate_BT1
    return torch.baddbmm(y_BTO, h_BTR, b_BOR.transpose(1, 2), alpha=scale)


def naive(x_TI: Tensor, adapters: Sequence[tuple[Tensor, Tensor, float]], weights_TN: Tensor) -> Tensor:
    """The specification: a Python loop over experts and tokens with (A_i [r_i, I], B_i [O, r_i], s_i)."""
    y_TO = x_TI.new_zeros(x_TI.shape[0], adapters[0][1].shape[0])
    for t in range(x_TI.shape[0]):
        for i, (a, b, scale) in enumerate(adapters):
            y_TO[t] += weights_TN[t, i] * scale * (b @ (a @ x_TI[t]))
    return y_TO


def _weighted_shrink(x_TI: Tensor, a_RI: Tensor, weights_TN: Tensor) -> Tensor:
    h_TR = functional.linear(x_TI, a_RI)
    num_columns = weights_TN.shape[1]
    if num_columns == a_RI.shape[0]:
        return h_TR * weights_TN
    return (h_TR.unflatten(1, (num_columns, -1)) * weights_TN.unsqueeze(2)).flatten(1)


class _GateLogits(torch.autograd.Function):
    """x . v per row with fp32 accumulation, keeping x in its own dtype for the backward pass."""

    @staticmethod
    def forward(ctx, x_BTI: Tensor, v_BSI: Tensor) -> Tensor:  # type: ignore[override]
        for_x, for_v = ctx.needs_input_grad
        ctx.save_for_backward(x_BTI if for_v else None, v_BSI if for_x else None)
        ctx.kind_of_x, ctx.kind_of_v = x_BTI.dtype, v_BSI.dtype
        return torch.bmm(x_BTI.to(v_BSI.dtype), v_BSI.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTS: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x_BTI, v_BSI = ctx.saved_tensors
        for_x, for_v = ctx.needs_input_grad
        grad_x = None
        if for_x and v_BSI.shape[1] == 1:  # rounded as it is written: no fp32 tensor of x's size
            grad_x = v_BSI.new_empty(*grad_BTS.shape[:2], v_BSI.shape[2], dtype=ctx.kind_of_x)
            torch.mul(grad_BTS, v_BSI, out=grad_x)
        elif for_x:  # the sites' parts are added up in fp32, and rounded once
            grad_x = torch.bmm(grad_BTS, v_BSI).to(ctx.kind_of_x)
        grad_v = torch.bmm(grad_BTS.transpose(1, 2), x_BTI.to(ctx.kind_of_v)) if for_v else None
        return grad_x, grad_v


def gate_logits(x_BTI: Tensor, v_BSI: Tensor) -> Tensor:
    """x_bt . v_bs [B, T, S] in v's dtype (fp32): the logits of PHATGOOSE's training gates of S sites that read x, raw input, no
    scaling.

    Saves x as it is (bf16 stays bf16), not an fp32 copy of it, and only if v takes a gradient: phatgoose.md 1.2, "Backward".
    """
    return _GateLogits.apply(x_BTI, v_BSI)  # type: ignore[no-any-return]


def gate_scores(x_TI: Tensor, vectors_ZI: Tensor, arrow: bool = False) -> Tensor:
    """Router scores [T, Z] in at least fp32: layernorm(x) . v from one product of the raw x and one scalar per token.

    layernorm(x) . v = (x . v - mean(x) sum(v)) / sqrt(var(x) + 1e-5); the second term is what rounding leaves of a
    standardised v's zero mean (phatgoose.md 1.4). arrow: |x . v| instead. vectors_ZI are prepared (routers.py).
    """
    wide_TI = x_TI.to(torch.promote_types(x_TI.dtype, torch.float32))
    dot_TZ = functional.linear(wide_TI, vectors_ZI.to(wide_TI.dtype))
    if arrow:
        return dot_TZ.abs()
    variance_T1, mean_T1 = torch.var_mean(wide_TI, 1, correction=0, keepdim=True)
    shift_Z = vectors_ZI.to(wide_TI.dtype).sum(1)
    return torch.addcmul(dot_TZ, mean_T1, shift_Z, value=-1) * torch.rsqrt(variance_T1 + EPSILON_NORM)


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(weights, int64 indices) [..., k] of the largest scores on the last axis: softmax over all, the chosen divided by
    (their sum + 1e-6). Ties go to the lower index; a score of -inf (or ABSENT) gets weight 0."""
    p = scores.softmax(dim=-1)
    # Sorting scores, not p: two scores whose p both round to 0 still differ.
    index = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    chosen = p.gather(-1, index)
    return chosen / (chosen.sum(dim=-1, keepdim=True) + EPSILON_SUM), index


def route_group(
    x_TI: Tensor, vectors_ZI: Tensor, absent_Z: Tensor, num_experts: int, k: int, arrow: bool = False
) -> tuple[Tensor, Tensor]:
    """(weights, int64 indices) [S, T, K] of all sites of a group: one product for all their gates."""
    scores_TZ = gate_scores(x_TI, vectors_ZI, arrow) + absent_Z
    return top_k(scores_TZ.unflatten(1, (-1, num_experts)).transpose(0, 1), k)


def masked_hidden(
    x_TI: Tensor, a_RI: Tensor, owner_R: Tensor, slots: Sequence[int], weights_STK: Tensor, index_STK: Tensor,
    num_experts: int, rank: int | None = None,
) -> Tensor:  # fmt: skip
    """hm [T, R] of all sites of a group: one shrink, then every slot times the weight of its expert (0: not chosen).

    rank  what all experts have at all sites (GroupShape.rank), or None where ranks are mixed: a weight per slot is then made
    """
    h_TR = functional.linear(x_TI, a_RI)
    if rank is not None:
        dense_TZ = dense_weights(weights_STK.to(h_TR.dtype).transpose(0, 1), index_STK.transpose(0, 1), num_experts)
        return (h_TR.unflatten(1, (-1, rank)) * dense_TZ.flatten(1).unsqueeze(2)).flatten(1)
    dense_STN = dense_weights(weights_STK, index_STK, num_experts)
    parts = [slot_weights(dense_TN, owner) for dense_TN, owner in zip(dense_STN, owner_R.split(list(slots)))]
    return h_TR * torch.cat(parts, 1).to(h_TR.dtype)
