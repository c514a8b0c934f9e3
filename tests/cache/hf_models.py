"""Tiny random models of several families and the comparisons that the ZipCache tests share."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from quietgoose.cache.hf import ZipCache
from quietgoose.cache.policy import Policy
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

VOCABULARY = 128
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# flushes come early, so that short tests meet packed tokens, tail and blocks that are not full
LOSSLESS = Policy(salient_ratio=0.6, high_bits=16, low_bits=16, flush_every=24, recent_tokens=5, sink_tokens=2)
MIXED = Policy(salient_ratio=0.6, flush_every=24)
QUALITY = Policy(salient_ratio=0.8, flush_every=24, sink_tokens=4, recent_tokens=8)
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SHAPE | {"num_hidden_layers": 3} | changes))).eval()


def family(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random `<name>ForCausalLM`."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name.removesuffix('ForCausalLM')}Config")
    return getattr(transformers, name)(config(**(SHAPE | changes))).eval()


def draw(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: int, length: int, padding: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) with that many padding tokens at the start of each row."""
    ids, mask = draw(rows, length, seed), torch.ones(rows, length, dtype=torch.long)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return ids.masked_fill(mask == 0, 0), mask


@torch.no_grad()
def both(model: Any, ids: torch.Tensor, policy: Policy = LOSSLESS, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Generated ids with transformers' own cache, and with a ZipCache."""
    torch.manual_seed(7)
    stock = model.generate(ids, past_key_values=DynamicCache(config=model.config), **(GREEDY | options))
    torch.manual_seed(7)
    ours = model.generate(ids, past_key_values=ZipCache(model.config, policy), **(GREEDY | options))
    return stock, ours


def codes(cache: ZipCache) -> list[torch.Tensor]:
    """Copies of the packed codes of every row and layer, cut to what is in use."""
    found = []
    for layer in cache.zip_layers:
        for arena in (layer.state.high, layer.state.low):
            for row, used in enumerate(arena.lengths().tolist()):
                found.append(arena.key_codes[row, :, :used].clone())
                found.append(arena.value_codes[row, :, :used].clone())
    return found


def starts_with(longer: list[torch.Tensor], shorter: list[torch.Tensor]) -> bool:
    """Whether every later list of codes begins with the earlier one, bit for bit."""
    return all(torch.equal(new[:, : old.shape[1]], old) for new, old in zip(longer, shorter, strict=True))
