"""Static merges: one expert that stands for all, for servers that cannot route and as baselines.

    mean_of_products   (1/N) sum_i s_i B_i A_i, exact, by concatenation: rank is the sum of ranks
    peft_merge         TIES (Yadav et al. 2023) and DARE (Yu et al. 2024) by PEFT's add_weighted_adapter

PEFT's `ties` and `dare_*` act on A and B apart and need one rank; the `*_svd` kinds act on the products B A and cut the
result back to rank r. Averaging A and B apart is not offered: it is another, weaker thing under the name "merged".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from peft import LoraConfig, LoraModel
from torch import Tensor, nn

from ..base.errors import RecipeError, suggest
from ..base.seeding import derive
from .expert import Expert, ExpertCard, SiteAdapter
from .library import ExpertLibrary

MergeKind = Literal["ties", "dare_linear", "dare_ties", "ties_svd", "dare_linear_svd", "dare_ties_svd"]
MERGES: tuple[str, ...] = get_args(MergeKind)
_MERGED = "quietgoose_merged"
SITES_AT_ONCE = 14
"""Sites are merged apart from each other; PEFT's injection takes time quadratic in the modules of a model (65 s for the
210 sites of SmolLM2 and 12 experts in one piece, a few seconds in pieces)."""


def mean_of_products(library: ExpertLibrary, name: str = "merged") -> Expert:
    """B A = (1/N) sum_i s_i B_i A_i at every site; an expert that lacks a site counts as 0 there."""
    _not_empty(library)
    adapters: dict[str, SiteAdapter] = {}
    for site in library.sites:
        found = [expert.adapters[site] for expert in library if site in expert.adapters]
        a_RI = torch.cat([adapter.a_RI for adapter in found])
        b_OR = torch.cat([adapter.scale / len(library) * adapter.b_OR for adapter in found], dim=1)
        adapters[site] = SiteAdapter(a_RI, b_OR, 1.0)
    return _as_expert(library, name, adapters, "mean of products")


def peft_merge(library: ExpertLibrary, kind: MergeKind, density: float = 0.5, seed: int = 0, name: str = "") -> Expert:
    """TIES or DARE over all experts, weight 1/N each, through PEFT. `density`: share of entries kept. DARE draws its
    mask from `seed`. The experts must share their sites, and their rank unless `kind` ends in _svd."""
    _not_empty(library)
    if kind not in MERGES:
        raise RecipeError(f"merge '{kind}': allowed are {', '.join(MERGES)}.{suggest(kind, MERGES)}", code="CFG-025")
    if not 0 < density <= 1:
        raise RecipeError(f"merge density is {density}; allowed is above 0, at most 1", code="CFG-025")
    _check_alike(library, kind)
    rank = max(adapter.a_RI.shape[0] for expert in library for adapter in expert.adapters.values())
    adapters: dict[str, SiteAdapter] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for start in range(0, len(library.sites), SITES_AT_ONCE):
            sites = library.sites[start : start + SITES_AT_ONCE]
            tuner = _peft_model(library, sites, rank)
            torch.manual_seed(derive(seed, "merge", kind, sites[0]))
            tuner.add_weighted_adapter(
                list(library.names), [1.0 / len(library)] * len(library), _MERGED, kind, density=density,
                svd_rank=rank, svd_full_matrices=False,
            )  # fmt: skip
            adapters |= {site: _read(tuner.model.get_submodule(site)) for site in sites}
    return _as_expert(library, name or kind, adapters, f"{kind}, density {density}, seed {seed}")


def _peft_model(library: ExpertLibrary, sites: Sequence[str], rank: int) -> LoraModel:
    """PEFT's LoRA layers around linears of the right shapes whose weights are never read, one adapter per expert.
    Scales are folded into B, ranks padded with zeros to `rank`, so that PEFT's own scaling is 1."""
    skeleton = nn.Module()
    for site in sites:
        adapter = next(e.adapters[site] for e in library if site in e.adapters)
        _put(skeleton, site, adapter.a_RI.shape[1], adapter.b_OR.shape[0])
    configs = {n: LoraConfig(r=rank, lora_alpha=rank, target_modules=list(sites)) for n in library.names}
    first = library.names[0]
    tuner = LoraModel(skeleton, configs[first], first)
    for name in library.names[1:]:
        tuner.peft_config[name] = configs[name]
        tuner.inject_adapter(skeleton, name)
    for expert in library:
        for site in sites:
            adapter = expert.adapters[site]
            layer, own = skeleton.get_submodule(site), adapter.a_RI.shape[0]
            a_RI: Tensor = layer.lora_A[expert.name].weight.data.zero_()  # type: ignore[index,union-attr]
            b_OR: Tensor = layer.lora_B[expert.name].weight.data.zero_()  # type: ignore[index,union-attr]
            a_RI[:own], b_OR[:, :own] = adapter.a_RI, adapter.scale * adapter.b_OR
    return tuner


def _put(skeleton: nn.Module, site: str, width_in: int, width_out: int) -> None:
    parent = skeleton
    *path, leaf = site.split(".")
    for part in path:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(leaf, nn.utils.skip_init(nn.Linear, width_in, width_out, bias=False))


def _read(layer: nn.Module) -> SiteAdapter:
    a_RI: Tensor = layer.lora_A[_MERGED].weight.data  # type: ignore[index,union-attr]
    b_OR: Tensor = layer.lora_B[_MERGED].weight.data  # type: ignore[index,union-attr]
    return SiteAdapter(a_RI.clone(), b_OR.clone(), float(layer.scaling[_MERGED]))  # type: ignore[index]


def _as_expert(library: ExpertLibrary, name: str, adapters: dict[str, SiteAdapter], method: str) -> Expert:
    """Scales are folded into B, so alpha equals the rank everywhere."""
    folded = {s: SiteAdapter(a.a_RI, a.scale * a.b_OR, 1.0) for s, a in adapters.items()}
    ranks = {site: adapter.a_RI.shape[0] for site, adapter in folded.items()}
    rank = max(ranks.values())
    differing = {site: r for site, r in ranks.items() if r != rank}
    provenance = {"method": method, "experts": list(library.names)}
    card = ExpertCard(
        name,
        rank,
        float(rank),
        library.sites,
        False,
        differing,
        {s: float(r) for s, r in differing.items()},
        provenance,
    )
    return Expert(card, folded)


def _check_alike(library: ExpertLibrary, kind: str) -> None:
    for expert in library:
        if set(expert.sites) != set(library.sites):
            raise RecipeError(
                f"merge {kind}: expert {expert.name} lacks some sites of the others; PEFT merges experts of one target "
                "set only; use mean_of_products",
                code="CFG-025",
            )
    ranks = sorted({adapter.a_RI.shape[0] for expert in library for adapter in expert.adapters.values()})
    if len(ranks) > 1 and not kind.endswith("_svd"):
        raise RecipeError(f"merge {kind}: ranks {ranks} differ; use {kind}_svd or mean_of_products", code="CFG-025")


def _not_empty(library: ExpertLibrary) -> None:
    if not len(library):
        raise RecipeError("no experts to merge: the library is empty", code="CFG-021")
