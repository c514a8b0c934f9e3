"""Which experts every site chooses, written down while a routed model runs: to compare two passes over the same tokens.

    with recorded_choices(model) as calls: model(...)
    calls[0]     int64 [T, K], ascending: the experts of the first site that was called

Each site's router scores its input once more for it, so a pass takes longer; outputs stay. Callers: train/jobs/thoughts.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .routed_linear import RoutedBank, RoutedLinear


def scoring_sites(model: nn.Module) -> list[RoutedLinear]:
    """The sites at which a token's numbers decide who handles it."""
    return [module for module in model.modules() if isinstance(module, RoutedLinear) and _bank(module) is not None]


@contextmanager
def recorded_choices(model: nn.Module) -> Iterator[list[Tensor]]:
    """The choices of every call of every scoring site within the context, in the order of calls."""
    calls: list[Tensor] = []

    @torch.no_grad()
    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        bank = _bank(module)
        assert bank is not None
        calls.append(bank.route(arguments[0].flatten(0, -2)).index_TK.sort(dim=1).values)

    handles = [site.register_forward_pre_hook(note) for site in scoring_sites(model)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _bank(module: nn.Module) -> RoutedBank | None:
    bank = getattr(module, "adapter", None)
    return bank if isinstance(bank, RoutedBank) and bank.kind is not None and bank.kind.kernel is not None else None
