"""Routed models: put RoutedLinear in place of a model's linears, give them experts, change routers, take it back.

The model stays the Hugging Face model it was (`generate`, KV cache, `save_pretrained` of the detached model); only the
named linears are replaced. What is attached is remembered on the model as `model.routing_state`.

    attach(model, library, router="phatgoose", k=2); model.generate(...); set_router(model, "arrow"); detach(model)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..base.errors import ArtifactError, QuietGooseError, RecipeError
from ..kernels.dispatch import Implementation
from .expert import check_gate
from .library import ExpertLibrary
from .routed_linear import RoutedBank, RoutedLinear, RoutingContext
from .routers import (
    SiteVectors,
    gate_vectors,
    library_arrow_vectors,
    mean_vectors,
    phatgoose_mean_vectors,
    random_vectors,
    router_kind,
)
from .shared import SharedBank, sharing_groups
from .sites import Site

SINGLE = "expert:"


@dataclass
class RoutingState:
    """What is attached to a model. `vectors` caches those that depend on the library only."""

    library: ExpertLibrary
    modules: dict[str, RoutedLinear]
    context: RoutingContext
    router: str = "phatgoose"
    k: int = 2
    vectors: dict[str, SiteVectors] = field(default_factory=dict)

    def bank(self, site: str) -> RoutedBank:
        adapter = self.modules[site].adapter
        assert isinstance(adapter, RoutedBank)
        return adapter


def install(model: nn.Module, sites: Iterable[Site] | Iterable[str]) -> dict[str, RoutedLinear]:
    """Replace the named linears by RoutedLinears around them (those already replaced are kept); by site name. An error leaves
    the model as it was."""
    modules: dict[str, RoutedLinear] = {}
    for site in sites:
        name = site.name if isinstance(site, Site) else site
        found = _linear(model, name)
        modules[name] = found if isinstance(found, RoutedLinear) else _around(name, found)
    _put(model, modules)
    return modules


def uninstall(model: nn.Module) -> None:
    """Put every plain linear back; the modules are the original ones, so outputs are the base's bit for bit."""
    for name, module in list(model.named_modules()):
        if isinstance(module, RoutedLinear):
            parent, leaf = _parent(model, name)
            setattr(parent, leaf, module.base)
            if isinstance(module.adapter, RoutedBank):
                module.adapter.shared.release()


def attach(
    model: nn.Module,
    library: ExpertLibrary,
    router: str = "phatgoose",
    k: int = 2,
    vectors: SiteVectors | None = None,
    seed: int = 0,
    implementation: Implementation = "auto",
) -> nn.Module:
    """Give `model` the experts of `library` and a router; returns the same model. Rebuilds banks only, so it also
    serves to add, remove or restrict experts: `attach(model, state(model).library.remove("x"), ...)`.

    Everything is made beside the model and put in at the end: an error leaves the model exactly as it was, with what was
    attached to it. Until then both sets of banks are in memory.

    implementation  reference (plain PyTorch), triton (kernels/routed_lora), auto: triton on a GPU
    """
    if not len(library):
        raise RecipeError("no experts to attach: the library is empty; use detach for the plain base", code="CFG-021")
    modules: dict[str, RoutedLinear] = {}
    for site in library.sites:
        found = _linear(model, site)
        modules[site] = _around(site, found.base if isinstance(found, RoutedLinear) else found)
        _check_shapes(library, site, modules[site])
    made = RoutingState(library, modules, RoutingContext())
    groups = _groups(modules)
    for group in groups:
        _share(library, group, made.context, implementation)
    _route(made, router, k, vectors, seed)
    detach(model)
    _put(model, modules)
    for group in groups:
        if len(group) > 1:
            parent, _ = _parent(model, group[0].name)
            made.bank(group[0].name).shared.watch(parent)
    model.routing_state = made  # type: ignore[assignment]
    return model


def set_router(
    model: nn.Module, router: str, k: int = 2, vectors: SiteVectors | None = None, seed: int = 0
) -> nn.Module:
    """Change the router of a routed model; banks stay. An error leaves the router that was there.

    router   phatgoose (trained gates), average_activation (mean activations), phatgoose_mean (both), random (seed), arrow,
             uniform, oracle (experts of rows from `assign_rows`), or `expert:NAME` (that expert for every token)
    vectors  site name -> expert name -> vector; overrides the router's own
    """
    _route(state(model), router, k, vectors, seed)
    return model


@contextmanager
def assign_rows(model: nn.Module, experts: Tensor | Sequence[int] | Sequence[str]) -> Iterator[None]:
    """While open, router `oracle` gives row b of every batch the expert experts[b] (names or library indices)."""
    found = state(model)
    if not isinstance(experts, Tensor):
        experts = torch.tensor([found.library.index(e) if isinstance(e, str) else int(e) for e in experts])
    bad = [int(e) for e in experts.unique() if not 0 <= int(e) < len(found.library)]
    if bad or experts.dim() != 1 or not experts.numel():
        raise RecipeError(
            f"assign_rows: expected one index from 0 to {len(found.library) - 1} per row, got {bad or experts.shape}",
            code="RTE-002",
        )
    before = found.context.expert_B
    device = next(iter(found.modules.values())).base.weight.device
    found.context.expert_B = experts.to(device=device, dtype=torch.int64)
    try:
        yield
    finally:
        found.context.expert_B = before


def detach(model: nn.Module) -> nn.Module:
    """Back to the plain base, bit for bit; does nothing on a plain model."""
    uninstall(model)
    if hasattr(model, "routing_state"):
        del model.routing_state
    return model


def state(model: nn.Module) -> RoutingState:
    """What is attached to `model`; error RTE-001 if nothing is."""
    found = getattr(model, "routing_state", None)
    if not isinstance(found, RoutingState):
        raise QuietGooseError("this model has no routed experts; call attach(model, library) first", code="RTE-001")
    return found


def _route(found: RoutingState, router: str, k: int, vectors: SiteVectors | None, seed: int) -> None:
    """Every site takes the router, or none does."""
    banks = {site: found.bank(site) for site in found.modules}
    if router.startswith(SINGLE):
        index = found.library.index(router.removeprefix(SINGLE))
        for bank in banks.values():
            bank.use_expert(index)
    elif router == "oracle":
        for bank in banks.values():
            bank.use_rows()
    else:
        kind = router_kind(router)
        chosen = vectors if vectors is not None else _own_vectors(found, router, seed)
        before = {site: bank.routing_choice() for site, bank in banks.items()}
        try:
            for site, bank in banks.items():
                bank.use_router(kind, _stack(found.library, site, chosen, bank), k)
        except BaseException:
            for site, bank in banks.items():
                bank.restore_choice(before[site])
            raise
    found.router, found.k = router, k


def _groups(modules: Mapping[str, RoutedLinear]) -> list[list[RoutedLinear]]:
    """Modules that read one input, by name; those whose widths, dtypes, devices or having a bias differ stay alone."""
    found = []
    for names in sharing_groups(list(modules)):
        group = [modules[name] for name in names]
        alike = {(m.in_features, m.base.weight.dtype, m.base.weight.device, m.base.bias is None) for m in group}
        found += [group] if len(alike) == 1 else [[module] for module in group]
    return found


def _share(
    library: ExpertLibrary, group: Sequence[RoutedLinear], context: RoutingContext, implementation: Implementation
) -> None:
    adapters_SN = [[expert.adapters.get(module.name) for expert in library] for module in group]
    shared = SharedBank(adapters_SN, [module.base for module in group], implementation)
    for position, (module, adapters) in enumerate(zip(group, adapters_SN)):
        module.adapter = RoutedBank(module.name, adapters, shared, position, context).train(module.training)


def _own_vectors(found: RoutingState, router: str, seed: int) -> SiteVectors:
    key = f"random:{seed}" if router == "random" else router
    if key not in found.vectors:
        found.vectors[key] = _build_vectors(found.library, router, seed)
    return found.vectors[key]


def _build_vectors(library: ExpertLibrary, router: str, seed: int) -> SiteVectors:
    match router:
        case "phatgoose":
            return gate_vectors(library)
        case "phatgoose_mean":
            return phatgoose_mean_vectors(library)
        case "average_activation":
            return mean_vectors(library)
        case "random":
            return random_vectors(library, seed)
        case "arrow":
            return library_arrow_vectors(library)
        case "uniform":
            return {site: {} for site in library.sites}
    raise RecipeError(f"router {router} needs vectors: pass them", code="CFG-022")


def _stack(library: ExpertLibrary, site: str, vectors: Mapping[str, Mapping[str, Tensor]], bank: RoutedBank) -> Tensor:
    """[N, I], zeros where an expert lacks the site; uniform has no vectors at all."""
    width = bank.a_RI.shape[1]
    if site not in vectors:
        raise RecipeError(f"routing vectors lack site {site}", code="CFG-022")
    rows = []
    for expert in library:
        vector = vectors[site].get(expert.name)
        if vector is None and vectors[site] and site in expert.adapters:
            raise RecipeError(f"routing vectors lack expert {expert.name} at site {site}", code="CFG-022")
        if vector is not None:
            check_gate(vector, f"expert {expert.name}, site {site}")
        rows.append(torch.zeros(width) if vector is None else vector.detach().cpu())
    return torch.stack(rows)


def _check_shapes(library: ExpertLibrary, site: str, module: RoutedLinear) -> None:
    for expert in library:
        adapter = expert.adapters.get(site)
        if adapter is None:
            continue
        have = (adapter.a_RI.shape[1], adapter.b_OR.shape[0])
        want = (module.in_features, module.out_features)
        if have != want:
            raise ArtifactError(
                f"expert {expert.name}, site {site}: adapter is {have[0]} -> {have[1]}, the base's linear {want[0]} -> "
                f"{want[1]}; the expert was made for another base",
                code="EXP-002",
            )


def _linear(model: nn.Module, name: str) -> nn.Linear | RoutedLinear:
    """What stands at a site; ArtifactError EXP-002 if it is no linear."""
    parent, leaf = _parent(model, name)
    found = getattr(parent, leaf)
    if not isinstance(found, (nn.Linear, RoutedLinear)):
        raise ArtifactError(f"site {name} is a {type(found).__name__}, not an nn.Linear", code="EXP-002")
    return found


def _around(name: str, base: nn.Linear) -> RoutedLinear:
    return RoutedLinear(name, base).train(base.training)


def _put(model: nn.Module, modules: Mapping[str, RoutedLinear]) -> None:
    for name, module in modules.items():
        parent, leaf = _parent(model, name)
        setattr(parent, leaf, module)


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(path)
        getattr(parent, leaf)
    except AttributeError as error:
        raise ArtifactError(
            f"site {name}: this base has no such module; the expert was made for another base", code="EXP-002"
        ) from error
    return parent, leaf
