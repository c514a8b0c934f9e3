"""Calls of thought_attention for its tests: random tensors, poisoned wherever nothing may be read, and one comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from quietgoose.kernels.testing import assert_close
from quietgoose.kernels.thought_attention import thought_attention

NAMES = ("q", "prefix_k", "prefix_v", "own_k", "own_v")


@dataclass
class Problem:
    """One call. Sizes as in kernels/thought_attention/layout.py; anchors drawn at random and ascending where not given.

    used        filled own slots where that is not N; the others are NaN
    documents   first positions of the packed documents of every row
    like_model  memory layout of a model's projections: heads beside each other
    """

    B: int = 1
    K: int = 1
    G: int = 1
    A: int = 3
    S: int = 1
    M: int = 2
    N: int | None = None
    L: int = 9
    D: int = 16
    used: int | None = None
    documents: tuple[int, ...] = (0,)
    anchors: list[list[int]] | None = None
    like_model: bool = True
    scale: float | None = None
    seed: int = 0
    tensors: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.N = self.M if self.N is None else self.N
        if self.anchors is None:
            rows = [torch.randperm(self.L, generator=g)[: self.A].sort().values for _ in range(self.B)]
            self.anchor = torch.stack(rows)
        else:
            self.anchor = torch.tensor(self.anchors)
            self.A = self.anchor.shape[1]
        firsts = torch.tensor(self.documents)
        self.start = firsts[(firsts <= self.anchor.clamp(min=0).unsqueeze(-1)).sum(-1) - 1]
        self.start[self.anchor < 0] = 77  # ignored there
        H = self.K * self.G
        self.tensors = [
            self._six(H, self.M, g), *(torch.randn(self.B, self.K, self.L, self.D, generator=g) for _ in range(2)),
            *(self._six(self.K, self.N, g) for _ in range(2)),
        ]  # fmt: skip
        self.grad = torch.randn(self.B, H, self.A, self.S, self.M, self.D, generator=g)
        padding = self.anchor < 0
        for x in (self.tensors[0], *self.tensors[3:], self.grad):
            x.masked_fill_(padding[:, None, :, None, None, None], float("nan"))
        if self.used is not None:
            for x in self.tensors[3:]:
                x[..., self.used :, :] = float("nan")

    def _six(self, heads: int, width: int, g: torch.Generator) -> torch.Tensor:
        if not self.like_model:
            return torch.randn(self.B, heads, self.A, self.S, width, self.D, generator=g)
        x = torch.randn(self.B, self.A * self.S * width, heads, self.D, generator=g).transpose(1, 2)
        return x.unflatten(2, (self.A, self.S, width))

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same problem with its numbers rounded to dtype."""
        self.tensors = [x.to(dtype) for x in self.tensors]
        self.grad = self.grad.to(dtype)
        return self

    def run(
        self,
        call: Callable[..., torch.Tensor] = thought_attention,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        length_on_device: bool = True,
        **options: Any,
    ) -> dict[str, torch.Tensor]:
        """Output and the five gradients, by name, on the CPU."""
        inputs = [x.to(device, dtype or x.dtype).detach().requires_grad_() for x in self.tensors]
        length: Any = self.used
        if length is not None and length_on_device:
            length = torch.tensor([length], device=device)
        scale = self.D**-0.5 if self.scale is None else self.scale
        out = call(*inputs, self.anchor.to(device), self.start.to(device), length, scale, **options)
        gradients = torch.autograd.grad(out, inputs, self.grad.to(device, dtype or self.grad.dtype))
        return {"out": out.detach().cpu()} | {f"d{n}": x.cpu() for n, x in zip(NAMES, gradients)}

    def check(self, call: Callable[..., torch.Tensor] = thought_attention, **options: Any) -> dict[str, torch.Tensor]:
        """`call` equals the reference in fp64 on output and gradients; at padding both are exactly 0."""
        dtype = self.tensors[0].dtype
        got = self.run(call, **options)
        want = self.run(dtype=torch.float64, implementation="reference")
        limit = 1e-5 if dtype == torch.float32 else None  # tighter than the table: it is what the method asks for
        for name, x in got.items():
            assert x.dtype == dtype, name
            direction = "forward" if name == "out" else "gradient"
            assert_close(name, x, want[name].to(x.dtype if dtype == torch.float64 else torch.float32), dtype=dtype,
                         direction=direction, limit=limit)  # fmt: skip
        padding = (self.anchor < 0)[:, None, :, None, None, None]
        for name in ("out", "dq", "down_k", "down_v"):
            x = got[name]
            assert not bool(x[padding.expand_as(x)].any()), name
        for name in ("down_k", "down_v"):
            assert self.used is None or not bool(got[name][..., self.used :, :].any()), name
        return got


SHAPES: dict[str, dict[str, Any]] = {
    "one of everything": {"B": 1, "A": 1, "S": 1, "M": 1, "L": 1},
    "one anchor": {"B": 2, "K": 2, "G": 3, "A": 1, "S": 2, "M": 3, "L": 20},
    "every position": {"B": 2, "K": 1, "G": 3, "A": 19, "S": 2, "M": 3, "L": 19},
    "sparse": {"B": 2, "K": 2, "G": 1, "A": 5, "S": 3, "M": 5, "L": 63},
    "groups of four": {"B": 1, "K": 2, "G": 4, "A": 6, "S": 1, "M": 2, "L": 33, "like_model": False},
    "head dim 64": {"B": 1, "K": 1, "G": 3, "A": 7, "S": 2, "M": 4, "L": 40, "D": 64},
    "head dim 128": {"B": 1, "K": 1, "G": 1, "A": 4, "S": 1, "M": 3, "L": 18, "D": 128},
    "head dim 24, own scale": {"B": 1, "K": 1, "G": 2, "A": 4, "S": 1, "M": 3, "L": 18, "D": 24, "scale": 0.31},
    "rollout": {"B": 2, "K": 2, "G": 2, "A": 9, "S": 2, "M": 1, "N": 5, "L": 33, "used": 3},
    "rollout, first step": {"B": 1, "K": 1, "G": 3, "A": 20, "S": 1, "M": 1, "N": 4, "L": 20, "used": 1},
    "several queries in a longer branch": {"B": 1, "K": 1, "G": 2, "A": 5, "S": 2, "M": 2, "N": 6, "L": 17, "used": 5},
    "full branch": {"B": 1, "K": 1, "G": 2, "A": 5, "S": 2, "M": 2, "N": 4, "L": 17},
    "packed documents": {
        "B": 2, "K": 2, "G": 3, "S": 2, "M": 3, "L": 50, "documents": (0, 7, 24, 40),
        "anchors": [[0, 6, 7, 23, 39, 49], [1, 12, 13, 24, 30, 41]],
    },
    "padding anchors": {
        "B": 2, "K": 1, "G": 3, "S": 2, "M": 3, "L": 40, "documents": (0, 11),
        "anchors": [[-1, 5, 20, -1, -1], [11, 12, -1, 39, -1]],
    },
    "a row of padding": {"B": 2, "K": 1, "G": 2, "M": 2, "L": 8, "anchors": [[-1, -1, -1], [0, 3, 7]]},
    "rollout with padding anchors": {
        "B": 2, "K": 1, "G": 2, "S": 2, "M": 1, "N": 4, "L": 20, "used": 2, "anchors": [[3, -1, 9], [-1, -1, 19]],
    },
    "any order": {"B": 1, "K": 1, "G": 1, "S": 2, "M": 9, "L": 100, "anchors": [[60, 3, -1, 99, 3, 41]]},
}  # fmt: skip
