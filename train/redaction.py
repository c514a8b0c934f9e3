"""Takes secrets out of everything that leaves the process: console, log files, events, tracebacks, MLflow.

A secret is the value of an environment variable whose name says so, the user part of a URL, a bearer token, a token in
one of the known shapes, or a value that somebody registered (the credentials file does). It is shown as `***`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

MASK = "***"
SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PAT|API_?KEY|ACCESS_?KEY|CREDENTIAL|PRIVATE_?KEY)(?:$|_)", re.IGNORECASE
)
SHORTEST = 6
PATTERNS = (
    re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]*(?=@)"),
    re.compile(r"(?<=://)[^/\s:@]{8,}(?=@)"),
    re.compile(r"(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"\b(?:hf|ghp|gho|ghs|glpat|sk|xox[abp])[_-][A-Za-z0-9_-]{16,}"),
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
)


class Redactor:
    """Callable on text; `value` walks containers. Registered values stay for the life of the process."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._values: set[str] = set()
        for name, value in (os.environ if environment is None else environment).items():
            if SECRET_NAME.search(name):
                self.add(value)

    def add(self, secret: str) -> None:
        """Hide `secret` from now on. Values under 6 characters are ignored: hiding `0` would hide everything."""
        if len(secret) >= SHORTEST and not os.path.exists(secret):
            self._values.add(secret)

    def __call__(self, text: str) -> str:
        for secret in sorted(self._values, key=len, reverse=True):
            text = text.replace(secret, MASK)
        for pattern in PATTERNS:
            text = pattern.sub(MASK, text)
        return text

    def value(self, value: Any) -> Any:
        """The same for every text inside dicts, lists and tuples; the value of a key that names a secret is masked."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {
                self(str(k)): MASK if isinstance(v, str) and v and _names_secret(str(k)) else self.value(v)
                for k, v in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.value(part) for part in value]
        return value


def _names_secret(key: str) -> bool:
    return bool(SECRET_NAME.search(key.rsplit(".", 1)[-1]))


redact = Redactor()


class RedactingFormatter(logging.Formatter):
    """A log formatter whose every line, traceback included, went through `redact`."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def install_excepthook() -> None:
    """Tracebacks that nobody caught are redacted too, in threads as well."""
    import threading

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = hook
    threading.excepthook = lambda args: hook(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
