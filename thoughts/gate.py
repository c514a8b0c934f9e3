"""Which tokens a model thinks before while it generates: `think_at` of ThoughtGeneration.

    "every"            every new token
    "never"            none: plain generation
    "entropy>1.5"      those whose ordinary prediction has more entropy than this, in nats
    a bool tensor      [B or 1, columns] over prompt and new tokens: True at the column after which to think
    a function         of the token ids so far, int64 [B, n] -> bool [B]

Caller: thinking.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..base.errors import RecipeError

ThinkAt = str | Tensor | Callable[[Tensor], Tensor]
ENTROPY = re.compile(r"entropy\s*>\s*(\d+(?:\.\d*)?|\.\d+)")


class Gate:
    """The parsed `think_at`. `threshold`: nats of entropy, None where entropy does not matter."""

    def __init__(self, think_at: ThinkAt) -> None:
        """RecipeError CFG-091 for anything else than what the module lists."""
        self.threshold: float | None = None
        self.columns: Tensor | None = None
        self.function: Callable[[Tensor], Tensor] | None = None
        self.kind: Literal["every", "never", "entropy", "columns", "function"]
        if isinstance(think_at, Tensor):
            if think_at.dtype != torch.bool or think_at.dim() != 2:
                raise _bad(f"a {think_at.dtype} tensor of shape {tuple(think_at.shape)}")
            self.kind, self.columns = "columns", think_at
        elif callable(think_at):
            self.kind, self.function = "function", think_at
        elif think_at in ("every", "never"):
            self.kind = think_at  # type: ignore[assignment]
        elif isinstance(think_at, str) and (found := ENTROPY.fullmatch(think_at.strip())):
            self.kind, self.threshold = "entropy", float(found[1])
        else:
            raise _bad(repr(think_at))

    def check(self, rows: int, columns: int) -> None:
        """RecipeError CFG-091 unless a tensor covers `rows` rows and `columns` columns."""
        if self.columns is None:
            return
        have = self.columns.shape
        if have[0] not in (1, rows) or have[1] < columns:
            raise RecipeError(
                f"think_at has shape {tuple(have)}: this call has {rows} rows and thinks after up to {columns} columns "
                f"(prompt with padding, and new tokens but the last); allowed is [1 or {rows}, at least {columns}]",
                code="CFG-091",
            )

    def wants(self, ids_BL: Tensor) -> Tensor | None:
        """bool [B]: which rows think before the token after `ids_BL`; None: entropy decides, or all do (`every`)."""
        rows, length = ids_BL.shape
        if self.kind == "never":
            return torch.zeros(rows, dtype=torch.bool, device=ids_BL.device)
        if self.columns is not None:
            return self.columns[:, length - 1].to(ids_BL.device).expand(rows)
        if self.function is not None:
            wanted = self.function(ids_BL)
            if not isinstance(wanted, Tensor) or wanted.dtype != torch.bool or wanted.shape != (rows,):
                shown = tuple(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
                raise RecipeError(
                    f"the think_at function returned {shown}: a bool tensor of shape ({rows},) is needed",
                    code="CFG-091",
                )
            return wanted.to(ids_BL.device)
        return None


def _bad(value: str) -> RecipeError:
    return RecipeError(
        f'think_at is {value}; allowed: "every", "never", "entropy>x" with x in nats, a bool tensor [rows, columns], or a '
        "function of the token ids that returns a bool tensor [rows]",
        code="CFG-091",
    )
