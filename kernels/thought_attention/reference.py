"""Thought attention as one softmax under a dense diagonal mask, in plain PyTorch: the specification.

Scores of a branch over prefix and own keys stand side by side, [.., L + N]; the mask is prefix_mask beside own_mask.
Autograd differentiates it. Memory grows with A * S * M * (L + N): for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import own_mask, prefix_mask


def thought_attention(
    q_BHASMD: Tensor,
    prefix_k_BKLD: Tensor,
    prefix_v_BKLD: Tensor,
    own_k_BKASND: Tensor,
    own_v_BKASND: Tensor,
    anchor_BA: Tensor,
    start_BA: Tensor,
    own_length: Tensor | int | None,
    scale: float,
) -> Tensor:
    """See `quietgoose.kernels.thought_attention.thought_attention`; fp64 stays fp64, everything else computes in fp32."""
    compute = torch.float64 if q_BHASMD.dtype == torch.float64 else torch.float32
    B, H, A, S, M, _ = q_BHASMD.shape
    K, L, N = prefix_k_BKLD.shape[1], prefix_k_BKLD.shape[2], own_k_BKASND.shape[4]
    valid_BA = anchor_BA >= 0
    visible_BAL = prefix_mask(anchor_BA, start_BA, L)
    visible_MN = own_mask(own_length, M, N, q_BHASMD.device)
    # whatever stands at a padding anchor or in an unused slot is replaced, not multiplied by 0: it may be NaN
    q = q_BHASMD.to(compute).masked_fill(~valid_BA[:, None, :, None, None, None], 0.0).unflatten(1, (K, H // K))
    hidden = ~(valid_BA[:, None, :, None, None, None] & visible_MN.any(0)[:, None])
    own_k, own_v = (x.to(compute).masked_fill(hidden, 0.0) for x in (own_k_BKASND, own_v_BKASND))
    prefix = torch.einsum("bkgasmd,bkld->bkgasml", q, prefix_k_BKLD.to(compute))
    own = torch.einsum("bkgasmd,bkasnd->bkgasmn", q, own_k)
    visible = torch.cat(
        [visible_BAL[:, None, None, :, None, None].expand(B, 1, 1, A, S, M, L), visible_MN.expand(B, 1, 1, A, S, M, N)],
        dim=-1,
    )
    score = (torch.cat([prefix, own], dim=-1) * scale).masked_fill(~visible, -torch.inf)
    weight = torch.softmax(score, dim=-1)
    out = torch.einsum("bkgasml,bkld->bkgasmd", weight[..., :L], prefix_v_BKLD.to(compute))
    out = out + torch.einsum("bkgasmn,bkasnd->bkgasmd", weight[..., L:], own_v)
    out = out.flatten(1, 2).masked_fill(~valid_BA[:, None, :, None, None, None], 0.0)
    return out.to(q_BHASMD.dtype)
