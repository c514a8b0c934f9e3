"""An expert: LoRA adapters at named sites, and (after gate training) one gate vector a site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..base.errors import ArtifactError
from ..base.files import safe_name, sha256_tensors


@dataclass(frozen=True)
class ExpertCard:
    """What an expert is, without its tensors. Names and meaning follow PEFT's LoraConfig.

    targets        PEFT target names that select exactly the expert's sites
    rank_pattern   rank by full site name where it differs from `rank`; alpha_pattern alike
    provenance     JSON values: where the expert comes from
    """

    name: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        safe_name(self.name)

    def rank_at(self, site: str) -> int:
        return self.rank_pattern.get(site, self.rank)

    def scale_at(self, site: str) -> float:
        """s = alpha / r, or alpha / sqrt(r) with rsLoRA."""
        alpha, rank = self.alpha_pattern.get(site, self.alpha), self.rank_at(site)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


@dataclass(frozen=True)
class SiteAdapter:
    """`scale * b_OR @ a_RI` is added to the site's weight. fp32."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float


@dataclass(frozen=True)
class Expert:
    """A card and its tensors by site name.

    gates   one fp32 vector a site, trained; None before gate training
    means   the mean input of each site over the expert's own training text, fp32 (routing/statistics.py); None where the
            gates were made without
    """

    card: ExpertCard
    adapters: Mapping[str, SiteAdapter]
    gates: Mapping[str, Tensor] | None = None
    means: Mapping[str, Tensor] | None = None

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.adapters)

    def with_gates(self, gates: Mapping[str, Tensor], means: Mapping[str, Tensor] | None = None) -> Expert:
        """This expert with gate vectors and, if given, mean activations. ArtifactError (EXP-003) if the sites differ or a
        vector is zero or not finite: a zero gate would score 0 everywhere, which beats every negative score."""
        for kind, vectors in (("gates", gates), ("mean activations", means)):
            if vectors is None:
                continue
            if set(vectors) != set(self.adapters):
                odd = sorted(set(vectors) ^ set(self.adapters))[0]
                raise ArtifactError(
                    f"expert {self.name}: {kind} and adapters name different sites, for example {odd}", code="EXP-003"
                )
            for site, vector in vectors.items():
                check_gate(vector, f"expert {self.name}, site {site}, {kind}")
        return replace(self, gates=dict(gates), means=None if means is None else dict(means))

    def tensor_hash(self) -> str:
        """sha256 over the adapters' tensors (not the gates)."""
        pairs = (
            (f"{site}.{part}", getattr(ad, part)) for site, ad in self.adapters.items() for part in ("a_RI", "b_OR")
        )
        return sha256_tensors(dict(pairs))


def check_gate(vector_I: Tensor, what: str) -> None:
    """ArtifactError (EXP-003) unless the gate is finite and not constant (a constant vector standardises to zero)."""
    if not bool(torch.isfinite(vector_I).all()):
        raise ArtifactError(f"{what}: the gate has non-finite entries; train the gates again", code="EXP-003")
    if vector_I.numel() == 0 or float(vector_I.var(correction=0)) == 0.0:
        raise ArtifactError(
            f"{what}: the gate is zero (or constant), so it cannot score tokens; train the gates first",
            code="EXP-003",
        )
