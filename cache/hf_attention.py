"""The attention and mask functions that `ZipCache` registers with transformers as `quietgoose_zip`.

A call that belongs to one of our caches is recognised without global state: the layer rides on the key that its
`update` returned, and on the length that its `get_mask_sizes` returned. Every other call (no cache, another cache,
training, a sliding-window layer) goes to the stock attention with the stock mask function, as if we were not there.
The name of that stock attention travels inside the config's implementation string (`SwitchedName`).

Called by transformers only; `hf_layer.py` does the work of a call that is ours.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..base.errors import RecipeError

if TYPE_CHECKING:
    from .hf_layer import ZipLayer

NAME = "quietgoose_zip"
STOCK = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
DEFAULT_STOCK = "sdpa"
HANDLE = "_quietgoose_layer"  # attribute of the key tensor that leads back to the cache layer


class SwitchedName(str):
    """`quietgoose_zip`, remembering the stock implementation it replaced; survives copies of the config."""

    stock: str

    def __new__(cls, text: str = NAME, stock: str = DEFAULT_STOCK) -> SwitchedName:
        made = super().__new__(cls, text)
        made.stock = stock
        return made


class HandledLength(int):
    """A number of key columns that remembers which cache layer it was asked of."""

    layer: ZipLayer

    def __new__(cls, length: int, layer: ZipLayer) -> HandledLength:
        made = super().__new__(cls, length)
        made.layer = layer
        return made


def switch(config: Any) -> None:
    """Let models with this config run `quietgoose_zip`, stock attention wherever no ZipCache is involved.

    Raises RecipeError when the config's implementation is not one we can stand in front of.
    """
    current = config._attn_implementation
    if current == NAME:
        return
    while hasattr(current, "stock"):  # another switch of ours stands in front of it (thoughts/attention.py)
        current = current.stock
    stock = DEFAULT_STOCK if current is None else str(current)
    if stock not in STOCK:
        raise RecipeError(
            f"attn_implementation = {stock!r}: ZipCache stands in front of {', '.join(STOCK)}; "
            "call model.set_attn_implementation with one of these first",
            code="CFG-060",
        )
    config._attn_implementation = SwitchedName(stock=stock)


def restore(config: Any) -> None:
    """Undo `switch`: the config names its stock implementation again."""
    if config._attn_implementation == NAME:
        config._attn_implementation = stock_name(config)


def stock_name(config: Any) -> str:
    """The implementation that calls without one of our caches take."""
    current = config._attn_implementation
    if current == NAME:
        return getattr(current, "stock", DEFAULT_STOCK)
    return DEFAULT_STOCK if current is None else str(current)


def zip_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Any:
    """The mask of one forward pass, under the name `quietgoose_zip`.

    For a call without our cache and for a first long chunk: what the stock function makes. For a mask that is not
    plainly causal, or that hides tokens which were stored as valid: a 4-D mask. Otherwise validity of the new tokens,
    bool [B, q], or None where all are valid. A step of one token reads nothing on the host; passes of more do so once.
    """
    layer = getattr(kv_length, "layer", None)
    length = int(kv_length)
    if layer is not None and attention_mask is not None and attention_mask.shape[-1] != length:
        raise RecipeError(
            f"attention_mask has {attention_mask.shape[-1]} columns, the cache holds {length - q_length} tokens and "
            f"{q_length} are new: {length} columns are needed (1 for a token, 0 for padding)",
            code="CFG-061",
        )
    name = stock_name(config) if layer is None or layer.takes_stock_mask(q_length) else None
    hidden = layer is not None and attention_mask is not None and layer.is_hidden_by(attention_mask, q_length)
    if name is not None or hidden or mask_function is not causal_mask_function:
        return ALL_MASK_ATTENTION_FUNCTIONS[name or "sdpa"](
            q_length=q_length,
            kv_length=length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            config=config,
            **kwargs,
        )
    if attention_mask is None or layer is None:
        return None
    valid = attention_mask[:, -q_length:].bool()
    return None if layer.takes_chunk(q_length) and bool(valid.all()) else valid


def zip_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention under the name `quietgoose_zip`: query [B,H,q,D], key and value [B,Hk,q,D] -> [B,q,H,D]."""
    layer = getattr(key, HANDLE, None)
    if layer is None:
        _refuse_lost_handle(module, attention_mask)
        return stock_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    layer = cast("ZipLayer", layer)
    length = layer.get_seq_length()
    extras = {name: found for name, found in kwargs.items() if found is not None}
    try:
        if extras.get("output_attentions"):
            raise RecipeError(
                "output_attentions=True: attention over a ZipCache has no weight matrix to return; use a DynamicCache "
                'with model.set_attn_implementation("eager")',
                code="CFG-062",
            )
        return layer.attend(module, query, key, value, attention_mask, scaling, extras), None
    except RecipeError:
        if layer.layer_index == 0 and layer.get_seq_length() == length:
            layer.waiting = False  # refused before any layer stored anything: the cache is what it was
        raise


def stock_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    name: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention that the model had before `switch` (or the one called `name`), called as the model calls it."""
    config: Any = module.config
    name = name or stock_name(config)
    if name == "eager":
        return _eager_of(module)(module, query, key, value, mask, **kwargs)
    function = ALL_ATTENTION_FUNCTIONS[name]
    if not name.startswith("flash"):
        return function(module, query, key, value, mask, **kwargs)
    ours = config._attn_implementation  # flash reads its own name from the config to find its library
    config._attn_implementation = name
    try:
        return function(module, query, key, value, mask, **kwargs)
    finally:
        config._attn_implementation = ours


def columns_seen(mask: Tensor, count: int) -> Tensor:
    """Which of the last `count` columns of a 4-D mask [B,1 or H,q,n] any query sees: bool [B, count].

    A token that not even itself sees is padding. Float masks are additive: what is near the lowest value is unseen.
    """
    part = mask[..., -count:]
    seen = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
    return seen.any(dim=2).any(dim=1)


def _eager_of(module: nn.Module) -> Any:
    """The eager attention of the file that defines this attention module."""
    home = sys.modules[type(module).__module__]
    function = getattr(home, "eager_attention_forward", None)
    if function is None:
        raise RecipeError(
            f"attn_implementation = 'eager': {home.__name__} has no eager_attention_forward; "
            'call model.set_attn_implementation("sdpa") before making the ZipCache',
            code="CFG-063",
        )
    return function


def _refuse_lost_handle(module: nn.Module, mask: Any) -> None:
    """Our short masks are for our own attention; anywhere else they would be misread."""
    two_d = isinstance(mask, Tensor) and mask.dim() == 2
    if two_d and not stock_name(module.config).startswith("flash"):
        raise RecipeError(
            f"{type(module).__name__} changes the keys between the cache and the attention, so the attention cannot "
            "find the ZipCache; this model is not supported, use a DynamicCache",
            code="CFG-064",
        )


AttentionInterface.register(NAME, zip_attention)
AttentionMaskInterface.register(NAME, zip_mask)
