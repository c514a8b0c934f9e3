"""An ordered collection of experts. Changes return a new library; experts themselves are shared, never edited."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from ..base.errors import RecipeError, suggest
from .expert import Expert


class ExpertLibrary:
    """Experts by name, in a fixed order that is the axis N everywhere."""

    def __init__(self, experts: Iterable[Expert] = ()) -> None:
        self._experts: dict[str, Expert] = {}
        for expert in experts:
            if expert.name in self._experts:
                raise RecipeError(f"two experts are called {expert.name}; rename one", code="CFG-021")
            self._experts[expert.name] = expert

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._experts)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of all sites where at least one expert has an adapter, in order of first mention."""
        return tuple(dict.fromkeys(site for expert in self for site in expert.sites))

    def __len__(self) -> int:
        return len(self._experts)

    def __iter__(self) -> Iterator[Expert]:
        return iter(self._experts.values())

    def __contains__(self, name: object) -> bool:
        return name in self._experts

    def __getitem__(self, name: str) -> Expert:
        self._known(name)
        return self._experts[name]

    def index(self, name: str) -> int:
        """Position of an expert on the axis N."""
        self._known(name)
        return self.names.index(name)

    def add(self, *experts: Expert) -> ExpertLibrary:
        return ExpertLibrary([*self, *experts])

    def remove(self, *names: str) -> ExpertLibrary:
        for name in names:
            self._known(name)
        return ExpertLibrary(expert for expert in self if expert.name not in names)

    def restrict(self, names: Sequence[str]) -> ExpertLibrary:
        """Only the named experts, in the order given."""
        return ExpertLibrary(self[name] for name in names)

    def with_gates(
        self, gates: Mapping[str, Mapping[str, Tensor]], means: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> ExpertLibrary:
        """Every expert with its gates (expert name -> site name -> vector), which must name all experts, and with the mean
        activations of those named in `means`."""
        for name in gates:
            self._known(name)
        missing = [name for name in self.names if name not in gates]
        if missing:
            raise RecipeError(f"no gates for expert {missing[0]}: gates are needed for every expert", code="CFG-021")
        found = means or {}
        return ExpertLibrary(expert.with_gates(gates[expert.name], found.get(expert.name)) for expert in self)

    def _known(self, name: str) -> None:
        if name not in self._experts:
            raise RecipeError(
                f"no expert called '{name}'; there are {', '.join(self.names) or 'none'}.{suggest(name, self.names)}",
                code="CFG-021",
            )
