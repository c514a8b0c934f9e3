"""A plain model of a cache layer (lists of tensors, exact softmax in fp64), and the shapes that state tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from quietgoose.cache import LayerState, Policy
from torch import Tensor

KV_HEADS, HEADS, WIDTH = 2, 4, 8
SCALING = WIDTH**-0.5
# both arenas in use, at 16 bits: every rank, map and crop is exercised, nothing is rounded
LOSSLESS = Policy(salient_ratio=0.6, high_bits=16, low_bits=16, flush_every=6, max_query=4)
LOSSLESS_SINKS = Policy(
    salient_ratio=0.6, high_bits=16, low_bits=16, flush_every=6, max_query=4, sink_tokens=3, recent_tokens=4
)
PACKED = Policy(salient_ratio=0.6, flush_every=6, max_query=4)
TAIL = Policy(salient_ratio=0.6, flush_every=6, max_query=4, sink_tokens=3, recent_tokens=4)


def make(policy: Policy, batch: int = 2, dtype: torch.dtype = torch.float32, **changes: Any) -> LayerState:
    settings: dict[str, Any] = {"kv_heads": KV_HEADS, "head_dim": WIDTH, "dtype": dtype, "device": "cpu"}
    return LayerState(policy, batch=batch, **(settings | changes))


class Source:
    """Random queries, keys and values of a shape, one stream per seed."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        def draw(heads: int) -> Tensor:
            return torch.randn(batch, heads, tokens, WIDTH, generator=self.generator, dtype=torch.float64).to(
                self.dtype
            )

        return draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)


class Plain:
    """What a cache layer must be equal to: all columns as they came."""

    def __init__(self, batch: int, dtype: torch.dtype = torch.float32) -> None:
        self.key = torch.zeros(batch, KV_HEADS, 0, WIDTH, dtype=dtype)
        self.value = self.key.clone()
        self.valid = torch.zeros(batch, 0, dtype=torch.bool)

    def extend(self, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
        valid = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool) if valid is None else valid
        self.key, self.value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        self.valid = torch.cat([self.valid, valid], 1)

    def crop(self, count: int) -> None:
        kept = self.key.shape[2] - count
        self.change(lambda t: t[:, :, :kept] if t.dim() == 4 else t[:, :kept])

    def change(self, how: Callable[[Tensor], Tensor]) -> None:
        self.key, self.value, self.valid = how(self.key), how(self.value), how(self.valid)

    def attend(self, query: Tensor, *, causal: bool = True) -> Tensor:
        """Exact attention in fp64; causal: the queries are the last columns. Rows without keys give zeros."""
        return exact_attention(query, self.key, self.value, self.valid, causal=causal)


def exact_attention(query: Tensor, key: Tensor, value: Tensor, valid: Tensor, *, causal: bool) -> Tensor:
    queries, columns = query.shape[2], key.shape[2]
    mask = valid[:, None, None, :].expand(-1, 1, queries, -1)
    if causal:
        own = torch.arange(columns - queries, columns)
        mask = mask & (torch.arange(columns) <= own[:, None])
    group = query.shape[1] // key.shape[1]
    scores = query.double() @ key.double().repeat_interleave(group, 1).transpose(2, 3) * SCALING
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value.double().repeat_interleave(group, 1)).to(query.dtype)


def check_same(state: LayerState, plain: Plain) -> None:
    """The state holds exactly what the plain model holds (lossless policies)."""
    key, value, valid = state.logical()
    assert state.seq_length == plain.key.shape[2]
    assert torch.equal(valid, plain.valid)
    present = plain.valid[:, None, :, None]
    assert torch.equal(key, torch.where(present, plain.key, 0))
    assert torch.equal(value, torch.where(present, plain.value, 0))
    assert int(state.tail.length) == state.tail_used


def check_attention(out: Tensor, expected: Tensor, valid: Tensor, tolerance: float = 2e-5) -> None:
    """Equal where the query is a token; valid bool [B, q]."""
    difference = torch.where(valid[:, None, :, None], out - expected, 0)
    assert float(difference.abs().max()) < tolerance


def codes(state: LayerState) -> dict[str, Tensor]:
    """Arena content by name, the part in use."""
    return {n: t for n, t in state.tensors().items() if ".high." in n or ".low." in n}


def poison(state: LayerState) -> None:
    """Fill what is not in use with NaN and 255: it must not matter."""
    for part in state.history.parts:
        store = part.store
        for arena in (store.high, store.low):
            lengths, blocks = arena.lengths().tolist(), arena.num_blocks.tolist()
            for row in range(store.batch):
                for name, tensor in arena.tensors().items():
                    if name in ("block_start", "num_blocks"):
                        continue
                    if name == "value_channel":
                        tensor[row] = tensor[row] if blocks[row] else float("nan")
                        continue
                    first = blocks[row] if name in ("key_scale", "key_min") else lengths[row]
                    tensor[row, :, first:] = 255 if tensor.dtype == torch.uint8 else float("nan")
    window = state.window
    window.tail.key[:, :, window.used :] = float("nan")
    window.tail.value[:, :, window.used :] = float("nan")
    missing = ~window.tail.valid.bool()
    window.tail.key.masked_fill_(missing[:, None, :, None], float("nan"))
    window.tail.value.masked_fill_(missing[:, None, :, None], float("nan"))


def filled(policy: Policy, steps: int = 9, source: Source | None = None, **changes: Any) -> LayerState:
    state, source = make(policy, **changes), source or Source(1)
    query, key, value = source(2, 17)
    valid = torch.ones(2, 17, dtype=torch.bool)
    valid[0, :5] = False
    state.prefill(query, key, value, valid, scaling=SCALING)
    go_on(state, source, steps)
    return state


def go_on(state: LayerState, source: Source, steps: int) -> torch.Tensor:
    out = torch.zeros(0)
    for _ in range(steps):
        query, key, value = source(state.batch, 1)
        state.append(key, value)
        out = state.attend(query, scaling=SCALING)
    return out
