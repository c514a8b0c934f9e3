"""Causal attention among the new tokens of a prompt chunk, with the log-sum-exp that merging with the history needs.

    out_i = sum_{t <= i, t valid} softmax(scaling * q_i . k_t) v_t,     lse_i = log sum_{t <= i} exp(scaling * q_i . k_t)

On a GPU in 16 bits and without padding the flash kernel inside PyTorch; otherwise fp32 mathematics over blocks of
queries. Called by hf_layer.py for the second and later chunks of a prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_BLOCK = 256  # rows of scores that exist at a time


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """query [B,H,n,D], key and value [B,Hk,n,D], valid bool [B,n] (None: all) -> out [B,H,n,D], lse fp32 [B,H,n].

    A query at a padding position that sees nothing gets zeros and -inf.
    """
    width = query.shape[-1]
    fits = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= 256
    if fits and valid is None:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, True, False, scale=scaling
        )[:2]
        return out, lse[..., : query.shape[2]].float()
    return _by_blocks(query, key, value, valid, scaling)


def _by_blocks(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """The plain form in fp32; memory is B * H * QUERY_BLOCK * n scores."""
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.float().view(batch, kv_heads, heads // kv_heads, length, width)
    k_B1ND, v_B1ND = key.float().unsqueeze(2), value.float().unsqueeze(2)
    position = torch.arange(length, device=query.device)
    outs, sums = [], []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        scores = grouped[..., start:stop, :] @ k_B1ND[..., :stop, :].transpose(-1, -2) * scaling
        seen = position[None, :stop] <= position[start:stop, None]
        if valid is not None:
            seen = seen & valid[:, None, None, None, :stop]
        scores = scores.masked_fill(~seen, float("-inf"))
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.clamp_min(torch.finfo(lse.dtype).min).unsqueeze(-1))
        outs.append(weights @ v_B1ND[..., :stop, :])
        sums.append(lse)
    out = torch.cat(outs, dim=-2).reshape(batch, heads, length, width)
    return out.to(query.dtype), torch.cat(sums, dim=-1).reshape(batch, heads, length)
