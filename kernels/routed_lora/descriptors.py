"""Descriptors by which Hopper and newer copy tiles of x, hm, A, B and W (TMA), and which calls take them.

A call takes them where tiles.py names tiles for its size and the tensors suit: 16-bit numbers, addresses and row strides
that are multiples of 16 bytes. Making seven of them takes the host longer than a small launch, so eager calls of fewer tokens than
`tiles.EAGER_COPIES` go by addresses, a captured graph never: it keeps the descriptors. The interpreter knows them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles
from .layout import PreparedGates, axis_length

FARTHEST = 2**40  # bytes: what the hardware takes as a stride
JOINED_SLOTS = 32  # rank slots a step of the joined loop holds at most
MOST_SEEN = 4096

Descriptors = tuple[TensorDescriptor | None, ...]


class Way(NamedTuple):
    """How a launch reads its tiles: by descriptors, or (empty) by addresses."""

    tile: tiles.Tiles
    descriptors: Descriptors
    block_r: int


def by_addresses(tile: tiles.Tiles, block_r: int, count: int) -> Way:
    return Way(tile._replace(loads="addresses"), (None,) * count, block_r)


@cache
def _known(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9)


def suits(*tensors: Tensor) -> bool:
    """Whether descriptors can name them: 16-bit numbers, side by side in a row, addresses and rows at multiples of 16 bytes."""
    return all(
        t.element_size() == 2
        and t.numel() > 0
        and t.stride(-1) == 1
        and t.data_ptr() % 16 == 0
        and all(stride % 8 == 0 and 0 < stride * 2 < FARTHEST for stride in t.stride()[:-1])
        for t in tensors
    )


def _of(matrix: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [*block])


def linear_way(
    chosen: tiles.Tiles | None, x_TI: Tensor, hidden_TR: Tensor, weights: Sequence[Tensor], b_RO: Sequence[Tensor]
) -> Way | None:
    """Descriptors of x, hm, every site's W and every site's B, as linear_expand takes them; None: by addresses."""
    tile = _tile(chosen, tiles.LINEAR_EXPAND_COPIES, x_TI, len(weights))
    if tile is None or not suits(x_TI, hidden_TR, *weights, *b_RO):
        return None
    slots = max(len(b) for b in b_RO)
    steps = -(-x_TI.shape[1] // tile.depth)
    block_r = axis_length(-(-slots // steps))
    if tile.loads != "joined" or block_r > JOINED_SLOTS:
        tile, block_r = tile._replace(loads="copies"), min(64, axis_length(slots))
    found: list[TensorDescriptor | None] = [_of(x_TI, tile.rows, tile.depth), _of(hidden_TR, tile.rows, block_r)]
    for columns in columns_of(tile):
        found += _three([_of(w, columns, tile.depth) for w in weights] if columns else [])
        found += _three([_of(b, block_r, columns) for b in b_RO] if columns else [])
    return Way(tile, tuple(found), block_r)


def columns_of(tile: tiles.Tiles) -> tuple[int, int]:
    """The power of two in a tile's columns, and the rest, another one or 0: a block's sides are powers of two."""
    whole = 1 << (tile.columns.bit_length() - 1)
    return whole, tile.columns - whole


def route_way(
    chosen: tiles.Tiles | None, x_TI: Tensor, gates: PreparedGates, a_RI: Tensor, padded: int, slots: Sequence[int]
) -> Way | None:
    """Descriptors of x, both parts of the gates as one [2, Z, I], and A, as route_shrink takes them; None: by addresses."""
    tile = _tile(chosen, tiles.ROUTE_SHRINK_COPIES, x_TI, len(slots))
    if tile is None or not suits(x_TI, a_RI, gates.high_ZI, gates.low_ZI):
        return None
    first, second = sorted((gates.high_ZI, gates.low_ZI), key=Tensor.data_ptr)  # their sum has no order
    apart = (second.data_ptr() - first.data_ptr()) // 2
    if apart * 2 >= FARTHEST or first.stride() != second.stride():
        return None
    block_r = min(tile.columns, axis_length(max(slots)))
    of_gates = TensorDescriptor(first, [2, *first.shape], [apart, *first.stride()], [2, padded, tile.depth])
    return Way(tile, (_of(x_TI, tile.rows, tile.depth), of_gates, _of(a_RI, block_r, tile.depth)), block_r)


def masked_way(chosen: tiles.Tiles | None, x_TI: Tensor, a_RI: Tensor, slots: Sequence[int]) -> Way | None:
    """Descriptors of x and A, as masked_shrink takes them; None: by addresses."""
    tile = _tile(chosen, tiles.MASKED_SHRINK_COPIES, x_TI, len(slots))
    if tile is None or not suits(x_TI, a_RI):
        return None
    block_r = min(tile.columns, axis_length(max(slots)))
    return Way(tile, (_of(x_TI, tile.rows, tile.depth), _of(a_RI, block_r, tile.depth)), block_r)


def _tile(chosen: tiles.Tiles | None, table: tiles.CopiesTable, x_TI: Tensor, sites: int) -> tiles.Tiles | None:
    tile = chosen or tiles.choose_copies(table, x_TI.shape[0], x_TI.shape[1], sites)
    return tile if tile and tile.loads != "addresses" and _known(x_TI.device) else None


def _three(found: list[TensorDescriptor]) -> Descriptors:
    return (*found, None, None, None)[:3]


_seen: set[Hashable] = set()


def ways(
    copied: Callable[[], Way | None], plain: Way, chosen: tiles.Tiles | None, x_TI: Tensor, call: Hashable
) -> list[Way]:
    """The launches to make, of which the last one counts; `copied` makes the descriptors where they are wanted.

    A small eager call goes by addresses. The first such call of its kind goes both ways: a graph that is captured after it
    finds the other kernel loaded, which a capture does not allow.
    """
    eager = x_TI.is_cuda and x_TI.shape[0] < tiles.EAGER_COPIES[0] and not torch.cuda.is_current_stream_capturing()
    if chosen is None and eager:
        key = (call, x_TI.shape, x_TI.stride(), x_TI.dtype, x_TI.device)
        if key in _seen:
            return [plain]
        if len(_seen) >= MOST_SEEN:
            _seen.clear()
        _seen.add(key)
        return [plain] if (found := copied()) is None else [found, plain]
    return [copied() or plain]
