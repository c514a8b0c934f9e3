"""A tiny Llama and a byte tokenizer; `taught` knows some of the answers by heart."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

KNOWN = [
    ("say red:", " rot"),
    ("say green, please:", " gruen"),
    ("say blue:", " blau"),
    ("what is black?", " schwarz"),
    ("two words for white:", " weiss weiss"),
]
UNKNOWN = [("say yellow:", " gelb"), ("what is brown?", " braun"), ("name a tree:", " ahorn")]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, "<pad>": 1, **{byte: index + 2 for index, byte in enumerate(alphabet)}}
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="<eos>", pad_token="<pad>")


def tiny_llama(seed: int, attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def random_model() -> LlamaForCausalLM:
    return tiny_llama(0)


@pytest.fixture(scope="session")
def taught(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model that answers KNOWN, ends each answer, and has never seen UNKNOWN."""
    model = tiny_llama(1).train()
    rows = [
        (tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id])
        for prompt, answer in KNOWN
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens, labels = torch.full((len(rows), width), 1), torch.full((len(rows), width), -100)
    for index, (prompt, answer) in enumerate(rows):
        tokens[index, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[index, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return model.eval()
