"""The error tree: every failure a user can meet has a class, a stable code and an exit code.

A message says: the setting or file, the value found, what is allowed, what to do.
The exit codes are the ones a rank leaves with; `outcome.json` in the run folder repeats them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Exit code of one rank."""

    FINISHED = 0
    BAD_INPUT = 2
    ENVIRONMENT = 3
    REFUSED_ARTIFACT = 4
    NUMERIC = 5
    STORAGE = 6
    PEER_LOST = 7
    OUT_OF_MEMORY = 8
    STOPPED_SAVED = 75
    STOPPED_NOT_SAVED = 76


class QuietGooseError(Exception):
    """Base of all errors. `code` is stable (for example `CKPT-003`); the text shows it as `QG-CKPT-003`."""

    exit_code: ExitCode = ExitCode.BAD_INPUT
    default_code: str = "GEN-000"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        self.code = f"QG-{code or self.default_code}"
        self.message = message
        super().__init__(f"{self.code} {message}")

    def __reduce__(self) -> tuple[Any, ...]:
        # errors travel between ranks; the default would call __init__ with the finished text
        return _restore, (type(self), self.args, dict(self.__dict__))


def _restore(kind: type[QuietGooseError], args: tuple[Any, ...], state: dict[str, Any]) -> QuietGooseError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class RecipeError(QuietGooseError):
    """The recipe, the strategy file or the command line asks for something that cannot be. Codes CFG-*."""

    default_code = "CFG-001"


class DataError(QuietGooseError):
    """A data file or a row is bad. Codes DATA-*."""

    default_code = "DATA-001"


class SecurityError(QuietGooseError):
    """A file or a name was refused before it could do harm. Codes SEC-*."""

    exit_code = ExitCode.REFUSED_ARTIFACT
    default_code = "SEC-001"


class NameRefused(SecurityError):
    """A name that could leave its folder or confuse a reader. Code SEC-002."""

    exit_code = ExitCode.BAD_INPUT
    default_code = "SEC-002"


class EnvironmentProblem(QuietGooseError):
    """The machine lacks something (compiler, ninja, GPU, package). Codes ENV-*."""

    exit_code = ExitCode.ENVIRONMENT
    default_code = "ENV-001"


class ArtifactError(QuietGooseError):
    """A checkpoint, adapter or export is torn, changed, foreign or incomplete. Codes CKPT-*, EXP-*."""

    exit_code = ExitCode.REFUSED_ARTIFACT
    default_code = "CKPT-001"


class NumericError(QuietGooseError):
    """Non-finite losses or gradients several steps in a row. Codes NUM-*."""

    exit_code = ExitCode.NUMERIC
    default_code = "NUM-001"


class StorageError(QuietGooseError):
    """Disk full, read-only, input/output error. Codes IO-*."""

    exit_code = ExitCode.STORAGE
    default_code = "IO-001"


class PeerLost(QuietGooseError):
    """Another rank or the launcher died or hangs. Codes DIST-*."""

    exit_code = ExitCode.PEER_LOST
    default_code = "DIST-001"


class MemoryExhausted(QuietGooseError):
    """The accelerator or the machine ran out of memory. Codes MEM-*."""

    exit_code = ExitCode.OUT_OF_MEMORY
    default_code = "MEM-001"


class StopRequested(QuietGooseError):
    """A signal or the stop file ended the run at a step boundary. Codes RUN-*."""

    exit_code = ExitCode.STOPPED_SAVED
    default_code = "RUN-001"

    def __init__(self, message: str, *, saved: bool) -> None:
        super().__init__(message, code="RUN-001" if saved else "RUN-002")
        self.exit_code = ExitCode.STOPPED_SAVED if saved else ExitCode.STOPPED_NOT_SAVED


def suggest(value: str, allowed: list[str] | tuple[str, ...]) -> str:
    """` Did you mean 'x'?` for the nearest allowed value, or an empty string."""
    import difflib

    near = difflib.get_close_matches(value, list(allowed), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
