"""Attention without a mask tensor over keys that all queries see, in tiles: long queries over what is stored already.

A prefill chunk attends its own tokens with stock causal attention and its history with this, then merges both by
log-sum-exp. Scores exist for one tile of queries and keys at a time, in fp32; bf16 and fp16 operands stay as they are on
a GPU (products accumulate in fp32). Caller: cache/state.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.cached_attention import merge

TILE_QUERIES = 1024
TILE_KEYS = 2048


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """(out [B,H,q,D] in the query's dtype, lse fp32 [B,H,q]) of query [B,H,q,D] over key, value [B,Hk,C,D].

    visible bool [B, Hk or 1, C]: keys that count, for all queries. What is not visible may hold anything, NaN included.
    A row that sees nothing gets zeros and -inf.
    """
    key = torch.where(visible.unsqueeze(-1), key, 0)
    value = torch.where(visible.unsqueeze(-1), value, 0)
    outs, lses = [], []
    for first in range(0, query.shape[2], TILE_QUERIES):
        part = query[:, :, first : first + TILE_QUERIES]
        out, lse = _empty(part)
        for start in range(0, key.shape[2], TILE_KEYS):
            keys = slice(start, start + TILE_KEYS)
            tile = _tile(part, key[:, :, keys], value[:, :, keys], visible[:, :, keys], scaling)
            out, lse = merge(out, lse, *tile)
        outs.append(out.to(query.dtype))
        lses.append(lse.float())
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _empty(query: Tensor) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(query.dtype, torch.float32)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=compute, device=query.device)
    return torch.zeros_like(query, dtype=compute), lse


def _tile(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    batch, heads, queries, width = query.shape
    kv_heads = key.shape[1]
    rows_NQD = query.unflatten(1, (kv_heads, -1)).reshape(batch * kv_heads, -1, width)
    scores_NQC = _product(rows_NQD, key.flatten(0, 1).transpose(1, 2)) * scaling
    hidden = ~visible.expand(-1, kv_heads, -1).flatten(0, 1).unsqueeze(1)
    scores_NQC = scores_NQC.masked_fill_(hidden, -torch.inf)
    lse_NQ = torch.logsumexp(scores_NQC, dim=-1)
    safe = torch.where(torch.isinf(lse_NQ), 0.0, lse_NQ)
    weight_NQC = scores_NQC.sub_(safe.unsqueeze(-1)).exp_()
    out_NQD = _product(weight_NQC.to(value.dtype), value.flatten(0, 1))
    return out_NQD.view(batch, heads, queries, width), lse_NQ.view(batch, heads, queries)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A batched product in at least fp32."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(left, right, out_dtype=torch.float32)
    compute = torch.promote_types(left.dtype, torch.float32)
    return torch.bmm(left.to(compute), right.to(compute))
