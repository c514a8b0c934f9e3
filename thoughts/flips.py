"""How often the gradient pass routes a thought token otherwise than the rollout that sampled it.

Both passes compute the same numbers by different kernels, token by token over a cache and all at once; where two experts' scores
nearly tie, rounding (or quantised thoughts) decides, and pi is not quite pi_old. Replays the rollout's steps with the tokens that
were drawn, then the gradient pass, and compares who was chosen. Nothing is drawn, trained or waited for. Caller: gradient.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from . import stats
from .attention import BranchState
from .branch import START, first_position, look_ahead, run_branches
from .calibration import calibrate
from .config import ThoughtConfig
from .policy import Policy, PolicyTensors
from .recompute import layers_of, recomputed
from .storage import ThoughtStore
from .types import Prefix, Rows, Thoughts

Choices = Callable[[], AbstractContextManager[list[Tensor]]]
"""What records the choices of every call of every site, int64 [tokens, K] each, ascending (routing/choices.py)."""


def flip_sums(
    policy: Policy, tensors: PolicyTensors, prefix: Prefix, rows: Rows, thoughts: Thoughts, config: ThoughtConfig,
    choices: Choices,
) -> Tensor:  # fmt: skip
    """The sums routed and flips of stats.py: (token, site) pairs of the valid anchors of `thoughts`, START and T - 1 sampled
    tokens each, and how many of them chose another set of experts."""
    prefix, tensors = prefix.detach(), tensors.with_flat([tensor.detach() for tensor in tensors.flat()])
    steps = thoughts.tokens_BAST.shape[-1]
    store = ThoughtStore.over(prefix, config, thoughts.anchors.count)
    calibrate(store, policy, tensors, prefix.keys[0].shape[2], prefix.hidden_BLD.device)
    with torch.no_grad(), choices() as sampled:
        _replay(policy, tensors, prefix, rows, thoughts, store)
    forget = bool(layers_of(policy.model))  # nothing goes backward
    with torch.enable_grad(), choices() as trained, policy.bind(tensors), recomputed(policy.model, forget):
        look_ahead(policy.model, tensors.thought, prefix, rows, thoughts, config.lookahead)
    valid_X = thoughts.anchors.valid_BA[:, :, None].expand(thoughts.tokens_BAST.shape[:3]).flatten()
    flips, routed = torch.zeros_like(valid_X, dtype=torch.int64), torch.zeros_like(valid_X, dtype=torch.int64)
    sites = len(trained)
    for site, whole in enumerate(trained):
        now_XTK = whole.view(len(valid_X), -1, whole.shape[-1])[:, :steps]
        then_XTK = torch.stack(sampled[site::sites], dim=1)
        flips += (now_XTK != then_XTK).any(-1).sum(1)
        routed += steps
    found = {"routed": (routed * valid_X).sum(), "flips": (flips * valid_X).sum()}
    return stats.collect(found, prefix.hidden_BLD.device)


def _replay(
    policy: Policy, tensors: PolicyTensors, prefix: Prefix, rows: Rows, thoughts: Thoughts, store: ThoughtStore
) -> None:
    """The rollout's steps over what it drew, uncaptured (rollout.py)."""
    anchors, samples = replace(thoughts.anchors, consecutive_from=None), thoughts.tokens_BAST.shape[2]
    position_BA = first_position(rows, anchors)
    start_BAS1 = torch.full_like(thoughts.tokens_BAST[..., :1], START)
    fed_BAST = torch.cat([start_BAS1, thoughts.tokens_BAST[..., :-1]], -1)
    for number, token_BAS in enumerate(fed_BAST.unbind(-1)):
        step = torch.full((1,), number, dtype=torch.int64, device=start_BAS1.device)
        state = BranchState.over(prefix, anchors, samples, store=store, step=step)
        with policy.bind(tensors):
            run_branches(policy.model, tensors.thought, state, token_BAS.unsqueeze(-1), position_BA + step)
