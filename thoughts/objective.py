"""The objective, as pure functions of fp32 numbers (quiet-star.md 1.2; Quiet-STaR, section 4.4).

    r_s   = sum over j of [ -log p_base(x_j) + log p_mixed,s(x_j) ]
    A_s   = r_s minus a mean over samples
    L_pol = - sum over thought tokens of  weight * A_s * log pi(t)

No function here touches a model. fp64 in gives fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Advantage


def rewards(base_nll: Tensor, mixed_nll: Tensor, valid: Tensor) -> Tensor:
    """r [B, A, S]: nats that the thought saves on its lookahead. base [B, A, J], mixed [B, A, S, J], valid [B, A, J]."""
    gain_BASJ = base_nll.unsqueeze(2) - mixed_nll
    return gain_BASJ.masked_fill(~valid.unsqueeze(2), 0.0).sum(-1)


def advantages(reward_BAS: Tensor, kind: Advantage) -> Tensor:
    """A [B, A, S], detached; 0 with one sample. The base losses cancel in it, whatever they are.

    two_sided      r - mean(r)
    one_sided      max(0, r - mean(r)), the authors' code; biased: it rewards luck
    leave_one_out  r - mean of the other samples = S / (S - 1) * (r - mean(r))
    """
    reward = reward_BAS.detach()
    samples = reward.shape[-1]
    if samples == 1:
        return torch.zeros_like(reward)
    # differences to the first sample, so that equal rewards give exactly 0
    centred = reward - reward[..., :1]
    centred = centred - centred.mean(-1, keepdim=True)
    if kind == "one_sided":
        return centred.clamp_min(0.0)
    return centred * (samples / (samples - 1)) if kind == "leave_one_out" else centred


def truncated_weights(logprob: Tensor, logprob_old: Tensor, cap: float) -> Tensor:
    """rho = min(cap, pi / pi_old) of every token, detached."""
    return (logprob - logprob_old).detach().exp().clamp_max(cap)


def reinforce(logprob_BAST: Tensor, advantage_BAS: Tensor, weight_BAST: Tensor | None = None) -> Tensor:
    """- weight * A * log pi of every thought token [B, A, S, T]; only log pi has a gradient."""
    loss = -advantage_BAS.detach().unsqueeze(-1) * logprob_BAST
    return loss if weight_BAST is None else loss * weight_BAST.detach()


def clipped(logprob_BAST: Tensor, logprob_old_BAST: Tensor, advantage_BAS: Tensor, epsilon: float) -> Tensor:
    """- min(rho A, clip(rho, 1 - eps, 1 + eps) A) of every thought token [B, A, S, T] (rlp preset: PPO's surrogate)."""
    ratio = (logprob_BAST - logprob_old_BAST.detach()).exp()
    advantage = advantage_BAS.detach().unsqueeze(-1)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def policy_divergence(logprob: Tensor, logprob_old: Tensor) -> Tensor:
    """An estimate of KL(pi_old || pi) from each token drawn from pi_old: (e^d - 1) - d >= 0, d = log pi - log pi_old."""
    difference = (logprob - logprob_old).detach()
    return torch.expm1(difference) - difference
