"""MiKV and H2O: caches ruled by accumulated attention, hence by attention that is written out.

H2O (Zhang et al. 2023, arXiv 2306.14048, section 4, algorithm 1; FMInference/H2O, h2o_hf, the variant that really
drops): importance of a token = attention it has received from all queries so far; the cache keeps `heavy_ratio` of the
prompt by importance and `recent_ratio` by age, half and half in the authors' scripts, and stays that size while tokens
come in. Keys keep the positions they had. The authors add importance up over the batch; here every row has its own.

MiKV (Yang et al. 2024, arXiv 2402.18096, section 3; no code was published): what H2O would drop is kept in few bits,
per token and asymmetric (3.1); keys are multiplied by the channel balancer sqrt(max |q| / max |k|) of the prompt (3.2);
important tokens keep more bits (3.3). Our choices where the paper leaves room: one group per token and head, 4 and
2 bit at 60 % important as ZipCache's authors run it, importance half by weight and half by age, new tokens in 16 bit
until `window` of them are there (the 100 of ZipCache's streaming). A token is demoted once and never promoted.

Both need the probabilities, so they come with an attention function that materialises them: the whole [q, n] matrix in
fp32 as their authors do, or `query_chunk` queries at a time where memory matters more than time.
Physical order is free, since attention does not depend on it: the newest q tokens are always the last columns.
Called by kv_peers.py.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from kv_peers import SIXTEEN_BIT_BYTES, Groups, PeerLayer, add_parts, dequantize_groups, join, quantize_groups
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION = "kv_peer"
SCORE_BYTES = 4
EMPTY = (0, 0)


class ImportanceLayer(PeerLayer):
    """Adds up the attention every held token receives. `valid` marks padding, None where there is none."""

    def __init__(self, query_chunk: int | None) -> None:
        super().__init__()
        self.query_chunk = query_chunk
        self.score: Tensor | None = None  # fp32 [B,Hk,n] in physical order
        self.valid: Tensor | None = None  # bool [B,Hk,n]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[-2]
        self._append(key_states, value_states)
        key, value = self._read()
        key._peer_layer = self  # type: ignore[attr-defined]  # the attention function finds its layer on the key
        return key, value

    def see_mask(self, mask: Tensor | None, new: int) -> None:
        """Note which of the `new` tokens are padding; `mask` bool [B, columns]."""
        held = 0 if self.score is None else self.score.shape[-1]
        if mask is None and self.valid is None:
            return
        if mask is None:
            raise ValueError("attention_mask: given before, missing now")
        shape = (mask.shape[0], self._kv_heads(), new)
        fresh = mask[:, None, -new:].expand(shape)
        old = self.valid if self.valid is not None else mask.new_ones(shape[0], shape[1], held)
        self.valid = torch.cat([old, fresh], -1)

    def add(self, mass: Tensor) -> None:
        """mass fp32 [B,Hk,n]: attention of this call's queries."""
        if self.score is not None:
            mass[..., : self.score.shape[-1]] += self.score
        self.score = mass

    def commit(self, query: Tensor, key: Tensor) -> None:
        """Compress, after the attention of this call has been seen."""
        raise NotImplementedError

    def _append(self, key: Tensor, value: Tensor) -> None:
        self.keys = key if self.keys is None else torch.cat([self.keys, key], -2)
        self.values = value if self.values is None else torch.cat([self.values, value], -2)

    def _read(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys.view_as(self.keys), self.values

    def _kv_heads(self) -> int:
        assert self.keys is not None
        return self.keys.shape[1]

    def _ranked(self) -> Tensor:
        assert self.score is not None
        return self.score if self.valid is None else self.score.masked_fill(~self.valid, -1.0)

    def _reorder_scores(self, index: Tensor) -> None:
        assert self.score is not None
        self.score = self.score.gather(-1, index)
        if self.valid is not None:
            self.valid = self.valid.gather(-1, index)

    def _score_parts(self) -> dict[str, int]:
        # padding is held as one bit per token and head
        index = 0 if self.valid is None else math.ceil(self.valid.numel() / 8)
        return {"scores": 0 if self.score is None else self.score.numel() * SCORE_BYTES, "index": index}


class H2OLayer(ImportanceLayer):
    """Heavy hitters and recent tokens; the others are gone."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"heavy_ratio": 0.2, "recent_ratio": 0.2, "query_chunk": None}

    def __init__(self, heavy_ratio: float, recent_ratio: float, query_chunk: int | None) -> None:
        super().__init__(query_chunk)
        self.ratios = (heavy_ratio, recent_ratio)
        self.sizes = EMPTY

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def commit(self, query: Tensor, key: Tensor) -> None:
        if self.sizes == EMPTY:
            self.sizes = (math.ceil(self.ratios[0] * self.seen), math.ceil(self.ratios[1] * self.seen))
        heavy, recent = self.sizes
        assert self.keys is not None
        assert self.values is not None
        held = self.keys.shape[-2]
        if held <= heavy + recent:
            return
        best = self._ranked()[..., : held - recent].topk(heavy, dim=-1).indices.sort(-1).values
        newest = torch.arange(held - recent, held, device=best.device).expand(*best.shape[:-1], recent)
        keep = torch.cat([best, newest], -1)
        self.keys, self.values = take(self.keys, keep), take(self.values, keep)
        self._reorder_scores(keep)

    def parts(self) -> dict[str, int]:
        held = 0 if self.keys is None or self.values is None else self.keys.numel() + self.values.numel()
        return add_parts({"sixteen_bit": held * SIXTEEN_BIT_BYTES}, self._score_parts())


class MikvLayer(ImportanceLayer):
    """Physical order: important tokens, the others, the 16-bit tail (`keys`, `values`)."""

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "high_bits": 4, "low_bits": 2, "ratio": 0.6, "recent_share": 0.5, "window": 100, "query_chunk": None,
    }  # fmt: skip

    def __init__(
        self, high_bits: int, low_bits: int, ratio: float, recent_share: float, window: int, query_chunk: int | None
    ) -> None:
        super().__init__(query_chunk)
        self.bits, self.ratio, self.recent_share, self.window = (high_bits, low_bits), ratio, recent_share, window
        self.high: tuple[Groups, Groups] | None = None
        self.low: tuple[Groups, Groups] | None = None
        self.counts = EMPTY
        self.balancer: Tensor | None = None  # [B,Hk,1,D]

    def commit(self, query: Tensor, key: Tensor) -> None:
        assert self.keys is not None
        if self.balancer is None:
            self.balancer = self._balance(query, key)
        elif self.keys.shape[-2] < self.window:
            return
        self._pack()

    def _balance(self, query: Tensor, key: Tensor) -> Tensor:
        batch, _, count, dim = query.shape
        if self.valid is not None:
            key = key * self.valid[..., None]
            query = query * self.valid[:, :1, -count:, None]
        top_query = query.abs().amax(-2).view(batch, key.shape[1], -1, dim).amax(2)
        top_key = key.abs().amax(-2)
        return (top_query.float() / top_key.float().clamp(min=1e-6)).sqrt().clamp(1e-3, 1e3)[:, :, None]

    def _pack(self) -> None:
        """The tail joins; the important share of all tokens stays high, the rest of high and tail goes low."""
        assert self.keys is not None
        assert self.values is not None
        tail = self.keys.shape[-2]
        held = self.counts[0] + tail
        wanted = min(held, math.ceil(self.ratio * self.seen))
        key, value = self.keys, self.values
        if self.high is not None:
            key = torch.cat([self._open(self.high, 0), key], -2)
            value = torch.cat([self._open(self.high, 1), value], -2)
        total = self.counts[0] + self.counts[1]
        device = key.device
        columns = torch.cat(
            [torch.arange(self.counts[0], device=device), torch.arange(total, total + tail, device=device)]
        )
        score = self._ranked()[..., columns]
        recent = min(tail, math.floor(self.recent_share * wanted))
        if recent:  # the newest are important whatever they weigh
            score = torch.cat([score[..., :-recent], torch.full_like(score[..., -recent:], torch.inf)], -1)
        order = score.sort(dim=-1, descending=True, stable=True).indices
        kept, dropped = order[..., :wanted].sort(-1).values, order[..., wanted:].sort(-1).values
        self.high = self._close(take(key, kept), take(value, kept), self.bits[0])
        if dropped.shape[-1]:
            new = self._close(take(key, dropped), take(value, dropped), self.bits[1])
            self.low = new if self.low is None else (join(self.low[0], new[0], -2), join(self.low[1], new[1], -2))
        old = torch.arange(self.counts[0], total, device=device).expand(*kept.shape[:-1], -1)
        self._reorder_scores(torch.cat([columns[kept], old, columns[dropped]], -1))
        self.counts = (wanted, self.counts[1] + dropped.shape[-1])
        self.keys, self.values = self.keys[..., :0, :], self.values[..., :0, :]

    def _close(self, key: Tensor, value: Tensor, bits: int) -> tuple[Groups, Groups]:
        dim = key.shape[-1]
        if bits < 16 and self.balancer is not None:
            key = key.float() * self.balancer
        return quantize_groups(key, bits, dim), quantize_groups(value, bits, dim)

    def _open(self, tier: tuple[Groups, Groups], which: int) -> Tensor:
        if which == 1 or tier[0].bits == 16 or self.balancer is None:
            return dequantize_groups(tier[which], self.dtype)
        return (dequantize_groups(tier[0], torch.float32) / self.balancer).to(self.dtype)

    def _read(self) -> tuple[Tensor, Tensor]:
        tiers = [tier for tier in (self.high, self.low) if tier is not None]
        if not tiers:
            return super()._read()
        key = torch.cat([*(self._open(tier, 0) for tier in tiers), self.keys], -2)
        return key, torch.cat([*(self._open(tier, 1) for tier in tiers), self.values], -2)

    def parts(self) -> dict[str, int]:
        tail = 0 if self.keys is None or self.values is None else self.keys.numel() + self.values.numel()
        groups = [group.parts() for tier in (self.high, self.low) if tier is not None for group in tier]
        balancer = 0 if self.balancer is None else self.balancer.numel() * SIXTEEN_BIT_BYTES
        return add_parts(
            *groups, {"sixteen_bit": tail * SIXTEEN_BIT_BYTES, "parameters": balancer}, self._score_parts()
        )


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B,Hk,n,D], index [B,Hk,m] -> [B,Hk,m,D]."""
    return x.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))


def attend(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float, query_chunk: int | None
) -> tuple[Tensor, Tensor]:
    """Causal attention written out: (out [B,H,q,D], mass fp32 [B,Hk,n] summed over queries and the group's heads).

    The last q columns are the queries' own tokens; all earlier columns are visible to every query.
    """
    batch, heads, count, dim = query.shape
    kv_heads, held = key.shape[1], key.shape[2]
    grouped = query.view(batch, kv_heads, heads // kv_heads, count, dim)
    mass = torch.zeros(batch, kv_heads, held, dtype=torch.float32, device=query.device)
    outs = []
    for start in range(0, count, query_chunk or count):
        part = grouped[..., start : start + (query_chunk or count), :]
        rows = part.shape[-2]
        scores = torch.matmul(part.flatten(2, 3), key.transpose(-1, -2)).mul_(scaling)
        scores = scores.view(batch, kv_heads, -1, rows, held)
        if count > 1:
            row = torch.arange(start, start + rows, device=query.device)[:, None] + held - count
            later = torch.arange(held, device=query.device) > row
            scores.masked_fill_(later, torch.finfo(scores.dtype).min)
        if valid is not None:
            scores.masked_fill_(~valid[:, :, None, None], torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, -1, dtype=torch.float32)
        if valid is not None:  # a padding query's weights mean nothing
            asked = valid[:, :, held - count + start : held - count + start + rows]
            weights = weights * asked[:, :, None, :, None]
        mass += weights.sum((2, 3))
        outs.append(torch.matmul(weights.to(value.dtype).flatten(2, 3), value).view(*part.shape))
    return torch.cat(outs, -2).reshape(batch, heads, count, dim), mass


def peer_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention transformers calls under the name ATTENTION; without one of our layers plain causal attention."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: ImportanceLayer | None = getattr(key, "_peer_layer", None)
    if layer is None:
        valid = None if attention_mask is None else attention_mask[:, None].expand(-1, key.shape[1], -1)
        out, _mass = attend(query, key, value, valid, scale, None)
    else:
        layer.see_mask(attention_mask, query.shape[2])
        out, mass = attend(query, key, value, layer.valid, scale, layer.query_chunk)
        layer.add(mass)
        layer.commit(query, key)
    return out.transpose(1, 2).contiguous(), None


def padding_mask(batch_size: int, *_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """The 2-D mask itself, bool [B, columns]; None where nothing is padded."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


AttentionInterface.register(ATTENTION, peer_attention)
AttentionMaskInterface.register(ATTENTION, padding_mask)
