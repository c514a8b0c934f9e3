"""What a training dashboard needs to see of thoughts: additive sums on the device, turned into means at the end.

A vector of sums [len(SUMS)], float64, is added over chunks, micro-batches and ranks (one all-reduce), then `summarise`d.
Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .objective import policy_divergence

SUMS = (
    "thoughts",  # valid (anchor, sample) pairs
    "scored",  # valid (anchor, sample, lookahead token)
    "weight",  # mixing weight, over scored
    "weight_square",
    "reward",  # over thoughts
    "reward_square",
    "reward_zero",  # thoughts whose reward is exactly 0
    "reward_within",  # square of reward minus mean over samples
    "advantage_size",  # |A|
    "thought_tokens",  # valid (anchor, sample, thought token)
    "entropy",  # of the distribution each was drawn from, at the temperature of sampling, by the training policy
    "logprob",  # log pi of the drawn token, likewise
    "difference",  # |log pi - log pi_old|
    "divergence",  # estimate of KL(rollout || train)
    "ratio",  # pi / pi_old, not truncated
    "ratio_square",
    "ratio_capped",  # tokens above the cap
    "anchors",  # valid anchors
    "own_gain",  # nats saved by an anchor's own thought, over gap_scored
    "other_gain",  # nats saved by another anchor's thought
    "gap_scored",  # valid (anchor, lookahead token) of the shuffled comparison
    "routed",  # (thought token, site) whose experts were compared between rollout and gradient pass
    "flips",  # those that chose others
)


def empty(device: torch.device) -> Tensor:
    """All sums 0: float64 [len(SUMS)]."""
    return torch.zeros(len(SUMS), dtype=torch.float64, device=device)


def collect(values: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """The vector with these scalars, 0 elsewhere."""
    unknown = set(values) - set(SUMS)
    if unknown:
        raise KeyError(f"no such sums: {sorted(unknown)}")
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([values[name].detach().double() if name in values else zero for name in SUMS])


def mixing_sums(weight_BASJ: Tensor, reward_BAS: Tensor, advantage_BAS: Tensor, valid_BAJ: Tensor) -> dict[str, Tensor]:
    """Sums of mixing weights, rewards and advantages over what is scored."""
    scored_BASJ = valid_BAJ.unsqueeze(2).expand_as(weight_BASJ).double()
    thought_BAS = valid_BAJ.any(-1, keepdim=True).expand_as(reward_BAS).double()
    within_BAS = reward_BAS - reward_BAS.mean(-1, keepdim=True)
    return {
        "anchors": valid_BAJ.any(-1).double().sum(),
        "thoughts": thought_BAS.sum(),
        "scored": scored_BASJ.sum(),
        "weight": (weight_BASJ * scored_BASJ).sum(),
        "weight_square": (weight_BASJ.double().square() * scored_BASJ).sum(),
        "reward": (reward_BAS * thought_BAS).sum(),
        "reward_square": (reward_BAS.double().square() * thought_BAS).sum(),
        "reward_zero": ((reward_BAS == 0) * thought_BAS).sum(),
        "reward_within": (within_BAS.double().square() * thought_BAS).sum(),
        "advantage_size": (advantage_BAS.abs() * thought_BAS).sum(),
    }


def policy_sums(
    logprob_BAST: Tensor, logprob_old_BAST: Tensor, entropy_BAST: Tensor, valid_BA: Tensor, cap: float
) -> dict[str, Tensor]:
    """Sums over thought tokens, all three at the temperature of sampling: under another one pi and pi_old have no ratio."""
    mask_BAST = valid_BA[:, :, None, None].expand_as(logprob_BAST).double()

    def total(x: Tensor) -> Tensor:
        return (x * mask_BAST).sum()

    difference = (logprob_BAST - logprob_old_BAST).detach().double()
    ratio = difference.exp()
    return {
        "thought_tokens": mask_BAST.sum(),
        "entropy": total(entropy_BAST),
        "logprob": total(logprob_BAST.detach()),
        "difference": total(difference.abs()),
        "divergence": total(policy_divergence(logprob_BAST.double(), logprob_old_BAST.double())),
        "ratio": total(ratio),
        "ratio_square": total(ratio.square()),
        "ratio_capped": total((ratio > cap).double()),
    }


def summarise(sums: Tensor) -> dict[str, float]:
    """Means by name from a vector of sums; names without data are left out. Waits for the device.

    mixing_weight, mixing_weight_std    reward, reward_std (all thoughts), reward_spread (within an anchor),
    reward_zero_share, advantage_size   thought_entropy, thought_logprob     rollout_kl, rollout_dlogp, ratio_mean,
    ratio_capped_share, effective_sample_share = (sum rho)^2 / (n sum rho^2)
    own_gain, shuffled_gain, own_minus_shuffled (nats a token)      routing_flip_share
    """
    s = dict(zip(SUMS, sums.tolist()))
    found: dict[str, float] = {"anchors": s["anchors"]}
    if s["scored"]:
        mean = s["weight"] / s["scored"]
        found["mixing_weight"] = mean
        found["mixing_weight_std"] = max(0.0, s["weight_square"] / s["scored"] - mean**2) ** 0.5
    if s["thoughts"]:
        n, mean = s["thoughts"], s["reward"] / s["thoughts"]
        found["reward"] = mean
        found["reward_std"] = max(0.0, s["reward_square"] / n - mean**2) ** 0.5
        found["reward_spread"] = (s["reward_within"] / n) ** 0.5
        found["reward_zero_share"] = s["reward_zero"] / n
        found["advantage_size"] = s["advantage_size"] / n
    if s["thought_tokens"]:
        n = s["thought_tokens"]
        found["thought_entropy"] = s["entropy"] / n
        found["thought_logprob"] = s["logprob"] / n
        found["rollout_dlogp"] = s["difference"] / n
        found["rollout_kl"] = s["divergence"] / n
        found["ratio_mean"] = s["ratio"] / n
        found["ratio_capped_share"] = s["ratio_capped"] / n
        found["effective_sample_share"] = s["ratio"] ** 2 / (n * s["ratio_square"]) if s["ratio_square"] else 0.0
    if s["gap_scored"]:
        found["own_gain"] = s["own_gain"] / s["gap_scored"]
        found["shuffled_gain"] = s["other_gain"] / s["gap_scored"]
        found["own_minus_shuffled"] = found["own_gain"] - found["shuffled_gain"]
    if s["routed"]:
        found["routing_flip_share"] = s["flips"] / s["routed"]
    return found
