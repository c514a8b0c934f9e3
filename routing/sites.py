"""Sites: the linears of a model that take adapters, and how their tensors lie in one flat vector.

Callers: expert files (which sites exist, which shapes), training (flat parameters), routed inference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..base.errors import RecipeError, suggest
from .routed_linear import RoutedLinear

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Site:
    """One adapted linear, by its dotted module name."""

    name: str
    in_features: int
    out_features: int


def find_sites(model: nn.Module, targets: Sequence[str]) -> tuple[Site, ...]:
    """The linears that `targets` select, in module order.

    Names mean what they mean in PEFT: a full module name or the end of one at a dot; `all-linear` is every linear but
    the output head. Raises RecipeError (CFG-020) if a target selects nothing, or something that is no nn.Linear.
    """
    linears = _linears(model)
    if not targets:
        raise RecipeError("experts.targets is empty: name linears (for example q_proj) or all-linear", code="CFG-020")
    chosen: set[str] = set()
    for target in targets:
        names = set(linears) if target == ALL_LINEAR else {name for name in linears if _matches(name, target)}
        if not names:
            _refuse(model, target, linears)
        chosen |= names
    return tuple(Site(n, m.in_features, m.out_features) for n, m in linears.items() if n in chosen)


def all_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every linear but the output head: what adapters from outside are checked against."""
    return find_sites(model, [ALL_LINEAR])


def target_names(chosen: Iterable[str], linears: Iterable[str]) -> tuple[str, ...]:
    """The shortest list of PEFT target names that selects exactly `chosen` among `linears`: last name parts where
    every linear of that name is chosen, full names elsewhere."""
    wanted, known = set(chosen), list(linears)
    groups: dict[str, list[str]] = {}
    for name in known:
        groups.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    names: list[str] = []
    for leaf, members in groups.items():
        picked = [name for name in members if name in wanted]
        names += [leaf] if picked and len(picked) == len(members) and not leaf.isdigit() else picked
    return tuple(sorted(names))


@dataclass(frozen=True)
class AdapterLayout:
    """Where the A and B of every site lie in one flat vector: site by site, A [r, I] then B [O, r], row-major.

    `ranks` gives the rank of each site, in the order of `sites`.
    """

    sites: tuple[Site, ...]
    ranks: tuple[int, ...]

    @staticmethod
    def uniform(sites: Sequence[Site], rank: int) -> AdapterLayout:
        return AdapterLayout(tuple(sites), (rank,) * len(sites))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Lengths of A, B, A, B, ... in the flat vector."""
        pairs = ((r * s.in_features, r * s.out_features) for s, r in zip(self.sites, self.ranks, strict=True))
        return tuple(size for pair in pairs for size in pair)

    @cached_property
    def numel(self) -> int:
        return sum(self.sizes)

    def unflatten(self, flat_P: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Views (A [r, I], B [O, r]) of one flat vector, by site name."""
        views = self.rows(flat_P.unsqueeze(0))
        return {site.name: (a[0], b[0]) for site, (a, b) in zip(self.sites, views)}

    def rows(self, flat_BP: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views (A [B, r, I], B [B, O, r]) of B flat vectors, one pair a site. One split: its backward is one cat."""
        parts = flat_BP.split(self.sizes, dim=1)
        count = flat_BP.shape[0]
        return [
            (
                parts[2 * i].view(count, rank, site.in_features),
                parts[2 * i + 1].view(count, site.out_features, rank),
            )
            for i, (site, rank) in enumerate(zip(self.sites, self.ranks))
        ]

    def flatten(self, adapters: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The flat vector of (A, B) pairs; the inverse of `unflatten`."""
        return torch.cat([part.reshape(-1) for site in self.sites for part in adapters[site.name]])


@dataclass(frozen=True)
class GateLayout:
    """One gate vector [I] per site, one after another."""

    sites: tuple[Site, ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(site.in_features for site in self.sites)

    @cached_property
    def numel(self) -> int:
        return sum(self.sizes)

    def rows(self, flat_BP: Tensor) -> list[Tensor]:
        """Views [B, I], one a site."""
        return list(flat_BP.split(self.sizes, dim=1))

    def unflatten(self, flat_P: Tensor) -> dict[str, Tensor]:
        return {site.name: part for site, part in zip(self.sites, flat_P.split(self.sizes))}


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    replaced = {id(m.base): n for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return {replaced.get(id(m), n): m for n, m in found.items()}


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _refuse(model: nn.Module, target: str, linears: Mapping[str, nn.Linear]) -> None:
    other = next((type(m).__name__ for n, m in model.named_modules() if _matches(n, target)), None)
    if other is not None:
        why = f"selects {other} modules; adapters go on nn.Linear (and not on the output head)"
    else:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in linears})
        why = f"selects no linear of this model; its linears are {', '.join(leaves)}.{suggest(target, leaves)}"
    raise RecipeError(f"experts.targets: '{target}' {why}", code="CFG-020")
