"""Tile shapes of the kernels, by the size of a call: a table that is written down, not searched for at run time.

`benchmarks/routed_lora.py --parts tune` measures the candidates below and prints these tables anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from ..sizes import power_of_two

Content = TypeVar("Content")


class Tiles(NamedTuple):
    """rows: tokens a program holds; columns: outputs or slots; depth: step of the inner loop.

    Powers of two; columns of linear_expand by descriptors also the sum of two.

    loads      addresses. copies: by descriptors (descriptors.py). joined: so, and base product and expand in one loop
    registers  most a thread of route_shrink or masked_shrink may have, so that more programs fit on a multiprocessor
               (route_shrink's then wait for what statistics read, instead of reading it a step ahead); None: as many as it likes
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    loads: str = "addresses"
    registers: int | None = None


LIMITLESS = 2**62
MOST_FUSED = 64

Table = list[tuple[int, int, Tiles]]
"""Entries: tokens up to, input width up to, tiles; the first that holds."""
Lines = list[tuple[int, int, int, str]]
"""Entries: tokens, rank slots of a site and input width up to, formulation."""
CopiesTable = list[tuple[int, int, int, Tiles | None]]
"""For launches that copy by descriptors. Entries: tokens, input width and sites of the group up to, tiles; None: by addresses,
with the tiles of the other table."""

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
# the shrink where routing is a launch of its own (more than MOST_FUSED experts); same file, from 1,024 tokens on
MASKED_SHRINK: Table = [
    (1024, LIMITLESS, Tiles(64, 64, 64, 4, 4)),
    (8192, LIMITLESS, Tiles(64, 128, 64, 4, 3)),
    (LIMITLESS, LIMITLESS, Tiles(128, 128, 64, 4, 3)),
]
# measured with LINEAR_EXPAND_COPIES below
MASKED_SHRINK_COPIES: CopiesTable = [
    (1024, LIMITLESS, 3, None),
    (8192, 1024, 1, Tiles(128, 256, 64, 8, 4, "copies")),
    (8192, 1024, 2, Tiles(64, 128, 64, 4, 3, "copies")),
    (LIMITLESS, 1024, 3, Tiles(128, 128, 64, 4, 3, "copies")),
    (LIMITLESS, 2048, 1, Tiles(128, 256, 64, 8, 4, "copies")),
    (LIMITLESS, LIMITLESS, 3, None),
]
# What follows the library's product of `split`, `split_fused` and `persistent`: columns the slots written at a time, depth the numbers
# of x read at a time. A warp a token and site, which waits for no other, takes with its product 0.066, 0.032, 0.046 and 0.107 ms for
# LLaMA3-8B's groups with 4,096 tokens where four warps take 0.084, 0.037, 0.058 and 0.109; all groups with 512 tokens 0.068 and 0.070,
# with 128 0.050 and 0.051 (H100, 2026-11-27_routed_lora_persistent_h100.json). Up to 32 tokens an estimate: fewer programs than
# multiprocessors have room for, so that a wide x is read faster by four
WEIGH_PRODUCTS: Table = [
    (32, LIMITLESS, Tiles(1, 256, 1024, 4, 1)),
    (LIMITLESS, LIMITLESS, Tiles(1, 256, 512, 1, 1)),
]
# Whether a captured graph of `stock` and `split` gets the base products as a branch of their own: tokens up to, width up to,
# whether. A model of LLaMA3-8B's shape takes 1.151 times its base with the branch, 1.149 without, 1.121 without and in pieces
# (STOCK_PIECE), at 4,096 tokens; 1.200, 1.181, 1.176 at 2,048; 1.216, 1.205, 1.185 at 512 (replayed in turn on one
# H100, 2026-11-27_routed_lora_pieces_h100.json). Wide inputs of up to 256 tokens: an estimate
BESIDE: list[tuple[int, int, bool]] = [
    (8192, 2048, True),
    (256, LIMITLESS, True),
    (LIMITLESS, LIMITLESS, False),
]
# 2026-11-26_routed_lora_tune_h100.json from 1,024 tokens on; below, the fastest of 2026-11-26_routed_lora_h100_first.json there,
# where this kernel was timed
LINEAR_EXPAND: Table = [
    (1024, LIMITLESS, Tiles(64, 64, 64, 4, 4)),
    (8192, LIMITLESS, Tiles(128, 64, 64, 4, 3)),
    (LIMITLESS, LIMITLESS, Tiles(256, 128, 64, 8, 4)),
]
# By descriptors. SmolLM2 and LLaMA3-8B (wider than 2,048) on an H200, group by group (2026-11-26_routed_lora_overlap_h200.json
# there). A layer of SmolLM2 with 4,096 tokens takes 0.125 ms with these tables and OVERLAP where the tiles before them took 0.167,
# with 32,768 0.768 and 0.798
LINEAR_EXPAND_COPIES: CopiesTable = [
    (1024, 2048, 3, None),
    (256, 4096, 3, Tiles(128, 128, 64, 4, 3, "copies")),
    (256, LIMITLESS, 3, None),
    (8192, 1024, 1, Tiles(64, 192, 64, 4, 2, "copies")),
    (8192, 1024, 2, Tiles(128, 128, 64, 4, 2, "copies")),
    (8192, 1024, 3, Tiles(64, 192, 64, 4, 2, "copies")),
    (LIMITLESS, 1024, 1, Tiles(128, 192, 64, 4, 2, "copies")),
    (LIMITLESS, 1024, 2, Tiles(128, 128, 64, 4, 2, "copies")),
    (LIMITLESS, 1024, 3, Tiles(128, 192, 64, 4, 2, "copies")),
    (LIMITLESS, 2048, 3, Tiles(128, 144, 64, 4, 3, "copies")),
    (LIMITLESS, LIMITLESS, 3, Tiles(128, 128, 64, 4, 3, "copies")),
]
# persistent_linear, which copies by descriptors and whose stages are its buffers. More than three do not fit beside the tile that
# leaves. [128, 128] and [256, 128] made a layer of LLaMA3-8B's shape 1.5 and 1.3 times as slow (copies had no warp of their own then).
# Token blocks that share a column block in L2: 8, 12, 16 and 32 differ by less than two measurements
PERSISTENT_LINEAR: Table = [(LIMITLESS, LIMITLESS, Tiles(128, 256, 64, 8, 3))]
PERSISTENT_SWEEP = 16
ROUTE_SHRINK_COPIES: CopiesTable = [
    (1024, 4096, 2, None),
    (1024, 2048, 3, None),
    (256, LIMITLESS, 3, None),
    (1024, LIMITLESS, 3, Tiles(64, 128, 64, 4, 3, "copies", 168)),
    (8192, 1024, 1, Tiles(64, 128, 64, 4, 3, "copies", 168)),
    (8192, 1024, 3, Tiles(64, 128, 64, 4, 2, "copies", 168)),
    (8192, 2048, 3, Tiles(64, 128, 64, 4, 3, "copies")),
    (8192, LIMITLESS, 1, Tiles(64, 128, 64, 4, 3, "copies", 168)),
    (LIMITLESS, LIMITLESS, 3, Tiles(128, 256, 64, 8, 4, "copies")),
]
# Whether the launch that makes hm lets the linear_expand that follows it begin with its own last programs, on what
# multiprocessors have left (programmatic dependent launch, Hopper and newer): tokens up to, width up to, whether. Measured with
# the tables above at 4,096 tokens of SmolLM2 (a layer 0.125 ms, without 0.155) and at 32,768 (0.770, without 0.783); few tokens
# and wide inputs were not.
OVERLAP: list[tuple[int, int, bool]] = [
    (1024, LIMITLESS, False),
    (LIMITLESS, 2048, True),
    (LIMITLESS, LIMITLESS, False),
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
# `stock` and `split` can add the experts to a piece of the base's product while the L2 still holds it: tokens up to, width up to,
# (tokens, outputs) of a piece. About 16 MB of y, in 16 bits, where inputs are wide and tokens many (the file of BESIDE; layers
# with 8,192 tokens take 5.48 ms instead of 5.71, with 16,384 10.7 instead of 11.1; on a second card the model with 4,096 tokens
# 1.107 with this table, 1.158 with the branch). With SmolLM2 they cost more than they save: a layer with 32,768 tokens takes
# 1.137 ms whole, 1.26 in pieces of [4096, 2048], one with 4,096 the same (2026-11-26_routed_lora_tune_h100.json)
STOCK_PIECE: list[tuple[int, int, tuple[int, int]]] = [
    (LIMITLESS, 2048, (2**40, 2**40)),
    (256, LIMITLESS, (2**40, 2**40)),
    (1024, LIMITLESS, (2**40, 8192)),
    (2048, LIMITLESS, (2**40, 4096)),
    (LIMITLESS, LIMITLESS, (4096, 2048)),
]
CANDIDATES: dict[str, list[Tiles]] = {
    "route_shrink": [
        Tiles(32, 64, 64, 4, 3), Tiles(64, 64, 64, 4, 3), Tiles(64, 128, 64, 4, 3), Tiles(128, 64, 64, 4, 3),
        Tiles(128, 128, 64, 8, 3), Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 128, 8, 3), Tiles(128, 256, 64, 8, 4),
    ],
    "route_shrink_copies": [
        Tiles(64, 128, 64, 4, 3, "copies"), Tiles(128, 128, 64, 8, 4, "copies"), Tiles(128, 256, 64, 8, 4, "copies"),
        Tiles(64, 128, 32, 4, 4, "copies"), Tiles(64, 128, 64, 4, 2, "copies", 168), Tiles(64, 128, 64, 4, 3, "copies", 168),
        Tiles(128, 128, 64, 8, 2, "copies", 128), Tiles(128, 128, 64, 8, 3, "copies", 128),
        Tiles(128, 128, 32, 8, 6, "copies", 128), Tiles(128, 256, 64, 8, 4, "copies", 255),
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
    "masked_shrink_copies": [
        Tiles(64, 128, 64, 4, 3, "copies"), Tiles(128, 64, 64, 4, 3, "copies"), Tiles(128, 128, 64, 4, 3, "copies"),
        Tiles(128, 128, 64, 8, 3, "copies", 128), Tiles(128, 256, 64, 8, 4, "copies"),
    ],
    "linear_expand": [
        Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 3), Tiles(128, 64, 64, 4, 3), Tiles(128, 64, 64, 4, 4),
        Tiles(128, 128, 64, 4, 3), Tiles(128, 128, 64, 8, 3), Tiles(128, 256, 64, 8, 3), Tiles(128, 256, 64, 8, 4),
        Tiles(256, 128, 64, 8, 3), Tiles(256, 128, 64, 8, 4),
    ],
    "linear_expand_copies": [
        Tiles(128, 128, 64, 4, 3, "copies"), Tiles(128, 192, 64, 4, 2, "copies"), Tiles(128, 128, 64, 4, 2, "copies"),
        Tiles(128, 144, 64, 4, 3, "copies"), Tiles(128, 96, 64, 4, 2, "copies"), Tiles(256, 128, 64, 8, 3, "joined"),
        Tiles(64, 192, 64, 4, 2, "copies"), Tiles(128, 256, 64, 8, 4, "copies"), Tiles(256, 128, 64, 8, 4, "copies"),
        Tiles(256, 144, 64, 8, 3, "copies"),
    ],
    "weigh_products": [
        Tiles(1, 256, 1024, 4, 1), Tiles(1, 256, 2048, 8, 1), Tiles(1, 256, 1024, 2, 1), Tiles(2, 256, 1024, 4, 1),
        Tiles(4, 128, 512, 4, 1), Tiles(1, 256, 256, 1, 1), Tiles(1, 256, 512, 1, 1), Tiles(1, 256, 512, 2, 1),
        Tiles(2, 256, 256, 2, 1),
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
STOCK_PIECES = [(2**40, 2**40), (2**40, 8192), (2**40, 4096), (4096, 4096), (4096, 2048), (2048, 4096), (2048, 2048)]


def choose(table: Sequence[tuple[int, int, Content]], num_tokens: int, width: int) -> Content:
    """The table's entry for this many tokens of this width."""
    return next(found for tokens, widths, found in table if num_tokens <= tokens and width <= widths)


def choose_copies(table: CopiesTable, num_tokens: int, width: int, sites: int) -> Tiles | None:
    """The same for a group of so many sites: programs of more sites fill a GPU with larger tiles."""
    return next(
        found for tokens, widths, most, found in table if num_tokens <= tokens and width <= widths and sites <= most
    )


def route_tiles(num_tokens: int, width: int, padded_experts: int, shrink: bool) -> Tiles:
    """Tiles of the routing kernel. More than MOST_FUSED experts leave no registers for a shrink beside their scores."""
    if shrink:
        return choose(ROUTE_SHRINK, num_tokens, width)
    if padded_experts <= MOST_FUSED:
        return choose(ROUTE_ONLY, num_tokens, width)
    return Tiles(64, 16, 64, 8, 2)


# Which formulation takes a call: read downwards, the first line that holds. Columns: tokens up to, rank slots of a site up to,
# input width up to, formulation. Measured on an H100 with experts of rank 16, ms a layer of seven linears unless said otherwise;
# the files are 2026-11-27_routed_lora_{layers,split,many,scores,64,pieces,persistent}_h100.json and, of the 26th, overlap_h200,
# tune_h100.
#   SmolLM2, 16 experts   16 tokens decode 0.057, fused 0.064; 32 split 0.053, split_fused 0.053; 64 split_fused 0.047, split 0.058;
#                         1,024 split_fused 0.086, fused 0.099; 4,096 fused 0.131, split_fused 0.178, stock 0.182, persistent 0.192,
#                         grouped 0.240; 32,768 fused 0.784, stock 0.925 (these two on an H200); fused 0.89, persistent 1.06
#   SmolLM2, 4 experts    32 tokens split and split_fused 0.056, fused 0.069; 512 split_fused 0.067, fused 0.071, split 0.082
#   SmolLM2, 64 experts   1 token decode 0.040, split 0.074, fused 0.096; 32 split_fused 0.087, decode 0.088; 512 split_fused 0.103,
#                         grouped 0.130; 4,096 grouped 0.271, fused 0.399; 32, later, split 0.067, decode 0.070, split_fused 0.074
#   SmolLM2, 166 experts  32 tokens decode 0.083, split 0.120; 64 split_fused 0.105, decode 0.118; 256 fused 0.131, split_fused
#                         0.133, grouped 0.143; 512 grouped 0.155, split_fused 0.181; 4,096 grouped 0.293, stock 0.583
#   LLaMA3-8B, 16 experts 1 token decode 0.203, split 0.224; 32 split 0.233, decode 0.430; 512 split 0.447, fused 0.656; 1,024 split
#                         0.794, fused 0.978; 4,096 stock 2.998, split 3.046, fused 3.413
#   and a model of 16 layers with 16 experts, times its base: 1,024 tokens split 1.16, persistent 1.17; 2,048 persistent 1.10, split
#                         1.14, stock 1.18; 4,096 persistent 1.07 and 1.09 (two cards), split 1.10 and 1.13, stock 1.11 and 1.13
#   LLaMA3-8B, 64         512 split 0.574, grouped 0.802; 4,096 grouped 3.56, with the down projection by split 3.44, all by it 3.60;
#                         later grouped 3.79, all by persistent 3.82, by split 3.91; 16,384 grouped 14.1, persistent 14.9
#   LLaMA3-8B, 166        512 split 0.786, grouped 0.811; 4,096 grouped 3.496, split 4.994
# Estimates: between these numbers of tokens and experts; many experts and wide inputs; persistent where it runs as split beyond 2,048
# tokens (no Hopper GPU), and for the down projection of 64 experts alone.
CROSSOVERS: Lines = [
    (16, LIMITLESS, LIMITLESS, "decode"),
    (32, 512, 2048, "split"),
    (1024, 512, 2048, "split_fused"),
    (LIMITLESS, 512, 2048, "fused"),
    (1024, 512, LIMITLESS, "split"),
    (LIMITLESS, 512, LIMITLESS, "persistent"),
    (32, LIMITLESS, 2048, "decode"),
    (256, LIMITLESS, 2048, "split_fused"),
    (LIMITLESS, LIMITLESS, 2048, "grouped"),
    (512, LIMITLESS, LIMITLESS, "split"),
    (LIMITLESS, LIMITLESS, LIMITLESS, "grouped"),
]


# The same for calls of 16-bit inference that would be `grouped` by that table, or `decode` with more than 16 tokens. Measured with 64
# experts and k = 2; training and fp32, which were not, keep to the table above.
INFERENCE_OF_MANY: Lines = [
    (32, 1024, 2048, "split"),
    (32, LIMITLESS, 2048, "decode"),
    (512, 1024, 2048, "split_fused"),
    (LIMITLESS, LIMITLESS, 4096, "grouped"),
    (4096, 1024, LIMITLESS, "persistent"),
    (LIMITLESS, LIMITLESS, LIMITLESS, "grouped"),
]


# The largest rank that `grouped` takes with 16-bit and with fp32 numbers: a program of grouped_shrink and of grouped_expand holds
# an expert's whole rank beside up to 128 tokens. Compiled for an H100 they share up to 192 KiB of its 227 at these ranks, at twice
# those more than there is.
WIDEST_OF_PAIRS: list[int] = [256, 128]


def formulation(num_tokens: int, slots: int, width: int, wide: bool = False, widest: int = 16) -> str:
    """decode, fused, stock, split, split_fused, persistent or grouped for a call. `wide` (fp32 numbers): base products are left to
    the library, and scores to our kernel, whose fp32 products are never TF32. widest: the largest rank of an expert."""
    name = _listed(num_tokens, slots, width, wide, widest)
    many = name == "grouped" or (name == "decode" and num_tokens > 16)
    return _first(INFERENCE_OF_MANY, num_tokens, slots, width) if many and not wide else name


def _first(lines: Lines, num_tokens: int, slots: int, width: int) -> str:
    return next(
        found for tokens, most_slots, most_width, found in lines
        if num_tokens <= tokens and slots <= most_slots and width <= most_width
    )  # fmt: skip


def _listed(num_tokens: int, slots: int, width: int, wide: bool, widest: int) -> str:
    """What CROSSOVERS say, where it can take the call."""
    name = _first(CROSSOVERS, num_tokens, slots, width)
    if name == "grouped" and widest > WIDEST_OF_PAIRS[int(wide)]:
        return "stock"
    return "stock" if wide and name in ("fused", "split", "split_fused", "persistent") else name


def by_pairs(num_tokens: int, slots: int, width: int, wide: bool = False, widest: int = 16) -> bool:
    """Whether training sorts (token, slot) pairs; else masked concatenation in plain PyTorch."""
    return _listed(num_tokens, slots, width, wide, widest) == "grouped"


# Many experts ----------------------------------------------------------------------------------------------------------
# Measured with 166 experts on an H100 (2026-11-27_routed_lora_scores_h100.json there): a layer of SmolLM2 takes 0.289 ms with 4,096
# tokens, 1.70 with 32,768; of LLaMA3-8B 0.795 with 512, 3.48 with 4,096. columns are not read by choose_products and grouped_shrink.
# What follows the library's products of x with the gates: rows tokens, depth the numbers of x read at a time.
CHOOSE_PRODUCTS: Table = [
    (LIMITLESS, 2048, Tiles(1, 16, 128, 1, 1)),
    (1024, LIMITLESS, Tiles(1, 16, 1024, 4, 1)),
    (LIMITLESS, LIMITLESS, Tiles(1, 16, 128, 1, 1)),
]
# bytes of those products made at a time. Pieces that stay in the L2 do not pay: 32,768 tokens take 1.73 ms in pieces of 16 MiB, 1.72
# of 32, 1.71 of 64, 1.70 at once (131 MB)
PRODUCT_BYTES: list[int] = [256 * 2**20]
# pairs an expert has at the mean up to, rows of a tile of pairs
PAIR_ROWS: list[tuple[int, int]] = [(15, 16), (40, 32), (197, 64), (LIMITLESS, 128)]
# rows of both are the tile's of pairs; a tile of up to 32 has products too small for more than four warps
GROUPED_SHRINK: Table = [
    (8192, LIMITLESS, Tiles(16, 16, 64, 2, 4)),
    (LIMITLESS, LIMITLESS, Tiles(16, 16, 64, 4, 3)),
]
GROUPED_EXPAND: Table = [
    (8192, LIMITLESS, Tiles(16, 128, 16, 4, 1)),
    (LIMITLESS, LIMITLESS, Tiles(16, 64, 16, 4, 1)),
]
# tokens up to which a captured graph gets grouped's base products as a branch of their own
GROUPED_BESIDE: list[int] = [8192]
CANDIDATES |= {
    "choose_products": [
        Tiles(1, 16, 128, 1, 1), Tiles(1, 16, 256, 1, 1), Tiles(2, 16, 128, 1, 1), Tiles(2, 16, 256, 1, 1), Tiles(1, 16, 256, 2, 1),
        Tiles(1, 16, 1024, 4, 1),
    ],
    "grouped_shrink": [
        Tiles(16, 16, 64, 2, 4), Tiles(16, 16, 64, 4, 3), Tiles(16, 16, 64, 4, 4), Tiles(16, 16, 128, 4, 3),
    ],
    "grouped_expand": [
        Tiles(16, 64, 16, 4, 1), Tiles(16, 128, 16, 4, 1), Tiles(16, 128, 16, 8, 1), Tiles(16, 256, 16, 4, 1),
        Tiles(16, 256, 16, 8, 1),
    ],
}  # fmt: skip
PRODUCT_BYTES_CHOICES = [[2**60], [64 * 2**20], [32 * 2**20], [16 * 2**20]]
PAIR_ROWS_CHOICES = [[(LIMITLESS, rows)] for rows in (16, 32, 64, 128)]


def pair_rows(num_tokens: int, num_experts: int) -> int:
    """(token, slot) pairs in a tile of one expert: about what an expert gets in a list."""
    return next(rows for most, rows in PAIR_ROWS if num_tokens // max(num_experts, 1) <= most)


def most_tiles(num_tokens: int, num_experts: int) -> int:
    """Tiles that a list of pairs has at most, whichever experts were chosen."""
    return -(-num_tokens // pair_rows(num_tokens, num_experts)) + num_experts


def plan_length(num_tokens: int, num_experts: int) -> int:
    """Numbers in a list's plan (triton_grouped.py): a count an expert, three numbers a tile."""
    return power_of_two(num_experts, 16) + 3 * most_tiles(num_tokens, num_experts)


def product_rows(columns: int) -> int:
    """Tokens whose fp32 products with so many columns are made at a time."""
    return max(128, PRODUCT_BYTES[0] // (4 * columns) // 128 * 128)
