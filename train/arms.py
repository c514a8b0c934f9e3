"""The rows of the result table: each arm puts one model into one state. Used by the `evaluate` stage.

base                 no experts                          experts             every single expert, one row each
oracle               the task's own expert (told)        phatgoose           trained gates, top-k
phatgoose_mean       gates and mean activations          average_activation  mean activations, same router
random               gates ~ N(0, I), same router
arrow                singular vectors, |x . v|           uniform             all experts, 1/N each
merged, ties, dare   one static adapter made of all      permuted            trained gates of the wrong experts
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ..base.errors import RecipeError, suggest
from ..base.seeding import generator
from ..evaluation.encoding import ItemRef
from ..evaluation.run import PerRow
from ..evaluation.tasks import Task
from ..routing.expert import Expert
from ..routing.library import ExpertLibrary
from ..routing.merge import mean_of_products, peft_merge
from ..routing.model import assign_rows, attach, detach
from ..routing.routers import SiteVectors, gate_vectors

ARMS = (
    "base", "experts", "oracle", "random", "permuted", "average_activation", "arrow", "uniform", "merged", "ties",
    "dare", "phatgoose", "phatgoose_mean",
)  # fmt: skip
MERGES: Mapping[str, Callable[[ExpertLibrary, int], Expert]] = {
    "merged": lambda library, seed: mean_of_products(library),
    "ties": lambda library, seed: peft_merge(library, "ties"),
    "dare": lambda library, seed: peft_merge(library, "dare_linear", seed=seed),
}
Arm = Callable[[], AbstractContextManager[Any]]


def check_arms(names: Sequence[str]) -> None:
    """RecipeError CFG-025 for a name that is no arm."""
    for name in names:
        if name not in ARMS:
            raise RecipeError(
                f"evaluate.arms: '{name}' is none of {', '.join(ARMS)}.{suggest(name, ARMS)}", code="CFG-025"
            )


def build_arms(
    names: Sequence[str],
    model: Any,
    library: ExpertLibrary,
    tasks: Sequence[Task],
    k: int,
    seed: int,
) -> tuple[dict[str, Arm], dict[str, tuple[str, ...]]]:
    """Arms by row name, and the tasks of those that cannot run on every task."""
    check_arms(names)
    arms: dict[str, Arm] = {}
    limited: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name == "base":
            arms[name] = lambda: _plain(model)
        elif name == "experts":
            arms |= {f"expert:{e}": routed(model, library, f"expert:{e}", k, seed) for e in library.names}
        elif name == "oracle":
            own = tuple(task.name for task in tasks if task.name in library)
            if own:
                arms[name] = lambda: _oracle(model, library)
                limited[name] = own
        elif name in MERGES:
            arms[name] = _merged(model, library, name, seed)
        elif name == "permuted":
            arms[name] = routed(model, library, "phatgoose", k, seed, lambda: permuted_gates(library, seed))
        else:
            arms[name] = routed(model, library, name, k, seed)
    return arms, limited


def permuted_gates(library: ExpertLibrary, seed: int) -> SiteVectors:
    """Trained gates given to other experts by one derangement drawn from the seed (a cyclic shift of a random order)."""
    order = torch.randperm(len(library), generator=generator(seed, "permuted")).tolist()
    names = library.names
    taken = {names[order[i]]: names[order[(i + 1) % len(order)]] for i in range(len(order))}
    return {
        site: {name: vectors[taken[name]] for name in vectors if taken[name] in vectors}
        for site, vectors in gate_vectors(library).items()
    }


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    detach(model)
    yield


def routed(
    model: Any, library: ExpertLibrary, router: str, k: int, seed: int, vectors: Callable[[], SiteVectors] | None = None
) -> Arm:
    """The model under one of routing/routers.py's routers; `vectors` are made when the arm is entered, in the place of its own."""

    @contextmanager
    def enter() -> Iterator[None]:
        made = vectors() if vectors is not None else None
        attach(model, library, router, k, vectors=made, seed=seed)
        yield

    return enter


def _merged(model: Any, library: ExpertLibrary, name: str, seed: int) -> Arm:
    @contextmanager
    def enter() -> Iterator[None]:
        expert = MERGES[name](library, seed)
        attach(model, ExpertLibrary([expert]), f"expert:{expert.name}", 1)
        yield

    return enter


@contextmanager
def _oracle(model: Any, library: ExpertLibrary) -> Iterator[PerRow]:
    attach(model, library, "oracle", 1)

    def enter(refs: Sequence[ItemRef]) -> AbstractContextManager[Any]:
        return assign_rows(model, [ref.task for ref in refs])

    yield PerRow(enter)
