"""Tile shapes of the kernels, by the size of a call: a table that is written down, not searched for at run time.

`benchmarks/routed_lora.py --parts tune` measures the candidates below and prints these tables anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

Content = TypeVar("Content")


class Tiles(NamedTuple):
    """rows: tokens a program holds; columns: outputs or slots; depth: step of the inner loop.

    Powers of two; columns of linear_expand by descriptors also the sum of two.

    loads   addresses. copies: by descriptors (descriptors.py). joined: so, and base product and expand in one loop
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    loads: str = "addresses"


LIMITLESS = 2**62
MOST_FUSED = 64

Table = list[tuple[int, int, Tiles]]
"""Entries: tokens up to, input width up to, tiles; the first that holds."""
CopiesTable = list[tuple[int, int, Tiles | None]]
"""The same for launches that copy by descriptors; None: by addresses, with the tiles of the other table."""

# Measured up to 32,768 tokens with a layer of SmolLM2 (benchmarks/results/2026-11-26_routed_lora_tune_h100.json); up to 512
# tokens estimates of before.
ROUTE_SHRINK: Table = [
    (256, LIMITLESS, Tiles(32, 64, 64, 4, 3)),
    (1024, LIMITLESS, Tiles(32, 64, 64, 4, 3)),
    (8192, LIMITLESS, Tiles(64, 128, 64, 4, 3)),
    (LIMITLESS, LIMITLESS, Tiles(128, 256, 64, 8, 4)),
]
# routing without a shrink, up to MOST_FUSED experts (columns is not read); same file
ROUTE_ONLY: Table = [
    (1024, LIMITLESS, Tiles(16, 16, 128, 2, 3)),
    (LIMITLESS, LIMITLESS, Tiles(64, 16, 64, 4, 3)),
]
# routing and shrink as two launches: tokens up to, width up to, whether
SHRINK_APART: list[tuple[int, int, bool]] = [
    (LIMITLESS, LIMITLESS, False),
]
# same file, from 1,024 tokens on
MASKED_SHRINK: Table = [
    (1024, LIMITLESS, Tiles(64, 64, 64, 4, 4)),
    (8192, LIMITLESS, Tiles(64, 128, 64, 4, 3)),
    (LIMITLESS, LIMITLESS, Tiles(128, 128, 64, 4, 3)),
]
# tokens of `stock` up to which a captured graph gets the base products as a branch of their own
BESIDE: list[int] = [8192]
# same file from 1,024 tokens on; below, the fastest of 2026-11-26_routed_lora_h100_first.json there, where this kernel was timed
LINEAR_EXPAND: Table = [
    (1024, LIMITLESS, Tiles(64, 64, 64, 4, 4)),
    (8192, LIMITLESS, Tiles(128, 64, 64, 4, 3)),
    (LIMITLESS, LIMITLESS, Tiles(256, 128, 64, 8, 4)),
]
# By descriptors: a layer of SmolLM2 with 4,096 tokens takes 0.171 ms instead of 0.208 by addresses, with 32,768 0.852 instead of
# 1.031 (2026-11-26_routed_lora_copies_h100.json there). Wider inputs were not timed.
LINEAR_EXPAND_COPIES: CopiesTable = [
    (1024, LIMITLESS, None),
    (8192, 2048, Tiles(128, 128, 64, 4, 3, "copies")),
    (LIMITLESS, 2048, Tiles(128, 192, 64, 4, 2, "copies")),
    (LIMITLESS, LIMITLESS, None),
]
ROUTE_SHRINK_COPIES: CopiesTable = [
    (1024, LIMITLESS, None),
    (8192, 2048, Tiles(128, 128, 64, 8, 4, "copies")),
    (LIMITLESS, 2048, Tiles(128, 256, 64, 8, 4, "copies")),
    (LIMITLESS, LIMITLESS, None),
]
# tokens from which eager calls make descriptors, too: an estimate of where a launch takes longer than they do
EAGER_COPIES: list[int] = [16384]
# base products of one token: rows is 1, columns the outputs of a program. Measured in 2026-11-26_routed_lora_h100_first.json,
# as DECODE_UPDATE (whose first pass is another kernel): a layer of SmolLM2 0.040 ms (with the estimates that stood here before
# 0.042 to 0.047), of LLaMA3-8B 0.207 (0.220)
DECODE_ONE: Table = [
    (LIMITLESS, 2048, Tiles(1, 1, 1024, 4, 1)),
    (LIMITLESS, LIMITLESS, Tiles(1, 4, 2048, 4, 1)),
]
# routing and experts of few tokens: rows is not read, columns the outputs of a program, depth the numbers of A it holds
DECODE_UPDATE: Table = [
    (LIMITLESS, LIMITLESS, Tiles(1, 64, 16384, 8, 1)),
]
# `stock` can add the experts to a piece of the base's product while the L2 still holds it: tokens and outputs of a piece.
# Pieces cost more than they save: a layer of SmolLM2 with 32,768 tokens takes 1.137 ms whole, 1.26 in pieces of [4096, 2048],
# one with 4,096 the same (2026-11-26_routed_lora_tune_h100.json)
STOCK_PIECE: list[int] = [2**40, 2**40]
CANDIDATES: dict[str, list[Tiles]] = {
    "route_shrink": [
        Tiles(32, 64, 64, 4, 3), Tiles(64, 64, 64, 4, 3), Tiles(64, 128, 64, 4, 3), Tiles(128, 64, 64, 4, 3),
        Tiles(128, 128, 64, 8, 3), Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 128, 8, 3), Tiles(128, 256, 64, 8, 4),
    ],
    "route_shrink_copies": [
        Tiles(64, 128, 64, 4, 3, "copies"), Tiles(64, 256, 64, 8, 3, "copies"), Tiles(128, 128, 64, 8, 3, "copies"),
        Tiles(128, 128, 64, 8, 4, "copies"), Tiles(128, 256, 64, 8, 3, "copies"), Tiles(128, 256, 64, 8, 4, "copies"),
    ],
    "route_only": [
        Tiles(16, 16, 128, 2, 3), Tiles(32, 16, 64, 2, 3), Tiles(32, 16, 64, 4, 3), Tiles(32, 16, 128, 4, 3),
        Tiles(64, 16, 64, 4, 3), Tiles(64, 16, 128, 4, 3), Tiles(128, 16, 64, 8, 3),
    ],
    "masked_shrink": [
        Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 3), Tiles(64, 128, 64, 4, 4), Tiles(64, 128, 128, 4, 3),
        Tiles(128, 64, 64, 4, 4), Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 64, 8, 4), Tiles(128, 128, 64, 4, 3),
        Tiles(128, 256, 64, 8, 3), Tiles(128, 256, 64, 8, 4), Tiles(256, 128, 64, 8, 3),
    ],
    "linear_expand": [
        Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 3), Tiles(128, 64, 64, 4, 3), Tiles(128, 64, 64, 4, 4),
        Tiles(128, 128, 64, 4, 3), Tiles(128, 128, 64, 8, 3), Tiles(128, 256, 64, 8, 3), Tiles(128, 256, 64, 8, 4),
        Tiles(256, 128, 64, 8, 3), Tiles(256, 128, 64, 8, 4),
    ],
    "linear_expand_copies": [
        Tiles(128, 64, 64, 4, 4, "copies"), Tiles(128, 128, 64, 4, 3, "copies"), Tiles(128, 128, 64, 8, 3, "copies"),
        Tiles(128, 192, 64, 4, 2, "copies"), Tiles(128, 192, 64, 8, 4, "copies"), Tiles(128, 256, 64, 8, 4, "copies"),
        Tiles(256, 128, 64, 8, 4, "copies"), Tiles(256, 192, 64, 8, 3, "copies"), Tiles(128, 64, 64, 4, 3, "joined"),
        Tiles(128, 128, 64, 4, 2, "joined"), Tiles(128, 192, 64, 8, 3, "joined"), Tiles(128, 256, 64, 8, 3, "joined"),
        Tiles(256, 128, 64, 8, 3, "joined"), Tiles(256, 192, 64, 8, 2, "joined"),
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


def choose(table: Sequence[tuple[int, int, Content]], num_tokens: int, width: int) -> Content:
    """The table's entry for this many tokens of this width."""
    return next(found for tokens, widths, found in table if num_tokens <= tokens and width <= widths)


def route_tiles(num_tokens: int, width: int, padded_experts: int, shrink: bool) -> Tiles:
    """Tiles of the routing kernel. More than MOST_FUSED experts leave no registers for a shrink beside their scores."""
    if shrink:
        return choose(ROUTE_SHRINK, num_tokens, width)
    if padded_experts <= MOST_FUSED:
        return choose(ROUTE_ONLY, num_tokens, width)
    return Tiles(64, 16, 64, 8, 2)


# Which formulation takes a call: read downwards, the first line that holds. Columns: tokens up to, rank slots of a site
# up to, input width up to, formulation. Measured with 16 experts and a layer of SmolLM2, ms (2026-11-26_routed_lora_tune_h100.json):
# 16 tokens decode 0.057, stock 0.057, fused 0.064; 64 tokens fused 0.056, decode 0.098; 4,096 tokens fused and stock about equal;
# 32,768 tokens fused 1.064, stock 1.14. The other lines come from the first kernels (2026-11-26_routed_lora_h100_first.json; up to
# 512 tokens they agreed with fp64): LLaMA3-8B's layer, 16 experts, 128 / 512 / 4,096 tokens, grouped 0.661 / 0.847 / 3.65, stock
# 0.743 / 0.996 / 3.14; SmolLM2's with 64 experts, 128 / 512, stock 0.131 / 0.229, grouped 0.181 / 0.192. Estimates: wider inputs
# beyond 512 tokens, where `stock` has another first pass today, and all other numbers of experts.
CROSSOVERS: list[tuple[int, int, int, str]] = [
    (16, LIMITLESS, 2048, "decode"),
    (LIMITLESS, 512, 2048, "fused"),
    (64, LIMITLESS, LIMITLESS, "decode"),
    (1024, 512, LIMITLESS, "grouped"),
    (LIMITLESS, 512, LIMITLESS, "stock"),
    (256, 1024, LIMITLESS, "stock"),
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
