"""Tile shapes of the kernels, by the size of a call: a table that is written down, not searched for at run time.

`benchmarks/routed_lora.py --parts tune` measures the candidates below and prints these tables anew.
"""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """rows: tokens a program holds; columns: outputs or slots; depth: step of the inner loop."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


LIMITLESS = 2**62
MOST_FUSED = 64

Table = list[tuple[int, int, Tiles]]
"""Entries: tokens up to, input width up to, tiles; the first that holds."""

# Estimates still: tiles were timed (benchmarks/results/2026-11-26_routed_lora_h100_first.json) with a first pass that raced and
# read x once; today's reads it twice, and only whole models have been timed with it (2026-11-26_routed_lora_h100.json there).
ROUTE_SHRINK: Table = [
    (256, LIMITLESS, Tiles(32, 64, 64, 4, 3)),
    (1024, LIMITLESS, Tiles(32, 64, 64, 4, 3)),
    (8192, LIMITLESS, Tiles(64, 128, 64, 4, 3)),
    (LIMITLESS, LIMITLESS, Tiles(128, 256, 64, 8, 3)),
]
# The kernel timed there is today's, behind the other first pass: up to 1,024 tokens the fastest of its candidates is the entry
# here, beyond (256, 128, 64, 8, 3) took 6 to 7 percent less for a layer of SmolLM2 but has not been compared with fp64 there.
LINEAR_EXPAND: Table = [
    (256, LIMITLESS, Tiles(64, 64, 64, 4, 4)),
    (1024, LIMITLESS, Tiles(64, 64, 64, 4, 4)),
    (LIMITLESS, LIMITLESS, Tiles(128, 128, 64, 8, 3)),
]
# base products of one token: rows is 1, columns the outputs of a program. Measured in that file, as DECODE_UPDATE (whose first
# pass is another kernel): a layer of SmolLM2 0.040 ms (with the estimates that stood here before 0.042 to 0.047), of
# LLaMA3-8B 0.207 (0.220)
DECODE_ONE: Table = [
    (LIMITLESS, 2048, Tiles(1, 1, 1024, 4, 1)),
    (LIMITLESS, LIMITLESS, Tiles(1, 4, 2048, 4, 1)),
]
# routing and experts of few tokens: rows is not read, columns the outputs of a program, depth the numbers of A it holds
DECODE_UPDATE: Table = [
    (LIMITLESS, LIMITLESS, Tiles(1, 64, 16384, 8, 1)),
]
# `stock` adds the experts to a piece of the base's product while the L2 still holds it: tokens and outputs of a piece
STOCK_PIECE: list[int] = [4096, 2048]
CANDIDATES: dict[str, list[Tiles]] = {
    "route_shrink": [
        Tiles(32, 64, 64, 4, 3), Tiles(64, 64, 64, 4, 3), Tiles(64, 128, 64, 4, 3), Tiles(64, 128, 64, 4, 2),
        Tiles(128, 64, 64, 4, 3), Tiles(128, 128, 64, 4, 3), Tiles(128, 128, 64, 8, 3), Tiles(128, 256, 64, 8, 3),
    ],
    "linear_expand": [
        Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 3), Tiles(64, 128, 64, 4, 4), Tiles(128, 64, 64, 4, 3),
        Tiles(128, 64, 64, 4, 4), Tiles(128, 128, 64, 4, 3), Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 64, 8, 4),
        Tiles(128, 256, 64, 8, 3), Tiles(256, 128, 64, 8, 3),
    ],
    "decode_one": [
        Tiles(1, 1, 1024, 4, 1), Tiles(1, 2, 1024, 4, 1), Tiles(1, 4, 1024, 4, 1), Tiles(1, 8, 512, 4, 1),
        Tiles(1, 8, 1024, 4, 1), Tiles(1, 4, 2048, 4, 1), Tiles(1, 2, 2048, 4, 1), Tiles(1, 4, 2048, 8, 1),
    ],
    "decode_update": [
        Tiles(1, 64, 16384, 8, 1), Tiles(1, 128, 8192, 4, 1), Tiles(1, 128, 16384, 8, 1), Tiles(1, 128, 16384, 4, 1),
        Tiles(1, 256, 16384, 8, 1), Tiles(1, 512, 16384, 8, 1),
    ],
}  # fmt: skip
STOCK_PIECES = [[2**40, 2**40], [8192, 2**40], [4096, 4096], [4096, 2048], [2048, 2048], [8192, 1024]]


def choose(table: Table, num_tokens: int, width: int) -> Tiles:
    """The table's entry for this many tokens of this width."""
    return next(found for tokens, widths, found in table if num_tokens <= tokens and width <= widths)


def route_tiles(num_tokens: int, width: int, padded_experts: int, shrink: bool) -> Tiles:
    """Tiles of the routing kernel. More than MOST_FUSED experts leave no registers for a shrink beside their scores."""
    if shrink:
        return choose(ROUTE_SHRINK, num_tokens, width)
    few = num_tokens <= 8192
    if padded_experts <= MOST_FUSED:
        return Tiles(32 if few else 64, 16, 64, 4, 3)
    return Tiles(64, 16, 64, 8, 2)


# Which formulation takes a call: read downwards, the first line that holds. Columns: tokens up to, rank slots of a site
# up to, input width up to, formulation. Measured (same file): `decode` up to 64 tokens, at 16 and 64 tokens the fastest or within
# 1 percent of it (4 experts at 64 tokens: `fused` 14 percent less); at 128 it still is with 166 experts, untested there. What
# lies beyond 64 tokens was timed with the racing first pass, so `fused` against `stock` against `grouped` are estimates.
CROSSOVERS: list[tuple[int, int, int, str]] = [
    (64, LIMITLESS, LIMITLESS, "decode"),
    (LIMITLESS, 512, 2048, "fused"),
    (LIMITLESS, 512, LIMITLESS, "stock"),
    (LIMITLESS, LIMITLESS, LIMITLESS, "grouped"),
]


def formulation(num_tokens: int, slots: int, width: int, wide: bool = False) -> str:
    """decode, fused, stock or grouped for a call; `wide` (fp32 numbers) leaves base products to the library."""
    name = next(
        found for tokens, most_slots, most_width, found in CROSSOVERS
        if num_tokens <= tokens and slots <= most_slots and width <= most_width
    )  # fmt: skip
    return "stock" if wide and name == "fused" else name


def by_pairs(num_tokens: int, slots: int, width: int) -> bool:
    """Whether training sorts (token, slot) pairs; else masked concatenation in plain PyTorch."""
    return formulation(num_tokens, slots, width) == "grouped"
