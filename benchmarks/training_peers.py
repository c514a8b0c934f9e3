"""What others do with the same rows: a plain Hugging Face + PEFT loop, the same on packed rows, the same compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measure import tidy
from peft import LoraConfig, get_peft_model
from quietgoose.train.data.attention import model_inputs
from training_cases import RANK, Shape, build, packed

BATCH = 32


@contextmanager
def peft_step(
    shape: Shape, rows: int, device: torch.device, *, padded: bool, compiled: bool
) -> Iterator[tuple[Any, int]]:
    """(one optimizer step with one adapter, its tokens). `padded`: a batch of 32 documents padded to the longest, as loops
    usually go, and `loss.item()` for the log; else `rows` packed rows under a block mask."""
    torch._dynamo.reset()
    tidy(device)
    base = build(shape, device)
    adapter = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, adapter).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if compiled:
        model = torch.compile(model, dynamic=False)
    inputs, labels, tokens = _padded(shape, device) if padded else _packed(shape, rows, device)

    def step() -> None:
        logits = model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    yield step, tokens


def _padded(shape: Shape, device: torch.device) -> tuple[dict[str, Any], torch.Tensor, int]:
    """Documents of half to one and a half times the usual length, padded on the right."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(shape.document // 2, shape.document * 3 // 2 + 1, (BATCH,), generator=g)
    longest = int(lengths.max())
    place = torch.arange(longest)
    tokens = torch.randint(3, shape.config.vocab_size, (BATCH, longest), generator=g)
    labels = torch.randint(3, shape.config.vocab_size, (BATCH, longest), generator=g)
    labels[(place < lengths[:, None] * 3 // 4) | (place >= lengths[:, None])] = -100
    inputs = {"input_ids": tokens.to(device), "attention_mask": (place < lengths[:, None]).long().to(device)}
    return inputs, labels.to(device), int(lengths.sum())


def _packed(shape: Shape, rows: int, device: torch.device) -> tuple[dict[str, Any], torch.Tensor, int]:
    from quietgoose.train.types import Batch

    found = packed(shape, "one", rows, 0)
    batch = Batch(
        *(torch.from_numpy(a.copy()).long() for a in (found.tokens_BT, found.labels_BT, found.position_BT)),
        torch.from_numpy(found.segment_BT.copy()), torch.zeros(rows, dtype=torch.int64),
    ).to(device)  # fmt: skip
    return model_inputs(batch), batch.labels_BT, rows * shape.length
