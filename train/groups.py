"""The optimizer groups of a job: together exactly its trainables, all fp32. Called by train/engine.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..base.errors import RecipeError


def check_groups(module: nn.Module, groups: Sequence[Mapping[str, Any]]) -> dict[str, nn.Parameter]:
    """Name -> parameter for all grouped parameters; RecipeError CFG-030 if groups and trainables do not match or are
    not fp32 (rounding a gate to bf16 is a PHATGOOSE trap)."""
    grouped = [id(p) for group in groups for p in group["params"]]
    wanted = {id(p) for p in module.parameters() if p.requires_grad}
    named = {name: p for name, p in module.named_parameters() if id(p) in set(grouped)}
    problems = []
    if len(grouped) != len(set(grouped)):
        problems.append("a parameter is in two groups")
    if wanted != set(grouped):
        problems.append(f"{len(wanted)} parameters need gradients, {len(set(grouped))} are in groups")
    problems += [f"{name} is {p.dtype}, not float32" for name, p in named.items() if p.dtype != torch.float32]
    names = [str(group["name"]) for group in groups]
    if len(set(names)) != len(names):
        problems.append("two groups have one name")
    if problems:
        raise RecipeError(f"optimizer groups: {'; '.join(problems[:5])}", code="CFG-030")
    return named
