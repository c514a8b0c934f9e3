"""Word problems whose sums are small and known: the text, the sums one after another, the answer.

    purse   coins that come and go                   14+5=19, 19-7=12
    crates  equal groups, then more or fewer         3*6=18, 18-4=14
    coach   people who get on and off at every stop  20-3=17, 17+8=25
    shares  equal parts, then more or fewer for one  24/4=6, 6+5=11

Called by train/steps_skills.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import NamedTuple

NAMES = ("Mia", "Tom", "Ada", "Leo", "Nora", "Sam", "Ivy", "Max", "Zoe", "Ben", "Lena", "Omar")
GOODS = ("coins", "stickers", "marbles", "shells", "stamps", "cards")
CRATED = ("pens", "apples", "bottles", "books", "lamps", "cups")
SWEETS = ("sweets", "nuts", "grapes", "biscuits", "cherries", "beads")
LARGEST = 60


class Problem(NamedTuple):
    """`prompt` ends with `Answer:`; `worked` and `direct` are what may follow it after a space."""

    prompt: str
    sums: tuple[str, ...]
    answer: int

    @property
    def direct(self) -> str:
        return str(self.answer)

    @property
    def worked(self) -> str:
        return f"({', '.join(self.sums)}) {self.answer}"

    @property
    def numbers(self) -> str:
        """What a split is decided by: the sums without the words."""
        return " ".join(self.sums)


class _Count:
    """A number that changes by sums, all of them kept between 1 and LARGEST."""

    def __init__(self, value: int, draw: random.Random) -> None:
        self.value = value
        self.sums: list[str] = []
        self._draw = draw

    def change(self) -> int:
        """Add or take something; what was added, negative if taken."""
        up = self.value < 4 or (self.value <= LARGEST - 12 and self._draw.random() < 0.5)
        amount = self._draw.randint(2, 12 if up else min(12, self.value - 1))
        self._keep("+" if up else "-", amount, self.value + amount if up else self.value - amount)
        return amount if up else -amount

    def apply(self, sign: str, amount: int) -> None:
        self._keep(sign, amount, self.value * amount if sign == "*" else self.value // amount)

    def _keep(self, sign: str, amount: int, result: int) -> None:
        self.sums.append(f"{self.value}{sign}{amount}={result}")
        self.value = result


def draw_problem(family: str, k: int, draw: random.Random) -> Problem:
    """A problem of `k` sums."""
    return PROBLEMS[family](k, draw)


def _purse(k: int, draw: random.Random) -> Problem:
    name, goods = draw.choice(NAMES), draw.choice(GOODS)
    count = _Count(draw.randint(5, 30), draw)
    first, events = count.value, []
    for _ in range(k):
        change = count.change()
        verb = (
            draw.choice(("finds", "is given", "wins")) if change > 0 else draw.choice(("spends", "loses", "gives away"))
        )
        events.append(f"{verb} {abs(change)}")
    text = f"{name} has {first} {goods}. {name} {' and then '.join(events)}. How many {goods} does {name} have?"
    return _problem(text, count)


def _crates(k: int, draw: random.Random) -> Problem:
    goods = draw.choice(CRATED)
    crates, each = draw.randint(2, 6), draw.randint(2, 9)
    count = _Count(crates, draw)
    count.apply("*", each)
    events = _changes(k - 1, count, draw, ("are added", "are delivered"), ("are sold", "are broken"))
    text = f"There are {crates} crates with {each} {goods} each. {events}How many {goods} are there now?"
    return _problem(text, count)


def _coach(k: int, draw: random.Random) -> Problem:
    count = _Count(draw.randint(8, 40), draw)
    first, events = count.value, []
    for _ in range(k):
        change = count.change()
        events.append(f"{abs(change)} get {'on' if change > 0 else 'off'}")
    text = (
        f"A coach carries {first} people. At the next stops {', then '.join(events)}. How many people are in the coach?"
    )
    return _problem(text, count)


def _shares(k: int, draw: random.Random) -> Problem:
    goods = draw.choice(SWEETS)
    name, people, each = draw.choice(NAMES), draw.randint(2, 6), draw.randint(3, 12)
    count = _Count(people * each, draw)
    total = count.value
    count.apply("/", people)
    events = _changes(k - 1, count, draw, ("more are handed over",), ("are eaten",), f" by {name}")
    text = f"{people} friends share {total} {goods} equally. {name} takes one share. {events}How many {goods} are left for {name}?"
    return _problem(text, count)


def _changes(
    k: int, count: _Count, draw: random.Random, more: tuple[str, ...], fewer: tuple[str, ...], whom: str = ""
) -> str:
    told = []
    for _ in range(k):
        change = count.change()
        verb = draw.choice(more if change > 0 else fewer)
        told.append(f"{abs(change)} {verb}{whom if change < 0 else ''}. ")
    return "".join(told)


def _problem(text: str, count: _Count) -> Problem:
    return Problem(f"{text} Answer:", tuple(count.sums), count.value)


PROBLEMS: Mapping[str, Callable[[int, random.Random], Problem]] = {
    "purse": _purse,
    "crates": _crates,
    "coach": _coach,
    "shares": _shares,
}
