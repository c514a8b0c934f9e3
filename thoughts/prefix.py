"""The ordinary causal pass over packed rows: hidden states, and every layer's keys and values.

Runs once a micro-batch, with a graph in training: its detached numbers serve the rollout, its leaves the gradient pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import QuietGooseError
from .attention import PrefixState, switch, thought_inputs
from .types import Prefix, Rows


def run_prefix(model: Any, rows: Rows) -> Prefix:
    """One forward of `model` (a causal LM) over the rows; documents do not see each other.

    One synchronisation with the host: whether a mask is needed at all. QuietGooseError THT-002 for a model that drops out:
    rollout and gradient pass would be two policies.
    """
    check_prefix(model)
    return masked_prefix(model, rows, document_mask(rows.segment_BT))


def masked_prefix(model: Any, rows: Rows, mask_B1LL: Tensor | None) -> Prefix:
    """The same with a mask at hand (document_mask), of a model that passed `check_prefix`. Waits for nothing."""
    state = PrefixState(mask_B1LL)
    out = model.base_model(
        input_ids=rows.tokens_BT, position_ids=rows.position_BT, **thought_inputs(state, rows.tokens_BT.device)
    )
    keys, values = state.close()
    return Prefix(out.last_hidden_state, keys, values, one_document=mask_B1LL is None)


def check_prefix(model: Any) -> None:
    """Let thoughts' attention in, and dropout not: QuietGooseError THT-002."""
    if model.training:
        _refuse_dropout(model)
    switch(model)


def _refuse_dropout(model: Any) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise QuietGooseError(
                f"thoughts run without dropout, and {name} drops {module.p}: put the model in eval mode", code="THT-002"
            )


def document_mask(segment_BT: Tensor) -> Tensor | None:
    """bool [B, 1, L, L], True where query t may see key u: one document and u <= t. None if every row is one
    document: then plain causal attention is the same."""
    if bool((segment_BT == segment_BT[:, :1]).all()):
        return None
    length = segment_BT.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=segment_BT.device).tril()
    return ((segment_BT[:, :, None] == segment_BT[:, None, :]) & causal_LL)[:, None]


def document_starts(segment_BT: Tensor) -> Tensor:
    """int64 [B, L]: the first position of the document that each position belongs to."""
    index_L = torch.arange(segment_BT.shape[1], device=segment_BT.device)
    begins_BL = torch.ones_like(segment_BT, dtype=torch.bool)
    begins_BL[:, 1:] = segment_BT[:, 1:] != segment_BT[:, :-1]
    return torch.where(begins_BL, index_L, 0).cummax(dim=1).values
