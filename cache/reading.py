"""Reading what a layer has stored: attention over segments, arenas and tail; dequantised keys in column order.

One call of `cached_attention` where there are no segments. A segment takes a call of its own, merged by log-sum-exp
(exact); the tail's saliency is then normalised over the own store and the tail only. Caller: cache/state.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.cached_attention import MAX_QUERY, cached_attention, merge
from ..kernels.quantize import dequantize
from .dense import dense_attention
from .history import History, Segment
from .tail import TailWindow


def attend(history: History, window: TailWindow, query: Tensor, *, scaling: float) -> Tensor:
    """Query i of q over all columns up to its own, the q last of which are the queries' own."""
    segments, own = list(history.segments), Segment(history.store)
    if len(segments) == 1 and not history.store.columns:
        own = segments.pop()  # a fork that has not flushed yet reads its parent and its own tail in one call
    queries = query.shape[2]
    out, lse = cached_attention(
        query, own.store.high, own.store.low, window.tail, scaling=scaling, saliency=window.buffers,
        limits=own.store.limits_for(queries), share=own.share, return_lse=True,
    )  # fmt: skip
    for segment in segments:
        out, lse = merge(out, lse, *_packed(segment, query, scaling))
    return out


def attend_history(history: History, window: TailWindow, query: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
    """All queries over all columns: (out in the query's dtype, lse fp32)."""
    used = slice(0, window.used)
    visible = window.tail.valid[:, used].bool().unsqueeze(1)
    out, lse = dense_attention(
        query, window.tail.key[:, :, used], window.tail.value[:, :, used], visible, scaling=scaling
    )
    for part in history.parts:
        if part.store.columns:
            read = _packed if query.shape[2] <= MAX_QUERY else _packed_long
            out, lse = merge(out, lse, *read(part, query, scaling))
    return out, lse


def logical(history: History, window: TailWindow, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B,Hk,columns,D] in column order, zero where valid bool [B,columns] is not."""
    tail = window.tail
    valid = valid_columns(history, window)
    gathered = [_in_order(part, dtype) for part in history.parts]
    here = valid[:, None, history.columns :, None]
    keys = [key for key, _ in gathered] + [tail.key[:, :, window.window].to(dtype).masked_fill(~here, 0)]
    values = [value for _, value in gathered] + [tail.value[:, :, window.window].to(dtype).masked_fill(~here, 0)]
    key, value = torch.cat(keys, dim=2), torch.cat(values, dim=2)
    packed = history.columns
    if window.sinks and packed:
        rank = valid[:, :packed].cumsum(1) - 1
        sink = (valid[:, :packed] & (rank < window.sinks))[:, None, :, None]
        index = rank.clamp(0, window.sinks - 1)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        for target, source in ((key, tail.key), (value, tail.value)):
            target[:, :, :packed] = torch.where(sink, source.to(dtype).gather(2, index), target[:, :, :packed])
    return key, value, valid


def valid_columns(history: History, window: TailWindow) -> Tensor:
    """bool [B, all columns]."""
    return torch.cat([history.valid(), window.tail.valid[:, window.window].bool()], dim=1)


def _packed(segment: Segment, query: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """(out, lse) over one store, everything visible."""
    store = segment.store
    out, lse = cached_attention(
        query, store.high, store.low, None, scaling=scaling, limits=store.limits_for(query.shape[2]),
        share=segment.share, return_lse=True,
    )  # fmt: skip
    return out, lse


def _packed_long(segment: Segment, query: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """As `_packed` for long queries: dequantise one arena at a time, then tiles."""
    store = segment.store
    parts = []
    # a row of the store with the queries of all rows that share it, as one longer query
    rows, heads, queries, width = query.shape
    joined = query.unflatten(0, (-1, segment.share)).transpose(1, 2).flatten(2, 3)
    for i, arena in enumerate((store.high, store.low)):
        slots = torch.arange(arena.capacity, device=query.device)
        limit = arena.lengths()[:, None, None] if store.limits is None else store.limits[i].unsqueeze(-1)
        key, value = dequantize(arena, dtype=query.dtype)
        parts.append(dense_attention(joined, key, value, slots < limit, scaling=scaling))
    out, lse = merge(*parts[0], *parts[1])
    out = out.unflatten(2, (segment.share, queries)).transpose(1, 2).reshape(rows, heads, queries, width)
    return out, lse.unflatten(2, (segment.share, queries)).transpose(1, 2).reshape(rows, heads, queries)


def _in_order(segment: Segment, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    key, value = segment.store.gather(dtype)
    return key.repeat_interleave(segment.share, 0), value.repeat_interleave(segment.share, 0)
