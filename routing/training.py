"""All experts, then all gates, in one pass over one frozen base.

Every row of a batch belongs to one expert. Its flat vector (A and B of all sites) is gathered once per forward and cast
once; every site then takes two batched products. A trained expert is ONE fp32 parameter, so optimizer groups, clipping
and checkpoints are per expert, and adding an expert touches no other tensor. Sources: phatgoose.md 1.1, 1.2, section 4.

The base's matrix products are shared by all rows, gradients never mix: expert i's gradient is a sum over its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..base.errors import QuietGooseError, RecipeError
from ..base.files import safe_name
from ..base.seeding import generator
from .expert import Expert, ExpertCard, SiteAdapter
from .library import ExpertLibrary
from .losses import expert_sums, head_losses, hidden_and_head
from .model import install
from .routers import SiteVectors
from .row_adapter import InputGroup, RowAdapter, RowContext
from .shared import sharing_groups
from .sites import AdapterLayout, GateLayout, Site, all_sites, target_names

PREFIX = "flat_"
GATHER_COLUMNS = 2**18


class PackedRows(Protocol):
    """The part of `Batch` that the losses need (train/types.py)."""

    @property
    def labels_BT(self) -> Tensor: ...

    @property
    def expert_B(self) -> Tensor: ...


class _GatherRows(torch.autograd.Function):
    """Row b takes flats[expert_B[b]], cast to `dtype`; the bank exists in `dtype` alone. Backward sums rows in fp32, by products
    straight into the gradients: no atomics."""

    @staticmethod
    def forward(ctx, expert_B: Tensor, dtype: torch.dtype, *flats: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(expert_B)
        ctx.num_experts, ctx.dtype = len(flats), flats[0].dtype
        bank_NP = torch.empty(len(flats), flats[0].numel(), dtype=dtype, device=flats[0].device)
        torch._foreach_copy_(list(bank_NP.unbind()), list(flats))
        return bank_NP.index_select(0, expert_B)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BP: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (expert_B,) = ctx.saved_tensors
        wide = torch.promote_types(ctx.dtype, torch.float32)
        one_hot_NB = torch.nn.functional.one_hot(expert_B, ctx.num_experts).t().to(wide)
        grad_NP = torch.empty(ctx.num_experts, grad_BP.shape[1], dtype=wide, device=grad_BP.device)
        for start in range(0, grad_BP.shape[1], GATHER_COLUMNS):
            piece = slice(start, start + GATHER_COLUMNS)
            torch.mm(one_hot_NB, grad_BP[:, piece].to(wide), out=grad_NP[:, piece])
        return None, None, *grad_NP.to(ctx.dtype).unbind()


class FlatBank(nn.Module):
    """One flat trainable vector per expert, registered as `flat_NAME`."""

    def __init__(self, flats: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(safe_name(name) for name in flats)
        for name, flat in flats.items():
            self.register_parameter(PREFIX + name, nn.Parameter(flat))
        self._aliases: Sequence[Tensor] | None = None

    def flat(self, name: str) -> nn.Parameter:
        return self.get_parameter(PREFIX + name)

    def forward(self, expert_B: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows' vectors [B, P] in `dtype`."""
        flats = [self.flat(name) for name in self.names] if self._aliases is None else self._aliases
        return _GatherRows.apply(expert_B, dtype, *flats)  # type: ignore[return-value]

    @contextmanager
    def aliased(self) -> Iterator[Sequence[Tensor]]:
        """While open, forward reads leaves that share the parameters' memory and nothing else: a gradient of these meets
        neither the parameters' hooks nor the stream these were made for."""
        self._aliases = [self.flat(name).detach().requires_grad_() for name in self.names]
        try:
            yield self._aliases
        finally:
            self._aliases = None


def initial_adapter(layout: AdapterLayout, name: str, seed: int) -> Tensor:
    """A fresh LoRA [P] as PEFT makes it: A uniform in +-1/sqrt(I) (Kaiming, a = sqrt 5), B zero."""
    adapters = {}
    for site, rank in zip(layout.sites, layout.ranks):
        bound = site.in_features**-0.5
        a_RI = torch.empty(rank, site.in_features)
        a_RI.uniform_(-bound, bound, generator=generator(seed, "expert", name, site.name))
        adapters[site.name] = (a_RI, torch.zeros(site.out_features, rank))
    return layout.flatten(adapters)


class ExpertBank(FlatBank):
    """LoRA experts, initialised by `initial_adapter`.

    The numbers depend on seed, expert name and site only, never on the other experts.
    """

    def __init__(self, layout: AdapterLayout, names: Sequence[str], seed: int) -> None:
        super().__init__({name: initial_adapter(layout, name, seed) for name in names})
        self.layout = layout


class GateBank(FlatBank):
    """One gate per expert and site, all zero at first: every sigmoid is 0.5 (phatgoose.md 1.2)."""

    def __init__(self, layout: GateLayout, names: Sequence[str]) -> None:
        super().__init__({name: torch.zeros(layout.numel) for name in names})
        self.layout = layout


class _TrainableRows(nn.Module):
    """Shared by expert and gate training: frozen model, sites replaced, loss sums per expert.

    `own`: the experts that this process holds and trains, in the order of `names`, and whose rows alone it is given with labels;
    None: all of them.
    """

    bank: FlatBank
    place_N: Tensor
    compiled_loss = False

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        names: Sequence[str],
        inputs: Callable[[Any], dict[str, Any]],
        own: Sequence[str] | None,
    ) -> None:
        super().__init__()
        if not names:
            raise RecipeError("no experts to train: name at least one in data.include or data.experts", code="CFG-021")
        self.names = tuple(names)
        self.own = None if own is None else tuple(own)
        held = self.names if own is None else self.own
        places = [held.index(name) if name in held else 0 for name in self.names]  # type: ignore[union-attr,operator]
        self.register_buffer("place_N", torch.tensor(places), persistent=False)
        self.sites = tuple(sites)
        self.model = model.requires_grad_(False)
        self.context = RowContext()
        self._inputs = inputs
        self._routed = install(model, self.sites)

    def _adapt(self, scale: float) -> None:
        for name, module in self._routed.items():
            module.adapter = RowAdapter(name, scale)
        self._groups: list[tuple[InputGroup, list[RowAdapter]]] = []
        for sites in sharing_groups(list(self._routed)):
            members: list[RowAdapter] = [self._routed[site].adapter for site in sites]  # type: ignore[misc]
            if len(members) > 1:
                group = InputGroup()
                self._groups.append((group, members))
                for member in members:
                    member.group = group

    def stop_sharing(self) -> None:
        """Every site shrinks by itself: where a layer's forward is run again for its backward, nothing may wait between sites."""
        for _, members in self._groups:
            for member in members:
                member.group = None
        self._groups = []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One optimizer group per expert that is trained here."""
        return [{"name": name, "params": [self.bank.flat(name)]} for name in self.own or self.names]

    def loss_sums(self, batch: PackedRows) -> Tensor:
        """Sum of -log p(label) over the label tokens of each expert's rows: fp32 [E], differentiable."""
        hidden_TD, head = self.hidden(batch)
        label_L = getattr(batch, "label_L", None)
        losses_BT = head_losses(self.model, hidden_TD, head, batch.labels_BT, label_L, self.compiled_loss)
        return expert_sums(losses_BT, batch.expert_B, len(self.names))

    def hidden(self, batch: PackedRows) -> tuple[Tensor, nn.Module]:
        """What the head is given, [B*T, D], and the head."""
        group_G: Tensor | None = getattr(batch, "group_G", None)
        expert_G = batch.expert_B if group_G is None else group_G
        self._set_context(expert_G if self.own is None else self.place_N[expert_G], self._compute_dtype())
        self._bind()
        return hidden_and_head(self.model, self._inputs(batch))

    def _bind(self) -> None:
        """Hand every site its part of the context."""
        context = self.context
        for index, module in enumerate(self._routed.values()):
            adapter = module.adapter
            assert isinstance(adapter, RowAdapter)
            adapter.a_GRI, adapter.b_GOR = context.adapters[index]
            adapter.gate_GI = None if context.gates is None else context.gates[index]
            adapter.share_BT1 = None if context.shares is None else context.shares[index]
        for group, members in self._groups:
            group.bind(members)

    def forward(self, batch: PackedRows) -> Any:
        return self.loss_sums(batch)

    def _set_context(self, expert_B: Tensor, dtype: torch.dtype) -> None:
        raise NotImplementedError

    def _compute_dtype(self) -> torch.dtype:
        return next(iter(self._routed.values())).base.weight.dtype

    def _flat_of(self, trained: Mapping[str, Tensor], name: str) -> Tensor:
        """This expert's vector among trained tensors named as `named_parameters` names them; fp32 on the CPU."""
        key = f"bank.{PREFIX}{name}"
        if key not in trained:
            raise QuietGooseError(f"trained tensors lack {key}; they hold {', '.join(trained)}", code="RTE-004")
        return trained[key].detach().float().cpu().clone()


class TrainableExperts(_TrainableRows):
    """N LoRA experts of one rank, alpha and target set over one frozen base."""

    bank: ExpertBank

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        names: Sequence[str],
        rank: int,
        alpha: float,
        rslora: bool,
        seed: int,
        inputs: Callable[[Any], dict[str, Any]],
        own: Sequence[str] | None = None,
    ) -> None:
        """`inputs(batch)` gives the model's keyword arguments for a batch."""
        super().__init__(model, sites, names, inputs, own)
        targets = target_names([s.name for s in sites], [s.name for s in all_sites(model)])
        self.cards = {name: ExpertCard(name, rank, alpha, targets, rslora) for name in self.names}
        self.bank = ExpertBank(AdapterLayout.uniform(sites, rank), self.own or self.names, seed)
        self._adapt(self.cards[self.names[0]].scale_at(self.sites[0].name))

    def _set_context(self, expert_B: Tensor, dtype: torch.dtype) -> None:
        self.context.adapters = self.bank.layout.rows(self.bank(expert_B, dtype))

    def experts(self, trained: Mapping[str, Tensor]) -> list[Expert]:
        """Experts from trained tensors by parameter name (`bank.flat_NAME`), whole and fp32."""
        found = []
        for name, card in self.cards.items():
            pairs = self.bank.layout.unflatten(self._flat_of(trained, name))
            adapters = {
                site: SiteAdapter(a.contiguous(), b.contiguous(), card.scale_at(site)) for site, (a, b) in pairs.items()
            }
            found.append(Expert(card, adapters))
        return found


class TrainableGates(_TrainableRows):
    """One sigmoid gate per expert and site of a library; base and LoRA frozen.

    y = W x + s g B (A x), g = sigmoid(x . v): raw input, no normalisation, no sqrt(d), no temperature (phatgoose.md
    1.2). The experts lie in one frozen buffer [N, P], concatenated once, ranks padded with zeros per site, scale folded
    into B. At a site that an expert lacks its gate gets no gradient and is left out of the result.
    """

    bank: GateBank
    frozen_NP: Tensor

    def __init__(
        self,
        model: nn.Module,
        library: ExpertLibrary,
        inputs: Callable[[Any], dict[str, Any]],
        own: Sequence[str] | None = None,
    ) -> None:
        known = {site.name: site for site in all_sites(model)}
        names = library.sites
        unknown = [name for name in names if name not in known]
        if unknown:
            raise RecipeError(f"an expert adapts {unknown[0]}, which this base does not have", code="EXP-002")
        sites = [known[name] for name in names]
        super().__init__(model, sites, library.names, inputs, own)
        self.library_before = library
        ranks = [max(e.adapters[s].a_RI.shape[0] for e in library if s in e.adapters) for s in names]
        self.layout = AdapterLayout(self.sites, tuple(ranks))
        held = library if own is None else library.restrict(own)
        self.register_buffer("frozen_NP", self._frozen(held).to(self._compute_dtype()), persistent=False)
        self.bank = GateBank(GateLayout(self.sites), held.names)
        self._adapt(1.0)

    def _set_context(self, expert_B: Tensor, dtype: torch.dtype) -> None:
        self.context.adapters = self.layout.rows(self.frozen_NP.to(dtype).index_select(0, expert_B))
        self.context.gates = self.bank.layout.rows(self.bank(expert_B, self.bank.flat(self.bank.names[0]).dtype))

    def _frozen(self, library: ExpertLibrary) -> Tensor:
        rows_NP = torch.zeros(len(library), self.layout.numel)
        for row_P, expert in zip(rows_NP, library):
            for site, (a_RI, b_OR) in self.layout.unflatten(row_P).items():
                adapter = expert.adapters.get(site)
                if adapter is not None:
                    rank = adapter.a_RI.shape[0]
                    a_RI[:rank] = adapter.a_RI
                    b_OR[:, :rank] = adapter.scale * adapter.b_OR
        return rows_NP

    def gates(self, trained: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Gate vectors by expert and site from trained tensors (`bank.flat_NAME`), only where the expert has the
        site."""
        return {
            expert.name: {
                site: vector.clone()
                for site, vector in self.bank.layout.unflatten(self._flat_of(trained, expert.name)).items()
                if site in expert.adapters
            }
            for expert in self.library_before
        }

    def library(self, trained: Mapping[str, Tensor], means: SiteVectors | None = None) -> ExpertLibrary:
        """The library with its trained gates and, if given, mean activations; ArtifactError (EXP-003) if a gate never moved
        from zero."""
        of_experts = None
        if means is not None:
            of_experts = {e.name: {site: means[site][e.name] for site in e.sites} for e in self.library_before}
        return self.library_before.with_gates(self.gates(trained), of_experts)
