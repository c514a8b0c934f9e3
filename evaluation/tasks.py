"""Tasks: folders in the collection's layout, `<task>/{train,validation,test}.jsonl[.gz]`, read as items.

A row has `prompt`, `completion` (normally begins with a space) and either `choices` + `answer` (index; the
choices are ranked by likelihood) or `target` (what a generated answer must equal). A row with neither takes
its completion as the target, one with choices and no completion its right choice as the completion (an answer may
then be named by `target` too). `collection.json` beside the task folders may give every task a role, the group of
its mean. Called by evaluation/run.py's callers: launch/evaluate.py and the evaluate stage.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from ..base.errors import DataError, suggest

Kind = Literal["choice", "generate"]
Match = Literal["exact", "number"]

NUMBER = re.compile(r"(?<!\d)(?<!\d\.)-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
PLAIN_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d*)(?:\.\d+)?\Z")
NEXT_QUESTION = "Question:"


@dataclass(frozen=True)
class Item:
    """One question. `choices` is empty for generate tasks; `answer` indexes it; `target` is the wanted
    string."""

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    answer: int = -1
    target: str = ""

    @property
    def continuations(self) -> tuple[str, ...]:
        """What may follow the prompt: the choices, or the one gold completion."""
        return self.choices or (self.completion,)

    @property
    def gold(self) -> int:
        """Index of the right continuation."""
        return self.answer if self.choices else 0


@dataclass(frozen=True)
class Task:
    """Items of one kind. `match`: how a generated text is judged; `group`: whose mean the task enters."""

    name: str
    kind: Kind
    items: tuple[Item, ...]
    match: Match = "exact"
    group: str = ""

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError(f"task {self.name}: no items; at least one row is needed", code="DATA-001")


def make_task(name: str, rows: Iterable[dict[str, Any]], group: str = "", origin: str = "row") -> Task:
    """A task from rows as they stand in a .jsonl file; DataError (DATA-001) names row and field."""
    items = [_item(row, f"{origin}:{number}") for number, row in enumerate(rows, start=1)]
    if not items:
        raise DataError(f"{origin}: no rows, so task {name} is empty; give at least one", code="DATA-001")
    ranked = [bool(item.choices) for item in items]
    if any(ranked) and not all(ranked):
        odd = ranked.index(not ranked[0]) + 1
        raise DataError(f"{origin}:{odd}: 'choices' must be in all rows of a task or in none", code="DATA-001")
    numeric = not any(ranked) and all(PLAIN_NUMBER.match(item.target) for item in items)
    return Task(name, "choice" if any(ranked) else "generate", tuple(items), "number" if numeric else "exact", group)


def load_task(folder: Path | str, split: str = "test", limit: int | None = None) -> Task:
    """The first `limit` items of `folder/<split>.jsonl[.gz]`. DataError if the file is missing or a row is
    bad."""
    folder = Path(folder)
    path = split_file(folder, split)
    if limit is not None and limit < 1:
        raise DataError(f"limit {limit}: must be at least 1, or absent for all items", code="DATA-002")
    return make_task(folder.name, _rows(path, limit), _group(folder), str(path))


def split_file(folder: Path | str, split: str) -> Path:
    """`folder/<split>.jsonl[.gz]`; DataError (DATA-002) with the splits that are there if it is not."""
    folder = Path(folder)
    path = next((p for end in ("jsonl.gz", "jsonl") if (p := folder / f"{split}.{end}").is_file()), None)
    if path is None:
        found = sorted({p.name.split(".jsonl")[0] for p in folder.glob("*.jsonl*")}) if folder.is_dir() else []
        hint = f"splits found: {', '.join(found)}" if found else "the folder has no .jsonl or .jsonl.gz file"
        raise DataError(f"{folder}: no split '{split}' ({hint}).{suggest(split, found)}", code="DATA-002")
    return path


def find_tasks(folder: Path | str, split: str = "test", include: Sequence[str] = ()) -> list[Path]:
    """Task folders in `folder` (or `folder` itself) that hold `split`, by name; `include` picks and orders
    them."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a task folder or a folder of them", code="DATA-002")
    if _has(folder, split) and not include:
        return [folder]
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and _has(path, split)}
    if not found:
        raise DataError(f"{folder}: no sub-folder holds {split}.jsonl or {split}.jsonl.gz", code="DATA-002")
    missing = [name for name in include if name not in found]
    if missing:
        raise DataError(
            f"{folder}: no task '{missing[0]}' with split '{split}'; there are {', '.join(found)}."
            f"{suggest(missing[0], list(found))}",
            code="DATA-002",
        )
    return [found[name] for name in include] if include else list(found.values())


def matches(text: str, target: str, match: Match) -> bool:
    """Is generated `text` (special tokens removed) the `target`? `exact`: equal after stripping. `number`:
    the last number of the text, up to a following "Question:", equals the target as a number (the gsm8k
    rule)."""
    if match == "exact":
        return text.strip() == target.strip()
    numbers = NUMBER.findall(text.split(NEXT_QUESTION)[0])
    return bool(numbers) and _decimal(numbers[-1]) == _decimal(target)


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def _has(folder: Path, split: str) -> bool:
    return any((folder / f"{split}.{end}").is_file() for end in ("jsonl", "jsonl.gz"))


def _group(folder: Path) -> str:
    """The task's role in `collection.json` beside the folder, else an empty string."""
    card = folder.parent / "collection.json"
    if not card.is_file():
        return ""
    try:
        entry = json.loads(card.read_text(encoding="utf-8")).get(folder.name, {})
        return str(entry.get("role", ""))
    except (ValueError, AttributeError) as error:
        raise DataError(f"{card}: not a table of tasks ({error}); mend or remove it", code="DATA-001") from error


def _rows(path: Path, limit: int | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                if limit is not None and len(rows) == limit:
                    break
                rows.append(_parse(line, f"{path}:{number}"))
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); is the file whole?", code="DATA-001") from error
    return rows


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}; re-encode the file", code="DATA-001") from error
    except ValueError as error:
        raise DataError(f"{where}: not a JSON object ({error})", code="DATA-001") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, got {type(row).__name__}", code="DATA-001")
    return row


def right_choice(row: Mapping[str, Any]) -> int:
    """Index of the right one of a row's `choices`: its `answer`, or the one choice that its `target` is. ValueError says what is
    wrong with the fields if they name no choice, several, or two different ones."""
    choices, answer, target = row["choices"], row.get("answer"), row.get("target")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("field 'choices' must be a list of two or more non-empty strings")
    named = [n for n, choice in enumerate(choices) if isinstance(target, str) and choice.strip() == target.strip()]
    if "answer" not in row and "target" in row:
        if len(named) != 1:
            raise ValueError(
                f"field 'target' is {target!r}, which is {len(named)} of the choices; give the index as 'answer'"
            )
        return named[0]
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"field 'answer' is {answer!r}; it must be an index from 0 to {len(choices) - 1}")
    return answer


def completion_of(row: Mapping[str, Any]) -> str | None:
    """The completion that a row without the field means: its right choice; None if the row has no choices. ValueError says
    why the choices leave it open."""
    if "choices" not in row:
        return None
    answer, target = right_choice(row), row.get("target")
    choice: str = row["choices"][answer]
    if isinstance(target, str) and target.strip() != choice.strip():
        raise ValueError(
            f"fields 'answer' and 'target' name two answers, {choice!r} and {target!r}; give the completion"
        )
    return choice


def _item(row: dict[str, Any], where: str) -> Item:
    prompt = _text(row, "prompt", where)
    try:
        filled = None if "completion" in row else completion_of(row)
        completion = _text(row, "completion", where) if filled is None else filled
        if "choices" in row:
            return Item(prompt, completion, tuple(row["choices"]), right_choice(row))
    except ValueError as error:
        raise DataError(f"{where}: {error}", code="DATA-001") from error
    target = row.get("target", completion.strip())
    if isinstance(target, int | float) and not isinstance(target, bool):
        target = str(target)
    if not isinstance(target, str) or not target.strip():
        raise DataError(f"{where}: field 'target' must be a non-empty string or a number", code="DATA-001")
    return Item(prompt, completion, target=target.strip())


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value:
        found = "missing" if field not in row else f"{type(value).__name__} {str(value)[:40]!r}"
        also = ", also beside target" if field == "completion" else ""
        raise DataError(f"{where}: field '{field}' is {found}; a non-empty string is needed{also}", code="DATA-001")
    return value
