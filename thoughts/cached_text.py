"""Rows of text in a KV cache of transformers, to which forwards append columns and from which `take_back` removes them.

Works with any cache that can be cropped: DynamicCache, and ZipCache, whose 16-bit tail holds a thought until it is taken
back (cache/rollback.py). Caller: thinking.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..base.errors import QuietGooseError, RecipeError
from ..cache.rollback import mark, reserve, roll_back
from ..kernels.cached_attention import SaliencyBuffers


class CachedText:
    """B rows: what `model` has read of them. Left padding by a mask.

    mask_BL      1 where a column is a token; None: everywhere
    position_B1  int64, the position of the next column
    """

    def __init__(self, model: Any, cache: Cache, mask_BL: Tensor | None, position_B1: Tensor) -> None:
        """`mask_BL`: of the columns that the cache holds already. RecipeError CFG-090 for a cache that cannot be cropped."""
        if not cache.is_croppable:
            raise RecipeError(
                f"a {type(cache).__name__} cannot take thoughts back: pass past_key_values=DynamicCache(config=model.config) "
                "or a quietgoose.ZipCache (no static cache; models with linear-attention layers are not supported)",
                code="CFG-090",
            )
        self.body = model.base_model
        self.cache, self.mask_BL, self.position_B1 = cache, mask_BL, position_B1
        self.takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters

    @property
    def length(self) -> int:
        """Columns in the cache, padding included."""
        return int(self.cache.get_seq_length())

    def forward(self, x_BnD: Tensor, seen_Bn: Tensor | None = None, position_Bn: Tensor | None = None) -> Tensor:
        """Append n columns of embeddings; their last hidden states [B, n, D], after the final norm.

        seen_Bn: 0 at padding (None: none)      position_Bn: None: one after another
        """
        count = x_BnD.shape[1]
        if position_Bn is None:
            position_Bn = self.position_B1 + torch.arange(count, device=x_BnD.device)
        if self.mask_BL is not None:
            seen_Bn = self.mask_BL.new_ones(x_BnD.shape[:2]) if seen_Bn is None else seen_Bn
            self.mask_BL = torch.cat([self.mask_BL, seen_Bn], dim=1)
        positions = {"position_ids": position_Bn} if self.takes_positions else {}
        out = self.body(
            inputs_embeds=x_BnD, attention_mask=self.mask_BL, past_key_values=self.cache, use_cache=True, **positions
        )
        self.position_B1 = position_Bn[:, -1:] + 1
        return out.last_hidden_state

    def repeat(self, times: int) -> None:
        """Every row `times` times, copies beside each other."""
        self.cache.batch_repeat_interleave(times)
        self.position_B1 = self.position_B1.repeat_interleave(times, dim=0)
        if self.mask_BL is not None:
            self.mask_BL = self.mask_BL.repeat_interleave(times, dim=0)

    def keep_each(self, times: int) -> None:
        """The inverse of `repeat`: the first of each `times` rows."""
        rows_B = torch.arange(0, self.position_B1.shape[0], times, device=self.position_B1.device)
        self.cache.batch_select_indices(rows_B)
        self.position_B1 = self.position_B1[rows_B]
        self.mask_BL = None if self.mask_BL is None else self.mask_BL[rows_B]

    def reserve(self, columns: int) -> None:
        """Room for `columns` that will be taken back. RecipeError CFG-076 if a ZipCache's tail is too small for them."""
        reserve(self.cache, columns)

    def mark(self) -> list[SaliencyBuffers | None]:
        """What `take_back` needs to know of now."""
        return mark(self.cache)

    def take_back(self, marked: list[SaliencyBuffers | None], columns: int) -> None:
        """Remove the last `columns`, the first of which ended the forward before `marked`."""
        wanted = self.length - columns
        roll_back(self.cache, marked, columns=columns, queries=1)
        if self.length != wanted:
            raise QuietGooseError(
                f"a {type(self.cache).__name__} holds {self.length} columns after {columns} were taken back, not {wanted}",
                code="THT-010",
            )
        self.position_B1 = self.position_B1 - columns
        self.mask_BL = None if self.mask_BL is None else self.mask_BL[:, :-columns]
