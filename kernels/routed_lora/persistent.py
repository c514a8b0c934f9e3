"""Launches of gluon_linear.py: which calls it takes, and its descriptors."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (launches of Triton kernels: the checker sees the Python function)

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton import CompilationError

from . import tiles
from .descriptors import suits
from .launch import Sites
from .layout import GroupShape

log = logging.getLogger(__name__)
_failed: list[Exception] = []


@cache
def _takes(device: torch.device) -> bool:
    """Hopper: warpgroup products were not there before, and later chips have others."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def takes(x_TI: Tensor, sites: Sites) -> bool:
    """Whether `linear_persistent` can take a call: Hopper, numbers of one 16-bit type, rows that descriptors can name."""
    if _failed or not _takes(x_TI.device) or x_TI.dtype not in (torch.bfloat16, torch.float16):
        return False
    read = [*sites.weights, *sites.b_RO]
    whole = all(b.shape[0] % 8 == 0 and b.shape[1] % 8 == 0 for b in sites.b_RO)
    side_by_side = all(bias.stride(0) == 1 for bias in sites.biases)
    return whole and side_by_side and all(t.dtype == x_TI.dtype for t in read) and suits(x_TI, *read)


def attempt(x_TI: Tensor, hidden_TR: Tensor, sites: Sites, shape: GroupShape) -> list[Tensor] | None:
    """`linear_persistent`, or None where this Triton cannot compile it: Gluon is experimental, and its names may change. That is said
    once; later calls are not taken."""
    try:
        return linear_persistent(x_TI, hidden_TR, sites, shape)
    except (CompilationError, ImportError, AttributeError) as problem:
        _failed.append(problem)
        log.warning(
            "wide models go on without their persistent kernel, slower: Triton %s: %s", triton.__version__, problem
        )
        return None


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _of(matrix: Tensor, *block: int) -> Any:
    """Gluon's descriptor of a matrix in tiles as warpgroup products read them."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    number = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[matrix.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([*block], number)
    return TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [*block], layout)


def linear_persistent(
    x_TI: Tensor, hidden_TR: Tensor, sites: Sites, shape: GroupShape, chosen: tiles.Tiles | None = None
) -> list[Tensor]:  # fmt: skip
    """Per site y [T, O] = x W^T + hm B (+ bias), a launch a site, for calls that `takes` takes."""
    from .gluon_linear import persistent_linear

    num_tokens, width = x_TI.shape
    tile = chosen or tiles.choose(tiles.PERSISTENT_LINEAR, num_tokens, width)
    found: list[Tensor] = []
    for site, h_TR in enumerate(hidden_TR.split(list(shape.slots), dim=1)):
        weight_OI, b_RO = sites.weights[site], sites.b_RO[site]
        y = x_TI.new_empty(num_tokens, len(weight_OI))
        blocks = triton.cdiv(num_tokens, tile.rows) * triton.cdiv(len(weight_OI), tile.columns)
        persistent_linear[(min(blocks, _multiprocessors(x_TI.device)),)](
            _of(x_TI, tile.rows, tile.depth), _of(weight_OI, tile.columns, tile.depth), _of(h_TR, tile.rows, tile.depth),
            _of(b_RO, tile.depth, tile.columns), _of(y, tile.rows, tile.columns), sites.biases[site] if sites.biases else weight_OI,
            num_tokens, len(weight_OI), width, len(b_RO),
            BIAS=bool(sites.biases), BUFFERS=tile.stages, SWEEP=tiles.PERSISTENT_SWEEP, num_warps=tile.warps,
        )  # fmt: skip
        found.append(y)
    return found
