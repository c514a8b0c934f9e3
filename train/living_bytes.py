"""How much memory a piece of code would hold, found by running it with tensors that have shapes and no numbers.

    with Shapes(): peak = peak_bytes(lambda: job(batch).total.backward(), there)

The code is the one that trains, its tensors are torch's fake CPU tensors, and the bytes of all storages alive at once are
counted: what is kept for the backward pass, what is recomputed, work space of single operations. Called by image_memory.py and
thought_memory.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Shapes(FakeTensorMode):
    """Tensors without numbers; a copy of a module (the average that teaches) stays among them."""

    def __deepcopy__(self, memo: Any) -> Shapes:
        return self


class LivingBytes(TorchDispatchMode):
    """Bytes of the storages that operations made while this was entered: `now` alive, and `peak`, the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def before(self, tensors: Any) -> None:
        """These were there before and do not count."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def most(self, step: Callable[[], Any]) -> int:
        """The most that lives at once while `step` runs, above what lived before it."""
        before = self.peak = self.now
        step()
        return self.peak - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.now -= size


def peak_bytes(step: Callable[[], Any], before: Any) -> int:
    """The most that lives at once while `step` runs; the tensors `before` do not count."""
    with LivingBytes() as living:
        living.before(before)
        step()
    return living.peak


def drop_gradients(job: nn.Module) -> None:
    """Let go of every gradient as soon as it is whole: those are counted with the optimizer."""
    for parameter in job.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
