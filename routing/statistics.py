"""What the routers of a model do: choices per site, load, entropy, votes per token; and mean activations, the
vectors of the average-activation router. Everything reads the model through hooks; no forward logs anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import DataError
from ..kernels.routed_lora import dense_weights
from .model import set_router, state
from .routed_linear import RoutedLinear
from .routers import Routing, SiteVectors


def collect(model: nn.Module, batch_inputs: Mapping[str, Any]) -> dict[str, Routing]:
    """One forward of a routed model; per site the Routing of all B*T tokens (flattened, with padding), on the CPU."""
    found: dict[str, Routing] = {}

    def observe(module: RoutedLinear, x: Tensor) -> None:
        found[module.name] = Routing(*(part.cpu() for part in module.route(x)))

    with torch.no_grad(), _observed(state(model).modules, observe):
        model(**batch_inputs, use_cache=False)
    return found


def site_weights(routing: Routing, num_experts: int) -> Tensor:
    """Dense weights [T, N] of one site."""
    return dense_weights(routing.weights_TK.float(), routing.index_TK, num_experts)


def load(routings: Mapping[str, Routing], num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """Share of all tokens' weight that each expert receives [N], over sites; sums to 1. Padding is left out."""
    votes_TN = _kept(token_votes(routings, num_experts), mask_T)
    return votes_TN.sum(0) / votes_TN.sum().clamp(min=torch.finfo(torch.float32).tiny)


def entropy(routings: Mapping[str, Routing], mask_T: Tensor | None = None) -> float:
    """Mean over sites and tokens of -sum_k w log w of the chosen weights, in nats. Padding is left out."""
    means = []
    for routing in routings.values():
        weights_TK = _kept(routing.weights_TK.float(), mask_T)
        means.append(torch.special.entr(weights_TK).sum(1).mean())
    return float(torch.stack(means).mean())


def token_votes(routings: Mapping[str, Routing], num_experts: int) -> Tensor:
    """Weights summed over sites [T, N], divided by the number of sites: each token's share of experts."""
    return torch.stack([site_weights(routing, num_experts) for routing in routings.values()]).mean(0)


def site_means(model: nn.Module, batches: Iterable[tuple[Mapping[str, Any], Tensor]]) -> dict[str, Tensor]:
    """Masked mean of every site's input [I], fp32 on the CPU, over (inputs, mask_BT) pairs, as the model stands now.

    DataError (DATA-010) if no token is counted.
    """
    sums: dict[str, Tensor] = {}
    count = torch.zeros((), dtype=torch.float64)
    modules = state(model).modules
    for inputs, mask_BT in batches:
        weights_T = mask_BT.flatten()

        def observe(module: RoutedLinear, x: Tensor, weights_T: Tensor = weights_T) -> None:
            flat_TI = x.flatten(0, -2).float()
            total_I = (weights_T.to(flat_TI) @ flat_TI).double()
            sums[module.name] = sums[module.name] + total_I if module.name in sums else total_I

        with torch.no_grad(), _observed(modules, observe):
            model(**inputs, use_cache=False)
        count = count + weights_T.sum().cpu()
    if not float(count):
        raise DataError("mean activations: no token is left by the mask; give at least one example", code="DATA-010")
    return {site: (total.cpu() / count).float() for site, total in sums.items()}


def average_activation(
    model: nn.Module, batches: Mapping[str, Iterable[tuple[Mapping[str, Any], Tensor]]]
) -> SiteVectors:
    """Vectors for the router `average_activation`: per expert the mean input of each site over its own examples, with
    that expert active on every token (as in gate training). `batches`: expert name -> (inputs, mask_BT) pairs.

    Leaves the last expert active: call `set_router(model, "average_activation", k, vectors)` next.
    """
    vectors: SiteVectors = {site: {} for site in state(model).library.sites}
    for expert in state(model).library:
        set_router(model, f"expert:{expert.name}")
        for site, mean_I in site_means(model, batches[expert.name]).items():
            if site in expert.adapters:
                vectors[site][expert.name] = mean_I
    return vectors


@contextmanager
def _observed(modules: Mapping[str, RoutedLinear], observe: Any) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(lambda module, arguments: observe(module, arguments[0]))
        for module in modules.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept(values: Tensor, mask_T: Tensor | None) -> Tensor:
    return values if mask_T is None else values[mask_T.flatten().bool().cpu()]
