"""What a Hugging Face model needs to read packed rows: every document attends to itself only, causally.

sdpa, eager          [B, T] tokens and a 4-D mask [B, 1, T, T]; transformers hands a 4-D mask to attention
untouched
                     (masking_utils.py, "if the mask is already 4D, simply return as-is", 5.17 to 5.23)
flash_attention_2    all rows in one line [1, B*T] and the borders of the documents (cu_seq_lens), no mask
Called by the jobs; `resolve_attention` by base_models.py and the stages.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

import torch

from ...base.errors import EnvironmentProblem, RecipeError

IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2")
FLEX, VARLEN = "quietgoose_flex", "quietgoose_varlen"
"""Ways of ours to read packed rows, for training (packed_attention.py)."""


class PackedBatch(Protocol):
    """The part of `Batch` that attention needs."""

    @property
    def tokens_BT(self) -> torch.Tensor: ...

    @property
    def position_BT(self) -> torch.Tensor: ...

    @property
    def segment_BT(self) -> torch.Tensor: ...


def model_inputs(
    batch: PackedBatch, implementation: str = "sdpa", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Keyword arguments for a Hugging Face causal LM; `dtype` is the dtype of its activations (used by
    eager).

    Logits come back as [B, T, V], or [1, B*T, V] with flash attention. Padding forms a document of its own,
    so no query is without a key.
    """
    if implementation == "flash_attention_2":
        return _flash_inputs(batch)
    if implementation in (FLEX, VARLEN):
        from .packed_attention import packed_inputs

        return packed_inputs(batch, implementation)
    allowed_B1TT = block_causal_mask(batch.segment_BT)
    mask: torch.Tensor = allowed_B1TT
    if implementation == "eager":  # eager adds the mask to the scores
        mask = torch.zeros(allowed_B1TT.shape, dtype=dtype, device=allowed_B1TT.device)
        mask = mask.masked_fill(~allowed_B1TT, torch.finfo(dtype).min)
    return {"input_ids": batch.tokens_BT, "position_ids": batch.position_BT, "attention_mask": mask}


def block_causal_mask(segment_BT: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, T, T], True where query t may see key u: same segment and u <= t."""
    length = segment_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segment_BT.device).tril()
    same_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]
    return (same_BTT & causal_TT)[:, None]


def document_borders(segment_BT: torch.Tensor) -> torch.Tensor:
    """int32 [documents + 1], where documents begin in the flattened rows, and B*T. A row's padding is one
    document."""
    starts_BT = torch.ones_like(segment_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segment_BT[:, 1:] != segment_BT[:, :-1]
    starts = starts_BT.flatten().nonzero().flatten()
    return torch.nn.functional.pad(starts, (0, 1), value=segment_BT.numel()).to(torch.int32)


def _flash_inputs(batch: PackedBatch) -> dict[str, Any]:
    """One wait for the device per call, for the number of documents. The row length bounds theirs from
    above."""
    borders = document_borders(batch.segment_BT)
    length = batch.tokens_BT.shape[1]
    return {
        "input_ids": batch.tokens_BT.reshape(1, -1),
        "position_ids": batch.position_BT.reshape(1, -1),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": length,
        "max_length_k": length,
    }


def resolve_attention(name: str, device: torch.device | str, dtype: torch.dtype | str) -> tuple[str, str]:
    """(implementation, reason) for a model of `dtype` (`"bfloat16"` also goes) on `device`. `auto` is flash
    attention where it is installed and can run, else sdpa.

    Raises:
        RecipeError: CFG-010, no such implementation, or flash attention without CUDA or with float32.
        EnvironmentProblem: ENV-004, flash attention asked for and not installed.
    """
    obstacle, installed = _flash_obstacle(torch.device(device), str(dtype).removeprefix("torch."))
    if name == "auto":
        return ("sdpa", f"flash attention needs {obstacle}") if obstacle else ("flash_attention_2", "installed")
    if name not in IMPLEMENTATIONS:
        raise RecipeError(f"base.attention: {name}; allowed are auto, {', '.join(IMPLEMENTATIONS)}", code="CFG-010")
    if name == "flash_attention_2" and obstacle:
        text = f"base.attention: flash_attention_2 needs {obstacle}; set base.attention: auto or sdpa"
        if installed:
            raise RecipeError(text, code="CFG-010")
        raise EnvironmentProblem(text, code="ENV-004")
    return name, "asked for"


def _flash_obstacle(device: torch.device, dtype: str) -> tuple[str, bool]:
    """(what flash attention lacks here, whether installing it would not help); the first is empty if it can
    run."""
    if device.type != "cuda":
        return f"a CUDA device, not {device.type}", True
    if dtype not in ("bfloat16", "float16"):
        return f"base.dtype bfloat16, not {dtype}", True
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn (pip install 'quietgoose[gpu]')", False
    from transformers.utils import is_flash_attn_2_available

    return ("", True) if is_flash_attn_2_available() else ("a flash-attn 2 that this transformers accepts", False)
