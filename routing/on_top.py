"""One LoRA over a model, whatever its linears carry already: the plain base, one expert, or routed experts with gates.

    y = base(x) + what the adapter of the linear adds + s B (A x)

All of it is one flat vector (sites.AdapterLayout), given from outside and read through a shared context, so that a training
loss can differentiate with respect to it and a loaded model can keep it. Experts, gates and base are not touched.

    top = TopLora(model, AdapterLayout.uniform(sites, 16), scale=1.0)
    with top.bound(flat_P): model(...)
    top.use(flat_P)                      # for good, and it moves with the model; top.use(None) switches it off

Called by train/jobs/thoughts.py and train/thought_model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import QuietGooseError
from .expert import Expert, ExpertCard, SiteAdapter
from .model import install
from .sites import AdapterLayout
from .training import initial_adapter

Adapters = list[tuple[Tensor, Tensor]] | None
"""(A [r, I], B [O, r]) of every site; None: switched off."""


class TopContext(nn.Module):
    """What all sites read, shared by them: the first site owns it as a submodule, so that moving or casting the model reaches
    it once. Nothing of it is in a state dict.

    kept_P   the vector of `TopLora.use`, in the base's dtype; None: there is none
    over     what `TopLora.bound` puts in its place, in a tuple of one; None: nothing
    """

    kept_P: Tensor | None

    def __init__(self, layout: AdapterLayout) -> None:
        super().__init__()
        self.layout = layout
        self.over: tuple[Adapters] | None = None
        self._kept: Adapters = None
        self.register_buffer("kept_P", None, persistent=False)

    @property
    def adapters(self) -> Adapters:
        """What the sites add now."""
        return self._kept if self.over is None else self.over[0]

    def keep(self, flat_P: Tensor | None) -> None:
        """Sites use this vector [P] from now on, wherever the model goes."""
        self.kept_P = flat_P
        self._kept = self.views(flat_P)

    def views(self, flat_P: Tensor | None) -> Adapters:
        """A and B of every site, as parts of the vector."""
        return None if flat_P is None else [(a[0], b[0]) for a, b in self.layout.rows(flat_P[None])]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TopContext:
        """A vector that moved or changed its dtype is cut into A and B anew."""
        super()._apply(fn, recurse)
        self._kept = self.views(self.kept_P)
        return self


class TopAdapter(nn.Module):
    """Adds the LoRA of one site; the first one of a model owns what all of them read."""

    context: TopContext

    def __init__(self, index: int, context: TopContext, scale: float) -> None:
        super().__init__()
        self.index, self.scale = index, scale
        self.own_context = context if index == 0 else None
        object.__setattr__(self, "context", context)  # not a second registration

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., I], y [..., O] -> y + scale * B A x. Without gradients y itself is updated."""
        adapters = self.context.adapters
        if adapters is None:
            return y
        a_RI, b_OR = adapters[self.index]
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
        self.context = TopContext(layout)
        modules = install(model, layout.sites)
        for index, module in enumerate(modules.values()):
            module.on_top = TopAdapter(index, self.context, scale)
        self._first = next(iter(modules.values()))

    @contextmanager
    def bound(self, flat_P: Tensor | None) -> Iterator[None]:
        """Within it the sites use `flat_P` [P] (cast here to the base's dtype); None: switched off."""
        before = self.context.over
        self.context.over = (None if flat_P is None else self.context.views(self._cast(flat_P)),)
        try:
            yield
        finally:
            self.context.over = before

    def use(self, flat_P: Tensor | None) -> None:
        """From now on the sites use `flat_P` [P], a copy of it on the base's device and in its dtype, both of which follow the
        model; None: switched off."""
        self.context.keep(None if flat_P is None else self._cast(flat_P.detach()).clone())

    def _cast(self, flat_P: Tensor) -> Tensor:
        if flat_P.numel() != self.layout.numel:
            raise QuietGooseError(
                f"the LoRA on top has {flat_P.numel()} numbers, its sites take {self.layout.numel}", code="RTE-004"
            )
        weight = self._first.base.weight
        return flat_P.to(weight.device, weight.dtype)


def flat_of(expert: Expert, layout: AdapterLayout) -> Tensor:
    """An expert's A and B as one vector; the inverse of `as_expert`."""
    return layout.flatten({site: (a.a_RI, a.b_OR) for site, a in expert.adapters.items()})


def as_expert(card: ExpertCard, layout: AdapterLayout, flat_P: Tensor) -> Expert:
    """The vector as an expert, for PEFT's format."""
    pairs = layout.unflatten(flat_P.detach().float().cpu())
    return Expert(
        card, {s: SiteAdapter(a.contiguous(), b.contiguous(), card.scale_at(s)) for s, (a, b) in pairs.items()}
    )
