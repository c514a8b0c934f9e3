"""Text to token ids for scoring, the way the experts were trained: the begin token if the tokenizer sets
one, the prompt, the continuation, end-of-text. Prompt and continuation are encoded as one text and cut at
the border; where a token would straddle it they are encoded apart. Called by evaluation/run.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..base.errors import DataError
from .tasks import Task


@dataclass(frozen=True)
class ItemRef:
    """Where an item stands: the task's name and the item's index in it."""

    task: str
    index: int


@dataclass(frozen=True)
class EncodedItem:
    """`prompt` and `leaves` (one per continuation, without end-of-text) are token ids."""

    ref: ItemRef
    prompt: tuple[int, ...]
    leaves: tuple[tuple[int, ...], ...]
    gold: int


def end_of_text(tokenizer: Any) -> int:
    """The id that ends an answer; DataError (DATA-003) if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no eos_token; set one, "
            "since an answer ends with it",
            code="DATA-003",
        )
    return int(tokenizer.eos_token_id)


def padding(tokenizer: Any) -> int:
    """The id that fills rows; it is masked everywhere, so end-of-text serves if there is no pad token."""
    return end_of_text(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def encode_task(task: Task, tokenizer: Any, indices: Sequence[int], context: int | None) -> list[EncodedItem]:
    """The items `indices` of `task` as ids. `context`: longest sequence the model takes, None for no limit.
    DataError (DATA-004) names the first item that does not fit: cutting it would silently change the task."""
    if not indices:
        return []
    items = [task.items[index] for index in indices]
    begin = begin_of_text(tokenizer)
    prompts = _ids(tokenizer, [item.prompt for item in items])
    alone = iter(_ids(tokenizer, [text for item in items for text in item.continuations]))
    whole = iter(_ids(tokenizer, [item.prompt + text for item in items for text in item.continuations]))
    encoded: list[EncodedItem] = []
    for index, item, prompt in zip(indices, items, prompts, strict=True):
        leaves = tuple(_behind(prompt, next(whole), next(alone)) for _ in item.continuations)
        first = () if prompt[:1] == [*begin] else begin  # a chat template may have written it
        encoded.append(EncodedItem(ItemRef(task.name, index), (*first, *prompt), leaves, item.gold))
        _check(encoded[-1], context)
    return encoded


def begin_of_text(tokenizer: Any) -> tuple[int, ...]:
    """The begin token, if the tokenizer puts one before every text."""
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return tuple(i for i in ids if i == tokenizer.bos_token_id)[:1]


def _behind(prompt: list[int], whole: list[int], alone: list[int]) -> tuple[int, ...]:
    return tuple(whole[len(prompt) :] if whole[: len(prompt)] == prompt else alone)


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _check(item: EncodedItem, context: int | None) -> None:
    where = f"task {item.ref.task}, item {item.ref.index + 1}"
    if not item.prompt or not all(item.leaves):
        raise DataError(f"{where}: the tokenizer gives no tokens for the prompt or a choice", code="DATA-004")
    longest = len(item.prompt) + max(map(len, item.leaves)) + 1
    if context is not None and longest > context:
        raise DataError(
            f"{where}: {longest} tokens with its answer, the model takes {context}; shorten or drop the item",
            code="DATA-004",
        )
