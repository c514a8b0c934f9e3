"""What thinking adds to a model: the START and END embeddings and the mixing head.

    h = (1 - w) * h_base + w * h_thought,   w = w0 + MLP([h_base; h_thought])       (Quiet-STaR, section 4.3)

Two vectors, not vocabulary rows: a model can neither emit nor be given them. They are set once, in the constructor, and
never again: loading, resuming and the first forward keep the bits. All parameters are read through `forward` alone,
because under ZeRO-3 they are whole only there; everything else takes the plain tensors of `ThoughtTensors`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..base.errors import QuietGooseError
from ..base.seeding import generator
from .config import HeadKind, ThoughtConfig


@dataclass(frozen=True)
class ThoughtTensors:
    """The values of `ThoughtParameters`, fp32, with their graph.

    meta_2D   START and END
    head      the MLP's weight, bias, weight, bias, weight; empty for kind "thought"
    """

    meta_2D: Tensor
    head: tuple[Tensor, ...]
    kind: HeadKind
    initial_weight: float

    def flat(self) -> list[Tensor]:
        """meta, then the head's tensors."""
        return [self.meta_2D, *self.head]

    def with_flat(self, tensors: Sequence[Tensor]) -> ThoughtTensors:
        """The same kind of head over other tensors, in the order of `flat`."""
        return replace(self, meta_2D=tensors[0], head=tuple(tensors[1:]))


class ThoughtParameters(nn.Module):
    """START, END and the mixing head of a model of width D; fp32.

    meta_2D          START and END, at first the embeddings given
    head_0 .. head_4 Linear(2D, D), ReLU, Linear(D, D), ReLU, Linear(D, 1) without bias and zero: w = w0 everywhere at first

    All are registered on this module itself and `forward` returns plain tensors: ZeRO-3's hooks look no deeper.
    """

    def __init__(self, start_D: Tensor, end_D: Tensor, config: ThoughtConfig, seed: int) -> None:
        """`start_D`, `end_D`: what the two embeddings start from, for example those of a token."""
        super().__init__()
        width = start_D.shape[-1]
        self.kind: HeadKind = config.head
        self.initial_weight = config.initial_weight
        self.meta_2D = nn.Parameter(torch.stack([start_D.detach(), end_D.detach()]).float().cpu().clone())
        initial = _initial_head(width, seed) if config.head != "thought" else []
        self._head_names = tuple(f"head_{index}" for index in range(len(initial)))
        for name, parameter in zip(self._head_names, initial):
            self.register_parameter(name, parameter)

    @classmethod
    def from_token(cls, model: nn.Module, token: int, config: ThoughtConfig, seed: int) -> ThoughtParameters:
        """START and END both from the embedding of one token ("---" in the paper), or of a token each: see __init__."""
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        with torch.no_grad():  # through the module: it may scale its rows, and under ZeRO-3 they are whole only there
            row_D = embedding(torch.tensor([token], device=next(model.parameters()).device))[0]
        return cls(row_D, row_D, config, seed)

    def forward(self) -> tuple[Tensor, ...]:
        """meta [2, D], then the head's tensors, with their graph; `tensors` names them."""
        return (self.meta_2D.clone(), *(self.get_parameter(name).clone() for name in self._head_names))

    def tensors(self) -> ThoughtTensors:
        """The values; the only way to read them."""
        meta_2D, *head = self()
        return ThoughtTensors(meta_2D, tuple(head), self.kind, self.initial_weight)


def _initial_head(width: int, seed: int) -> list[nn.Parameter]:
    """Linear layers as PyTorch initialises them, uniform in +-1 / sqrt(inputs); the last one zero."""
    random = generator(seed, "thoughts", "head")

    def uniform(*shape: int, inputs: int) -> nn.Parameter:
        bound = inputs**-0.5
        return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound, generator=random))

    return [
        uniform(width, 2 * width, inputs=2 * width),
        uniform(width, inputs=2 * width),
        uniform(width, width, inputs=width),
        uniform(width, inputs=width),
        nn.Parameter(torch.zeros(1, width)),
    ]


def mixing_weight(tensors: ThoughtTensors, base: Tensor, thought: Tensor) -> Tensor:
    """w, fp32 (fp64 for fp64) [..., 1], for hidden states [..., D] of the base path and of the thought.

    paper     w = w0 + MLP, unbounded
    bounded   w = sigmoid(logit(w0) + MLP)
    thought   w = 1: only the thinking path predicts (RLP)
    """
    compute = torch.promote_types(base.dtype, torch.float32)
    if tensors.kind == "thought":
        return torch.ones(*base.shape[:-1], 1, dtype=compute, device=base.device)
    raw = _mlp(tensors.head, base.to(compute), thought.to(compute))
    if tensors.kind == "bounded":
        return torch.sigmoid(raw + math.log(tensors.initial_weight / (1 - tensors.initial_weight)))
    return raw + tensors.initial_weight


def mix(tensors: ThoughtTensors, base: Tensor, thought: Tensor) -> tuple[Tensor, Tensor]:
    """((1 - w) base + w thought, w [..., 1]), both at least fp32: rounded to 16 bits, what a thought adds at a small w would be
    lost. At w = 0 the result is `base`; for kind "thought" it is `thought`, in its own dtype."""
    weight = mixing_weight(tensors, base, thought)
    if tensors.kind == "thought":
        return thought, weight
    return torch.lerp(base.to(weight.dtype), thought.to(weight.dtype), weight), weight


def _mlp(head: Sequence[Tensor], base: Tensor, thought: Tensor) -> Tensor:
    if len(head) != 5:
        raise QuietGooseError(f"the mixing head has {len(head)} tensors, it needs 5", code="THT-001")
    w1, b1, w2, b2, w3 = (p.to(base.dtype) for p in head)
    hidden = functional.relu(functional.linear(torch.cat([base, thought], dim=-1), w1, b1))
    return functional.linear(functional.relu(functional.linear(hidden, w2, b2)), w3)
