"""Where thoughts help: nats saved on held-out text, by how uncertain the model is without them.

Every label of a few packed rows is predicted without and with a greedy thought of its own. The tokens are cut into ten
groups of equal size by the entropy of the prediction without a thought (as trained); per group the mean gain with a bootstrap
interval over rows. Used by train/evaluate_thoughts.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base import distributed
from ..evaluation.intervals import Interval, interval, ratio_draws, resamples
from ..routing.on_top import TopLora
from ..thoughts.anchors import IGNORED, choose_anchors
from ..thoughts.attention import restore
from ..thoughts.gradient import base_losses
from ..thoughts.prefix import run_prefix
from .data.loader import StepData
from .thought_arms import ThinkingModel, first_token, scoring_config, think
from .types import Batch

GROUPS = 10


@dataclass(frozen=True)
class TokenGains:
    """Of every scored token: its row, the entropy without a thought, -log p without and with one, and -log p with the LoRA on top
    switched off: before the stage, unless all weights trained. float64 [n]."""

    row_N: np.ndarray
    entropy_N: np.ndarray
    base_N: np.ndarray
    mixed_N: np.ndarray
    before_N: np.ndarray


@dataclass(frozen=True)
class Decile:
    """Tokens whose entropy lies in low..high. `gain`: nats saved a token, mean with interval."""

    low: float
    high: float
    tokens: int
    base_nats: float
    thought_nats: float
    gain: Interval


def token_gains(thinker: ThinkingModel, data: StepData, device: Any) -> TokenGains:
    """All label tokens of step 0 of `data`, which holds this rank's share. Collective: every rank gets all of them."""
    found = [_gains(thinker, micro.to(device)) for micro in data.step(0).micro]
    parts = distributed.gather([np.concatenate(columns) for columns in zip(*found)])
    row_N, *others = (np.concatenate(columns) for columns in zip(*parts))
    order = np.argsort(row_N, kind="stable")  # whatever the number of ranks
    return TokenGains(row_N[order], *(column[order] for column in others))


@torch.no_grad()
def _gains(thinker: ThinkingModel, rows: Batch) -> list[np.ndarray]:
    policy = thinker.policy
    tensors = policy.tensors()
    count = int((rows.labels_BT != IGNORED).sum(1).max())
    if count == 0:
        return [np.zeros(0)] * 5
    config = replace(scoring_config(thinker.config, "thought"), limit=count)
    with policy.bind(tensors):
        prefix = run_prefix(policy.model, rows)
        base_BL, entropy_BL = base_losses(policy.model, prefix.hidden_BLD, rows.labels_BT)
    before_BL = base_BL if thinker.top is None else _before(thinker, thinker.top, rows)
    anchors = choose_anchors(config, rows, seed=thinker.seed, step=0, row_ids=rows.row_B)
    thoughts = think(thinker, "thought", tensors, prefix, rows, anchors, config)
    mixed_BA, _ = first_token(thinker, tensors, prefix, rows, thoughts)
    restore(policy.model)  # type: ignore[arg-type]
    valid_BA, index_BA = anchors.valid_BA, anchors.index_BA.clamp_min(0)
    assert rows.row_B is not None
    columns: list[Tensor] = [
        rows.row_B[:, None].expand_as(valid_BA), entropy_BL.gather(1, index_BA), base_BL.gather(1, index_BA), mixed_BA,
        before_BL.gather(1, index_BA),
    ]  # fmt: skip
    return [column[valid_BA].double().cpu().numpy() for column in columns]


def _before(thinker: ThinkingModel, top: TopLora, rows: Batch) -> Tensor:
    """-log p of every label without the LoRA on top and without a thought, fp32 [B, L]."""
    model = thinker.policy.model
    with top.bound(None):
        return base_losses(model, run_prefix(model, rows).hidden_BLD, rows.labels_BT)[0]


def deciles(gains: TokenGains, bootstrap: int, seed: int) -> list[Decile]:
    """Groups by entropy, lowest first; ties stay in the order of the text."""
    rows = np.unique(gains.row_N)
    count_RN = resamples(len(rows), bootstrap, seed, "deciles")
    place_N = np.searchsorted(rows, gains.row_N)
    order = np.argsort(gains.entropy_N, kind="stable")
    return [_decile(gains, part, place_N, len(rows), count_RN) for part in np.array_split(order, GROUPS) if len(part)]


def _decile(gains: TokenGains, part: np.ndarray, place_N: np.ndarray, rows: int, count_RN: np.ndarray) -> Decile:
    saved = gains.base_N[part] - gains.mixed_N[part]
    saved_R = np.bincount(place_N[part], weights=saved, minlength=rows)
    tokens_R = np.bincount(place_N[part], minlength=rows).astype(np.float64)
    used = (count_RN @ tokens_R) > 0  # a resample may hold no row of this group
    draws = ratio_draws(saved_R, tokens_R, count_RN[used])
    entropy = gains.entropy_N[part]
    return Decile(
        float(entropy.min()), float(entropy.max()), len(part), float(gains.base_N[part].mean()),
        float(gains.mixed_N[part].mean()), interval(float(saved.mean()), draws),
    )  # fmt: skip


def to_json(found: Sequence[Decile]) -> list[dict[str, Any]]:
    return [{**vars(one), "gain": [one.gain.value, one.gain.low, one.gain.high]} for one in found]


def to_markdown(found: Sequence[Decile], all_tokens: Mapping[str, Any]) -> str:
    """A table, one line a group, and the means of `totals`."""
    lines = [
        "## Nats saved a token by a thought, by the entropy of the prediction without it", "",
        "| entropy, nats | tokens | nats without | nats with | saved [95 % interval] |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for one in found:
        saved = f"{one.gain.value:+.3f} [{one.gain.low:+.3f}, {one.gain.high:+.3f}]"
        lines.append(
            f"| {one.low:.2f} to {one.high:.2f} | {one.tokens} | {one.base_nats:.3f} | {one.thought_nats:.3f} | {saved} |"
        )
    means = f"All tokens: {all_tokens['nats_without']:.3f} nats without, {all_tokens['nats_with']:.3f} with."
    if "cost" in all_tokens:
        cost, low, high = all_tokens["cost"]
        means += f" Before the stage {all_tokens['nats_before']:.3f}, so without thoughts the stage costs"
        means += f" {cost:+.3f} [{low:+.3f}, {high:+.3f}]."
    return "\n".join([*lines, "", means, "", "Intervals: bootstrap over rows.", ""])


def totals(gains: TokenGains, bootstrap: int, seed: int, *, before: bool = True) -> dict[str, Any]:
    """Means over all tokens. `before`: also what the stage costs without thoughts, nats a token with its interval."""
    found: dict[str, Any] = {
        "tokens": float(len(gains.base_N)), "nats_without": float(gains.base_N.mean()),
        "nats_with": float(gains.mixed_N.mean()), "gain": float((gains.base_N - gains.mixed_N).mean()),
    }  # fmt: skip
    if before:
        rows, place_N = np.unique(gains.row_N, return_inverse=True)
        cost_N = gains.base_N - gains.before_N
        cost_R = np.bincount(place_N, weights=cost_N, minlength=len(rows))
        draws = ratio_draws(
            cost_R, np.bincount(place_N).astype(np.float64), resamples(len(rows), bootstrap, seed, "deciles")
        )
        cost = interval(float(cost_N.mean()), draws)
        found |= {"nats_before": float(gains.before_N.mean()), "cost": [cost.value, cost.low, cost.high]}
    return found
