"""Saliency and selection in plain PyTorch: the specification of the Triton kernels (mathematics in README.md).

p_i = ( sum_{k in P, k >= i} sum_{g in group} A^g_{k,i} ) / |{k in P : k >= i}|        (ZipCache, eq. 8)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .probes import SaliencyMode, hash_positions, share

_CHUNK = 256  # probe rows whose scores exist at once


def probe_saliency(
    query: Tensor,
    key: Tensor,
    probes: Tensor,
    valid: Tensor,
    *,
    scaling: float,
    mode: SaliencyMode,
    lse: Tensor | None = None,
) -> Tensor:
    """The attention modes in fp64; see `quietgoose.kernels.saliency.probe_saliency`. Result fp64 [B, Hk, n]."""
    batch, heads, num, _ = query.shape
    kv_heads, n = key.shape[1], key.shape[2]
    key_BHND = key.double()  # a padded key may hold anything: its scores are replaced, never multiplied
    total = torch.zeros(batch, kv_heads, n, dtype=torch.float64, device=key.device)
    position = torch.arange(n, device=key.device)
    length = valid.long().cumsum(1)  # visible keys of a probe at each position
    for first in range(0, num, _CHUNK):
        part = slice(first, first + _CHUNK)
        probe_BP = probes[:, part]
        query_BHGPD = query[:, :, part].double().unflatten(1, (kv_heads, heads // kv_heads))
        seen_BPN = (position <= probe_BP.unsqueeze(2)) & valid.unsqueeze(1)
        scores = scaling * (query_BHGPD @ key_BHND.unsqueeze(2).transpose(3, 4))
        scores = scores.masked_fill(~seen_BPN[:, None, None], float("-inf"))
        if lse is None:
            lse_part = torch.logsumexp(scores, dim=-1)
        else:
            lse_part = lse[:, :, part].double().unflatten(1, (kv_heads, heads // kv_heads))
        present = (probe_BP >= 0)[:, None, None]
        lse_part = torch.where(present & (lse_part > float("-inf")), lse_part, float("inf"))  # absent rows weigh 0
        attention = torch.exp(scores - lse_part.unsqueeze(-1))
        if mode is SaliencyMode.ROW_LENGTH:
            attention = attention * length.gather(1, probe_BP.clamp(min=0))[:, None, None, :, None]
        total += attention.sum(dim=(2, 3))
    return total


def normalise(total: Tensor, probes: Tensor, valid: Tensor, mode: SaliencyMode) -> Tensor:
    """Column sums [B, Hk, n] -> scores: divided as the mode says, -inf where not valid."""
    n = valid.shape[1]
    if mode is SaliencyMode.AUTHORS_CODE:
        # the authors divide by all later queries though only the probes were summed (modeling_llama.py:793)
        count = valid.long().sum(1, keepdim=True) - (valid.long().cumsum(1) - 1)
    elif mode is SaliencyMode.ACCUMULATED:
        count = torch.ones_like(valid, dtype=torch.int64)
    else:
        # probes at or after i: all of them less those before i
        before = torch.zeros(valid.shape[0], n + 1, dtype=torch.int64, device=valid.device)
        before.scatter_add_(1, probes.clamp(min=-1) + 1, (probes >= 0).long())
        count = (probes >= 0).sum(1, keepdim=True) - before.cumsum(1)[:, :n]
    scores = total / count.clamp(min=1).unsqueeze(1)
    return scores.masked_fill(~valid.unsqueeze(1), float("-inf"))


def without_attention(
    valid: Tensor, kv_heads: int, mode: SaliencyMode, seed: int, sequence_id: Tensor | None
) -> Tensor:
    """RECENT (the rank among valid tokens) and RANDOM (a hash in [0, 1), per head): fp32 [B, Hk, n]."""
    rank = (valid.long().cumsum(1) - 1).unsqueeze(1)
    if mode is SaliencyMode.RECENT:
        scores = rank.float().expand(-1, kv_heads, -1)
    else:
        if sequence_id is None:
            sequence_id = torch.zeros(valid.shape[0], dtype=torch.int64, device=valid.device)
        head = torch.arange(kv_heads, device=valid.device).view(1, -1, 1)
        stream = sequence_id.long().view(-1, 1, 1) * 65537 + head + 1
        scores = (hash_positions(rank, stream, seed) >> 38).float() / 2**24
    return scores.masked_fill(~valid.unsqueeze(1), float("-inf"))


def order_keys(saliency: Tensor, valid: Tensor, forced: Tensor | None) -> Tensor:
    """int32 keys whose order is: not valid, NaN or -inf, the numbers (-0 equals 0), forced."""
    bits = (saliency.float() + 0.0).contiguous().view(torch.int32)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # IEEE order as integer order
    lowest = -(2**31) + 1
    keys = torch.where(torch.isnan(saliency), lowest, keys)
    if forced is not None:
        keys = torch.where(forced.unsqueeze(1), 2**31 - 1, keys)
    return torch.where(valid.unsqueeze(1), keys, -(2**31)).to(torch.int32)


def select_salient(saliency: Tensor, valid: Tensor, ratio: float, forced: Tensor | None) -> Tensor:
    """See `quietgoose.kernels.saliency.select_salient`."""
    if saliency.shape[2] == 0:
        return torch.zeros_like(saliency, dtype=torch.bool)
    order = order_keys(saliency, valid, forced).sort(dim=-1, descending=True, stable=True).indices
    wanted = share(ratio, valid.long().sum(1)).view(-1, 1, 1)
    taken = torch.arange(saliency.shape[2], device=saliency.device) < wanted
    return torch.zeros_like(saliency, dtype=torch.bool).scatter(2, order, taken.expand(order.shape))
