"""The attention that `switch` registers with transformers as `quietgoose_thoughts`.

A model's code stays as it is: `model.base_model(inputs_embeds=..., position_ids=..., **thought_inputs(state))` hands
`state` through to every attention layer as the keyword `thought_branch`.

    PrefixState   ordinary causal attention inside documents; the layer's keys and values are kept
    BranchState   branches over a prefix stored once (kernels/thought_attention)
    nothing       the call is not ours: the model's own attention with its own mask, as before `switch`

The switch stays in place, because activation checkpointing runs attention again in the backward pass; `restore` undoes
it. No state is kept on modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..base.errors import QuietGooseError, RecipeError
from ..cache.hf_attention import stock_attention
from ..kernels.thought_attention import thought_attention
from .config import length_dependent
from .storage import ThoughtStore
from .types import Anchors, Prefix

NAME = "quietgoose_thoughts"
KEYWORD = "thought_branch"
REFUSED_EXTRAS = ("softcap", "s_aux", "sliding_window")


class SwitchedName(str):
    """`quietgoose_thoughts`, remembering the implementation it replaced; survives copies of the config."""

    stock: Any

    def __new__(cls, text: str = NAME, stock: Any = "sdpa") -> SwitchedName:
        made = super().__new__(cls, text)
        made.stock = stock
        return made


@dataclass
class PrefixState:
    """Collects keys and values of one ordinary pass.

    mask_B1LL  bool, True where a key may be seen; None: one document a row, plainly causal
    kept       layer -> (keys, values) [B, K, L, C]; filled while `open`, so that a recomputation adds nothing
    """

    mask_B1LL: Tensor | None = None
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    open: bool = True

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, H, L, C] -> [B, L, H, C]."""
        if self.open:
            self.kept[int(module.layer_idx)] = (key, value)  # type: ignore[arg-type]
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, self.mask_B1LL, dropout=0.0, scaling=scaling)

    def close(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """All layers' keys and values; nothing is kept any more."""
        self.open = False
        ordered = [self.kept[layer] for layer in sorted(self.kept)]
        self.kept = {}
        return tuple(k for k, _ in ordered), tuple(v for _, v in ordered)


@dataclass(frozen=True)
class BranchState:
    """Branches of the anchors, laid out as one token axis [B, A * S * M].

    keys, values  of the prefix, [B, K, L, C] a layer
    samples       S
    store, step   a rollout's own keys and values and the slot (int64 tensor of one element) of the one new position;
                  None: the gradient pass, all M positions at once, causal, nothing kept
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    anchors: Anchors
    samples: int
    store: ThoughtStore | None = None
    step: Tensor | None = None

    @classmethod
    def over(cls, prefix: Prefix, anchors: Anchors, samples: int, **rollout: Any) -> BranchState:
        """Branches over a prefix."""
        return cls(prefix.keys, prefix.values, anchors, samples, **rollout)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> tuple[Tensor, None]:
        """query [B, H, A*S*M, C], key and value [B, K, A*S*M, C] -> [B, A*S*M, H, C]."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        shape = (self.anchors.count, self.samples, -1)
        q_BHASMC, k_BKASMC, v_BKASMC = (x.unflatten(2, shape) for x in (query, key, value))
        length = None
        if self.store is not None:
            assert self.step is not None
            k_BKASMC, v_BKASMC = self.store.append(layer, self.step, k_BKASMC, v_BKASMC)
            length = self.step + 1
        out_BHASMC = thought_attention(
            q_BHASMC, self.keys[layer], self.values[layer], k_BKASMC, v_BKASMC,
            self.anchors.index_BA, self.anchors.start_BA, length, scaling,
            consecutive_from=self.anchors.consecutive_from,
        )  # fmt: skip
        return out_BHASMC.flatten(2, 4).transpose(1, 2), None


def thought_inputs(state: PrefixState | BranchState, device: torch.device) -> dict[str, Any]:
    """Keyword arguments that carry `state` to the attention. A 4-D mask is one that transformers hands on untouched."""
    return {KEYWORD: state, "attention_mask": torch.empty(0, 1, 0, 0, device=device), "use_cache": False}


def switch(model: nn.Module) -> None:
    """Let `model` run `quietgoose_thoughts`; calls without a thought state stay as they were. Idempotent.

    RecipeError CFG-103 for a model whose attention branches cannot follow (no config, encoder-decoder), CFG-105 as
    check_rotary.
    """
    config = _text_config(model)
    if config._attn_implementation != NAME:
        check_rotary(model)
        config._attn_implementation = SwitchedName(stock=config._attn_implementation or "sdpa")


def check_rotary(model: nn.Module) -> None:
    """RecipeError CFG-105 for rotary positions whose frequencies depend on how long the sequence is: the keys of a prefix would
    have others than the branches behind it."""
    kind = length_dependent(vars(_text_config(model)))
    if kind:
        raise RecipeError(
            f"{type(model).__name__} has rotary positions of type '{kind}', whose frequencies change with the length of the "
            "sequence: thoughts need a base with fixed ones (default, linear, llama3, yarn)",
            code="CFG-105",
        )


def restore(model: nn.Module) -> None:
    """Undo `switch`."""
    config = _text_config(model)
    current = config._attn_implementation
    if current == NAME:
        config._attn_implementation = getattr(current, "stock", "sdpa")


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        raise RecipeError(
            f"{type(model).__name__}: thoughts need a causal language model of transformers", code="CFG-103"
        )
    return config.get_text_config(decoder=True)


def thoughts_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    thought_branch: PrefixState | BranchState | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention under the name `quietgoose_thoughts`: query [B, H, q, C] -> [B, q, H, C]."""
    if thought_branch is None:
        if isinstance(attention_mask, Tensor) and attention_mask.numel() == 0:
            raise RecipeError(
                f"{type(module).__name__} did not get the keyword {KEYWORD}: this model does not hand keywords on to its "
                "attention, so thoughts cannot run through it",
                code="CFG-103",
            )
        with _as_before(module.config) as stock:
            return stock_attention(
                module, query, key, value, attention_mask, name=stock, scaling=scaling, dropout=dropout, **kwargs
            )
    if not getattr(module, "is_causal", True):
        raise RecipeError(
            f"{type(module).__name__} is not causal: thoughts need a causal language model", code="CFG-103"
        )
    for name in REFUSED_EXTRAS:
        if kwargs.get(name) is not None:
            raise RecipeError(
                f"{type(module).__name__} uses {name} = {kwargs[name]!r} in its attention: thoughts need full causal "
                "attention without it",
                code="CFG-103",
            )
    if dropout:
        raise QuietGooseError("thoughts run without attention dropout: put the model in eval mode", code="THT-002")
    return thought_branch.attend(module, query, key, value, scaling)


def thoughts_mask(*, config: Any = None, **kwargs: Any) -> Any:
    """The mask of a call that is not ours: what the model had before."""
    with _as_before(config) as stock:
        return ALL_MASK_ATTENTION_FUNCTIONS[stock](config=config, **kwargs)


@contextmanager
def _as_before(config: Any) -> Iterator[str]:
    """The config names the implementation that `switch` replaced, as long as this lasts."""
    ours = config._attn_implementation
    stock = getattr(ours, "stock", "sdpa")
    config._attn_implementation = stock
    try:
        yield str(stock)
    finally:
        config._attn_implementation = ours


AttentionInterface.register(NAME, thoughts_attention)
AttentionMaskInterface.register(NAME, thoughts_mask)
