"""Keys and values of thoughts while they are sampled: static buffers, one slot a position, exact or in few bits.

The gradient pass never reads them. Quantised, each token and head has its own fp16 scale, so appending a position never
touches an earlier one and nothing is quantised twice; one layer at a time is turned back for its attention. Keys have channels
far from zero and far larger than others (KIVI, arXiv 2402.02750), which would take the few steps of all channels: numbers are
therefore taken less a mean and over a spread, channel by channel, before they are rounded: those of a text that is no row's
(calibration.py), since of its own row an anchor sees the beginning only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.errors import RecipeError
from .config import RolloutCache, ThoughtConfig
from .types import Prefix

LEVELS: dict[str, int] = {"int8": 127, "int4": 7}


@dataclass(frozen=True)
class Codes:
    """One buffer. exact: values [B, K, A, S, N, C]; else codes int8 [.., C] (int4: [.., C / 2]), scales [.., 1], and a mean and a
    spread of each channel, [1, K, 1, 1, 1, C]."""

    values: Tensor
    scales: Tensor | None = None
    centre: Tensor | None = None
    spread: Tensor | None = None

    def measure(self, text_1KLC: Tensor) -> None:
        """Mean and spread of the text's channels. A channel that hardly moves in it counts as moving a tenth of the others, so
        that it does not take all steps where a thought moves it."""
        if self.centre is None or self.spread is None:
            return
        var_1KC, mean_1KC = torch.var_mean(text_1KLC.to(self.centre.dtype), dim=2, correction=0)
        floor_1K1 = 1e-2 * var_1KC.mean(-1, keepdim=True) + 1e-4 * mean_1KC.square().mean(-1, keepdim=True)
        self.centre.copy_(mean_1KC.view_as(self.centre))
        self.spread.copy_((var_1KC + floor_1K1 + 1e-8).sqrt().view_as(self.spread))


class ThoughtStore:
    """Buffers of all layers for the branches of A anchors and S samples, N slots each."""

    def __init__(
        self,
        kind: RolloutCache,
        layers: int,
        shape: tuple[int, int, int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """shape = (B, K, A, S, N, C). RecipeError CFG-104: int4 with an odd C."""
        if kind == "int4" and shape[-1] % 2:
            raise RecipeError(f"thoughts.rollout_cache int4 needs an even head size, not {shape[-1]}", code="CFG-104")
        self.kind, self.dtype = kind, dtype
        self._keys = [self._empty(shape, device) for _ in range(layers)]
        self._values = [self._empty(shape, device) for _ in range(layers)]

    @classmethod
    def over(cls, prefix: Prefix, config: ThoughtConfig, anchors: int) -> ThoughtStore:
        """For the thoughts of so many anchors a row of the prefix, on its device and in its dtype."""
        key = prefix.keys[0]
        shape = (key.shape[0], key.shape[1], anchors, config.samples, config.tokens, key.shape[3])
        return cls(config.rollout_cache, len(prefix.keys), shape, key.dtype, key.device)

    def measure(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """A text's keys and values [1, K, L, C] of every layer, before a rollout. What was appended before is void."""
        for codes, text_1KLC in zip((*self._keys, *self._values), (*keys, *values), strict=True):
            codes.measure(text_1KLC)

    def append(self, layer: int, slot: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write key and value [B, K, A, S, 1, C] into `slot` (int64, one element, on the device); the layer's keys and
        values [B, K, A, S, N, C]. Slots not written yet hold zeros or an earlier rollout's numbers."""
        pairs = ((self._keys[layer], key), (self._values[layer], value))
        return tuple(self._put(codes, slot, x) for codes, x in pairs)  # type: ignore[return-value]

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        buffers = [t for codes in (*self._keys, *self._values) for t in vars(codes).values() if t is not None]
        return sum(t.numel() * t.element_size() for t in buffers)

    def _empty(self, shape: tuple[int, ...], device: torch.device) -> Codes:
        if self.kind == "exact":
            return Codes(torch.zeros(shape, dtype=self.dtype, device=device))
        width = shape[-1] // (2 if self.kind == "int4" else 1)
        scale_dtype = torch.float32 if self.dtype == torch.float64 else torch.float16
        frame = (1, shape[1], 1, 1, 1, shape[-1])
        return Codes(
            torch.zeros(*shape[:-1], width, dtype=torch.int8, device=device),
            torch.zeros(*shape[:-1], 1, dtype=scale_dtype, device=device),
            torch.zeros(frame, dtype=torch.float32, device=device),
            torch.ones(frame, dtype=torch.float32, device=device),
        )

    def _put(self, codes: Codes, slot: Tensor, x: Tensor) -> Tensor:
        if codes.scales is None or codes.centre is None or codes.spread is None:
            codes.values.index_copy_(4, slot, x.to(self.dtype))
            return codes.values
        levels, own = LEVELS[self.kind], (x.float() - codes.centre) / codes.spread
        scale = (own.abs().amax(-1, keepdim=True) / levels).clamp(1e-6, 6e4).to(codes.scales.dtype)
        steps = (own / scale.float()).round().clamp(-levels, levels).to(torch.int8)
        codes.scales.index_copy_(4, slot, scale)
        codes.values.index_copy_(4, slot, _pack(steps) if self.kind == "int4" else steps)
        stored = _unpack(codes.values) if self.kind == "int4" else codes.values
        return (stored.to(torch.float32) * codes.scales.float() * codes.spread + codes.centre).to(self.dtype)


def _pack(steps: Tensor) -> Tensor:
    """Two signed 4-bit numbers a byte: the first half of the channels in the low nibble."""
    low, high = steps.chunk(2, dim=-1)
    return (low & 15) | (high << 4)


def _unpack(packed: Tensor) -> Tensor:
    """The inverse; shifts of int8 keep the sign."""
    return torch.cat([(packed << 4) >> 4, packed >> 4], dim=-1)
