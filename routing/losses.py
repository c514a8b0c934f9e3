"""Next-token losses without ever holding the logits of all tokens: SmolLM2 at 32k tokens would need 6.4 GB in fp32.

The head runs only at positions that have a label, in pieces whose gradient is made while the logits are there, or which
are recomputed in the backward pass if the head is trained or sharded (kernels/linear_loss.py).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..kernels.linear_loss import HEAD_EXTRAS, IGNORED, num_pieces, token_nll


def head_losses(
    model: nn.Module,
    hidden_TD: Tensor,
    head: nn.Module,
    labels_BT: Tensor,
    index_L: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:
    """-log p(label) in fp32 [B, T] from `hidden_and_head` of a Hugging Face causal LM, 0 where the label is -100; labels are
    already shifted.

    `index_L` says where the labels are in the flattened rows; without it the device is waited for, to count them.
    A frozen head makes the gradient of the hidden states in the forward pass, by compiled code if asked for.
    """
    labels_T = labels_BT.flatten()
    whole = model.get_output_embeddings()  # type: ignore[operator]
    sharded = any(hasattr(p, "ds_id") for p in whole.parameters())  # ZeRO-3: all ranks call the head equally often
    known = index_L is not None and not sharded
    if index_L is None:
        index_L = (labels_T != IGNORED).nonzero().squeeze(1)
    losses_L, _ = token_nll(
        head,
        hidden_TD.index_select(0, index_L),
        labels_T.index_select(0, index_L),
        pieces=num_pieces(index_L.numel() if known else labels_T.numel(), whole),
        recompute=sharded or any(p.requires_grad for p in whole.parameters()),
        entropy=False,
        compiled=compiled,
    )
    return losses_L.new_zeros(labels_T.shape).index_copy(0, index_L, losses_L).view_as(labels_BT)


def expert_sums(losses_BT: Tensor, expert_B: Tensor, num_experts: int) -> Tensor:
    """Sums per expert [E] of rows that belong to one expert each; no atomics, so the same bits every time."""
    one_hot_BE = functional.one_hot(expert_B, num_experts).to(losses_BT.dtype)
    return losses_BT.sum(dim=1) @ one_hot_BE


def hidden_and_head(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, nn.Module]:
    """Hidden states [T, D] and the head; for models that do more to logits than a linear, logits and the identity.

    `inputs` are the model's keyword arguments; its rows may be flattened to [1, B*T] (flash attention).
    """
    body = getattr(model, "base_model", model)
    plain = all(getattr(model.config, name, None) in (None, 1, 1.0) for name in HEAD_EXTRAS)  # type: ignore[union-attr]
    if body is model or not plain:
        return model(**inputs, use_cache=False).logits.flatten(0, -2), nn.Identity()
    return body(**inputs, use_cache=False).last_hidden_state.flatten(0, -2), model.get_output_embeddings()  # type: ignore[operator,return-value]
