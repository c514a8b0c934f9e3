"""Many experts: launches of the kernels over (token, slot) pairs sorted by expert, from tensors to tensors; no autograd, no
host synchronisation. Called by operators.py and gradients.py. Every grid depends on shapes only, as launch.py's do.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportIndexIssue=false
# pyright: reportPrivateUsage=false
# (launches of Triton kernels: the checker sees the Python function; helpers of launches are shared by both files)

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import launch, tiles
from .launch import Sites, _base_into, _distances, _rows, _side_stream, _three, wide_product
from .layout import GroupShape, GroupTables, PreparedGates, axis_length, both_parts
from .triton_grouped import count_experts, grouped_expand, grouped_outer, grouped_shrink, place_tokens, scan_counts
from .triton_split import choose_products

SORT_BLOCK = 128
MOST_UNSCANNED = 64  # blocks whose counts every program of the sort adds up itself


class Pairs(NamedTuple):
    """(token, slot) pairs sorted by expert: order int32 [L, T], plan int32 [L, P] (triton_grouped.py), whose first NP numbers
    are the pairs of each expert."""

    order_LT: Tensor
    plan_LP: Tensor


def route(
    x_TI: Tensor, gates: PreparedGates, tables: GroupTables, shape: GroupShape, k: int, arrow: bool,
    chosen: tiles.Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(weight fp32 [S, T, K], index int32 [S, T, K]); more than MOST_FUSED experts and 16-bit tokens from products of the library,
    of at most PRODUCT_BYTES at a time (or of 128 tokens, if theirs are more)."""
    if not gates.high_ZI.numel() or (shape.num_experts <= tiles.MOST_FUSED and not chosen):
        return launch.route(x_TI, gates, tables, shape, k, arrow)[:2]
    x_TI, (num_tokens, width), sites = _rows(x_TI), x_TI.shape, len(shape.slots)
    tile, both_PI = chosen or tiles.choose(tiles.CHOOSE_PRODUCTS, num_tokens, width), both_parts(gates)
    weight = x_TI.new_empty(sites, num_tokens, k, dtype=torch.float32)
    index = x_TI.new_empty(sites, num_tokens, k, dtype=torch.int32)
    piece = tiles.product_rows(len(both_PI))
    for first in range(0, num_tokens, piece):
        x = x_TI[first : first + piece]
        product_TP = wide_product(x, both_PI)
        choose_products[(sites * triton.cdiv(len(x), tile.rows),)](
            x, product_TP, gates.shift_Z, tables.absent_Z, weight, index,
            first, len(x), num_tokens, width, x.stride(0), product_TP.stride(0), shape.num_experts, len(gates.high_ZI), sites,
            K=k, NP=axis_length(shape.num_experts), ARROW=arrow, BLOCK_T=tile.rows, BLOCK_I=min(tile.depth, axis_length(width)),
            num_warps=tile.warps,
        )  # fmt: skip
    return weight, index


def sort_pairs(index_STK: Tensor, num_experts: int) -> Pairs:
    """Counting sort of every (site, slot) list by expert, stable, in two or three launches."""
    sites, num_tokens, k = index_STK.shape
    lists, padded = sites * k, axis_length(num_experts)
    blocks = triton.cdiv(num_tokens, SORT_BLOCK)
    scanned = blocks > MOST_UNSCANNED
    counts = index_STK.new_empty(lists, blocks, padded)
    order = index_STK.new_empty(lists, num_tokens)
    plan = index_STK.new_empty(lists, tiles.plan_length(num_tokens, num_experts))
    count_experts[(blocks, lists)](index_STK, counts, num_tokens, NP=padded, K=k, BLOCK=SORT_BLOCK)
    if scanned:
        scan_counts[(padded // 16, lists)](
            counts, plan, blocks, plan.stride(0), NP=padded, COLUMNS=16, CHUNK=128, num_warps=4
        )
    place_tokens[(blocks + 1, lists)](
        index_STK, counts, order, plan, num_tokens, tiles.most_tiles(num_tokens, num_experts), num_experts, plan.stride(0),
        NP=padded, K=k, BLOCK=SORT_BLOCK, EARLIER=32, TILE=tiles.pair_rows(num_tokens, num_experts), CHUNK=32, SCANNED=scanned,
        num_warps=4 if scanned else 8,
    )  # fmt: skip
    return Pairs(order, plan)


def shrink_pairs(
    x_TI: Tensor, rows_RI: Tensor, tables: GroupTables, shape: GroupShape, pairs: Pairs, k: int,
    weight_STK: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """h [L, T, RP] in x's dtype and sorted order: rows of each pair's expert times its token (times its weight)."""
    x_TI, (num_tokens, width) = _rows(x_TI), x_TI.shape
    lists, rank = len(pairs.plan_LP), axis_length(shape.widest)
    count, tile = tiles.most_tiles(num_tokens, shape.num_experts), tiles.choose(tiles.GROUPED_SHRINK, num_tokens, width)
    hidden = x_TI.new_empty(lists, num_tokens, rank)
    grouped_shrink[(count, lists)](
        x_TI, rows_RI, tables.start_Z, tables.rank_Z, pairs.order_LT, pairs.plan_LP,
        hidden if weight_STK is None else weight_STK, hidden,
        num_tokens, count, width, x_TI.stride(0), pairs.plan_LP.stride(0), shape.num_experts,
        NP=axis_length(shape.num_experts), K=k, RP=rank, WEIGHTED=weight_STK is not None, EVEN=width % tile.depth == 0,
        BLOCK_T=tiles.pair_rows(num_tokens, shape.num_experts), BLOCK_I=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return hidden


def expand_pairs_(
    y_TO: Tensor, hidden_LTR: Tensor, rows_RO: Tensor, tables: GroupTables, shape: GroupShape, pairs: Pairs, k: int,
    site: int, base_slot: int,
) -> Tensor:  # fmt: skip
    """y += sum over the site's K lists of h times the expert's rows [R_site, O]; one pass over y a list."""
    _expand([y_TO], hidden_LTR, [rows_RO], tables, shape, pairs, k, site, [base_slot])
    return y_TO


def expand_sites_(
    ys: Sequence[Tensor], hidden_LTR: Tensor, b_RO: Sequence[Tensor], tables: GroupTables, shape: GroupShape, pairs: Pairs,
    k: int,
) -> None:  # fmt: skip
    """The same for all sites of a group: one launch a slot."""
    bases = [sum(shape.slots[:site]) for site in range(len(ys))]
    _expand([*ys], hidden_LTR, [*b_RO], tables, shape, pairs, k, 0, bases)


def _expand(
    ys: list[Tensor], hidden_LTR: Tensor, rows: list[Tensor], tables: GroupTables, shape: GroupShape, pairs: Pairs, k: int,
    first_site: int, bases: list[int],
) -> None:  # fmt: skip
    num_tokens, outs = ys[0].shape[0], [y.shape[1] for y in ys]
    tile = tiles.choose(tiles.GROUPED_EXPAND, num_tokens, max(outs))
    count = tiles.most_tiles(num_tokens, shape.num_experts)
    columns = min(tile.columns, axis_length(max(outs)))
    blocks = sum(triton.cdiv(o, columns) for o in outs)
    for slot in range(k):
        grouped_expand[(count * blocks,)](
            hidden_LTR, rows[0], tables.start_Z, tables.rank_Z, pairs.order_LT, pairs.plan_LP, ys[0],
            slot, first_site, blocks, num_tokens, count, pairs.plan_LP.stride(0), shape.num_experts, *_three(outs),
            *_three(bases), *_distances(rows), *_distances(ys),
            NP=axis_length(shape.num_experts), K=k, RP=hidden_LTR.shape[2],
            BLOCK_T=tiles.pair_rows(num_tokens, shape.num_experts), BLOCK_O=columns, num_warps=tile.warps,
        )  # fmt: skip


def outer_pairs(
    hidden_LTR: Tensor, x_TI: Tensor, tables: GroupTables, shape: GroupShape, pairs: Pairs, k: int,
    site: int, base_slot: int,
) -> Tensor:  # fmt: skip
    """fp32 [R_site, I]: per expert the sum over its pairs of h^T x."""
    x_TI, (num_tokens, width) = _rows(x_TI), x_TI.shape
    out = x_TI.new_empty(shape.slots[site], width, dtype=torch.float32)  # every slot is an expert's, so it is written
    block_i = 64
    grouped_outer[(shape.num_experts, triton.cdiv(width, block_i))](
        hidden_LTR, x_TI, tables.start_Z, tables.rank_Z, pairs.order_LT, pairs.plan_LP, out,
        site * k, site, base_slot, num_tokens, width, x_TI.stride(0), pairs.plan_LP.stride(0), shape.num_experts,
        NP=axis_length(shape.num_experts), K=k, RP=hidden_LTR.shape[2], BLOCK_P=64, BLOCK_I=block_i, num_warps=4,
    )  # fmt: skip
    return out


def _bases(y: list[Tensor], x_TI: Tensor, sites: Sites) -> None:
    """Every site's base product into its y, its bias too."""
    for site, y_TO in enumerate(y):
        _base_into(y_TO, x_TI, sites.weights[site].t(), sites.biases[site] if sites.biases else None)


def linear_grouped(
    x_TI: Tensor, gates: PreparedGates, tables: GroupTables, shape: GroupShape, k: int, arrow: bool, a_RI: Tensor,
    sites: Sites,
) -> list[Tensor]:  # fmt: skip
    """Per site y [T, O] = x W^T (+ bias) + its experts' updates; the base by the library, after the shrink, so that the L2 holds
    what it can of y, or inside a capture of few tokens as a branch of the graph beside all before the expand."""
    y = [x_TI.new_empty(len(x_TI), b_RO.shape[1]) for b_RO in sites.b_RO]
    few = x_TI.is_cuda and len(x_TI) <= tiles.GROUPED_BESIDE[0]
    beside = few and torch.cuda.is_current_stream_capturing()
    if beside:
        main, side = torch.cuda.current_stream(x_TI.device), _side_stream(x_TI.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            _bases(y, x_TI, sites)
    weight, index = route(x_TI, gates, tables, shape, k, arrow)
    pairs = sort_pairs(index, shape.num_experts)
    hidden_LTR = shrink_pairs(x_TI, a_RI, tables, shape, pairs, k, weight)
    if beside:
        torch.cuda.current_stream(x_TI.device).wait_stream(_side_stream(x_TI.device))
    else:
        _bases(y, x_TI, sites)
    expand_sites_(y, hidden_LTR, sites.b_RO, tables, shape, pairs, k)
    return y
