"""Two ways for a Hugging Face model to attend within the documents of packed rows, made for compiled training.

flex     FlexAttention with a block mask: blocks of 128 x 128 in which no document meets itself are never computed. It must
         be compiled, layer by layer (train/compiled.py) or by itself
varlen   the flash kernels that PyTorch has inside, given where documents begin; rows stay [B, T]

Both are registered with transformers' AttentionInterface under names of ours and read what they need from the model's keyword
arguments, which transformers hands through. `sdpa` with a mask computes the same and is what they are tested against.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from ...base.errors import RecipeError
from .attention import FLEX, VARLEN, document_borders

BLOCK = 128
VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)
"""They differ between versions of PyTorch."""


def packed_inputs(batch: Any, implementation: str) -> dict[str, Any]:
    """Keyword arguments for the model."""
    inputs = {"input_ids": batch.tokens_BT, "position_ids": batch.position_BT}
    if implementation == FLEX:
        return {**inputs, "document_mask": document_mask(batch.segment_BT)}
    borders = getattr(batch, "border_D", None)
    return {**inputs, "document_borders": document_borders(batch.segment_BT) if borders is None else borders}


def document_mask(segment_BT: Tensor) -> BlockMask:
    """Which blocks of which rows are needed: same document and u <= t. Padding is a document."""

    def allowed(b: Tensor, h: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return (segment_BT[b, t] == segment_BT[b, u]) & (u <= t)

    rows, length = segment_BT.shape
    return create_block_mask(allowed, rows, None, length, length, device=str(segment_BT.device), BLOCK_SIZE=BLOCK)


def packed_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    document_mask: BlockMask | None = None,
    document_borders: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, d], key and value [B, G, T, d] -> [B, T, H, d]; by flex if there is a mask, by varlen if borders."""
    if dropout > 0:
        raise RecipeError(
            "train.attention: flex and varlen have no attention dropout, which this model's config asks for; set "
            "train.attention: base",
            code="CFG-032",
        )
    if document_mask is not None:
        return _flex(query, key, value, document_mask, scaling), None
    assert document_borders is not None
    return _varlen(query, key, value, document_borders, scaling), None


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None) -> Tensor:
    """Heads are repeated: the kernels want H / G a power of 2 otherwise."""
    key, value = _repeated(key, query), _repeated(value, query)
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return attend(query, key, value, block_mask=mask, scale=scaling).transpose(1, 2).contiguous()  # type: ignore[union-attr]


def _varlen(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scaling: float | None) -> Tensor:
    """Documents of no length at the end of the borders cost nothing."""
    rows, heads, length, size = query.shape
    grouped = "enable_gqa" in VARLEN_OPTIONS
    if not grouped:
        key, value = _repeated(key, query), _repeated(value, query)
    flat = [part.transpose(1, 2).reshape(rows * length, -1, size) for part in (query, key, value)]
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in VARLEN_OPTIONS else {"is_causal": True}
    if grouped and key.shape[1] != heads:
        options["enable_gqa"] = True
    if "scale" in VARLEN_OPTIONS:
        options["scale"] = scaling
    elif scaling is not None and abs(scaling * size**0.5 - 1) > 1e-6:
        flat[0] = flat[0] * (scaling * size**0.5)  # older kernels scale by 1 / sqrt(d) themselves
    q, k, v = flat
    return varlen_attn(q, k, v, borders, borders, length, length, **options).view(rows, length, heads, size)  # type: ignore[union-attr]


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def _repeated(part: Tensor, query: Tensor) -> Tensor:
    times = query.shape[1] // part.shape[1]
    return part if times == 1 else part.repeat_interleave(times, dim=1)


for name in (FLEX, VARLEN):
    AttentionInterface.register(name, packed_forward)
