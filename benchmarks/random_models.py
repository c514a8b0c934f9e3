"""Models of random weights in the shapes that benchmarks time, and the bytes and numbers that such shapes imply."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama3_8b(layers: int = 32) -> LlamaConfig:
    """The shape of LLaMA3-8B; `layers` fewer for a smaller card."""
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072 + 1024, rope_theta=500000.0,
    )  # fmt: skip


def smollm2(layers: int = 30) -> LlamaConfig:
    """The shape of SmolLM2-135M."""
    return LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True,
    )  # fmt: skip


def tiny() -> LlamaConfig:
    """Same family and group structure, small: for CPU tests and for the correctness gate."""
    return LlamaConfig(
        hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=509, max_position_embeddings=4096, initializer_range=0.1,
    )  # fmt: skip


def build(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """Random weights made where and as they are needed; 16 GB for the 8B shape in bf16."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def weight_bytes(model: Any) -> int:
    """Bytes of the parameters that one decode step reads: all but the table of input embeddings (a row a token)."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    return total if head is table else total - table.numel() * table.element_size()


def numbers_cached(config: Any, rows: int, tokens: int) -> int:
    """Keys and values of all layers, counted in numbers."""
    text = config.get_text_config(decoder=True)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * rows * text.num_key_value_heads * width * tokens
