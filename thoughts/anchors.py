"""Which positions think. A pure function of seed, step, row number and labels, so that every rank knows all counts.

A position can be an anchor if at least one of its J lookahead labels is there and in its document. Only those labels
are scored: an anchor whose lookahead leaves the document scores what is inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..base.errors import QuietGooseError
from ..base.randomness import hashed
from ..kernels.linear_loss import IGNORED
from .config import ThoughtConfig
from .prefix import document_starts
from .types import Anchors, Rows

SHARE_PARTS = 10**6


def choose_anchors(
    config: ThoughtConfig,
    rows: Rows,
    *,
    seed: int,
    step: int,
    row_ids: Tensor | None = None,
    entropy_BL: Tensor | None = None,
    one_document: bool = False,
) -> Anchors:
    """The anchors of every row, ascending and padded to one number that depends on shapes and `config` alone.

    row_ids       int64 [B], the rows' numbers in the whole data; None: 0, 1, ...
    entropy_BL    entropy of the next token at every position; needed for anchors "entropy"
    one_document  a promise that every row is one document (run_prefix finds out)
    """
    labels_BL, length = rows.labels_BT, rows.labels_BT.shape[1]
    row_ids = torch.arange(labels_BL.shape[0], device=labels_BL.device) if row_ids is None else row_ids
    index_L = torch.arange(length, device=labels_BL.device)
    key_BL = anchor_key(row_ids[:, None], index_L)
    starts_BL = document_starts(rows.segment_BT)
    can_BL = candidates(config, rows)
    if config.anchors == "every" and config.limit is None:
        index_BL = index_L.expand_as(labels_BL)
        if one_document:  # all positions run, so that stock causal kernels apply; only candidates are scored
            return Anchors(index_BL, starts_BL, can_BL, key_BL, consecutive_from=0)
        return Anchors(index_BL.masked_fill(~can_BL, -1), starts_BL, can_BL, key_BL)
    chosen_BL = _chosen(config, can_BL, _priority(config, key_BL, seed, step, entropy_BL))
    count = anchors_in_row(config, length)
    index_BA = torch.where(chosen_BL, index_L, length).sort(dim=1).values[:, :count]
    valid_BA = index_BA < length
    safe_BA = torch.where(valid_BA, index_BA, 0)
    start_BA, key_BA = starts_BL.gather(1, safe_BA), key_BL.gather(1, safe_BA)
    return Anchors(torch.where(valid_BA, index_BA, -1), start_BA, valid_BA, key_BA)


def anchor_key(row_ids: Tensor, position: Tensor) -> Tensor:
    """int64, broadcast: what names the random numbers of an anchor, by the row's number in the data and its position."""
    return (row_ids << 24) + position


def anchors_in_row(config: ThoughtConfig, length: int) -> int:
    """A for rows of `length` positions."""
    if config.anchors == "every_n":
        count = -(-length // config.every)
    else:
        count = length if config.anchors == "every" else _share_of(length, config.share)
    return max(1, count if config.limit is None else min(count, config.limit))


def chunk_size(count: int, most: int | None) -> int:
    """Anchors of a row in one piece of a pass over `count` of them: at most `most` (None: all), and pieces of one size as far as
    can be."""
    return -(-count // -(-count // min(count, most or count)))


def scored(rows: Rows, lookahead: int) -> tuple[Tensor, Tensor]:
    """(labels int64 [B, L, J], valid bool [B, L, J]): what is predicted at i .. i + J - 1, in the document of i.

    Labels are 0 where not valid.
    """
    labels_BL, segment_BL = rows.labels_BT, rows.segment_BT
    labels = [_shift(labels_BL, j, IGNORED) for j in range(lookahead)]
    inside = [(_shift(segment_BL, j, 0) == segment_BL) & (segment_BL > 0) for j in range(lookahead)]
    labels_BLJ = torch.stack(labels, dim=-1)
    valid_BLJ = torch.stack(inside, dim=-1) & (labels_BLJ != IGNORED)
    return labels_BLJ.masked_fill(~valid_BLJ, 0), valid_BLJ


def candidates(config: ThoughtConfig, rows: Rows) -> Tensor:
    """bool [B, L]: the positions that may think under `config`."""
    _, valid_BLJ = scored(rows, config.lookahead)
    if config.anchors == "entropy":  # all or nothing, so that counts do not depend on which are chosen
        return valid_BLJ.all(-1)
    can_BL = valid_BLJ.any(-1)
    if config.anchors == "every_n":
        can_BL = can_BL & (torch.arange(can_BL.shape[1], device=can_BL.device) % config.every == 0)
    return can_BL


def term_counts(config: ThoughtConfig, rows: Rows, *, seed: int, step: int, row_ids: Tensor | None = None) -> Tensor:
    """float64 [4]: how many summands each term of types.TERMS has on these rows. Needs no model."""
    base = (rows.labels_BT != IGNORED).sum()
    if not config.thinks:
        return torch.stack([base, *[torch.zeros_like(base)] * 3]).double()
    nothing_BL = torch.zeros(rows.labels_BT.shape, device=rows.labels_BT.device)
    anchors = choose_anchors(config, rows, seed=seed, step=step, row_ids=row_ids, entropy_BL=nothing_BL)
    _, valid_BLJ = scored(rows, config.lookahead)
    tokens = (at_anchors(valid_BLJ, anchors) & anchors.valid_BA[..., None]).sum()
    thought_tokens = anchors.valid_BA.sum() * config.tokens
    return torch.stack([base, *(config.samples * torch.stack([tokens, thought_tokens, tokens]))]).double()


def at_anchors(x_BL: Tensor, anchors: Anchors) -> Tensor:
    """x [B, L, ...] at the anchors, [B, A, ...]; padding anchors read position 0."""
    index_BA = anchors.index_BA.clamp_min(0)
    rows_B1 = torch.arange(x_BL.shape[0], device=x_BL.device)[:, None]
    return x_BL[rows_B1, index_BA]


def _priority(config: ThoughtConfig, key_BL: Tensor, seed: int, step: int, entropy_BL: Tensor | None) -> Tensor:
    """Positions with the lowest are taken first; no two of a row are equal, except by entropy."""
    if config.anchors != "entropy":
        return (hashed(seed, step, key_BL) << 24) + torch.arange(key_BL.shape[1], device=key_BL.device)
    if entropy_BL is None:
        raise QuietGooseError("anchors = entropy needs the entropy of the next token at every position", code="THT-003")
    return -entropy_BL


def _chosen(config: ThoughtConfig, can_BL: Tensor, priority_BL: Tensor) -> Tensor:
    """bool [B, L]: the candidates that are taken."""
    keep_B = can_BL.sum(dim=1)
    if config.anchors in ("random", "entropy"):
        keep_B = _share_of(keep_B, config.share)
    keep_B = keep_B.clamp_max(anchors_in_row(config, can_BL.shape[1]))
    worst = torch.finfo(priority_BL.dtype).max if priority_BL.is_floating_point() else torch.iinfo(torch.int64).max
    rank_BL = priority_BL.masked_fill(~can_BL, worst).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return can_BL & (rank_BL < keep_B[:, None])


def _share_of(count: Any, share: float) -> Any:
    """share * count, rounded up, in integers: alike on every device."""
    parts = round(share * SHARE_PARTS)
    return (count * parts + SHARE_PARTS - 1) // SHARE_PARTS


def _shift(x_BL: Tensor, places: int, fill: int) -> Tensor:
    """x[:, i + places] at i, `fill` beyond the end."""
    length = x_BL.shape[1]
    return functional.pad(x_BL[:, min(places, length) :], (0, min(places, length)), value=fill)
