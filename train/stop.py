"""How a run ends: signals, stop file, lost parent, hang, errors; one exit code and one `outcome.json` for each.

A signal only sets a flag; the engine sums the flags of all ranks with the losses, so all ranks stop after the same
step. `outcome.json` is the truth, because the launcher's own exit code is not (deepspeed.md 2.2: it exits 0 when its
child is killed). `quietgoose stop [--now] RUN` writes the stop file.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from ..base.distributed import world
from ..base.errors import ExitCode, MemoryExhausted, PeerLost, QuietGooseError, StopRequested
from ..base.files import read_json, write_atomic, write_json
from .redaction import redact
from .stalls import HangWitness

OUTCOME = "outcome.json"
STOP_FILE = "STOP"
STOP_NOW = "now"
SAME_KEY_PRESS_SECONDS = 1.0
GRACE_SECONDS = 28.0  # the launcher kills a rank 30 s after SIGTERM
HANG_SECONDS = 1500.0  # below the collective timeout, so that the stacks are seen first
POLL_SECONDS = 0.5
IN_USE = "QG-RUN-004"
STARTED = time.time()
PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Socket Timeout", "Broken pipe")


def request_stop(folder: Path, *, now: bool = False) -> None:
    """Ask the run in `folder` to stop after its current step; it saves unless `now`."""
    write_atomic(folder / STOP_FILE, STOP_NOW if now else "save")


@dataclass
class Progress:
    """How far a run is, for its outcome: the optimizer steps that the training at hand has taken; None between trainings."""

    step: int | None = None


class StopControl:
    """Signals and the stop file of one run. `install` once per process, `close` at the end. `outer`: that of the run this one is
    part of; what it was asked for holds here. `progress`: where the training loop notes its steps."""

    def __init__(
        self,
        folder: Path,
        *,
        hang_seconds: float = HANG_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        outer: StopControl | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.folder = folder
        self.progress = progress or Progress()
        self.outer = outer
        self.hang_seconds = hang_seconds
        self.grace_seconds = grace_seconds
        self._wanted = ""
        self._at_once = False
        self._interrupted_at: float | None = None
        self._deadline: float | None = None
        self._watching = False
        self._beat = (time.monotonic(), "start")
        self._witness: HangWitness | None = None
        self._closed = threading.Event()
        self._ancestors = launcher_ancestors()
        self._previous: dict[int, object] = {}

    def install(self) -> StopControl:
        """Take over SIGTERM, SIGINT, SIGUSR1, start the watching thread, mark the run as running. Call it while
        holding the run folder's lock. A stop file older than this process is removed. Collective."""
        if world().is_main:
            path = self.folder / STOP_FILE
            if path.exists() and path.stat().st_mtime < STARTED:
                path.unlink()
            write_outcome(self.folder, "running", None, "", None)
        self._witness = HangWitness(self.folder)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, name="quietgoose-stop", daemon=True).start()
        return self

    def close(self) -> None:
        self._closed.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block a missing `beat` for `hang_seconds` ends all ranks with code 7, after they said where they are. Only a
        block that ends well forgets its step: the outcome of the run tells it."""
        self.beat("start of training")
        self._watching = True
        try:
            yield
            self.progress.step = None
        finally:
            self._watching = False

    def beat(self, section: str) -> None:
        self._beat = (time.monotonic(), section)

    def flags(self) -> tuple[float, float]:
        """(stop and save, stop at once) as this rank knows it; the engine sums them over ranks."""
        outer = (0.0, 0.0) if self.outer is None else self.outer.flags()
        return max(float(bool(self._wanted)), outer[0]), max(float(self._at_once), outer[1])

    def requested(self) -> bool:
        """Whether this rank was asked to stop: for stages that have no steps."""
        return bool(self._wanted) or (self.outer is not None and self.outer.requested())

    def reason(self) -> str:
        return self._wanted or (self.outer.reason() if self.outer is not None else "another rank was asked to stop")

    # ------------------------------------------------------------------ signals

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is not None and now - self._interrupted_at >= SAME_KEY_PRESS_SECONDS:
                self._at_once = True
            self._interrupted_at = self._interrupted_at or now
        elif number == signal.SIGTERM and self._interrupted_at is None and self._deadline is None:
            self._deadline = now + self.grace_seconds
        first = not self._wanted
        self._wanted = self._wanted or signal.Signals(number).name
        if first and world().is_main:
            os.write(2, f"\n{self._wanted}: saving after this step; again: stop without saving\n".encode())

    # ------------------------------------------------------------------ the watching thread

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            self._look_at_stop_file()
            self._look_at_ancestors()
            now = time.monotonic()
            if self._deadline is not None and now > self._deadline and self._watching:
                self._leave(ExitCode.STOPPED_NOT_SAVED, "QG-RUN-002", "no step ended within the grace time")
            since, section = self._beat
            stuck = self._watching and now - since > self.hang_seconds
            if self._witness is not None and (stuck or self._witness.called()):
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                self._leave(ExitCode.PEER_LOST, "QG-DIST-003", self._witness.testify(section, now - since))

    def _look_at_stop_file(self) -> None:
        path = self.folder / STOP_FILE
        if self._at_once or not path.exists():
            return
        try:
            self._at_once = path.read_text().strip() == STOP_NOW
        except FileNotFoundError:  # rank 0 of the next start removed it between the two calls
            return
        self._wanted = self._wanted or "stop file"

    def _look_at_ancestors(self) -> None:
        if not self._ancestors:
            return
        if os.getppid() != self._ancestors[0]:
            self._leave(ExitCode.PEER_LOST, "QG-DIST-002", "the launcher's process is gone")
        if len(self._ancestors) > 1 and not _alive(self._ancestors[1]):
            self._wanted = self._wanted or "the deepspeed command was stopped"

    def _leave(self, code: ExitCode, message_code: str, message: str) -> None:
        """End the process now, from the thread: the main thread may hang in a collective."""
        os.write(2, f"{message_code} {message}\n".encode())
        write_outcome(self.folder, "failed", code, f"{message_code} {message}", self.progress.step)
        os._exit(int(code))


def launcher_ancestors() -> tuple[int, ...]:
    """Process ids of the launcher that started this rank: (its parent,) or (parent, the `deepspeed` command).
    Empty if no launcher did: a run under nohup must survive its shell."""
    if "LOCAL_RANK" not in os.environ or os.getppid() <= 1:
        return ()
    parent = os.getppid()
    if "deepspeed" not in _command(parent) and "torch" not in _command(parent):
        return ()
    runner = _parent_of(parent)
    return (parent, runner) if runner and "deepspeed" in _command(runner) else (parent,)


def _command(process: int) -> str:
    """The words of a process's command that name programs or modules; not a shell that merely quotes them."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    if Path(os.fsdecode(words[0])).name in ("sh", "bash", "dash", "zsh", "timeout"):
        return ""
    return b" ".join(words[:4]).decode(errors="replace")


def _parent_of(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])


def _alive(process: int) -> bool:
    """False for a process that is gone or a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


# ---------------------------------------------------------------------- outcome


def write_outcome(folder: Path, state: str, code: int | None, message: str, step: int | None) -> None:
    """`state`: running, finished, stopped, failed. `step`: how many steps the training that ended so has taken; None outside one.

    A folder that cannot be written costs a line, not the exit code.
    """
    record = {
        "state": state,
        "code": code,
        "message": redact(message),
        "step": step,
        "pid": os.getpid(),
        "rank": world().rank,
    }
    try:
        write_json(folder / OUTCOME, record)
    except OSError as error:
        os.write(2, f"QG-IO-002 {folder / OUTCOME}: {error}\n".encode())


def read_outcome(folder: Path) -> int:
    """The exit code that the last start of the run deserves: one that never wrote its end was killed (7). 3 if there
    is no outcome: the ranks never got to work."""
    path = folder / OUTCOME
    if not path.is_file():
        return int(ExitCode.ENVIRONMENT)
    code = read_json(path)["code"]
    return int(ExitCode.PEER_LOST) if code is None else int(code)


def last_end(folder: Path) -> str:
    """How the last start of a run that no process runs ended, in words."""
    state = _state(folder)
    return {"": "it never started", "running": "its last start was killed"}.get(state, f"its last start {state}")


def run_guarded(folder: Path, main: Callable[[], None], progress: Progress | None = None) -> int:
    """Run `main`; turn whatever ends it into `outcome.json`, with the step of `progress`, and the exit code of this rank.

    Rank 0 writes the outcome. Another rank writes it only if it failed first and by itself, so that a loss of rank 0
    leaves `running` behind, which `read_outcome` reports as 7. A folder held by another run (QG-RUN-004) is not
    touched.
    """
    main_rank, progress = world().is_main, progress or Progress()
    try:
        main()
    except StopRequested as stopped:
        return _end(folder, "stopped", stopped, progress, main_rank)
    except QuietGooseError as error:
        ours = error.code != IN_USE and (main_rank or not isinstance(error, PeerLost))
        return _end(folder, "failed", error, progress, write=ours)
    except torch.OutOfMemoryError as error:
        return _end(folder, "failed", _memory(error), progress, write=True)
    except (RuntimeError, ConnectionError) as error:
        lost = _peer_lost(error)
        if lost is None:
            _unexpected(folder, error, progress)
            raise
        traceback.print_exc()
        return _end(folder, "failed", lost, progress, write=main_rank and _state(folder) == "running")
    except Exception as error:
        _unexpected(folder, error, progress)
        raise
    if main_rank:
        write_outcome(folder, "finished", int(ExitCode.FINISHED), "", None)
    return int(ExitCode.FINISHED)


def leave(code: int) -> None:
    """End the process without the libraries' clean-up: after a lost peer that would wait for the peer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end(folder: Path, state: str, error: QuietGooseError, progress: Progress, write: bool) -> int:
    code = int(error.exit_code)
    if write:
        write_outcome(folder, state, code, str(error), progress.step)
    if write or world().is_main:
        os.write(2, f"{redact(str(error))}\n".encode())
    return code


def _state(folder: Path) -> str:
    path = folder / OUTCOME
    return read_json(path)["state"] if path.is_file() else ""


def _unexpected(folder: Path, error: Exception, progress: Progress) -> None:
    write_outcome(folder, "failed", 1, f"{type(error).__name__}: {error}"[:2000], progress.step)


def _memory(error: torch.OutOfMemoryError) -> MemoryExhausted:
    return MemoryExhausted(
        f"rank {world().rank}: out of memory ({str(error).splitlines()[0]}). Cheapest first: halve train.micro_rows, "
        "set train.activation_checkpointing, take a higher ZeRO stage or an offload strategy"
    )


def _peer_lost(error: Exception) -> PeerLost | None:
    text = str(error)
    if isinstance(error, dist.DistError) or any(word in text for word in PEER_WORDS):
        return PeerLost(f"rank {world().rank} lost a peer: {text.splitlines()[0] if text else type(error).__name__}")
    return None
