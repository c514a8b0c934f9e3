"""One LoRA over a model, whatever its linears carry already: the plain base, one expert, or routed experts with gates.

    y = base(x) + what the adapter of the linear adds + s B (A x)

All of it is one flat vector (sites.AdapterLayout), given from outside and read through a shared context, so that a training
loss can differentiate with respect to it and a loaded model can keep it. Experts, gates and base are not touched.

    top = TopLora(model, AdapterLayout.uniform(sites, 16), scale=1.0)
    with top.bound(flat_P): model(...)
    top.use(flat_P)                      # for good; top.use(None) switches it off

Called by train/jobs/thoughts.py and train/thought_model.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..base.errors import QuietGooseError
from .expert import Expert, ExpertCard, SiteAdapter
from .model import install
from .sites import AdapterLayout
from .training import initial_adapter


class TopContext:
    """What all sites read: (A [r, I], B [O, r]) of every site in the compute dtype, or None while switched off."""

    def __init__(self) -> None:
        self.adapters: list[tuple[Tensor, Tensor]] | None = None


class TopAdapter(nn.Module):
    """Adds the LoRA of one site; holds no tensors."""

    def __init__(self, index: int, context: TopContext, scale: float) -> None:
        super().__init__()
        self.index, self.context, self.scale = index, context, scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., I], y [..., O] -> y + scale * B A x. Without gradients y itself is updated."""
        if self.context.adapters is None:
            return y
        a_RI, b_OR = self.context.adapters[self.index]
        h_TR = nn.functional.linear(x.flatten(0, -2), a_RI)
        y_TO = y.flatten(0, -2)
        if torch.is_grad_enabled():
            return torch.addmm(y_TO, h_TR, b_OR.t(), alpha=self.scale).view_as(y)
        return y_TO.addmm_(h_TR, b_OR.t(), alpha=self.scale).view_as(y)


class FlatLora(nn.Module):
    """The flat vector as a parameter, initialised as PEFT does (A uniform, B zero): a function of seed, name and site."""

    def __init__(self, layout: AdapterLayout, name: str, seed: int) -> None:
        super().__init__()
        self.flat_P = nn.Parameter(initial_adapter(layout, name, seed))

    def forward(self) -> Tensor:
        """The vector, fp32 [P]; the only way to read it (under ZeRO-3 a parameter is whole in its module's forward)."""
        return self.flat_P.clone()


class TopLora:
    """The LoRA's places in a model."""

    def __init__(self, model: nn.Module, layout: AdapterLayout, scale: float) -> None:
        self.layout, self.scale = layout, scale
        self.context = TopContext()
        modules = install(model, layout.sites)
        for index, module in enumerate(modules.values()):
            module.on_top = TopAdapter(index, self.context, scale)
        self.dtype = next(iter(modules.values())).base.weight.dtype

    @contextmanager
    def bound(self, flat_P: Tensor | None) -> Iterator[None]:
        """Within it the sites use `flat_P` [P] (cast to the base's dtype here); None: switched off."""
        before = self.context.adapters
        self.use(flat_P)
        try:
            yield
        finally:
            self.context.adapters = before

    def use(self, flat_P: Tensor | None) -> None:
        """From now on the sites use `flat_P`."""
        self.context.adapters = None if flat_P is None else self._views(flat_P)

    def _views(self, flat_P: Tensor) -> list[tuple[Tensor, Tensor]]:
        if flat_P.numel() != self.layout.numel:
            raise QuietGooseError(
                f"the LoRA on top has {flat_P.numel()} numbers, its sites take {self.layout.numel}", code="RTE-004"
            )
        return [(a[0], b[0]) for a, b in self.layout.rows(flat_P.to(self.dtype)[None])]


def flat_of(expert: Expert, layout: AdapterLayout) -> Tensor:
    """An expert's A and B as one vector; the inverse of `as_expert`."""
    return layout.flatten({site: (a.a_RI, a.b_OR) for site, a in expert.adapters.items()})


def as_expert(card: ExpertCard, layout: AdapterLayout, flat_P: Tensor) -> Expert:
    """The vector as an expert, for PEFT's format."""
    pairs = layout.unflatten(flat_P.detach().float().cpu())
    return Expert(
        card, {s: SiteAdapter(a.contiguous(), b.contiguous(), card.scale_at(s)) for s, (a, b) in pairs.items()}
    )
