"""The linear that takes adapters, and the adapter of routed inference.

`RoutedLinear` computes base(x) and hands x and y to its adapter, if it has one. Adapters: `RoutedBank` (inference,
here) and the row adapters of training.py. No host synchronisation; compiles with fullgraph=True.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import QuietGooseError, RecipeError
from ..kernels.routed_lora import add_routed_lora, slot_weights
from .expert import SiteAdapter
from .routers import RouterKind, Routing, uniform
from .row_adapter import RowAdapter
from .shared import SharedBank


class RoutedLinear(nn.Module):
    """`y = base(x)`, plus what the adapter adds, plus what lies on top of that (on_top.py). The base linear is the model's
    own module, untouched."""

    def __init__(self, name: str, base: nn.Linear) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.adapter: nn.Module | None = None
        self.on_top: nn.Module | None = None

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> y [..., O]."""
        if isinstance(self.adapter, RoutedBank) and self.adapter.takes_base(x):
            y = self.adapter.linear(x)
        elif isinstance(self.adapter, RowAdapter) and self.adapter.takes_base(self.base):
            y = self.adapter.linear(x, self.base)
        else:
            y = self.base(x)
            if self.adapter is not None:
                y = self.adapter(x, y)
        return y if self.on_top is None else self.on_top(x, y)

    def route(self, x: Tensor) -> Routing:
        """The experts this site would choose for x [..., I], tokens flattened."""
        if not isinstance(self.adapter, RoutedBank):
            raise QuietGooseError(f"site {self.name} has no routed experts; attach a library first", code="RTE-001")
        return self.adapter.route(x.flatten(0, -2))


class RoutingContext:
    """Shared by all sites of a model, held by reference: the expert of every row, while `assign_rows` is open."""

    def __init__(self) -> None:
        self._expert_B: Tensor | None = None
        self._one_hot: dict[tuple[int, int, torch.dtype], Tensor] = {}

    @property
    def expert_B(self) -> Tensor | None:
        return self._expert_B

    @expert_B.setter
    def expert_B(self, expert_B: Tensor | None) -> None:
        self._expert_B = expert_B
        self._one_hot = {}

    def one_hot_TN(self, num_tokens: int, num_experts: int, dtype: torch.dtype) -> Tensor:
        """Weight 1 for each token's own expert; made once per batch shape, for all sites."""
        key = (num_tokens, num_experts, dtype)
        if key not in self._one_hot:
            index_TN = torch.nn.functional.one_hot(self.expert_T(num_tokens), num_experts)
            self._one_hot[key] = index_TN.to(dtype)
        return self._one_hot[key]

    def expert_T(self, num_tokens: int) -> Tensor:
        """The expert of every token, rows being equally long."""
        if self.expert_B is None:
            raise QuietGooseError(
                "router oracle: the rows' experts are not set; wrap the call in assign_rows(model, experts)",
                code="RTE-002",
            )
        num_rows = self.expert_B.shape[0]
        if num_tokens % num_rows:
            raise QuietGooseError(
                f"assign_rows named {num_rows} rows, but a site sees {num_tokens} tokens, no multiple of that; "
                "pass one expert for every row of the batch",
                code="RTE-002",
            )
        return self.expert_B.repeat_interleave(num_tokens // num_rows)


class RoutedBank(nn.Module):
    """The experts of one site and the router that weighs them: a place in a SharedBank, which holds the tensors.

    The first site of a group owns the shared bank as a submodule, so that moving or casting the model reaches it once.
    """

    owner_R: Tensor | None
    present_N: Tensor | None
    shared: SharedBank

    def __init__(
        self, site: str, adapters: Sequence[SiteAdapter | None], shared: SharedBank, position: int, context: RoutingContext
    ) -> None:  # fmt: skip
        super().__init__()
        ranks = [0 if a is None else a.a_RI.shape[0] for a in adapters]
        owner = [i for i, rank in enumerate(ranks) for _ in range(rank)]
        self.site, self.context, self.position = site, context, position
        self.num_experts, self.num_present = len(ranks), sum(rank > 0 for rank in ranks)
        self._slots = _slot_ranges(ranks)
        self.own_shared = shared if position == 0 else None
        object.__setattr__(self, "shared", shared)  # not a second registration
        device = shared.a_RI.device
        self._keep("owner_R", None if len(set(ranks)) == 1 else torch.tensor(owner, device=device))
        self._keep("present_N", None if all(ranks) else torch.tensor([r > 0 for r in ranks], device=device))
        self.kind: RouterKind | None = None
        self.single: int | None = None
        self.k = 0

    @property
    def a_RI(self) -> Tensor:
        return self.shared.a_RI_of(self.position)

    @property
    def b_OR(self) -> Tensor:
        return self.shared.b_RO_of(self.position).t()

    @property
    def vectors_NI(self) -> Tensor | None:
        """Prepared routing vectors, fp32, zero rows for absent experts."""
        return self.shared.vectors_NI(self.position)

    def use_router(self, kind: RouterKind, vectors_NI: Tensor, k: int) -> None:
        """Weigh experts by a scoring router; `vectors_NI` raw, with any rows for absent experts."""
        if k < 1:
            raise RecipeError(f"router.k is {k}; it must be at least 1", code="CFG-024")
        if tuple(vectors_NI.shape) != (self.num_experts, self.a_RI.shape[1]):
            raise RecipeError(
                f"site {self.site}: routing vectors have shape {tuple(vectors_NI.shape)}, expected "
                f"{(self.num_experts, self.a_RI.shape[1])} (experts, input width)",
                code="CFG-024",
            )
        prepared = kind.prepare(vectors_NI.to(torch.promote_types(vectors_NI.dtype, torch.float32)))
        self.shared.set_vectors(self.position, kind, prepared, k)
        self.kind, self.single, self.k = kind, None, min(k, self.num_present)

    def use_expert(self, index: int) -> None:
        """Every token takes one expert, with weight 1."""
        self.kind, self.single = None, index

    def use_rows(self) -> None:
        """Every row takes the expert that the context names (oracle)."""
        self.kind, self.single = None, None

    def routing_choice(self) -> tuple[Any, ...]:
        """The router as it is, for `restore_choice`; tensors are referred to, nothing changes them in place."""
        return self.kind, self.single, self.k, self.shared.routing_choice()

    def restore_choice(self, choice: tuple[Any, ...]) -> None:
        """Back to what `routing_choice` said."""
        self.kind, self.single, self.k, of_group = choice
        self.shared.restore_choice(of_group)

    def takes_base(self, x: Tensor) -> bool:
        """Whether `linear` may stand for the base's own product and `forward`."""
        return self.kind is not None and self.shared.takes_base(x)

    def linear(self, x: Tensor) -> Tensor:
        """base(x) + routed sum, x [..., I] -> [..., O]; inference."""
        return self.shared.linear(x, self.position)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + routed sum, x [..., I], y [..., O]."""
        if self.kind is not None and self.kind.kernel is not None:
            return self.shared.add(x, y, self.position)
        x_TI, y_TO = x.flatten(0, -2), y.flatten(0, -2)
        if self.single is not None:
            return self._one(x_TI, y_TO).view_as(y)
        if self.kind is None:
            weights = self.context.one_hot_TN(x_TI.shape[0], self.num_experts, x.dtype)
        else:
            # uniform: all experts in order, one row for all tokens
            weights = self.route(x_TI[:1]).weights_TK.to(x.dtype)
        if self.owner_R is not None:
            weights = slot_weights(weights, self.owner_R)
        return add_routed_lora(y_TO, x_TI, self.a_RI, self.b_OR, weights).view_as(y)

    def route(self, x_TI: Tensor) -> Routing:
        """Weights and indices of the experts of every token."""
        if self.kind is not None and self.kind.kernel is not None:
            weights_STK, index_STK = self.shared.route(x_TI)
            return Routing(weights_STK[self.position, :, : self.k], index_STK[self.position, :, : self.k].long())
        if self.kind is not None and self.vectors_NI is not None:
            return uniform(x_TI, self.vectors_NI, self.present_N)
        if self.single is not None:
            index_T = torch.full((x_TI.shape[0],), self.single, dtype=torch.int64, device=x_TI.device)
        else:
            index_T = self.context.expert_T(x_TI.shape[0])
        return Routing(torch.ones_like(index_T, dtype=torch.float32)[:, None], index_T[:, None])

    def _one(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        start, stop = self._slots[self.single or 0]
        if start == stop:
            return y_TO
        return add_routed_lora(y_TO, x_TI, self.a_RI[start:stop], self.b_OR[:, start:stop])

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)


def _slot_ranges(ranks: Sequence[int]) -> list[tuple[int, int]]:
    ranges, start = [], 0
    for rank in ranks:
        ranges.append((start, start + rank))
        start += rank
    return ranges
