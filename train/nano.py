"""The embedded nano model: a small Llama with random weights, and a byte-level tokenizer made in code, with a
chat template that changes nothing but rows of `messages`.

The `base` stage trains it from scratch; nothing is downloaded. Called by base_models.py and train/stages.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..base.errors import RecipeError
from ..base.seeding import derive
from .recipe import NanoSettings

PAD, END = "<pad>", "<end>"
# a line `role: content` for every message; what the assistant says ends the text, as a completion does
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}" + END + "{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
BYTES = 256
VOCABULARY = BYTES + 2


class Nano(NamedTuple):
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast


def nano_tokenizer(context: int = NanoSettings.context) -> PreTrainedTokenizerFast:
    """Ids 0..255 are the bytes of UTF-8, 256 is <pad>, 257 is <end> (end and begin of text). Every text
    round-trips. Its chat template writes `user: ...`, `assistant: ...`, a line each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # GPT-2's names of the bytes: printable Latin-1 characters are themselves, the others follow 255 in order
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(BYTES + n) for n, byte in enumerate(others)}
    vocabulary = {names[byte]: byte for byte in range(BYTES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(PAD, special=True), AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        bos_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT,
    )


def nano_config(settings: NanoSettings) -> LlamaConfig:
    """Llama with the shape of the settings.

    Raises:
        RecipeError: CFG-012, sizes that do not divide.
    """
    if settings.width % settings.heads or (settings.width // settings.heads) % 2:
        raise RecipeError(
            f"base.nano.width {settings.width} must be heads ({settings.heads}) times an even number",
            code="CFG-012",
        )
    if settings.heads % settings.kv_heads:
        raise RecipeError(
            f"base.nano.kv_heads {settings.kv_heads} must divide base.nano.heads {settings.heads}",
            code="CFG-012",
        )
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.width,
        intermediate_size=settings.mlp_width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context,
        pad_token_id=BYTES,
        eos_token_id=BYTES + 1,
        bos_token_id=BYTES + 1,
        tie_word_embeddings=False,
    )


def build_nano(settings: NanoSettings, seed: int) -> Nano:
    """A nano with random fp32 weights, the same for the same seed, and its tokenizer. Global random state is
    kept."""
    config = nano_config(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "nano"))
        model = LlamaForCausalLM(config)
    return Nano(model.float(), nano_tokenizer(settings.context))
