"""Launches of the Triton kernels: plain functions from tensors to tensors, no autograd, no host synchronisation.

Called by operators.py. Every grid depends on shapes only, so that a captured graph replays with new tokens.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportIndexIssue=false
# (launches of Triton kernels: the checker sees the Python function)

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import descriptors, tiles
from .layout import GroupShape, GroupTables, PreparedGates, axis_length
from .triton_decode import decode_base, decode_update
from .triton_linear import linear_expand
from .triton_route import route_shrink
from .triton_shrink import masked_shrink
from .triton_split import weigh_products

FUSED_DECODE_BYTES = 96 * 1024  # of chosen A per token: above it the shrink is a launch of its own
DECODE_SPLIT = 2048


class Sites(NamedTuple):
    """The base linears of a group and the experts' B, one entry a site. biases: empty, or one a site."""

    weights: list[Tensor]
    biases: list[Tensor]
    b_RO: list[Tensor]


def _three(values: list[int] | tuple[int, ...]) -> tuple[int, int, int]:
    first, second, third = (*values, 0, 0)[:3]
    return first, second, third


def _distances(tensors: list[Tensor]) -> tuple[int, int]:
    """How far, in elements, the second and third tensor lie from the first. Kernels take those of outputs as int64, however near
    they lie: a kernel of another signature could not be loaded inside a capture."""
    size, origin = tensors[0].element_size(), tensors[0].data_ptr()
    away = [(t.data_ptr() - origin) // size for t in tensors]
    return _three(away)[1:]


def _rows(x_TI: Tensor) -> Tensor:
    """The tensor, or a copy, with the numbers of a row side by side: kernels take any distance between rows, but only that
    within them."""
    return x_TI if x_TI.stride(-1) == 1 else x_TI.contiguous()


def _limited(tile: tiles.Tiles) -> dict[str, int]:
    """The option by which a program gets no more than the tile's registers; only CUDA's compiler knows it."""
    return {} if tile.registers is None else {"maxnreg": tile.registers}


def early(follows: bool) -> dict[str, bool]:
    """The option by which a launch begins before the one before it has ended; only CUDA's compiler knows it."""
    return {"launch_pdl": True} if follows else {}


@cache
def _overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 9


def overlap(x_TI: Tensor) -> bool:
    """Whether what makes hm may let a `linear` that follows it at once begin early (tiles.OVERLAP). Not where x is copied first
    (`_rows`), which would happen between both."""
    if not _overlaps(x_TI.device) or x_TI.stride(-1) != 1:
        return False
    return tiles.choose(tiles.OVERLAP, x_TI.shape[0], x_TI.shape[1])


def _addresses(chosen: tiles.Tiles | None) -> tiles.Tiles | None:
    return chosen if chosen and chosen.loads == "addresses" else None


def _gates(gates: PreparedGates) -> tuple[Tensor, Tensor, bool]:
    if gates.high_ZI.numel():
        return gates.high_ZI, gates.low_ZI, True
    return gates.vectors_ZI, gates.vectors_ZI, False


def route(
    x_TI: Tensor,
    gates: PreparedGates,
    tables: GroupTables,
    shape: GroupShape,
    k: int,
    arrow: bool,
    a_RI: Tensor | None = None,
    store: bool = True,
    chosen: tiles.Tiles | None = None,
    begins: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight fp32 [S, T, K], index int32 [S, T, K], hm [T, R] in x's dtype); empty where not asked for.

    begins  whether a `linear` launched with `follows` may begin before this has ended
    """
    x_TI, (num_tokens, width) = _rows(x_TI), x_TI.shape
    sites = len(shape.slots)
    shrink, padded = a_RI is not None, axis_length(shape.num_experts)
    kept = (sites, num_tokens, k) if store else (0,)
    weight = x_TI.new_empty(kept, dtype=torch.float32)
    index = x_TI.new_empty(kept, dtype=torch.int32)
    hidden = x_TI.new_empty((num_tokens, sum(shape.slots)) if shrink else (0, 0))
    high, low, split = _gates(gates)
    tile = _addresses(chosen) or tiles.route_tiles(num_tokens, width, padded, shrink)
    most_slots = max(shape.slots) if shrink else 1
    plain = descriptors.by_addresses(tile, min(tile.columns, axis_length(most_slots)) if shrink else 16, 3)
    call = ("route", shape, k, arrow, store, begins)
    found_ways = [plain]
    if a_RI is not None and split:
        make = partial(descriptors.route_way, chosen, x_TI, gates, a_RI, padded, shape.slots)
        found_ways = descriptors.ways(make, plain, chosen, x_TI, call)
    for tile, found, block_r in found_ways:
        blocks_r = triton.cdiv(most_slots, block_r)
        route_shrink[(blocks_r * sites * triton.cdiv(num_tokens, tile.rows),)](
            x_TI, high, gates.shift_Z, tables.absent_Z, a_RI if shrink else high, tables.owner_R, hidden, weight, index,
            num_tokens, width, x_TI.stride(0), hidden.stride(0), shape.num_experts, *_three(shape.slots),
            _distances([high, low])[0], *found, sites,
            K=k, NP=padded, ARROW=arrow, SPLIT=split, SHRINK=shrink, STORE=store, TMA=found[0] is not None,
            AHEAD=tile.registers is None, BEGINS=begins,
            BLOCK_T=tile.rows, BLOCK_R=block_r, BLOCK_I=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
            **_limited(tile),
        )  # fmt: skip
    return weight, index, hidden


def shrink_masked(
    x_TI: Tensor, a_RI: Tensor, tables: GroupTables, shape: GroupShape, weight_STK: Tensor, index_STK: Tensor,
    chosen: tiles.Tiles | None = None, begins: bool = False,
) -> Tensor:  # fmt: skip
    """hm [T, R] in x's dtype from routing that is known: what `route` gives with `a_RI`; begins as there."""
    x_TI, (num_tokens, width), k = _rows(x_TI), x_TI.shape, weight_STK.shape[2]
    tile = _addresses(chosen) or tiles.choose(tiles.MASKED_SHRINK, num_tokens, width)
    plain = descriptors.by_addresses(tile, min(tile.columns, axis_length(max(shape.slots))), 2)
    hidden = x_TI.new_empty(num_tokens, sum(shape.slots))
    make = partial(descriptors.masked_way, chosen, x_TI, a_RI, shape.slots)
    for tile, found, block_r in descriptors.ways(make, plain, chosen, x_TI, ("masked", shape, k, begins)):
        blocks = sum(triton.cdiv(count, block_r) for count in shape.slots)
        masked_shrink[(triton.cdiv(num_tokens, tile.rows) * blocks,)](
            x_TI, a_RI, tables.owner_R, weight_STK, index_STK, hidden,
            num_tokens, width, x_TI.stride(0), hidden.stride(0), *_three(shape.slots), *found,
            SITES=len(shape.slots), K=k, EVEN=width % tile.depth == 0, TMA=found[0] is not None, BEGINS=begins,
            BLOCK_T=tile.rows, BLOCK_R=block_r, BLOCK_I=tile.depth, SWEEP=8,
            num_warps=tile.warps, num_stages=tile.stages, **_limited(tile),
        )  # fmt: skip
    return hidden


def wide_product(x_TI: Tensor, stack_PI: Tensor) -> Tensor:
    """x stack^T, fp32 [T, P], summed in fp32 (torch.mm has out_dtype from torch 2.8 on, on CUDA)."""
    if x_TI.is_cuda:
        return torch.mm(x_TI, stack_PI.t(), out_dtype=torch.float32)
    return x_TI.float() @ stack_PI.float().t()


def route_split(
    x_TI: Tensor, stack_PI: Tensor, gates: PreparedGates, tables: GroupTables, shape: GroupShape, k: int, arrow: bool,
    chosen: tiles.Tiles | None = None, begins: bool = False,
) -> Tensor:  # fmt: skip
    """hm [T, R] in x's dtype, what `route` gives with A, from one product of the library (layout.stack_factors) and a small kernel.
    16-bit tokens. begins as in `route`."""
    product_TP, num_slots = wide_product(x_TI, stack_PI), sum(shape.slots)
    x_TI, (num_tokens, width), sites = _rows(x_TI), x_TI.shape, len(shape.slots)
    tile = chosen or tiles.choose(tiles.WEIGH_PRODUCTS, num_tokens, width)
    hidden = x_TI.new_empty(num_tokens, num_slots)
    weigh_products[(sites * triton.cdiv(num_tokens, tile.rows),)](
        x_TI, product_TP, gates.shift_Z, tables.absent_Z, tables.owner_R, hidden,
        num_tokens, width, x_TI.stride(0), product_TP.stride(0), hidden.stride(0), shape.num_experts, *_three(shape.slots),
        num_slots, num_slots + sites * shape.num_experts, sites,
        K=k, NP=axis_length(shape.num_experts), ARROW=arrow, BEGINS=begins,
        BLOCK_T=tile.rows, BLOCK_R=min(tile.columns, axis_length(max(shape.slots))),
        BLOCK_I=min(tile.depth, axis_length(width)), num_warps=tile.warps,
    )  # fmt: skip
    return hidden


def linear(
    x_TI: Tensor, hidden_TR: Tensor, sites: Sites, shape: GroupShape, chosen: tiles.Tiles | None = None,
    follows: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Per site y [T, O] = x W^T + hm B (+ bias).

    follows  right behind the launch that made hm from the same x and let this begin (Hopper and newer): programs
             run before that launch has ended, and wait for its end before they read hm. What they read besides was there before
             the routing
    """
    x_TI, (num_tokens, width) = _rows(x_TI), x_TI.shape
    outs = [w.shape[0] for w in sites.weights]
    y = [x_TI.new_empty(num_tokens, o) for o in outs]
    tile = _addresses(chosen) or tiles.choose(tiles.LINEAR_EXPAND, num_tokens, width)
    plain = descriptors.by_addresses(tile, min(64, axis_length(max(shape.slots))), 14)
    make = partial(descriptors.linear_way, chosen, x_TI, hidden_TR, sites.weights, sites.b_RO)
    biases = sites.biases or sites.weights
    call = ("linear", shape, *outs, bool(sites.biases), hidden_TR.stride(0), follows)
    for tile, found, block_r in descriptors.ways(make, plain, chosen, x_TI, call):
        whole, more = descriptors.columns_of(tile)
        blocks = triton.cdiv(num_tokens, tile.rows) * sum(triton.cdiv(o, tile.columns) for o in outs)
        linear_expand[(blocks,)](
            x_TI, hidden_TR, sites.weights[0], biases[0], sites.b_RO[0], y[0],
            num_tokens, width, x_TI.stride(0), hidden_TR.stride(0), *_three(outs), *_three(shape.slots),
            *_distances(sites.weights), *_distances(biases), *_distances(sites.b_RO), *_distances(y), *found,
            SITES=len(outs), BIAS=bool(sites.biases), EVEN=width % tile.depth == 0,
            TMA=found[0] is not None, JOINED=tile.loads == "joined", FOLLOWS=follows,
            MORE=more, BLOCK_T=tile.rows, BLOCK_O=whole, BLOCK_I=tile.depth, BLOCK_R=block_r, SWEEP=8,
            num_warps=tile.warps, num_stages=tile.stages, **early(follows),
        )  # fmt: skip
    return y


def _base_into(y_TO: Tensor, x_TI: Tensor, weight_IO: Tensor, bias_O: Tensor | None) -> None:
    if bias_O is None:
        torch.mm(x_TI, weight_IO, out=y_TO)
    else:
        torch.addmm(bias_O, x_TI, weight_IO, out=y_TO)


def linear_in_pieces(x_TI: Tensor, hidden_TR: Tensor, sites: Sites, shape: GroupShape) -> list[Tensor]:
    """What `linear` gives, by the library's products: expand added to each piece of y while the L2 holds the piece. The pieces of
    the same outputs follow one another, so that the L2 still holds their weights, too; the next outputs begin with the tokens that
    came last."""
    found, (rows, columns) = [], tiles.choose(tiles.STOCK_PIECE, *x_TI.shape)
    for site, h_TR in enumerate(hidden_TR.split(list(shape.slots), dim=1)):
        weight_IO, b_RO = sites.weights[site].t(), sites.b_RO[site]
        num_tokens, num_out = x_TI.shape[0], b_RO.shape[1]
        y = x_TI.new_empty(num_tokens, num_out)
        starts = list(range(0, num_tokens, rows))
        for o in range(0, num_out, columns):
            for t in starts:
                piece, x, w = y[t : t + rows, o : o + columns], x_TI[t : t + rows], weight_IO[:, o : o + columns]
                _base_into(piece, x, w, sites.biases[site][o : o + columns] if sites.biases else None)
                piece.addmm_(h_TR[t : t + rows], b_RO[:, o : o + columns])
            starts.reverse()
        found.append(y)
    return found


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def linear_beside(x_TI: Tensor, make_hidden: Callable[[], Tensor], sites: Sites, shape: GroupShape) -> list[Tensor]:
    """What `linear_in_pieces` gives, inside a capture: the base products are a branch of the graph beside routing and shrink,
    none of which fills the device alone. Every tensor is the main stream's, which waits before it goes on."""
    main, side = torch.cuda.current_stream(x_TI.device), _side_stream(x_TI.device)
    y = [x_TI.new_empty(x_TI.shape[0], b_RO.shape[1]) for b_RO in sites.b_RO]
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for site, weight_OI in enumerate(sites.weights):
            _base_into(y[site], x_TI, weight_OI.t(), sites.biases[site] if sites.biases else None)
    hidden_TR = make_hidden()
    main.wait_stream(side)
    for y_TO, h_TR, b_RO in zip(y, hidden_TR.split(list(shape.slots), dim=1), sites.b_RO):
        y_TO.addmm_(h_TR, b_RO)
    return y


def decode(
    x_TI: Tensor,
    gates: PreparedGates,
    tables: GroupTables,
    shape: GroupShape,
    k: int,
    arrow: bool,
    a_RI: Tensor,
    sites: Sites,
) -> list[Tensor]:
    """Per site y [T, O] for T <= 64: base and gate products in one launch, routing and experts in one or two."""
    x_TI, (num_tokens, width) = _rows(x_TI), x_TI.shape
    outs = [w.shape[0] for w in sites.weights]
    y = [x_TI.new_empty(num_tokens, o) for o in outs]
    high, low, split = _gates(gates)
    num_gates = high.shape[0]
    dot = x_TI.new_empty(num_tokens, num_gates, dtype=torch.float32)
    one = num_tokens == 1
    tile = tiles.choose(tiles.DECODE_ONE, 1, width) if one else tiles.Tiles(1, 16, 128, 4, 3)
    block_o, block_i = tile.columns, tile.depth
    biases = sites.biases or sites.weights
    grid = triton.cdiv(num_gates, block_o) + sum(triton.cdiv(o, block_o) for o in outs)
    decode_base[(grid,)](
        x_TI, sites.weights[0], biases[0], high, low, y[0], dot, num_tokens, width, x_TI.stride(0), num_gates,
        *_three(outs), *_distances(sites.weights), *_distances(biases), *_distances(y),
        SITES=len(outs), BIAS=bool(sites.biases), SPLIT=split, ROWS=1 if one else axis_length(num_tokens),
        BLOCK_O=block_o, BLOCK_I=block_i, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    _update(x_TI, dot, gates, tables, shape, k, arrow, a_RI, sites.b_RO, y)
    return y


def _update(
    x_TI: Tensor, dot_TZ: Tensor, gates: PreparedGates, tables: GroupTables, shape: GroupShape, k: int, arrow: bool,
    a_RI: Tensor, b_RO: list[Tensor], y: list[Tensor],
) -> None:  # fmt: skip
    num_tokens, width = x_TI.shape
    outs = [t.shape[1] for t in y]
    rank, chosen = axis_length(shape.widest, 1), triton.next_power_of_2(k)
    rows = rank * chosen
    split = rows * width * x_TI.element_size() > FUSED_DECODE_BYTES
    splits = triton.cdiv(width, DECODE_SPLIT) if split else 1
    part = x_TI.new_empty((num_tokens, len(outs), splits, rows) if split else (1,), dtype=torch.float32)
    tile = tiles.choose(tiles.DECODE_UPDATE, num_tokens, width)
    block_o = tile.columns if num_tokens <= 8 else max(256, tile.columns)
    block_o = max(16, min(block_o, tile.depth // rows))
    blocks_o = triton.cdiv(max(outs), block_o)
    block_i = max(16, min(triton.next_power_of_2(width), tile.depth // rows))
    for phase in (1, 2) if split else (0,):
        decode_update[(num_tokens, len(outs), splits if phase == 1 else blocks_o)](
            x_TI, dot_TZ, gates.shift_Z, tables.absent_Z, tables.start_Z, tables.rank_Z, a_RI, b_RO[0], y[0], part,
            width, x_TI.stride(0), shape.num_experts, len(outs), *_three(outs), *_three(shape.slots)[:2],
            *_distances(b_RO), *_distances(y), splits,
            K=k, KP=chosen, NP=axis_length(shape.num_experts), RP=rank, ARROW=arrow, SITES=len(outs), PHASE=phase,
            BLOCK_O=block_o, BLOCK_I=block_i,
            BLOCK_X=min(2048, triton.next_power_of_2(width)), num_warps=tile.warps,
        )  # fmt: skip
