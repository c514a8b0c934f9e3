"""Reads and checks training rows: .jsonl, .jsonl.gz, collection folders, Hugging Face datasets, embedded
skills.

A row is one of
    {"prompt": str, "completion": str}                    loss on the completion
    {"prompt": str, "choices": [str, ...], "answer": int}   loss on the right choice; `target`, a choice's text, for `answer`
    {"messages": [{"role": str, "content": str}, ...]}    loss on what the assistant says
    {"text": str}                                         loss on all of it
Other fields are ignored. A bad row names file, line, field and reason (DATA-001). Called by tokens.py.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from ...base.errors import DataError
from ...base.files import safe_name, sha256_file
from ...evaluation.tasks import completion_of
from ..recipe import SourceSettings

SKILLS, STEPS = "skills:", "steps:"
JOIN = " + "
NO_CHAT_TEMPLATE = (
    "field messages needs a chat template, and the tokenizer of the base has none; "
    "give prompt and completion, or a base with a chat template"
)
FILE_ENDINGS = (".jsonl", ".jsonl.gz")
MAX_LINE_BYTES = 64 * 2**20
log = logging.getLogger("quietgoose.data")


@dataclass(frozen=True)
class Row:
    """One checked row. Exactly one of (prompt and completion), messages, text is there."""

    where: str
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    text: str | None = None


@dataclass
class RowReport:
    """How many rows were taken and how many left out; the first few reasons."""

    taken: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)


class BadRows:
    """What happens to a bad row: raise at once, or count it. One object follows a source through all its
    stages."""

    def __init__(self, policy: Literal["error", "skip"], report: RowReport) -> None:
        self.policy = policy
        self.report = report

    def bad(self, where: str, reason: str, *, code: str = "DATA-001") -> None:
        if self.policy == "error":
            raise DataError(f"{where}: {reason}; mend the row, or set data.on_bad_row: skip", code=code)
        self.report.skipped += 1
        if len(self.report.reasons) < 5:
            self.report.reasons.append(f"QG-{code} {where}: {reason}")


class Source(Protocol):
    """A place rows come from. `fingerprint` changes whenever the rows may have changed."""

    def fingerprint(self) -> str: ...

    def raw(self, bad: BadRows) -> Iterator[tuple[str, Any]]:
        """(where, decoded value) of every row."""
        ...


def open_source(settings: SourceSettings, name: str, seed: int) -> Source:
    """The source a setting means; several joined by ` + ` are read one after another.

    Raises:
        DataError: DATA-002, the file, folder, split, dataset or skill is not there.
    """
    path = settings.path
    if not path:
        raise DataError(
            f"data.experts.{name}.path is empty; name a file, a folder, a dataset, skills:NAME or steps:NAME",
            code="DATA-002",
        )
    if JOIN in path:
        parts = [part.strip() for part in path.split(JOIN)]
        return JoinedSource(tuple(open_source(replace(settings, path=part), name, seed) for part in parts))
    if path.startswith((SKILLS, STEPS)):
        if path.startswith(STEPS):
            from ..steps_skills import parse_name

            parse_name(path.removeprefix(STEPS))
        return SkillSource(path, settings.split, seed)
    local = Path(path).expanduser()
    if local.is_dir():
        return FileSource(split_file(local, settings.split))
    if local.is_file():
        if not path.endswith(FILE_ENDINGS):
            raise DataError(f"{path}: allowed are files ending in {' or '.join(FILE_ENDINGS)}", code="DATA-002")
        return FileSource(local)
    if path.endswith((*FILE_ENDINGS, ".json", ".gz")) or path.startswith((".", "/", "~")):
        raise DataError(f"{path}: no such file or folder (source of '{name}')", code="DATA-002")
    return DatasetSource(path, settings.split)


def split_file(folder: Path, split: str) -> Path:
    """`folder/split.jsonl.gz` or `folder/split.jsonl`; DATA-002 lists the splits there are."""
    safe_name(split, "split")
    for ending in reversed(FILE_ENDINGS):
        candidate = folder / f"{split}{ending}"
        if candidate.is_file():
            return candidate
    there = sorted(file.name for file in folder.iterdir() if file.name.endswith(FILE_ENDINGS))
    raise DataError(
        f"{folder}: no {split}.jsonl.gz or {split}.jsonl; it has {', '.join(there) or 'no .jsonl files'}",
        code="DATA-002",
    )


@dataclass(frozen=True)
class FileSource:
    """JSON lines, gzipped or not."""

    path: Path

    def fingerprint(self) -> str:
        return sha256_file(self.path)

    def raw(self, bad: BadRows) -> Iterator[tuple[str, Any]]:
        for number, line in self._lines():
            where = f"{self.path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad.bad(where, f"byte {error.start + 1} is not UTF-8 ({error.reason})")
                continue
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                bad.bad(where, f"not JSON ({error})")
                continue
            yield where, value

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        opener = gzip.open if self.path.suffix == ".gz" else open
        number = 0
        try:
            with opener(self.path, "rb") as handle:
                while line := handle.readline(MAX_LINE_BYTES + 1):
                    number += 1
                    if len(line) > MAX_LINE_BYTES:
                        raise DataError(
                            f"{self.path}, line {number}: longer than {MAX_LINE_BYTES} bytes", code="DATA-002"
                        )
                    yield number, line
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{self.path}: cannot be read after line {number} ({error}); fetch the file again",
                code="DATA-002",
            ) from error


@dataclass(frozen=True)
class DatasetSource:
    """A Hugging Face dataset, `name` or `name:configuration`; no dataset brings code of its own."""

    name: str
    split: str

    def fingerprint(self) -> str:
        return _fingerprint_of_rows(self)

    def raw(self, bad: BadRows) -> Iterator[tuple[str, Any]]:
        from datasets.exceptions import DatasetsError

        from .hub import load_hub_dataset

        try:
            rows = load_hub_dataset(self.name, split=self.split)
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(
                f"{self.name}: no file or folder here, and no dataset with split '{self.split}' ({error})",
                code="DATA-002",
            ) from error
        for number, value in enumerate(rows):
            yield f"dataset {self.name}[{self.split}], row {number}", value


@dataclass(frozen=True)
class SkillSource:
    """Rows made by train/skills.py (`skills:NAME`) or train/steps_skills.py (`steps:NAME`): the same for the same name,
    split and seed."""

    name: str
    split: str
    seed: int

    def fingerprint(self) -> str:
        return _fingerprint_of_rows(self)

    def raw(self, bad: BadRows) -> Iterator[tuple[str, Any]]:
        for number, value in enumerate(made_rows(self.name, self.split, self.seed)):
            yield f"{self.name}[{self.split}], row {number}", value


def made_rows(name: str, split: str, seed: int, count: int | None = None) -> list[dict[str, str]]:
    """The rows of `skills:NAME` or `steps:NAME`. DataError DATA-002 if there is no such thing."""
    if name.startswith(STEPS):
        from .. import steps_skills

        return steps_skills.rows(name.removeprefix(STEPS), split, seed, count)
    from .. import skills

    return skills.rows(name.removeprefix(SKILLS), split, seed, count)


@dataclass(frozen=True)
class JoinedSource:
    """Several sources, one after another."""

    parts: tuple[Source, ...]

    def fingerprint(self) -> str:
        return hashlib.sha256("|".join(part.fingerprint() for part in self.parts).encode()).hexdigest()

    def raw(self, bad: BadRows) -> Iterator[tuple[str, Any]]:
        for part in self.parts:
            yield from part.raw(bad)


def read_rows(source: Source, limit: int | None, bad: BadRows) -> Iterator[Row]:
    """The first `limit` good rows of a source, checked. Bad ones go to `bad`."""
    for where, value in source.raw(bad):
        if limit is not None and bad.report.taken >= limit:
            return
        row = check_row(where, value, bad)
        if row is not None:
            bad.report.taken += 1
            yield row


def check_row(where: str, value: Any, bad: BadRows) -> Row | None:
    """A Row, or None after telling `bad` the field and the reason."""
    if not isinstance(value, Mapping):
        return bad.bad(where, f"a row must be a JSON object, found {type(value).__name__}")
    if "messages" in value:
        return _chat(where, value["messages"], bad)
    if "prompt" in value or "completion" in value:
        if "completion" not in value:
            try:
                value = _completed(value)
            except ValueError as error:
                return bad.bad(where, f"field completion is missing, and {error}")
        reason = _text_problem(value, "prompt", may_be_empty=True) or _text_problem(value, "completion")
        if reason:
            return bad.bad(where, reason)
        return Row(where, prompt=value["prompt"], completion=value["completion"])
    if "text" in value:
        reason = _text_problem(value, "text")
        return bad.bad(where, reason) if reason else Row(where, text=value["text"])
    found = ", ".join(sorted(map(str, value))[:8]) or "no fields"
    return bad.bad(where, f"needs the fields prompt and completion, or messages, or text; found {found}")


def _completed(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the right one of the choices as its completion, where it has choices. ValueError: the choices or the target leave open
    what to train."""
    completion = completion_of(value)
    if completion is not None:
        return {**value, "completion": completion}
    if "target" in value:
        raise ValueError("target does not say whether a space goes before the answer; give the completion")
    return value


def _chat(where: str, messages: Any, bad: BadRows) -> Row | None:
    if not isinstance(messages, list) or not messages:
        return bad.bad(where, f"field messages: must be a list of messages, found {type(messages).__name__}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            return bad.bad(where, f"field messages[{index}]: must be an object, found {type(message).__name__}")
        reason = _text_problem(message, "role") or _text_problem(
            message, "content", may_be_empty=message.get("role") != "assistant"
        )
        if reason:
            return bad.bad(where, f"messages[{index}], {reason}")
    if not any(message["role"] == "assistant" for message in messages):
        return bad.bad(where, "field messages: no assistant message, so no token would be trained", code="DATA-004")
    return Row(where, messages=tuple({"role": m["role"], "content": m["content"]} for m in messages))


def _text_problem(value: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str | None:
    if name not in value:
        return f"field {name} is missing"
    text = value[name]
    if not isinstance(text, str):
        return f"field {name}: must be text, found {type(text).__name__}"
    if not text and not may_be_empty:
        return f"field {name} is empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"field {name}: character {error.start + 1} is a lone surrogate, which is no text"
    return None


def _fingerprint_of_rows(source: Source) -> str:
    digest = hashlib.sha256()
    for where, value in source.raw(BadRows("skip", RowReport())):
        digest.update(json.dumps([where, value], sort_keys=True, default=str).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()
