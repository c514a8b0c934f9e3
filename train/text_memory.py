"""What a step of a language model holds at its peak, found by taking that step with tensors that have shapes and no numbers.

The helpers here make a model of the meta device one of fake CPU tensors, with one and with two of its repeated layers: what
lives in a step is a fixed part and a part a layer, so two steps tell of all layers, and a dry run takes seconds. `base_bytes` is
the `base` stage's step; the `thoughts` stage's is in thought_memory.py. Weights, gradients and optimizer are not counted.
Called by train/plan.py.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import QuietGooseError
from .data.attention import model_inputs
from .jobs.base import LanguageModelJob
from .living_bytes import LivingBytes, Shapes, drop_gradients
from .types import Batch

FEW = 1
"""Layers of the smaller of two models."""


class Answered(LivingBytes):
    """As LivingBytes, for code that asks its tensors: every question gets `answer`, every number is 1, and what is sought is found
    everywhere."""

    answer: bool = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.answer if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.equal.default:
            return self.answer
        if func is torch.ops.aten.nonzero.default:
            return torch.zeros(args[0].numel(), args[0].dim(), dtype=torch.int64, device=args[0].device)
        return super().__torch_dispatch__(func, types, args, kwargs)


Measure = Callable[[Any, Answered], tuple[int, ...]]
"""Bytes of a model of fake tensors; called within `Shapes` and `Answered`."""


def over_layers(model: nn.Module, measure: Measure) -> tuple[int, ...]:
    """What `measure` would find of a model of the meta device with all its layers. The model stays as it is."""
    place = _repeated(model)
    count = 0 if place is None else len(model.get_submodule(place))  # type: ignore[arg-type]
    if place is None or count <= FEW + 1:
        return _measured(copy.deepcopy(model), measure)
    try:
        less, more = (_measured(_shortened(model, place, layers), measure) for layers in (FEW, FEW + 1))
    except QuietGooseError:  # the first layers lack what the others have, for instance a linear that is named in full
        return _measured(copy.deepcopy(model), measure)
    return tuple(b + (count - FEW - 1) * (b - a) for a, b in zip(less, more))


def base_bytes(model: nn.Module, rows: int, length: int) -> int:
    """Peak of the `base` stage's step of `rows` rows in one process. fp32, as that stage trains."""

    def measure(fake: Any, living: Answered) -> tuple[int, ...]:
        job = LanguageModelJob(fake, model_inputs)
        drop_gradients(job)
        batch = shapes_of_batch(rows, length)
        return (living.most(lambda: job(batch).sum_E.sum().backward()),)

    return over_layers(copy.deepcopy(model).float().train(), measure)[0]


def shapes_of_batch(rows: int, length: int) -> Batch:
    """A micro-batch without numbers."""
    whole = torch.zeros(rows, length, dtype=torch.int64)
    return Batch(whole, whole.clone(), whole.clone(), whole.clone(), whole[:, 0].clone(), whole[:, 0].clone())


def _measured(model: nn.Module, measure: Measure) -> tuple[int, ...]:
    with Shapes(), _quiet(), Answered() as living:
        return measure(_lose_numbers(model), living)


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch warns of fake tensors' pointers and logs whole traces of what it then raises."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield
    finally:
        log.setLevel(level)


def _repeated(model: nn.Module) -> str | None:
    """The name of the list that holds the repeated layers."""
    count = getattr(model.config, "num_hidden_layers", None)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return names[0] if len(names) == 1 else None


def _shortened(model: nn.Module, place: str, layers: int) -> nn.Module:
    """A copy with the first few layers."""
    model = copy.deepcopy(model)
    parent, _, leaf = place.rpartition(".")
    holder = model.get_submodule(parent)
    setattr(holder, leaf, nn.ModuleList(list(getattr(holder, leaf))[:layers]))
    model.config.num_hidden_layers = layers  # type: ignore[union-attr]
    return model


def _lose_numbers(model: nn.Module) -> nn.Module:
    """The same model with fake CPU tensors in place of its own, wherever those are; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    made[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]
    return model
