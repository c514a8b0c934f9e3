"""Routed LoRA: the sum of the chosen experts' low-rank updates per token (mathematics in README.md)."""

from . import operators
from .gradients import route_sparingly
from .layout import GroupShape, GroupTables, PreparedGates, group_shape, group_tables, split_gates, stack_factors
from .reference import (
    add_routed_lora,
    add_row_lora,
    dense_weights,
    gate_logits,
    gate_scores,
    masked_hidden,
    naive,
    route_group,
    routed_lora,
    slot_weights,
)
from .rows import linear_rows, shrink_rows
from .tiles import by_pairs, formulation

__all__ = [
    "GroupShape",
    "GroupTables",
    "PreparedGates",
    "add_routed_lora",
    "add_row_lora",
    "by_pairs",
    "dense_weights",
    "formulation",
    "gate_logits",
    "gate_scores",
    "group_shape",
    "group_tables",
    "linear_rows",
    "masked_hidden",
    "naive",
    "operators",
    "route_group",
    "route_sparingly",
    "routed_lora",
    "shrink_rows",
    "slot_weights",
    "split_gates",
    "stack_factors",
]
