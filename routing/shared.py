"""What the sites that read one input share: A of all their experts, gates, one routing and one shrink a forward.

q, k and v (gate and up) see the same tensor. The first of them to be called makes everything for all (statistics, one
router product over all gates, one shrink; in inference the base products too) and the others take their part. What waits
is dropped when the last part is taken or when the parent's forward ends: nothing of a sequence stays here.

A call is recognised by the identity of its input, so a site that is fed something else (cross attention) just makes its
own. Which formulation computes is decided by shapes alone (kernels/routed_lora/tiles.py): no synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..base.modules import hooked
from ..kernels.dispatch import Implementation, takes_triton
from ..kernels.routed_lora import (
    GroupTables,
    by_pairs,
    formulation,
    group_shape,
    group_tables,
    masked_hidden,
    operators,
    route_sparingly,
    split_gates,
    stack_factors,
)
from .expert import SiteAdapter
from .routers import RouterKind

GROUPS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"),
    ("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("w1", "w3"),
)  # fmt: skip
OTHER_INPUTS = ("cross", "encdec", "encoder_attn")
MOST_CHOSEN = 8


def sharing_groups(sites: Sequence[str]) -> list[tuple[str, ...]]:
    """`sites` in groups that read one input, by the names model families use; every other site is a group alone."""
    left, found = dict.fromkeys(sites), []
    for site in sites:
        if site not in left:
            continue
        parent, _, leaf = site.rpartition(".")
        names = next((g for g in GROUPS if leaf in g), (leaf,))
        if any(word in parent.lower() for word in OTHER_INPUTS):
            names = (leaf,)
        members = tuple(m for name in names if (m := f"{parent}.{name}" if parent else name) in left)
        found.append(members)
        for member in members:
            del left[member]
    return found


class SharedBank(nn.Module):
    """The experts' A and the routing vectors of a group of sites, and the parts of the input at hand.

    a_RI       all sites' A one below the other, in the base's dtype; b_0, b_1, b_2 the sites' B beside it, start_0, rank_0 and
               so on where each expert's slots lie within a site
    stack_PI   what a_RI, high_ZI and low_ZI are parts of, 16-bit dtypes; one product with it routes and shrinks
    vectors_ZI prepared routing vectors of all sites, at least fp32 whatever the model is cast to; None: no scoring router
    """

    a_RI: Tensor
    owner_R: Tensor
    start_Z: Tensor
    rank_Z: Tensor
    absent_Z: Tensor
    vectors_ZI: Tensor | None
    high_ZI: Tensor
    low_ZI: Tensor
    shift_Z: Tensor
    stack_PI: Tensor

    def __init__(
        self, adapters_SN: Sequence[Sequence[SiteAdapter | None]], bases: Sequence[nn.Linear], implementation: Implementation
    ) -> None:  # fmt: skip
        super().__init__()
        weight = bases[0].weight
        ranks = [[0 if a is None else a.a_RI.shape[0] for a in adapters] for adapters in adapters_SN]
        self.shape = group_shape(ranks)
        self.implementation: Implementation = implementation
        self.kind: RouterKind | None = None
        self.k = 0
        found = [a.a_RI for adapters in adapters_SN for a in adapters if a is not None]
        self._keep("a_RI", torch.cat(found).to(weight.device, weight.dtype))
        for name, table in group_tables(ranks, weight.device)._asdict().items():
            self._keep(name, table)
        self._keep("vectors_ZI", None)
        for position, adapters in enumerate(adapters_SN):
            scaled = torch.cat([(a.scale * a.b_OR.float()).t() for a in adapters if a is not None])
            self._keep(f"b_{position}", scaled.to(weight.device, weight.dtype).contiguous())
            own = group_tables(ranks[position : position + 1], weight.device)
            self._keep(f"start_{position}", own.start_Z)
            self._keep(f"rank_{position}", own.rank_Z)
        self._bases = list(bases)
        self._plain = all(type(base) is nn.Linear and not hooked(base) for base in bases)
        self._input: _Input | None = None
        self._hook: RemovableHandle | None = None

    # routers ---------------------------------------------------------------------------------------------------

    def set_vectors(self, position: int, kind: RouterKind, prepared_NI: Tensor, k: int) -> None:
        """The prepared vectors of one site; `kind` and k hold for the whole group."""
        count = self.shape.num_experts
        whole = self.vectors_ZI
        if whole is None or whole.dtype != prepared_NI.dtype:
            whole = prepared_NI.new_zeros(count * len(self.shape.slots), prepared_NI.shape[1], device=self.a_RI.device)
        else:
            whole = whole.clone()
        whole[position * count : (position + 1) * count] = prepared_NI
        self.kind, self.k = kind, min(k, count)
        self._keep_vectors(whole)

    def routing_choice(self) -> tuple[Any, ...]:
        """Kind, k and the tensors of the router as they are, for `restore_choice`."""
        return self.kind, self.k, dict(self._buffers)

    def restore_choice(self, choice: tuple[Any, ...]) -> None:
        """Back to what `routing_choice` said."""
        self.kind, self.k, buffers = choice
        self._buffers.clear()
        self._buffers.update(buffers)

    def a_RI_of(self, position: int) -> Tensor:
        """A of one site's experts [R, I]."""
        first = sum(self.shape.slots[:position])
        return self.a_RI[first : first + self.shape.slots[position]]

    def b_RO_of(self, position: int) -> Tensor:
        """s B of one site's experts, a row a slot [R, O]; the scale was folded in in fp32."""
        return getattr(self, f"b_{position}")

    def vectors_NI(self, position: int) -> Tensor | None:
        """One site's prepared vectors."""
        count = self.shape.num_experts
        return None if self.vectors_ZI is None else self.vectors_ZI[position * count : (position + 1) * count]

    def route(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, indices) [S, T, K] of all sites; differentiable in x. An absent expert can only have weight 0."""
        assert self.kind is not None
        assert self.vectors_ZI is not None
        arrow = self.kind.kernel == "projection"
        if not self._takes_kernels(x_TI):
            return route_sparingly(x_TI, self.vectors_ZI, self.absent_Z, self.shape.num_experts, self.k, arrow)
        return torch.ops.quietgoose.route_experts(
            x_TI, self.vectors_ZI, self._gates()[1:4], self._tables(), self.shape.num_experts, self.k, arrow
        )

    # the input at hand -----------------------------------------------------------------------------------------

    def takes_base(self, x: Tensor) -> bool:
        """Whether `linear` computes this call, base products included: inference with plain bases on our kernels."""
        if torch.is_grad_enabled() or not self._plain or self.kind is None or self.kind.kernel is None:
            return False
        if torch.is_autocast_enabled(x.device.type):
            return False
        return self._takes_kernels(x) and all(_fits(base.weight, x) for base in self._bases)

    def linear(self, x: Tensor, position: int) -> Tensor:
        """y [..., O] of one site, base and experts."""
        return self._part(x, position, "linears").view(*x.shape[:-1], -1)

    def add(self, x: Tensor, y: Tensor, position: int) -> Tensor:
        """y + the experts of one site; without gradients y itself may be updated."""
        y_TO, b_RO = y.flatten(0, -2), self.b_RO_of(position)
        if self._by_pairs(x):
            part = self._part(x, position, "grouped")
            own = self._own_slots(position)
            out = torch.ops.quietgoose.expand_experts(y_TO, *part, b_RO, *own, self.shape.widest)
            return out.view_as(y)
        hidden_TR = self._part(x, position, "hidden")
        if torch.is_grad_enabled():
            return torch.addmm(y_TO, hidden_TR, b_RO).view_as(y)
        return y_TO.addmm_(hidden_TR, b_RO).view_as(y)

    def forget(self, *_: Any) -> None:
        """Drop what waits for sites that were not called."""
        self._input = None

    def watch(self, parent: nn.Module) -> None:
        """Forget at the end of every forward of the module that holds the sites."""
        self._hook = parent.register_forward_hook(self.forget)

    def release(self) -> None:
        """Undo `watch`."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    # inside ----------------------------------------------------------------------------------------------------

    def _part(self, x: Tensor, position: int, what: Literal["linears", "grouped", "hidden"]) -> Any:
        found = self._input
        if found is None or not found.serves(x, position, what):
            make = {"linears": self._linears, "grouped": self._grouped, "hidden": self._hidden}[what]
            found = _Input(x, what, dict(enumerate(make(x.flatten(0, -2)))))
        part = found.parts.pop(position)
        self._input = found if found.parts else None
        return part

    def _linears(self, x_TI: Tensor) -> list[Tensor]:
        assert self.kind is not None
        (tokens, width), slots, wide = x_TI.shape, max(self.shape.slots), x_TI.dtype == torch.float32
        name = formulation(tokens, slots, width, wide, self.shape.widest)
        biases = [base.bias for base in self._bases if base.bias is not None]  # of all or of none
        b_RO = [self.b_RO_of(position) for position in range(len(self._bases))]
        compute = torch.ops.quietgoose.routed_linears if torch.compiler.is_compiling() else operators.linears
        return compute(
            x_TI, [base.weight for base in self._bases], biases, self.a_RI, b_RO, self._gates(), self._tables(),
            self.shape.num_experts, self.shape.widest, self.k, self.kind.kernel == "projection", name,
        )  # fmt: skip

    def _hidden(self, x_TI: Tensor) -> list[Tensor]:
        weights_STK, index_STK = self.route(x_TI)
        slots = list(self.shape.slots)
        hidden_TR = masked_hidden(
            x_TI, self.a_RI, self.owner_R, slots, weights_STK, index_STK, self.shape.num_experts, self.shape.rank
        )
        return list(hidden_TR.split(slots, dim=1))

    def _grouped(self, x_TI: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per site hidden [K, T, RP], weighted, of its pairs sorted by expert, order [K, T] and plan [K, P]: one sort and one
        shrink for the group, forward and backward."""
        weights_STK, index_STK = self.route(x_TI)
        pairs = torch.ops.quietgoose.sort_experts(index_STK.int(), self.shape.num_experts)
        hidden_SKTR = torch.ops.quietgoose.shrink_experts(
            x_TI, weights_STK, *pairs, self.a_RI, self.start_Z, self.rank_Z, self.shape.slots, self.shape.widest
        )
        return list(zip(hidden_SKTR.unbind(), *pairs))

    def _by_pairs(self, x: Tensor) -> bool:
        tokens, wide = x.numel() // x.shape[-1], x.dtype == torch.float32
        return self._takes_kernels(x) and by_pairs(tokens, max(self.shape.slots), x.shape[-1], wide, self.shape.widest)

    def _takes_kernels(self, x: Tensor) -> bool:
        return takes_triton(self.implementation, x, self._problem(x))

    def _problem(self, x: Tensor) -> str | None:
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or x.dtype != self.a_RI.dtype:
            return f"routed LoRA: the kernels take fp16, bf16 or fp32 tokens of the adapters' dtype, got {x.dtype}"
        if self.k > MOST_CHOSEN:
            return f"routed LoRA: the kernels take k up to {MOST_CHOSEN}, got {self.k}"
        return None

    def _own_slots(self, position: int) -> tuple[Tensor, Tensor]:
        """First slot within the site and number of slots of every expert, int32 [N]."""
        return getattr(self, f"start_{position}"), getattr(self, f"rank_{position}")

    def _tables(self) -> list[Tensor]:
        return list(GroupTables(self.owner_R, self.start_Z, self.rank_Z, self.absent_Z))

    def _gates(self) -> list[Tensor]:
        assert self.vectors_ZI is not None
        return [self.vectors_ZI, self.high_ZI, self.low_ZI, self.shift_Z, self.stack_PI]

    def _keep_vectors(self, vectors_ZI: Tensor) -> None:
        a_RI, gates, stack_PI = stack_factors(self.a_RI, split_gates(vectors_ZI, self.a_RI.dtype))
        for name, tensor in {"a_RI": a_RI, "stack_PI": stack_PI, **gates._asdict()}.items():
            self._keep(name, tensor)

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SharedBank:
        """Casting the model leaves scores in fp32: vectors only move, their 16-bit parts are made anew."""
        vectors_ZI, absent_Z = self.vectors_ZI, self.absent_Z
        self._buffers.pop("stack_PI", None)  # its parts are what is moved
        super()._apply(fn, recurse)
        self.absent_Z = absent_Z.to(self.a_RI.device)
        if vectors_ZI is not None:
            self._keep_vectors(vectors_ZI.to(self.a_RI.device))
        return self


class _Input:
    """One input and the parts its sites have not taken yet."""

    def __init__(self, x: Tensor, what: str, parts: dict[int, Any]) -> None:
        self.x, self.what, self.parts = x, what, parts
        self.with_gradients = torch.is_grad_enabled()

    def serves(self, x: Tensor, position: int, what: str) -> bool:
        return (
            self.x is x
            and self.what == what
            and position in self.parts
            and self.with_gradients == torch.is_grad_enabled()
        )


def _fits(weight: Tensor, x: Tensor) -> bool:
    """A whole (not ZeRO-3 sharded), contiguous weight of x's dtype."""
    return weight.dim() == 2 and weight.dtype == x.dtype and weight.shape[1] == x.shape[-1] and weight.is_contiguous()
