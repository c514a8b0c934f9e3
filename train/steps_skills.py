"""Questions that take several steps, made in code: with the steps written out (worked) or with the answer alone (direct).

    permutations  a state goes through k secret permutations of eight states; questions stand among filler words, the last one
                  of a text after another mark
                  direct   moor lamp ?sPKNLO=z. fern @tLLKMN=w
                  worked   moor lamp ?sPKNLO=>uvyxz=z. fern @tLLKMN=>vxsyw=w
    purse, crates, coach, shares
                  word problems of k small sums
                  direct   Mia has 14 coins. Mia finds 5 and then spends 7. How many coins does Mia have? Answer: 12
                  worked   ... Answer: (14+5=19, 19-7=12) 12

One step is a table of 48 entries (or a small sum), k of them at once are not: a model that read worked questions can answer
in steps and yet not at once, which is what thoughts are to mend. A permutation question belongs to one split for every
seed, by its hash; so does a word problem, by its numbers. The answer's place in a text is known by construction
(`hard_positions`).

Sources are `steps:FAMILY-KIND`, kind being direct, worked or half (each question one or the other), with options behind:
`steps:permutations-half,k=5,questions=3,filler=2`. Called by data/rows.py and by the evaluate stage.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from ..base.errors import DataError, suggest
from ..base.seeding import derive
from .word_problems import PROBLEMS, Problem, draw_problem

Kind = Literal["direct", "worked", "half"]
Split = Literal["train", "validation", "test"]
Row = dict[str, str]

STATES = "stuvwxyz"
NAMES_OF_PERMUTATIONS = "KLMNOP"  # no symbol of a question but the equals sign is one of train/skills.py
EQUALS, TELL = "=", ">"
WITHIN, LAST = "?", "@"  # before a question within a text, before the last one
LETTERS = "abcdefghijklmnopqr"  # of the filler: no state is among them
NUM_WORDS, FOLLOWERS = 24, 3
KINDS: tuple[Kind, ...] = ("direct", "worked", "half")
FAMILIES = ("permutations", *PROBLEMS)
TRIES = 10_000


@dataclass(frozen=True)
class StepsName:
    """What a source `steps:...` asks for. `rows`: how many the split `train` has. Of permutations only: `questions` of a text,
    `filler` (words before each), and how many of the permutations are used (`names`)."""

    family: str
    kind: Kind
    k: int = 5
    questions: int = 1
    filler: int = 1
    names: int = 6
    rows: int = 8000


class Question(NamedTuple):
    """A composition: the state at the start, the names of the permutations, the state after each."""

    start: str
    names: str
    states: str

    @property
    def asked(self) -> str:
        return f"{self.start}{self.names}{EQUALS}"

    @property
    def answer(self) -> str:
        return self.states[-1]

    def told(self, worked: bool) -> str:
        """What follows the equals sign."""
        return f"{TELL}{self.states}{EQUALS}{self.answer}" if worked else self.answer


COUNTS: Mapping[str, int] = {"train": StepsName.rows, "validation": 500, "test": 1000}
LIMITS: Mapping[str, tuple[int, int]] = {
    "k": (1, 32), "rows": (1, 1_000_000), "questions": (1, 64), "filler": (0, 64), "names": (2, 6),
}  # fmt: skip


def parse_name(text: str) -> StepsName:
    """`FAMILY-KIND` with `,option=number` behind it. DataError DATA-002 says what is known."""
    name, *options = text.split(",")
    family, _, kind = name.rpartition("-")
    if family not in FAMILIES or kind not in KINDS:
        known = [f"{f}-{k}" for f in FAMILIES for k in KINDS]
        raise DataError(
            f"steps:{name}: a source is FAMILY-KIND, families {', '.join(FAMILIES)}, kinds {', '.join(KINDS)}."
            f"{suggest(name, known)}",
            code="DATA-002",
        )
    allowed = list(LIMITS) if family == "permutations" else ["k", "rows"]
    found = StepsName(family, kind, k=5 if family == "permutations" else 2)  # type: ignore[arg-type]
    for option in options:
        key, _, value = option.strip().partition("=")
        if key not in allowed or not value.isdecimal():
            raise DataError(
                f"steps:{text}: option '{option}'; allowed are {', '.join(f'{name}=NUMBER' for name in allowed)}."
                f"{suggest(key, allowed)}",
                code="DATA-002",
            )
        low, high = LIMITS[key] if family == "permutations" or key != "k" else (1, 6)
        if not low <= int(value) <= high:
            raise DataError(f"steps:{text}: {key}={value}; allowed are {low} to {high}", code="DATA-002")
        found = replace(found, **{key: int(value)})
    return found


def rows(name: str, split: str, seed: int, count: int | None = None) -> list[Row]:
    """`count` rows (default: COUNTS) with prompt, completion and target; the same for the same arguments, and the first
    ones do not depend on `count`. The prompt ends where the last question is to be answered.

    Raises:
        DataError: DATA-002, no such source, option or split.
    """
    wanted = parse_name(name)
    if split not in COUNTS:
        raise DataError(
            f"steps:{name}: split '{split}'; allowed are {', '.join(COUNTS)}.{suggest(split, list(COUNTS))}",
            code="DATA-002",
        )
    draw = random.Random(derive(seed, "steps", repr(replace(wanted, rows=0)), split))
    number = count if count is not None else wanted.rows if split == "train" else COUNTS[split]
    if wanted.family == "permutations":
        return [_permutation_row(wanted, split, seed, draw) for _ in range(number)]
    return [_problem_row(wanted, split, draw) for _ in range(number)]


def hard_positions(text: str) -> list[int]:
    """Where the answers of direct permutation questions stand in a text; a character is a token of the byte-level
    tokenizer. The token before each is where a thought can help."""
    return [
        place + 1
        for place, character in enumerate(text[:-1])
        if character == EQUALS and text[place + 1] in STATES and text[place - 1] in NAMES_OF_PERMUTATIONS
    ]


@lru_cache(maxsize=16)
def tables(seed: int) -> Mapping[str, Mapping[str, str]]:
    """The secret permutations: name -> state -> state, drawn from the seed, all different, none the identity."""
    draw = random.Random(derive(seed, "steps", "tables"))
    found: dict[str, Mapping[str, str]] = {}
    seen = {tuple(STATES)}
    for name in NAMES_OF_PERMUTATIONS:
        images = list(STATES)
        while tuple(images) in seen:
            draw.shuffle(images)
        seen.add(tuple(images))
        found[name] = dict(zip(STATES, images, strict=True))
    return found


@lru_cache(maxsize=16)
def vocabulary(seed: int) -> Mapping[str, tuple[str, ...]]:
    """The filler: every word and the words that may follow it."""
    draw = random.Random(derive(seed, "steps", "filler"))
    words: dict[str, None] = {}
    while len(words) < NUM_WORDS:
        words["".join(draw.choices(LETTERS, k=draw.randint(3, 5)))] = None
    return {word: tuple(draw.sample(list(words), FOLLOWERS)) for word in words}


def question(k: int, split: str, seed: int, draw: random.Random, names_used: int = 6) -> Question:
    """A composition of `k` permutations that belongs to `split`."""
    known = tables(seed)
    for _ in range(TRIES):
        start, names = draw.choice(STATES), "".join(draw.choices(NAMES_OF_PERMUTATIONS[:names_used], k=k))
        if k < 3 or split_of(start + names) == split:  # fewer than three steps leave too few questions to divide
            states, state = [], start
            for name in names:
                state = known[name][state]
                states.append(state)
            return Question(start, names, "".join(states))
    raise DataError(f"steps: no permutation question of {k} steps in split {split}", code="DATA-003")


def split_of(text: str) -> Split:
    """The split a question belongs to, whatever the seed: one in ten is test, one in ten validation."""
    bucket = hashlib.sha256(text.encode()).digest()[0]
    return "test" if bucket < 26 else "validation" if bucket < 52 else "train"


def _permutation_row(wanted: StepsName, split: str, seed: int, draw: random.Random) -> Row:
    follows = vocabulary(seed)
    word = draw.choice(list(follows))
    parts: list[str] = []
    for number in range(wanted.questions):
        for _ in range(wanted.filler):
            parts.append(f"{word} ")
            word = draw.choice(follows[word])
        one = question(wanted.k, split, seed, draw, wanted.names)
        told = one.told(_worked(wanted.kind, draw))
        if number == wanted.questions - 1:
            return {"prompt": "".join(parts) + f"{LAST}{one.asked}", "completion": told, "target": told}
        parts.append(f"{WITHIN}{one.asked}{told}. ")
    raise AssertionError("a row has at least one question")


def _problem_row(wanted: StepsName, split: str, draw: random.Random) -> Row:
    for _ in range(TRIES):
        problem: Problem = draw_problem(wanted.family, wanted.k, draw)
        if split_of(f"{wanted.family} {problem.numbers}") == split:
            told = problem.worked if _worked(wanted.kind, draw) else problem.direct
            return {"prompt": problem.prompt, "completion": f" {told}", "target": told}
    raise DataError(f"steps:{wanted.family}: no problem of {wanted.k} sums in split {split}", code="DATA-003")


def _worked(kind: Kind, draw: random.Random) -> bool:
    return kind == "worked" or (kind == "half" and draw.random() < 0.5)
