"""One decoder layer's seven linears with N experts, and the ways to compute them: ours, and others' formulations.

Peers are re-implemented from what their code does per site (phatgoose.md of the design notes, PEFT's arrow.py), on the same
tensors: r-three/phatgoose stacks the bank and loops over experts with boolean indexing, microsoft/mttl merges A and B per
token, PEFT's Arrow forms every expert's output of every token, `grouped_mm` is PyTorch's own grouped product over sorted
pairs. A function adds nothing to the clock that its original does not do at every forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from measure import worst
from quietgoose.kernels.routed_lora import (
    formulation,
    group_shape,
    group_tables,
    masked_hidden,
    operators,
    route_group,
    split_gates,
    stack_factors,
)
from quietgoose.kernels.testing import relative_rmse
from torch import Tensor
from torch.nn import functional

SHAPES = {"smollm2": (576, 1536, 576, 192), "llama3-8b": (4096, 14336, 4096, 1024), "tiny": (64, 96, 64, 32)}
RANK = 16
CLEAR = 1e-4  # of a score: nearer choices may turn with the order of summation
assert operators is not None


class Group(NamedTuple):
    """Sites that read one input: base weights, experts as stacks [N, r, I] and [N, O, r], and our tensors of them."""

    weights: list[Tensor]
    a_SNRI: list[Tensor]
    b_SNOR: list[Tensor]
    vectors: Tensor
    a_RI: Tensor
    b_RO: list[Tensor]
    gates: list[Tensor]
    tables: list[Tensor]


def checked_rows(tokens: int, device: torch.device, most: int = 1024) -> Tensor:
    """Tokens that stand for all: evenly from the first to the last, and the last 128, a tile that may not be full."""
    if tokens <= most:
        return torch.arange(tokens, device=device)
    spread = torch.linspace(0, tokens - 1, most - 128, dtype=torch.float64).round().long()
    return torch.cat([spread, torch.arange(tokens - 128, tokens)]).unique().to(device)


class Layer:
    """`copies` layers of random weights (more bytes than the L2 holds, for few tokens) and one input per group."""

    def __init__(
        self, shape: str, experts: int, tokens: int, copies: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        d, ff, q, kv = SHAPES[shape]
        self.experts, self.tokens, self.dtype = experts, tokens, dtype
        self.plan = [(d, (q, kv, kv)), (q, (d,)), (d, (ff, ff)), (ff, (d,))]
        torch.manual_seed(0)
        self.inputs = [torch.randn(tokens, width, device=device, dtype=dtype) for width, _ in self.plan]
        self.copies = [[self._group(width, outs, device) for width, outs in self.plan] for _ in range(copies)]

    def _group(self, width: int, outs: tuple[int, ...], device: torch.device) -> Group:
        def normal(*shape: int, size: float) -> Tensor:
            return torch.randn(*shape, device=device, dtype=self.dtype).mul_(size)

        weights = [normal(o, width, size=width**-0.5) for o in outs]
        a = [normal(self.experts, RANK, width, size=width**-0.5) for _ in outs]
        b = [normal(self.experts, o, RANK, size=0.25) for o in outs]
        raw = torch.randn(len(outs) * self.experts, width, device=device)
        vectors = functional.layer_norm(raw, (width,)) / width**0.5
        ranks = [[RANK] * self.experts] * len(outs)
        stacked = torch.cat([part.flatten(0, 1) for part in a])
        a_RI, gates, stack = stack_factors(stacked, split_gates(vectors, self.dtype))
        return Group(
            weights, a, b, vectors, a_RI, [part.transpose(1, 2).flatten(0, 1).contiguous() for part in b],
            [*gates, stack], list(group_tables(ranks, device)),
        )  # fmt: skip

    def only(self, number: int) -> Layer:
        """The same layer with one of its groups."""
        found = copy.copy(self)
        found.plan, found.inputs = [self.plan[number]], [self.inputs[number]]
        found.copies = [[groups[number]] for groups in self.copies]
        return found

    def at(self, tokens: int, copies: int) -> Layer:
        """The first `copies` of this layer with another number of tokens."""
        found = copy.copy(self)
        g = torch.Generator(self.inputs[0].device).manual_seed(tokens)
        found.inputs = [
            torch.randn(tokens, width, generator=g, device=x.device, dtype=self.dtype)
            for x, (width, _) in zip(self.inputs, self.plan)
        ]
        found.tokens, found.copies = tokens, self.copies[:copies]
        return found

    def last(self) -> Layer:
        """The copy whose outputs `run` gives, alone."""
        found = copy.copy(self)
        found.copies = self.copies[-1:]
        return found

    def parameters(self) -> list[Tensor]:
        """What may be trained: A and B, for gradients."""
        return [t for groups in self.copies for g in groups for t in (g.a_RI, *g.b_RO)]

    def run(self, function: Callable[[Tensor, Group], list[Tensor]]) -> list[Tensor]:
        """The outputs of the last copy."""
        found: list[Tensor] = []
        for groups in self.copies:
            found = [y for x, group in zip(self.inputs, groups) for y in function(x, group)]
        return found

    def checked_rows(self, most: int = 1024) -> Tensor:
        return checked_rows(self.tokens, self.inputs[0].device, most)

    def exact(self, k: int, arrow: bool, rows: Tensor) -> list[Tensor]:
        """The outputs of the tokens `rows` in fp64."""
        found = []
        for x, g in zip(self.inputs, self.copies[-1]):
            wide = x[rows].double()
            shape = group_shape([[RANK] * self.experts] * len(g.weights))
            weight, index = route_group(wide, g.vectors.double(), g.tables[3].double(), self.experts, k, arrow)
            hidden = masked_hidden(wide, g.a_RI.double(), g.tables[0], shape.slots, weight, index, self.experts)
            for w, h, b in zip(g.weights, hidden.split(list(shape.slots), 1), g.b_RO):
                found.append(wide @ w.double().t() + h @ b.double())
        return found


def clear_choices(layer: Layer, rows: Tensor, k: int) -> list[Tensor]:
    """Of every linear, which of the tokens `rows` have a k-th score well above the next."""
    found: list[Tensor] = []
    for x, g in zip(layer.inputs, layer.copies[-1]):
        if k >= layer.experts:
            found.extend(torch.ones(len(g.weights), len(rows), dtype=torch.bool, device=x.device))
            continue
        weights, _ = route_group(x[rows].double(), g.vectors.double(), g.tables[3].double(), layer.experts, k + 1)
        found.extend((weights[..., k - 1] / weights[..., k]).log() > CLEAR)
    return found


def error_of(layer: Layer, k: int = 2, arrow: bool = False) -> Callable[[list[Tensor]], float]:
    """Relative RMSE of the last copy's outputs against fp64, the worst of the linears: of all tokens up to 1,024, beyond that of as
    many spread over all; but for Arrow, of those whose choice of experts is clear."""
    rows = layer.checked_rows()
    want = layer.exact(k, arrow, rows)
    clear = [torch.ones_like(rows, dtype=torch.bool)] * len(want) if arrow else clear_choices(layer, rows, k)
    return lambda ys: worst(relative_rmse(y[rows][sure], w[sure]) for y, w, sure in zip(ys, want, clear))


def base(x: Tensor, g: Group) -> list[Tensor]:
    return [functional.linear(x, w) for w in g.weights]


def single_lora(x: Tensor, g: Group) -> list[Tensor]:
    """PEFT's LoRA of one expert: base, A, B, scale, sum."""
    return [
        functional.linear(x, w) + functional.linear(functional.linear(x, a[0]), b[0]) * 1.0
        for w, a, b in zip(g.weights, g.a_SNRI, g.b_SNOR)
    ]


def ours(k: int, method: str | None = None) -> Callable[[Tensor, Group], list[Tensor]]:
    """Our operator; `method` None takes the table's choice."""

    def run(x: Tensor, g: Group) -> list[Tensor]:
        experts = g.vectors.shape[0] // len(g.weights)
        name = method or formulation(x.shape[0], g.b_RO[0].shape[0], x.shape[1], x.dtype == torch.float32)
        return torch.ops.quietgoose.routed_linears(
            x, g.weights, [], g.a_RI, g.b_RO, g.gates, g.tables, experts, RANK, k, False, name
        )

    return run


def taken(layer: Layer) -> list[str]:
    """What `ours` takes for each group of a layer when the table chooses."""
    wide = layer.dtype == torch.float32
    return [
        formulation(layer.tokens, g.b_RO[0].shape[0], width, wide) for g, (width, _) in zip(layer.copies[0], layer.plan)
    ]


def plain_concat(k: int) -> Callable[[Tensor, Group], list[Tensor]]:
    """The reference of kernels/routed_lora in plain PyTorch (masked concatenation)."""

    def run(x: Tensor, g: Group) -> list[Tensor]:
        experts = g.vectors.shape[0] // len(g.weights)
        weight, index = route_group(x, g.vectors, g.tables[3], experts, k)
        slots = [b.shape[0] for b in g.b_RO]
        hidden = masked_hidden(x, g.a_RI, g.tables[0], slots, weight, index, experts)
        return [
            torch.addmm(functional.linear(x, w), h, b) for w, h, b in zip(g.weights, hidden.split(slots, 1), g.b_RO)
        ]

    return run


def _route_site(x: Tensor, vectors_NI: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The reference implementation's router at one site: both sides standardised, softmax over all, k largest."""
    normal = functional.layer_norm(x.float(), x.shape[1:], eps=1e-5)
    p = functional.linear(normal, vectors_NI).softmax(1)
    weight, index = p.topk(k, dim=1)
    return (weight / (weight.sum(1, keepdim=True) + 1e-6)).to(x.dtype), index


def _sites(g: Group) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    return list(zip(g.weights, g.a_SNRI, g.b_SNOR, g.vectors.chunk(len(g.weights))))


def r_three(k: int) -> Callable[[Tensor, Group], list[Tensor]]:
    """The bank is stacked at every call; a loop over experts picks its tokens by boolean indexing (host synchronises)."""

    def run(x: Tensor, g: Group) -> list[Tensor]:
        found = []
        for w, a, b, v in _sites(g):
            a_bank, b_bank = torch.stack(list(a)), torch.stack(list(b))
            weight, index = _route_site(x, v, k)
            y = functional.linear(x, w)
            for expert in range(a.shape[0]):
                token, slot = torch.where(index == expert)
                if token.numel() == 0:
                    continue
                part = functional.linear(functional.linear(x[token], a_bank[expert]), b_bank[expert])
                y.index_add_(0, token, part * weight[token, slot, None])
            found.append(y)
        return found

    return run


def mttl(k: int) -> Callable[[Tensor, Group], list[Tensor]]:
    """A and B of every token merged with its weights ([T, I, r] and [T, r, O] in memory), then two batched products.

    Mixing both factors is another function than mixing outputs (weights enter twice), so it has no error to report.
    """

    def run(x: Tensor, g: Group) -> list[Tensor]:
        found = []
        for w, a, b, v in _sites(g):
            weight, index = _route_site(x, v, k)
            dense = torch.zeros(x.shape[0], a.shape[0], device=x.device, dtype=x.dtype).scatter_(1, index, weight)
            merged_a, merged_b = torch.einsum("tn,nri->tir", dense, a), torch.einsum("tn,nor->tro", dense, b)
            h = torch.bmm(x[:, None], merged_a)
            found.append(functional.linear(x, w) + torch.bmm(h, merged_b)[:, 0])
        return found

    return run


def arrow(k: int) -> Callable[[Tensor, Group], list[Tensor]]:
    """PEFT 0.21's ArrowLoraLinearLayer without its host-to-device copy (so that it can be captured)."""

    def run(x: Tensor, g: Group) -> list[Tensor]:
        found = []
        for w, a, b, v in _sites(g):
            top, index = (x @ v.to(x.dtype).t()).abs().topk(k, dim=1)
            score = x.new_full((x.shape[0], a.shape[0]), float("-inf")).scatter_(1, index, top)
            share = score.softmax(1)
            z = torch.einsum("tf,erf->ter", x, torch.stack(list(a)))
            every = torch.einsum("ter,eor->teo", z, torch.stack(list(b))) * 1.0
            found.append(functional.linear(x, w) + torch.einsum("te,teo->to", share, every))
        return found

    return run


def grouped_mm(k: int) -> Callable[[Tensor, Group], list[Tensor]]:
    """PyTorch's grouped product over pairs sorted by expert; the outputs of all pairs [T k, O] are added up at the end."""
    product: Any = getattr(functional, "grouped_mm", None) or torch._grouped_mm

    def run(x: Tensor, g: Group) -> list[Tensor]:
        found = []
        for w, a, b, v in _sites(g):
            weight, index = _route_site(x, v, k)
            order = index.flatten().sort(stable=True).indices
            token = order // k
            ends = torch.zeros(a.shape[0], device=x.device, dtype=torch.int32)
            ends = ends.scatter_add_(0, index.flatten(), torch.ones_like(index.flatten(), dtype=torch.int32))
            ends = ends.cumsum(0, dtype=torch.int32)
            h = product(x[token], a.transpose(1, 2), offs=ends) * weight.flatten()[order, None]
            found.append(functional.linear(x, w).index_add_(0, token, product(h, b.transpose(1, 2), offs=ends)))
        return found

    return run


PEERS: dict[str, Callable[[int], Callable[[Tensor, Group], list[Tensor]]]] = {
    "plain_concat": plain_concat,
    "grouped_mm": grouped_mm,
    "peft_arrow": arrow,
    "r_three": r_three,
    "mttl": mttl,
}
OURS = ("decode", "fused", "stock", "split", "split_fused", "persistent", "grouped")
