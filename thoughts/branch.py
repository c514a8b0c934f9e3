"""The branch routine that rollout, gradient pass, scoring and generation share: ids in, hidden states and losses out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.errors import RecipeError
from ..kernels.linear_loss import HEAD_EXTRAS, IGNORED, token_nll
from ..kernels.wide_head import WideHead
from .anchors import at_anchors, scored
from .attention import BranchState, thought_inputs
from .parameters import ThoughtTensors, mix
from .types import PAUSE, Anchors, Prefix, Rows, Thoughts

START, END = PAUSE, -2
"""Ids of the two embeddings that are no vocabulary rows."""

LOGITS_AT_ONCE = 2**25
"""Elements of one piece of a branch pass's logits, 128 MB in fp32; some three copies live at a time."""


def language_head(model: Any) -> WideHead:
    """The output embedding, its logits in fp32 whatever the model's dtype: rollout, gradient pass, scoring and generation
    compare log-probabilities, which rounded logits would drown (kernels/wide_head.py).

    RecipeError CFG-103 where logits are more than a linear function of the hidden state.
    """
    for name in HEAD_EXTRAS:
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise RecipeError(
                f"{type(model).__name__} has {name} = {getattr(model.config, name)}: thoughts mix hidden states before a "
                "plain linear head",
                code="CFG-103",
            )
    return WideHead(model.get_output_embeddings())


def embed(model: Any, thought: ThoughtTensors, ids: Tensor) -> Tensor:
    """Embeddings [..., D] of vocabulary ids, START and END, in the model's dtype."""
    rows = model.get_input_embeddings()(ids.clamp_min(0))
    start_D, end_D = thought.meta_2D.to(rows.dtype)
    rows = torch.where((ids == START).unsqueeze(-1), start_D, rows)
    return torch.where((ids == END).unsqueeze(-1), end_D, rows)


def run_branches(
    model: Any, thought: ThoughtTensors, state: BranchState, ids_BASM: Tensor, position_BA: Tensor
) -> Tensor:
    """Last hidden states [B, A, S, M, D] of branches; `position_BA` is the RoPE position of m = 0."""
    shape = ids_BASM.shape
    steps_M = torch.arange(shape[-1], device=ids_BASM.device)
    position_BASM = (position_BA[:, :, None, None] + steps_M).expand(shape)
    out = model.base_model(
        inputs_embeds=embed(model, thought, ids_BASM).flatten(1, 3), position_ids=position_BASM.flatten(1, 3),
        **thought_inputs(state, ids_BASM.device),
    )  # fmt: skip
    return out.last_hidden_state.unflatten(1, shape[1:])


def branch_ids(rows: Rows, thoughts: Thoughts, lookahead: int) -> Tensor:
    """int64 [B, A, S, M]: START, the thought, END, then the true tokens x[i+1] .. x[i+J-1].

    True tokens beyond the row's end repeat its last one; nothing that is scored sees them.
    """
    tokens_BAST = thoughts.tokens_BAST
    rim_BAS1 = tokens_BAST[..., :1]
    true_BAj = lookahead_of(rows.tokens_BT, thoughts.anchors, lookahead, first=1)
    true_BASj = true_BAj.unsqueeze(2).expand(*tokens_BAST.shape[:3], lookahead - 1)
    return torch.cat([torch.full_like(rim_BAS1, START), tokens_BAST, torch.full_like(rim_BAS1, END), true_BASj], -1)


def first_position(rows: Rows, anchors: Anchors) -> Tensor:
    """int64 [B, A]: the RoPE position of START, one after the anchor's."""
    return at_anchors(rows.position_BT, anchors) + 1


@dataclass(frozen=True)
class Lookahead:
    """What each branch says of the next J true tokens.

    branch_BASMD   hidden states of the whole branch
    base_BAJD, mixed_BASJD   hidden states before the head: without the thought in the model's dtype, with it at least fp32
    labels_BAJ, valid_BAJ    what is scored; labels are 0 where not valid
    weight_BASJ              mixing weight, fp32
    """

    branch_BASMD: Tensor
    base_BAJD: Tensor
    mixed_BASJD: Tensor
    labels_BAJ: Tensor
    valid_BAJ: Tensor
    weight_BASJ: Tensor

    def mixed_nll(self, head: Any, recompute: bool) -> Tensor:
        """- log p_mixed of every scored token, fp32 [B, A, S, J]; 0 where not valid."""
        shape = self.mixed_BASJD.shape[:-1]
        labels_BASJ = self.labels_BAJ.unsqueeze(2).expand(shape)
        nll, _ = token_nll(
            head, self.mixed_BASJD.flatten(0, 3), labels_BASJ.flatten(), recompute=recompute,
            pieces=head_pieces(labels_BASJ.numel(), head),
        )  # fmt: skip
        return nll.view(shape).masked_fill(~self.valid_BAJ.unsqueeze(2), 0.0)


def look_ahead(
    model: Any, thought: ThoughtTensors, prefix: Prefix, rows: Rows, thoughts: Thoughts, lookahead: int
) -> Lookahead:
    """Run the branches of `thoughts`, teacher-forced, and mix (Quiet-STaR, sections 4.2 and 4.3)."""
    anchors = thoughts.anchors
    tokens = thoughts.tokens_BAST.shape[-1]
    state = BranchState.over(prefix, anchors, thoughts.tokens_BAST.shape[2])
    ids_BASM = branch_ids(rows, thoughts, lookahead)
    branch_BASMD = run_branches(model, thought, state, ids_BASM, first_position(rows, anchors))
    base_BAJD = lookahead_of(prefix.hidden_BLD, anchors, lookahead)
    talk_BASJD = branch_BASMD[..., tokens + 1 :, :]
    mixed_BASJD, weight = mix(thought, base_BAJD.unsqueeze(2).expand_as(talk_BASJD), talk_BASJD)
    labels_BLJ, valid_BLJ = scored(rows, lookahead)
    valid_BAJ = at_anchors(valid_BLJ, anchors) & anchors.valid_BA.unsqueeze(-1)
    labels_BAJ = at_anchors(labels_BLJ, anchors)
    return Lookahead(branch_BASMD, base_BAJD, mixed_BASJD, labels_BAJ, valid_BAJ, weight.squeeze(-1))


def base_losses(model: Any, hidden_BLD: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """(-log p(label) without a thought, entropy of the next token), fp32 [B, L]; 0 where there is no label.

    One synchronisation with the host: the number of labels.
    """
    head = language_head(model)
    index_N = (labels_BL.flatten() != IGNORED).nonzero().squeeze(1)
    nll_N, entropy_N = token_nll(
        head, hidden_BLD.flatten(0, 1).index_select(0, index_N), labels_BL.flatten().index_select(0, index_N),
        recompute=trains(head), pieces=head_pieces(labels_BL.numel(), head),
    )  # fmt: skip
    empty = nll_N.new_zeros(labels_BL.numel())
    return tuple(empty.index_copy(0, index_N, x).view_as(labels_BL) for x in (nll_N, entropy_N))  # type: ignore[return-value]


def head_pieces(tokens: int, head: Any) -> int:
    """Into how many pieces so many tokens of branches are cut for the head: a function of shapes alone, at least 1."""
    return max(1, -(-tokens * getattr(head, "out_features", 1) // LOGITS_AT_ONCE))


def trains(head: Any) -> bool:
    """Whether the head has trainable parameters of its own: then its logits are made again in the backward pass."""
    return any(p.requires_grad for p in head.parameters())


def lookahead_of(x_BL: Tensor, anchors: Anchors, lookahead: int, first: int = 0) -> Tensor:
    """x [B, L, ...] at i + first .. i + J - 1 of every anchor i, [B, A, J - first, ...]; beyond the row its last entry."""
    index_BA = anchors.index_BA.clamp_min(0)
    places_BAJ = index_BA[..., None] + torch.arange(first, lookahead, device=index_BA.device)
    rows_B11 = torch.arange(index_BA.shape[0], device=index_BA.device)[:, None, None]
    return x_BL[rows_B11, places_BAJ.clamp_max(x_BL.shape[1] - 1)]
