"""Next-token losses without ever holding the logits of all tokens: SmolLM2 at 32k tokens would need 6.4 GB in fp32.

The head runs only at positions that have a label, in pieces that are recomputed in the backward pass. The number of
pieces depends on the shape of the batch alone, so all ranks call the head equally often (ZeRO-3 gathers its weight in
every call).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORED = -100
LOGITS_AT_ONCE = 2**27
"""Elements of one piece of logits: 0.5 GB in fp32."""

_HEAD_EXTRAS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def token_losses(model: nn.Module, inputs: dict[str, Any], labels_BT: Tensor) -> Tensor:
    """-log p(label) in fp32 [B, T] of a Hugging Face causal LM, 0 where the label is -100; labels are already shifted.

    `inputs` are the model's keyword arguments; its rows may be flattened to [1, B*T] (flash attention).
    One host synchronisation: the number of labels.
    """
    hidden_TD, head = _hidden_and_head(model, inputs)
    labels_T = labels_BT.flatten()
    index_L = (labels_T != IGNORED).nonzero().squeeze(1)
    vocabulary = model.get_output_embeddings().out_features  # type: ignore[operator]
    num_pieces = -(-labels_T.numel() * vocabulary // LOGITS_AT_ONCE)
    pieces = zip(
        hidden_TD.index_select(0, index_L).tensor_split(num_pieces),
        labels_T.index_select(0, index_L).tensor_split(num_pieces),
    )
    losses_L = torch.cat([_piece(head, hidden, labels) for hidden, labels in pieces])
    return losses_L.new_zeros(labels_T.shape).index_copy(0, index_L, losses_L).view_as(labels_BT)


def expert_sums(losses_BT: Tensor, expert_B: Tensor, num_experts: int) -> Tensor:
    """Sums per expert [E] of rows that belong to one expert each; no atomics, so the same bits every time."""
    one_hot_BE = functional.one_hot(expert_B, num_experts).to(losses_BT.dtype)
    return losses_BT.sum(dim=1) @ one_hot_BE


def _piece(head: nn.Module, hidden_LD: Tensor, labels_L: Tensor) -> Tensor:
    # No determinism check: it compares shapes, and under ZeRO-3 the head's weight is whole or empty as need be.
    return checkpoint(
        _cross_entropy,
        head,
        hidden_LD,
        labels_L,
        use_reentrant=False,
        preserve_rng_state=False,
        determinism_check="none",
    )


def _cross_entropy(head: nn.Module, hidden_LD: Tensor, labels_L: Tensor) -> Tensor:
    logits = head(hidden_LD)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(wide, labels_L, reduction="none")


def _hidden_and_head(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, nn.Module]:
    """Hidden states [T, D] and the head; for models that do more to logits than a linear, logits and the identity."""
    body = getattr(model, "base_model", model)
    plain = all(getattr(model.config, name, None) in (None, 1, 1.0) for name in _HEAD_EXTRAS)  # type: ignore[union-attr]
    if body is model or not plain:
        return model(**inputs, use_cache=False).logits.flatten(0, -2), nn.Identity()
    return body(**inputs, use_cache=False).last_hidden_state.flatten(0, -2), model.get_output_embeddings()  # type: ignore[operator,return-value]
