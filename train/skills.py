"""Small skills made in code, for the demo: the right expert of every answer character is known by construction.

A prompt is two or three words of symbols and an equals sign, the answer is words of the same lengths:

    base      every symbol is copied                     AB 402 = AB 402
    digits    every digit is replaced by a secret table  71 402 = 30 586
    mixed     words of two kinds, each by its own table  AB 402 = FJ 586

There are five kinds of symbols, each with ten members, and one skill for every kind: a permutation of the kind
without fixed points, drawn from the seed. The base model reads words of all kinds and copies, so it knows symbols,
kinds and the form of an answer, but no table; an expert sees the words of its own kind alone; a mixed prompt needs two
experts within one answer and is never trained on. A prompt belongs to one split for every seed, by its hash.

    python -m quietgoose.train.skills FOLDER      writes the tasks as a collection

Called by data/rows.py (`skills:NAME`) and by the evaluate stage.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from ..base.errors import DataError, suggest
from ..base.files import write_atomic, write_json
from ..base.seeding import derive

Split = Literal["train", "validation", "test"]
Row = dict[str, str]

SKILLS: Mapping[str, str] = {
    "letters": "abcdefghij",
    "capitals": "ABCDEFGHIJ",
    "digits": "0123456789",
    "marks": "!#$%&*+-/<",
    "brackets": "()[]{}|;:,",
}
NAMES = ("base", *SKILLS, "mixed")
COUNTS: Mapping[str, int] = {"train": 2000, "validation": 200, "test": 200}
BASE_TRAIN_ROWS = 12000
LENGTH = 7
LONGEST_WORD = 4
KIND_OF = {symbol: name for name, symbols in SKILLS.items() for symbol in symbols}


def rows(name: str, split: str, seed: int, count: int | None = None) -> list[Row]:
    """`count` different rows (default: COUNTS) of a skill, of `mixed`, or of `base`; the same for the same arguments.

    Rows of skills and of `mixed` have the fields prompt, completion and target, rows of `base` the field text. The
    first rows do not depend on `count`.

    Raises:
        DataError: DATA-002, no such skill or split; `mixed` has no train split.
    """
    if name not in NAMES:
        raise DataError(f"skills:{name}: there are {', '.join(NAMES)}.{suggest(name, NAMES)}", code="DATA-002")
    if split not in COUNTS:
        raise DataError(
            f"skills:{name}: split '{split}'; allowed are {', '.join(COUNTS)}.{suggest(split, list(COUNTS))}",
            code="DATA-002",
        )
    if count is None:
        count = BASE_TRAIN_ROWS if (name, split) == ("base", "train") else COUNTS[split]
    if name == "base":
        return base_rows(split, seed, count)
    if name == "mixed":
        return mixed_rows(split, seed, count)
    return [_task_row(source, seed) for source in _sources(lambda _: [name], name, split, seed, count)]


def base_rows(split: str, seed: int, count: int) -> list[Row]:
    """Plain text of all kinds of words, each copied behind the equals sign: {"text": ...}."""
    sources = _sources(lambda _: list(SKILLS), "base", split, seed, count)
    return [{"text": f"{source} = {source}"} for source in sources]


def mixed_rows(split: str, seed: int, count: int) -> list[Row]:
    """Prompts with words of exactly two kinds.

    Raises:
        DataError: DATA-002, split train: no expert may see a mixed prompt in training.
    """
    if split == "train":
        raise DataError(
            "skills:mixed: no train split, experts never see mixed prompts; allowed are validation, test",
            code="DATA-002",
        )
    pairs = list(itertools.combinations(SKILLS, 2))
    sources = _sources(lambda draw: list(draw.choice(pairs)), "mixed", split, seed, count, kinds_needed=2)
    return [_task_row(source, seed) for source in sources]


def decisive(text: str) -> list[str | None]:
    """Per character of an answer the skill that must make it; None for characters that any expert gets right."""
    return [KIND_OF.get(character) for character in text]


def needed_experts(prompt: str, completion: str) -> list[str | None]:
    """Per character of prompt + completion the expert that this position must pick, which is the skill of the next
    character; None where no answer symbol follows. A character is a token of the byte-level tokenizer."""
    return [None] * (len(prompt) - 1) + decisive(completion) + [None]


@lru_cache(maxsize=64)
def table(name: str, seed: int) -> Mapping[str, str]:
    """The secret table of a skill: a permutation of its symbols that moves every one of them."""
    draw = random.Random(derive(seed, "skills", "table", name))
    symbols = list(SKILLS[name])
    images = symbols.copy()
    while any(a == b for a, b in zip(symbols, images, strict=True)):
        draw.shuffle(images)
    return dict(zip(symbols, images, strict=True))


def answer(source: str, seed: int) -> str:
    """Every symbol of `source` by its own kind's table; spaces stay."""
    return "".join(table(KIND_OF[s], seed)[s] if s in KIND_OF else s for s in source)


def split_of(source: str) -> Split:
    """The split a prompt belongs to, whatever the seed: one in ten is test, one in ten validation."""
    bucket = hashlib.sha256(source.encode()).digest()[0]
    return "test" if bucket < 26 else "validation" if bucket < 52 else "train"


def write_collection(folder: Path, seed: int) -> None:
    """Task folders in the collection's layout: every skill with its three splits, mixed without train, and
    collection.json with their roles."""
    cards = {}
    for name in (*SKILLS, "mixed"):
        splits = [split for split in COUNTS if (name, split) != ("mixed", "train")]
        for split in splits:
            lines = "".join(json.dumps(row) + "\n" for row in rows(name, split, seed))
            write_atomic(folder / name / f"{split}.jsonl.gz", gzip.compress(lines.encode(), mtime=0))
        role = "two experts" if name == "mixed" else "expert"
        cards[name] = {"role": role, "kind": "generate", "examples": {split: COUNTS[split] for split in splits}}
    write_json(folder / "collection.json", cards)


def _task_row(source: str, seed: int) -> Row:
    target = answer(source, seed)
    return {"prompt": f"{source} =", "completion": f" {target}", "target": target}


def _sources(
    choose_kinds: Callable[[random.Random], list[str]],
    name: str,
    split: str,
    seed: int,
    count: int,
    kinds_needed: int = 1,
) -> list[str]:
    """`count` different sources of a split; each word is of one kind out of `choose_kinds(draw)`, and at least
    `kinds_needed` kinds occur."""
    draw = random.Random(derive(seed, "skills", name, split))
    found: dict[str, None] = {}
    while len(found) < count:
        allowed = choose_kinds(draw)
        lengths = draw.choice(WORD_LENGTHS)
        kinds = [draw.choice(allowed) for _ in lengths]
        if len(set(kinds)) < kinds_needed:
            continue
        words = ("".join(draw.choices(SKILLS[kind], k=n)) for kind, n in zip(kinds, lengths, strict=True))
        source = " ".join(words)
        if split_of(source) == split:
            found[source] = None
    return list(found)


def _word_lengths() -> list[tuple[int, ...]]:
    """Lengths of two or three words that fill LENGTH characters with the spaces between them."""
    return [
        lengths
        for words in (2, 3)
        for lengths in itertools.product(range(1, LONGEST_WORD + 1), repeat=words)
        if sum(lengths) + words - 1 == LENGTH
    ]


WORD_LENGTHS = _word_lengths()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's tasks as a collection of task folders.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="the seed of the recipe whose model is to be evaluated")
    arguments = parser.parse_args()
    write_collection(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
