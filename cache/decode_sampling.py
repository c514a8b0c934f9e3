"""The next token from the logits: greedy, temperature, top-k, top-p, by device operations only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.errors import RecipeError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, kinds in (("temperature", (int, float)), ("top_k", int), ("top_p", (int, float))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds):
                wanted = "an integer" if kinds is int else "a number"
                raise RecipeError(f"sampling: {name} is {value!r}; it must be {wanted}", code="CFG-046")
        if not self.temperature >= 0:
            raise RecipeError(f"sampling: temperature is {self.temperature}; it must be 0 or more", code="CFG-046")
        if self.top_k < 0:
            raise RecipeError(f"sampling: top_k is {self.top_k}; it must be 0 (all) or more", code="CFG-046")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"sampling: top_p is {self.top_p}; it must be above 0 and at most 1", code="CFG-046")


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """fp32 probabilities [B,V] the next token is drawn from; temperature above 0."""
    scores = logits.float() / sampling.temperature
    if sampling.top_k:
        kept = scores.topk(min(sampling.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < kept, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = scores.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[:, 0] = 0
        ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        scores = torch.empty_like(scores).scatter_(-1, index, ordered)
    return scores.softmax(-1)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """int64 [B]. Drawing is the exponential race argmax(p / Exp(1)), which needs no synchronisation."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    chances = distribution(logits, sampling)
    return (chances / torch.empty_like(chances).exponential_(generator=generator)).argmax(-1)
