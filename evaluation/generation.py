"""Greedy generation in left-padded batches with the KV cache (`model.generate`). Called by evaluation/run.py.

A string target needs no more steps than its gold answer has tokens, plus end-of-text, plus a little for
another tokenization of the same text; a numeric target (last number of the text) may take `max_new_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from .encoding import EncodedItem, ItemRef
from .tasks import Task, matches

SLACK = 4  # further tokens a string answer may take
CACHED = 4  # cached tokens cost keys and values only: batches hold this many times the tokens of a forward pass


@dataclass(frozen=True)
class PromptRow:
    """One prompt to continue by at most `limit` tokens."""

    ref: ItemRef
    prompt: tuple[int, ...]
    limit: int


@dataclass(frozen=True)
class PromptBatch:
    """token_BT int64 left-padded, mask_BT 0 on padding; `limit`: the most any row may take."""

    refs: tuple[ItemRef, ...]
    token_BT: torch.Tensor
    mask_BT: torch.Tensor
    limit: int


def prompt_rows(task: Task, items: Sequence[EncodedItem], max_new_tokens: int) -> list[PromptRow]:
    """The items' prompts with their budgets of new tokens."""
    numeric = task.match == "number"
    return [
        PromptRow(item.ref, item.prompt, max_new_tokens if numeric else len(item.leaves[item.gold]) + 1 + SLACK)
        for item in items
    ]


def prompt_batches(rows: Sequence[PromptRow], batch_tokens: int) -> list[list[PromptRow]]:
    """Rows of like budgets and lengths together, largest first. Prompt and new tokens of a batch, padding
    included, are at most four times `batch_tokens` (one row at least): decoding is bound by the number of steps, so
    few large batches it is."""
    batches: list[list[PromptRow]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: (-_step(row.limit), -len(row.prompt))):
        width = max(longest, len(row.prompt))
        joins = bool(batches) and _step(batches[-1][0].limit) == _step(row.limit)
        if not joins or (len(batches[-1]) + 1) * (width + batches[-1][0].limit) > CACHED * batch_tokens:
            batches.append([])
            width = len(row.prompt)
        batches[-1].append(row)
        longest = width
    return batches


def collate_prompts(rows: Sequence[PromptRow], pad: int, device: torch.device | str) -> PromptBatch:
    """Rows as one left-padded batch on `device`."""
    width = max(len(row.prompt) for row in rows)
    tokens = [[pad] * (width - len(row.prompt)) + list(row.prompt) for row in rows]
    mask = [[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in rows]
    return PromptBatch(
        tuple(row.ref for row in rows),
        torch.tensor(tokens).to(device),
        torch.tensor(mask).to(device),
        max(row.limit for row in rows),
    )


@torch.no_grad()
def generate_batch(model: Any, batch: PromptBatch, eos: int, pad: int, **options: Any) -> list[list[int]]:
    """New token ids of every row, up to and with end-of-text where it was reached. `options` go to `model.generate`."""
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=batch.limit,
        eos_token_id=eos,
        pad_token_id=pad,
        use_cache=True,
    )
    output_BT = model.generate(
        input_ids=batch.token_BT, attention_mask=batch.mask_BT, generation_config=greedy, **options
    )  # fmt: skip
    rows = output_BT[:, batch.token_BT.shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def is_correct(new: Sequence[int], target: str, task: Task, tokenizer: Any) -> bool:
    """Exact targets: the answer must also have ended. Numeric ones: the last number counts, ended or not."""
    ended = bool(new) and new[-1] == tokenizer.eos_token_id
    if task.match == "exact" and not ended:
        return False
    return matches(tokenizer.decode(list(new), skip_special_tokens=True), target, task.match)


def _step(limit: int) -> int:
    """Budgets in steps of a power of two: few kinds of batches, and no short answer waits for a much longer
    one."""
    return 1 << (limit - 1).bit_length()
