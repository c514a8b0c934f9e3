"""Next-token losses without ever holding the logits of all tokens: SmolLM2 at 32k tokens would need 6.4 GB in fp32.

The head runs only at positions that have a label, in pieces that are recomputed in the backward pass
(kernels/linear_loss.py). The number of pieces depends on the shape of the batch alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..kernels.linear_loss import HEAD_EXTRAS, IGNORED, num_pieces, token_nll


def token_losses(model: nn.Module, inputs: dict[str, Any], labels_BT: Tensor) -> Tensor:
    """-log p(label) in fp32 [B, T] of a Hugging Face causal LM, 0 where the label is -100; labels are already shifted.

    `inputs` are the model's keyword arguments; its rows may be flattened to [1, B*T] (flash attention).
    One host synchronisation: the number of labels.
    """
    hidden_TD, head = _hidden_and_head(model, inputs)
    labels_T = labels_BT.flatten()
    index_L = (labels_T != IGNORED).nonzero().squeeze(1)
    pieces = num_pieces(labels_T.numel(), model.get_output_embeddings())  # type: ignore[operator,arg-type]
    losses_L, _ = token_nll(
        head, hidden_TD.index_select(0, index_L), labels_T.index_select(0, index_L), pieces=pieces, entropy=False
    )
    return losses_L.new_zeros(labels_T.shape).index_copy(0, index_L, losses_L).view_as(labels_BT)


def expert_sums(losses_BT: Tensor, expert_B: Tensor, num_experts: int) -> Tensor:
    """Sums per expert [E] of rows that belong to one expert each; no atomics, so the same bits every time."""
    one_hot_BE = functional.one_hot(expert_B, num_experts).to(losses_BT.dtype)
    return losses_BT.sum(dim=1) @ one_hot_BE


def _hidden_and_head(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, nn.Module]:
    """Hidden states [T, D] and the head; for models that do more to logits than a linear, logits and the identity."""
    body = getattr(model, "base_model", model)
    plain = all(getattr(model.config, name, None) in (None, 1, 1.0) for name in HEAD_EXTRAS)  # type: ignore[union-attr]
    if body is model or not plain:
        return model(**inputs, use_cache=False).logits.flatten(0, -2), nn.Identity()
    return body(**inputs, use_cache=False).last_hidden_state.flatten(0, -2), model.get_output_embeddings()  # type: ignore[operator,return-value]
