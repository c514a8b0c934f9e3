"""Routers: what each kind scores by, how its vectors are prepared, and where the vectors come from.

A scoring router takes tokens and one vector per expert to the experts of every token. The scores themselves, the choice of
the k largest and their weights are kernels/routed_lora's (`route_group` there is the specification), for all sites that read
one input at once; here is what is done once, when experts are attached. Source: phatgoose.md 1.3, 1.5.

    phatgoose  z = layernorm(x) . layernorm(v) / sqrt(d), v the trained gate; average_activation, random: another v
    phatgoose_mean  v = layernorm(gate - g) + layernorm(mean activation - a), both standardised, g and a their means over the
               site's experts: gates and means err on different tasks (docs/results.md)
    arrow      z = |x . v| / 10, v the top right singular vector of B A (Ostapenko et al. 2024)
    uniform    every present expert with weight 1/N, whatever the token
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..base.errors import RecipeError, suggest
from ..base.seeding import generator
from ..kernels.routed_lora.reference import EPSILON_NORM
from .expert import Expert
from .library import ExpertLibrary

ARROW_TEMPERATURE = 10.0


class Routing(NamedTuple):
    """Who handles each token: weights_TK and index_TK (int64, on the library's axis N), largest weight first."""

    weights_TK: Tensor
    index_TK: Tensor


def standardise(x_TI: Tensor) -> Tensor:
    """Layer norm without affine, eps 1e-5, population variance, in at least fp32."""
    wide = x_TI.to(torch.promote_types(x_TI.dtype, torch.float32))
    return functional.layer_norm(wide, wide.shape[-1:], eps=EPSILON_NORM)


def prepare_phatgoose(vectors_NI: Tensor) -> Tensor:
    """layernorm(v) / sqrt(d_in) in fp32: the part of the score that does not depend on the token."""
    return standardise(vectors_NI) / math.sqrt(vectors_NI.shape[1])


def prepare_arrow(vectors_NI: Tensor) -> Tensor:
    """Unit vectors divided by the authors' temperature 10."""
    return functional.normalize(vectors_NI, dim=1) / ARROW_TEMPERATURE


def uniform(x_TI: Tensor, vectors_NI: Tensor, present_N: Tensor | None = None) -> Routing:
    """All present experts with weight 1/N each. Equals the product-mean merge where all are present."""
    present = torch.ones_like(vectors_NI[:, 0]) if present_N is None else present_N.to(vectors_NI.dtype)
    weights_TK = (present / len(present)).expand(x_TI.shape[0], -1)
    index_TK = torch.arange(len(present), device=x_TI.device).expand(x_TI.shape[0], -1)
    return Routing(weights_TK, index_TK)


def unchanged(vectors_NI: Tensor) -> Tensor:
    """Vectors that are not read."""
    return vectors_NI


@dataclass(frozen=True)
class RouterKind:
    """What a router does to its vectors once, and the form in which the kernels know it.

    kernel  standardised: layernorm(x) . v; projection: |x . v|; None: no scores, weights do not depend on the token (`uniform`)
    """

    prepare: Callable[[Tensor], Tensor]
    kernel: Literal["standardised", "projection"] | None


KINDS: dict[str, RouterKind] = {
    "phatgoose": RouterKind(prepare_phatgoose, "standardised"),
    "phatgoose_mean": RouterKind(prepare_phatgoose, "standardised"),
    "average_activation": RouterKind(prepare_phatgoose, "standardised"),
    "random": RouterKind(prepare_phatgoose, "standardised"),
    "arrow": RouterKind(prepare_arrow, "projection"),
    "uniform": RouterKind(unchanged, None),
}
ROUTERS: tuple[str, ...] = (*KINDS, "oracle")

SiteVectors = dict[str, dict[str, Tensor]]
"""site name -> expert name -> vector [I]"""


def gate_vectors(library: ExpertLibrary) -> SiteVectors:
    """The trained gates. RecipeError (CFG-022) if an expert has none."""
    return _by_site(library, "phatgoose", "gates", {expert.name: expert.gates for expert in library})


def mean_vectors(library: ExpertLibrary) -> SiteVectors:
    """The mean activations that the gates stage took. RecipeError (CFG-022) if an expert has none."""
    return _by_site(
        library, "average_activation", "mean activations", {expert.name: expert.means for expert in library}
    )


def phatgoose_mean_vectors(library: ExpertLibrary) -> SiteVectors:
    """layernorm(c(gate)) + layernorm(c(mean activation)) in equal parts, c(v) as in `centred`.

    What all experts' vectors share moves every score alike and says nothing of who should win, yet it is most of a mean
    activation: left in, it decides how much of the sum an expert's own direction gets (docs/log.md, 2026-11-26). So a vector
    depends on which experts are attached; `phatgoose` is the router where none does.
    """
    means = centred(mean_vectors(library))
    return {
        site: {name: standardise(gate) + standardise(means[site][name]) for name, gate in gates.items()}
        for site, gates in centred(gate_vectors(library)).items()
    }


def centred(vectors: SiteVectors) -> SiteVectors:
    """Standardised vectors of each site less their mean over its experts; a site's only vector is left whole, and so are
    equal ones (copies of one expert), which have nothing of their own."""
    found: SiteVectors = {}
    for site, of_experts in vectors.items():
        own = {name: standardise(vector) for name, vector in of_experts.items()}
        every = list(own.values())
        differ = any(not torch.equal(every[0], vector) for vector in every[1:])
        shared = torch.stack(every).mean(0) if differ else 0.0
        found[site] = {name: vector - shared for name, vector in own.items()}
    return found


def _by_site(
    library: ExpertLibrary, router: str, what: str, vectors: Mapping[str, Mapping[str, Tensor] | None]
) -> SiteVectors:
    found: SiteVectors = {site: {} for site in library.sites}
    for name, of_expert in vectors.items():
        if of_expert is None:
            raise RecipeError(
                f"router {router}: expert {name} has no {what}; run the gates stage, or choose random or arrow",
                code="CFG-022",
            )
        for site, vector in of_expert.items():
            found[site][name] = vector
    return found


def random_vectors(library: ExpertLibrary, seed: int) -> SiteVectors:
    """v ~ N(0, I) from the seed, the expert's name and the site: no expert's vector depends on the others."""
    return {
        site: {
            e.name: torch.randn(e.adapters[site].a_RI.shape[1], generator=generator(seed, "random_gate", e.name, site))
            for e in library
            if site in e.adapters
        }
        for site in library.sites
    }


def arrow_vectors(expert: Expert) -> dict[str, Tensor]:
    """Top right singular vector of B A per site, through QR of A^T and of B and one r x r SVD: never forms B A.

    With A^T = Q_A R_A and B = Q_B R_B: B A = Q_B (R_B R_A^T) Q_A^T, so v = Q_A times the inner right vector.
    The sign is fixed by the largest entry (the score takes |x . v|, so it is cosmetic). Sites of one shape go together.
    """
    shapes: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for site, adapter in expert.adapters.items():
        shapes.setdefault((adapter.a_RI.shape, adapter.b_OR.shape), []).append(site)
    vectors: dict[str, Tensor] = {}
    for sites in shapes.values():
        a_SIR = torch.stack([expert.adapters[site].a_RI.t() for site in sites]).double()
        b_SOR = torch.stack([expert.adapters[site].b_OR for site in sites]).double()
        q_SIR, r_A = torch.linalg.qr(a_SIR)
        r_B = torch.linalg.qr(b_SOR, mode="r").R
        right_SR = torch.linalg.svd(r_B @ r_A.mT).Vh[:, 0]
        vectors_SI = (q_SIR @ right_SR[:, :, None]).squeeze(2)
        signs_S1 = vectors_SI.gather(1, vectors_SI.abs().argmax(1, keepdim=True)).sign()
        vectors |= dict(zip(sites, (vectors_SI * signs_S1).float(), strict=True))
    return {site: vectors[site] for site in expert.adapters}


def library_arrow_vectors(library: ExpertLibrary) -> SiteVectors:
    """`arrow_vectors` of every expert, by site."""
    per_expert = {expert.name: arrow_vectors(expert) for expert in library}
    return {site: {name: found[site] for name, found in per_expert.items() if site in found} for site in library.sites}


def router_kind(name: str) -> RouterKind:
    """The router called `name`; RecipeError (CFG-023) if there is none."""
    if name not in KINDS:
        allowed = (*ROUTERS, "expert:NAME")
        raise RecipeError(f"router '{name}': allowed are {', '.join(allowed)}.{suggest(name, allowed)}", code="CFG-023")
    return KINDS[name]
