"""Rows to token ids and which of them are trained; cached on disk as safetensors, never as pickle.

A row is a list of pieces (text, trained?). All pieces are tokenised as one text if the piece borders are
token borders of that text, else piece by piece: what the model reads before a trained piece is then always
what the tokenizer gives for that prompt alone, as at inference. End-of-text follows the last piece and is
trained. Called by build.py.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...base.errors import DataError, SecurityError
from ...base.files import fsync_folder, sha256_json
from ..recipe import SourceSettings
from .rows import NO_CHAT_TEMPLATE, BadRows, Row, RowReport, log, open_source, read_rows

CACHE_FORMAT = "quietgoose-tokens-1"
CHUNK_ROWS = 2048
Piece = tuple[str, bool]
ARRAYS = {"tokens": np.int32, "trained": np.uint8, "ends": np.int64}


@dataclass(frozen=True)
class TokenSet:
    """Documents one after another. Document i is tokens_P[ends[i-1]:ends[i]]; trained_P is 1 where the loss
    counts the token as a target. `report` says which rows were left out."""

    tokens_P: np.ndarray
    trained_P: np.ndarray
    ends: np.ndarray
    report: RowReport

    def __len__(self) -> int:
        return len(self.ends)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start = int(self.ends[index - 1]) if index else 0
        part = slice(start, int(self.ends[index]))
        return self.tokens_P[part], self.trained_P[part]


@dataclass(frozen=True)
class TokenSettings:
    """What the token ids depend on besides the rows and the tokenizer."""

    length: int
    loss_on: Literal["completion", "all"] = "completion"
    on_bad_row: Literal["error", "skip"] = "error"


def token_set(
    settings: SourceSettings,
    name: str,
    tokenizer: Any,
    rule: TokenSettings,
    cache: Path | None,
    seed: int,
    tokenizer_sha256: str | None = None,
) -> TokenSet:
    """The tokenised source, from the cache if it is there. Processes wait for the one that fills the cache.
    `tokenizer_sha256` is `tokenizer_hash(tokenizer)`, where the caller has it already.

    Raises:
        DataError: a bad row under on_bad_row error (DATA-001, DATA-004), no source (DATA-002), no good row
        (DATA-003). SecurityError: SEC-001, the cache file is not what this program wrote.
    """
    source = open_source(settings, name, seed)
    if cache is None:
        return _build(source, settings.limit, name, tokenizer, rule)
    reads = tokenizer_sha256 or tokenizer_hash(tokenizer)
    key = sha256_json([CACHE_FORMAT, source.fingerprint(), settings.limit, reads, dataclasses.asdict(rule)])
    path = cache / f"{key[:32]}.safetensors"
    with _locked(path) as usable:
        if usable and path.exists():
            return load_token_set(path)
        tokens = _build(source, settings.limit, name, tokenizer, rule)
        if usable:
            _keep(tokens, path)
        return tokens


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what a tokenizer does to text: vocabulary, rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)  # left behind by earlier calls
        rules.pop("padding", None)
    return sha256_json([rules, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.chat_template])


def encode_rows(
    rows: Sequence[Row], tokenizer: Any, rule: TokenSettings, bad: BadRows
) -> Iterator[tuple[list[int], list[int]]]:
    """(token ids, trained) of every good document. A text row gives one document for every `length`
    tokens."""
    pieces = [_pieces(row, tokenizer) for row in rows]
    encoded = _encode(pieces, tokenizer)
    for row, (ids, trained) in zip(rows, encoded, strict=True):
        if rule.loss_on == "all":
            trained = [1] * len(trained)
        if not any(trained[1:]):
            bad.report.taken -= 1
            bad.bad(row.where, "no token would be trained", code="DATA-004")
        elif row.text is not None:
            yield from _windows(ids, trained, rule.length)
        elif len(ids) - 1 > rule.length:
            bad.report.taken -= 1
            bad.bad(
                row.where,
                f"{len(ids) - 1} tokens do not fit into data.sequence_length {rule.length} "
                "(neither prompt nor completion is ever cut); raise it",
                code="DATA-004",
            )
        else:
            yield ids, trained


def _build(source: Any, limit: int | None, name: str, tokenizer: Any, rule: TokenSettings) -> TokenSet:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of the base has no end-of-text token; '{name}' cannot be trained", code="DATA-005"
        )
    report = RowReport()
    bad = BadRows(rule.on_bad_row, report)
    tokens: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    rows = read_rows(source, limit, bad)
    while chunk := list(islice(rows, CHUNK_ROWS)):
        for ids, mask in encode_rows(chunk, tokenizer, rule, bad):
            tokens.append(np.asarray(ids, dtype=np.int32))
            trained.append(np.asarray(mask, dtype=np.uint8))
    if report.skipped:
        log.warning("%s: %d rows left out, %d taken; first: %s", name, report.skipped, report.taken, report.reasons[0])
    if not tokens:
        raise DataError(f"'{name}': no good row in the source ({report.skipped} left out)", code="DATA-003")
    ends = np.cumsum([len(ids) for ids in tokens], dtype=np.int64)
    return TokenSet(np.concatenate(tokens), np.concatenate(trained), ends, report)


def _pieces(row: Row, tokenizer: Any) -> list[Piece]:
    """What a row says, in order, and which parts are trained. End-of-text comes later."""
    if row.text is not None:
        return [(row.text, True)]
    if row.messages is None:
        return [(row.prompt or "", False), (row.completion or "", True)]
    return _chat_pieces(row, tokenizer)


def _chat_pieces(row: Row, tokenizer: Any) -> list[Piece]:
    """A conversation as its chat template writes it; what the assistant says, up to its end-of-text, is
    trained."""
    if not tokenizer.chat_template:
        raise DataError(f"{row.where}: {NO_CHAT_TEMPLATE}", code="DATA-005")
    pieces: list[Piece] = []
    done = ""
    messages = [dict(message) for message in row.messages or ()]
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], row, True) if index else ""
        after = _render(tokenizer, messages[: index + 1], row, False)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{row.where}: the chat template rewrites earlier messages when message {index} is added, "
                "so the assistant's tokens cannot be told apart; give prompt and completion instead",
                code="DATA-005",
            )
        said, closing = _cut_after(after[len(before) :], tokenizer.eos_token)
        pieces += [(before[len(done) :], False), (said, True), (closing, False)]
        done = after
    return pieces[:-1]  # nothing follows the last assistant message


def _render(tokenizer: Any, messages: list[dict[str, str]], row: Row, prompt: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(f"{row.where}: the chat template refuses the messages ({error})", code="DATA-005") from error


def _cut_after(text: str, mark: str) -> tuple[str, str]:
    at = text.rfind(mark)
    end = at + len(mark) if at >= 0 else len(text)
    return text[:end], text[end:]


def _encode(documents: Sequence[list[Piece]], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(ids, trained) per document, with the tokenizer's begin token if it sets one, end-of-text added and
    trained."""
    prefix = [i for i in tokenizer("", add_special_tokens=True)["input_ids"] if i == tokenizer.bos_token_id][:1]
    texts = ["".join(text for text, _ in pieces[: k + 1]) for pieces in documents for k in range(len(pieces))]
    parts = [text for pieces in documents for text, _ in pieces]
    until = _ids(tokenizer, texts)
    results = []
    start = 0
    for pieces in documents:
        here = until[start : start + len(pieces)]
        own = parts[start : start + len(pieces)]
        start += len(pieces)
        whole = here[-1]
        if all(whole[: len(ids)] == ids for ids in here):
            borders = [0, *(len(ids) for ids in here)]
            cut = [whole[a:b] for a, b in pairwise(borders)]
        else:
            cut = _ids(tokenizer, own)
        begin = [] if whole[:1] == prefix else prefix  # a chat template may write the begin token itself
        ids, trained = [*begin], [0] * len(begin)
        for piece_ids, (_, flag) in zip(cut, pieces, strict=True):
            ids += piece_ids
            trained += [int(flag)] * len(piece_ids)
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
            trained.append(1)
        results.append((ids, trained))
    return results


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _windows(ids: list[int], trained: list[int], length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Plain text in portions of at most `length` inputs; a portion's last target is the next portion's first
    input."""
    for start in range(0, max(len(ids) - 1, 1), length):
        yield ids[start : start + length + 1], trained[start : start + length + 1]


def save_token_set(tokens: TokenSet, path: Path) -> None:
    """One safetensors file, whole or absent; its header holds the report and a hash of the arrays."""
    from safetensors.numpy import save_file

    arrays = {"tokens": tokens.tokens_P, "trained": tokens.trained_P, "ends": tokens.ends}
    metadata = {
        "format": CACHE_FORMAT,
        "sha256": _hash(arrays),
        "report": json.dumps(dataclasses.asdict(tokens.report)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(arrays, staging, metadata=metadata)
    with staging.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(staging, path)
    fsync_folder(path.parent)


def load_token_set(path: Path) -> TokenSet:
    """Read a cache file against what save_token_set writes; anything else is refused (SEC-001), nothing
    unpickled."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        right = (
            metadata.get("format") == CACHE_FORMAT
            and {name: array.dtype for name, array in arrays.items()} == {n: np.dtype(t) for n, t in ARRAYS.items()}
            and _hash(arrays) == metadata.get("sha256")
        )
        report = RowReport(**json.loads(metadata["report"])) if right else RowReport()
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise _refused(path, str(error)) from error
    if not right:
        raise _refused(path, "format, types or hash differ")
    return TokenSet(arrays["tokens"], arrays["trained"], arrays["ends"], report)


def _refused(path: Path, why: str) -> SecurityError:
    return SecurityError(f"{path}: not a token cache this program wrote ({why}); delete the file, it is made anew")


def _hash(arrays: dict[str, np.ndarray]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}|{arrays[name].shape}|".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _keep(tokens: TokenSet, path: Path) -> None:
    """Save to the cache; a full or read-only disk costs a warning, since the tokens are there already."""
    from safetensors import SafetensorError

    try:
        save_token_set(tokens, path)
    except (OSError, SafetensorError) as error:
        log.warning("token cache %s: not written (%s); the next start tokenises again", path, error)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold `path`'s lock file, which the system releases if the process dies. False: the folder cannot be used."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.with_suffix(".lock").open("a")
    except OSError as error:
        log.warning("token cache %s: cannot be used (%s); set data.cache to another folder", path.parent, error)
        yield False
        return
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield True
