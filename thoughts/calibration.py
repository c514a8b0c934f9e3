"""The mean and spread by which a quantised rollout rounds keys and values (storage.py): of a text that tells nothing of the rows.

Measured on a row itself, text behind an anchor would choose how its thought is rounded, and so which thought is sampled. So the
policy reads one text of evenly drawn tokens, always the same ones, at positions spread over the row's length, and every row is
rounded alike. On real weights the rollout's divergence is about that of a row's own numbers (KL a token in 8 and 4 bits 1.5e-4
and 0.041, against 1.0e-4 and 0.041; SmolLM2-135M, fp32, L = 128, T = 8, S = 2). One forward of 128 tokens a rollout.
Callers: rollout.py, flips.py.
"""

from __future__ import annotations

import torch

from ..base.randomness import hashed
from .branch import language_head
from .policy import Policy, PolicyTensors
from .prefix import check_prefix, masked_prefix
from .storage import ThoughtStore
from .types import TextRows

TOKENS = 128
SEED = 0


@torch.no_grad()
def calibrate(store: ThoughtStore, policy: Policy, tensors: PolicyTensors, length: int, device: torch.device) -> None:
    """Measure `store` for rows of `length` positions under the policy as it stands; an exact store needs nothing. Waits for
    nothing. The first position is left out: what all later ones attend to has keys of its own."""
    if store.kind == "exact":
        return
    number_1T = torch.arange(TOKENS, device=device)[None]
    text = TextRows(hashed(SEED, number_1T) % language_head(policy.model).out_features, number_1T * length // TOKENS)
    check_prefix(policy.model)
    with policy.bind(tensors):
        prefix = masked_prefix(policy.model, text, None)
    store.measure([key[:, :, 1:] for key in prefix.keys], [value[:, :, 1:] for value in prefix.values])
