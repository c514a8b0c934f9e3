"""A GGUF file becomes a Hugging Face folder, once: weights dequantized to float32, a fast tokenizer, a
manifest.

Weights are read by transformers. The tokenizer is built here from the file's own fields, because
transformers reads it wrongly for SmolLM2: 5.17 takes <|im_start|> for end-of-text and drops the chat
template, and 5.17 to 5.23 lose the rule that splits digits (`tokenizer.ggml.pre`). Called by base_models.py.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..base.errors import ArtifactError, DataError
from ..base.files import fsync_folder, read_json, sha256_file, write_json

MANIFEST = "quietgoose_base.json"
CONVERTER = 1
CONTROL_TOKEN = 3


def convert(file: Path, sha256: str, folder: Path) -> None:
    """Write `folder` from a GGUF file; whole or absent.

    Raises:
        DataError: DATA-010, no GGUF file, or a model or tokenizer kind that is not supported.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        reader = _reader(file)
        tokenizer_of(reader, file).save_pretrained(staging)
        _save_weights(file, staging)
        files = {path.name: sha256_file(path) for path in sorted(staging.iterdir())}
        write_json(
            staging / MANIFEST,
            {"converter": CONVERTER, "gguf_sha256": sha256, "note": _note(reader), "files": files},
        )
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(staging, folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """The manifest of a converted folder, None if it is another folder or was made by an older converter."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    return manifest if manifest.get("converter") == CONVERTER else None


def verify(folder: Path, hashes: dict[str, str], manifest: dict[str, Any]) -> None:
    """CKPT-010 if a weight file of a converted folder has another hash than at its conversion."""
    for name, found in hashes.items():
        wanted = manifest["files"].get(name)
        if wanted != found:
            raise ArtifactError(
                f"{folder / name}: sha256 {found[:12]}.., was {str(wanted)[:12]}.. when it was converted; "
                f"delete {folder}, it is made anew",
                code="CKPT-010",
            )


def tokenizer_of(reader: Any, file: Path) -> Any:
    """Fast byte-level BPE tokenizer from the fields tokenizer.ggml.*.

    `pre` smollm splits every digit off, then uses GPT-2's rule (llama.cpp, llm_tokenizer_bpe); gpt-2 is
    GPT-2's rule.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = {
        name.removeprefix("tokenizer."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith("tokenizer.")
    }
    kind, rule = fields.get("ggml.model"), fields.get("ggml.pre", "gpt-2")
    if kind != "gpt2" or rule not in ("smollm", "gpt-2"):
        raise DataError(
            f"{file}: tokenizer {kind}/{rule}; from GGUF only gpt2/smollm and gpt2/gpt-2 are supported; "
            "give the model as a Hugging Face folder",
            code="DATA-010",
        )
    tokens: list[str] = fields["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if rule == "smollm" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, type_ in zip(tokens, fields["ggml.token_type"]) if type_ == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special = {
        f"{name}_token": tokens[fields[f"ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"ggml.{key}_token_id" in fields
    }
    special.setdefault("pad_token", special["eos_token"])
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=int(_field(reader, "context_length", file)),
        **special,
    )
    result.chat_template = fields.get("chat_template")
    return result


def _save_weights(file: Path, folder: Path) -> None:
    """The object transformers makes from GGUF refuses save_pretrained; its weights move to one that does
    not."""
    from transformers import AutoModelForCausalLM

    read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    config = type(read.config).from_dict(
        {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_model_name_or_path")}
    )
    with torch.device("meta"):
        plain = type(read)(config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)


def _reader(file: Path) -> Any:
    import gguf

    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise DataError(f"{file}: not a GGUF file", code="DATA-010")
    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise DataError(f"{file}: torn or no GGUF file ({error})", code="DATA-010") from error


def _field(reader: Any, name: str, file: Path) -> Any:
    architecture = reader.fields["general.architecture"].contents()
    field = reader.fields.get(f"{architecture}.{name}")
    if field is None:
        raise DataError(f"{file}: field {architecture}.{name} is missing", code="DATA-010")
    return field.contents()


def _note(reader: Any) -> str:
    """`dequantized from Q4_1`: the type most weights have."""
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    quantized = [name for name, _ in types.most_common() if name not in ("F32", "F16", "BF16")]
    return f"dequantized from {quantized[0]}" if quantized else f"converted from {types.most_common(1)[0][0]}"
