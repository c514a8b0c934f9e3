"""What a thought loss trains: a model, and the trainable tensors that stand between parameters and loss.

`thought_loss` differentiates with respect to tensors, not parameters: they come out of module forwards once per
micro-batch (under ZeRO-3 a parameter is whole only there), enter one autograd function as inputs, and the model is made
to use them, or detached copies of them, by `bind`. train/ writes the policy of routed LoRA; this file has the two that
need nothing but the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from .parameters import ThoughtParameters, ThoughtTensors


@dataclass(frozen=True)
class PolicyTensors:
    """Everything trainable of one micro-batch, with its graph.

    thought    START, END, mixing head
    adapters   the rest: what the model's adapters read, or the model's own parameters; may be empty
    """

    thought: ThoughtTensors
    adapters: tuple[Tensor, ...] = ()

    def flat(self) -> list[Tensor]:
        """thought.flat(), then adapters."""
        return [*self.thought.flat(), *self.adapters]

    def with_flat(self, tensors: Sequence[Tensor]) -> PolicyTensors:
        """The inverse of `flat`."""
        count = len(self.thought.flat())
        return PolicyTensors(self.thought.with_flat(tensors[:count]), tuple(tensors[count:]))


class Policy(Protocol):
    """A model in eval mode (no dropout) and its trainable tensors.

    `bind(tensors)` makes `model` use tensors.adapters within the context; calls nest. A tensor of `adapters` that is a
    leaf (an nn.Parameter of the model) is differentiated as it stands and never replaced, so binding it is a no-op;
    every other one is replaced by detached leaves during the gradient pass, and by static copies in a captured rollout.
    """

    @property
    def model(self) -> Any:
        """A causal LM of transformers."""
        ...

    def tensors(self) -> PolicyTensors:
        """Fresh tensors with a graph to the parameters; module forwards run here."""
        ...

    def bind(self, tensors: PolicyTensors) -> AbstractContextManager[None]: ...


class ModelPolicy:
    """Thoughts on a plain model: with its own parameters trained where they need gradients, or everything frozen.

    Full fine-tuning: leave `requires_grad` on (ZeRO 0-2). Embeddings and head only: `model.requires_grad_(False)`.
    """

    def __init__(self, model: nn.Module, parameters: ThoughtParameters) -> None:
        self.model = model
        self.parameters = parameters

    def tensors(self) -> PolicyTensors:
        return PolicyTensors(self.parameters.tensors(), tuple(p for p in self.model.parameters() if p.requires_grad))

    @contextmanager
    def bind(self, tensors: PolicyTensors) -> Iterator[None]:
        """The model holds its parameters itself."""
        yield
