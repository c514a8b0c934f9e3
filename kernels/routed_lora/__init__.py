"""Routed LoRA: the sum of the chosen experts' low-rank updates per token (mathematics in README.md)."""

from .reference import (
    add_routed_lora,
    add_row_lora,
    dense_weights,
    gate_logits,
    naive,
    routed_lora,
    slot_weights,
)

__all__ = [
    "add_routed_lora",
    "add_row_lora",
    "dense_weights",
    "gate_logits",
    "naive",
    "routed_lora",
    "slot_weights",
]
