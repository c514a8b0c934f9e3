"""Where packed keys and values lie: the arena, its blocks, and the shapes that are supported.

An arena holds tokens of one precision for every (row, KV head), in position order. A *block* is at most BLOCK
consecutive slots written by one call of `append_packed`; it owns the channel parameters of keys and is never reopened.
The channel scale of values is one for all blocks of a (row, KV head): the call that writes a row's first block computes
it, later calls take it as it is. So a row without blocks has none, and emptying a row (num_blocks = 0) forgets it. Rows
have their own lengths (padding is never stored); all heads of a row are equally long. Which slot is which position
follows from the precision bitmap that cache/ keeps: rank in the bitmap = slot.

    key   = key_scale * u + key_min                                  per block and channel
    value = value_channel * (value_scale * u + value_min)            c per channel; scale, min per slot

Codes are planar along the head dimension: 4-bit byte j holds channel j (low nibble) and j + D/2; 2-bit byte j holds
channels j, j + D/4, j + D/2, j + 3D/4 from low bits to high. Readers: kernels/cached_attention, cache/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..dispatch import UnsupportedShape

BLOCK = 128  # slots of a block at most
BITS = (2, 4, 16)
PARAMETER_DTYPE = torch.float16
MODEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_HEAD_DIMS = (16, 32, 64, 128, 256)  # of the quantize and saliency kernels
_ALIGNMENT = 256  # bytes, as the allocator gives them


@dataclass(frozen=True)
class PackedArena:
    """Packed keys and values of one layer in one precision; C slots and N blocks of capacity.

    Tensors are updated in place; the dataclass itself never changes. Memory past a row's length is undefined: readers
    mask it, they never multiply by zero.
    """

    bits: int  # 2, 4 or 16 (16: codes are the values themselves in the model's dtype, parameters have size 0)
    key_codes: Tensor  # uint8 [B, Hk, C, D * bits // 8]
    value_codes: Tensor  # uint8 [B, Hk, C, D * bits // 8]
    value_scale: Tensor  # fp16 [B, Hk, C]
    value_min: Tensor  # fp16 [B, Hk, C]
    key_scale: Tensor  # fp16 [B, Hk, N, D]
    key_min: Tensor  # fp16 [B, Hk, N, D]
    value_channel: Tensor  # fp16 [B, Hk, D], positive; undefined while the row has no block
    block_start: Tensor  # int32 [B, N + 1]; block i = slots [start_i, start_i+1); past num_blocks: the row's length
    num_blocks: Tensor  # int32 [B]

    @property
    def head_dim(self) -> int:
        return self.key_codes.shape[3] if self.bits == 16 else self.key_codes.shape[3] * 8 // self.bits

    @property
    def capacity(self) -> int:
        """Slots, used or not."""
        return self.key_codes.shape[2]

    @property
    def block_capacity(self) -> int:
        return self.block_start.shape[1] - 1

    def lengths(self) -> Tensor:
        """Slots in use, int32 [B], a fresh tensor on the arena's device; no synchronisation."""
        return self.block_start.gather(1, self.num_blocks.long().unsqueeze(1)).squeeze(1)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by field name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class BitTables:
    """One bit a column, lowest bit of a byte first: where `append_ranked` notes what it did with each token."""

    salient: Tensor  # uint8 [B, Hk, M]: went to the high arena
    valid: Tensor  # uint8 [B, M]
    column: int  # of the first new token; at least ceil((column + n) / 8) bytes are there


def empty_arena(
    bits: int,
    batch: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    blocks: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> PackedArena:
    """An arena without tokens. `dtype` is the model's: the dtype of the codes at 16 bits, otherwise not used."""
    check_bits(bits, head_dim)
    lossless = bits == 16
    width, code_dtype = (head_dim, dtype) if lossless else (head_dim * bits // 8, torch.uint8)
    slots, groups, channels = (0, 0, 0) if lossless else (capacity, blocks, head_dim)
    codes = ((batch, kv_heads, capacity, width), code_dtype)
    per_slot = ((batch, kv_heads, slots), PARAMETER_DTYPE)
    per_block = ((batch, kv_heads, groups, head_dim), PARAMETER_DTYPE)
    tables = (((batch, blocks + 1), torch.int32), ((batch,), torch.int32))
    channel = ((batch, kv_heads, channels), PARAMETER_DTYPE)
    made = zeros_together([codes, codes, per_slot, per_slot, per_block, per_block, channel, *tables], device)
    return PackedArena(bits, *made)


def zeros_together(pieces: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device | str) -> list[Tensor]:
    """Zeroed contiguous tensors of these shapes and dtypes: one allocation, one launch. They live and die together."""
    size, places = _places(tuple(pieces))
    storage = torch.zeros(size, dtype=torch.uint8, device=device)
    views = {dtype: storage.view(dtype) for _, dtype in pieces}
    return [views[dtype].as_strided(*place) for (_, dtype), place in zip(pieces, places)]


@lru_cache(maxsize=64)
def _places(pieces: tuple[tuple[tuple[int, ...], torch.dtype], ...]) -> tuple[int, list[tuple[Any, Any, int]]]:
    """(bytes in all, shape, strides and first element of each piece); every layer of a model asks for the same."""
    places, end = [], 0
    for shape, dtype in pieces:
        steps = [math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape))]
        places.append((shape, steps, end // dtype.itemsize))
        end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return end, places


def check_bits(bits: int, head_dim: int) -> None:
    """Raise UnsupportedShape unless codes of this width can be laid out planar over head_dim channels."""
    if bits not in BITS:
        raise UnsupportedShape(f"bits = {bits}: supported are 2, 4 and 16 (16 stores the values as they are)")
    if bits != 16 and head_dim % (8 // bits):
        raise UnsupportedShape(f"head_dim = {head_dim} with {bits} bits: it must be a multiple of {8 // bits}")
