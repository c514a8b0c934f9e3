"""Tracking of a run: an event log that is written first, and a process beside rank 0 that tells MLflow.

The sink (train/mlflow_sink.py) follows events.jsonl, so a server that is slow, down or hanging cannot hold a training
step, and what was not sent is sent later: at the next start, or by `quietgoose sync RUN`. It ends when this process
does, however that ends. On other ranks a Tracker does nothing.

    settings = flatten(plain(recipe))
    with Tracker(recipe.tracking, folder, settings_of_run=settings, name=..., main=True, say=console.line) as tracker:
        with tracker.stage("experts") as callback:
            train(engine, data, checkpoints, [callback], ...)
        tracker.artifact(folder / "report.html")
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit, urlunsplit

from ..base.errors import ArtifactError, QuietGooseError, StopRequested
from ..base.files import inside, read_json
from .checks import read_credentials
from .events import NAME, EventLog
from .recipe import TrackingSettings
from .redaction import MASK, redact
from .safe_yaml import read_yaml

if TYPE_CHECKING:
    from .types import StepReport

RUN_FILE = "run.json"
CLOSING_SECONDS = 60.0
FAILING_SECONDS = 2.0
HTTP_SECONDS = 15.0
SYNC_SECONDS = 3600.0
Status = Literal["FINISHED", "FAILED", "KILLED"]


class StageTracker:
    """Callback of one stage: the loop tells it about steps, saves and events."""

    def __init__(self, log: EventLog | None, stage: str) -> None:
        self._log = log
        self._stage = stage

    def on_step(self, report: StepReport) -> None:
        if self._log is None:
            return
        rate = report.tokens / report.seconds if report.seconds > 0 else 0.0
        self._log.write(
            "step", stage=self._stage, step=report.step, loss=report.loss, losses=dict(report.losses),
            gradient_norms=dict(report.gradient_norms), learning_rate=report.learning_rate,
            seconds=round(report.seconds, 6), memory_gib=memory_gib(), skipped=report.skipped,
            **{report.unit: report.tokens, f"{report.unit}_per_second": round(rate, 1)}, extra=dict(report.extra),
        )  # fmt: skip

    def on_save(self, path: Path) -> None:
        if self._log is not None:
            self._log.write("checkpoint", stage=self._stage, path=path.name)

    def on_event(self, kind: str, **fields: Any) -> None:
        if self._log is not None:
            self._log.write(kind, **{"stage": self._stage, **fields})


class Tracker:
    """Events and MLflow of one run; a context manager that ends the run with the status of what ended it."""

    def __init__(
        self,
        settings: TrackingSettings,
        folder: Path,
        *,
        settings_of_run: Mapping[str, Any],
        name: str,
        main: bool,
        say: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self._say = say
        self._main = main
        self._sink: _SinkProcess | None = None
        self._ended = False
        self.log = EventLog(folder / NAME, say) if main else None
        self.event("run_started", name=name, settings=dict(settings_of_run), python=sys.version.split()[0])
        if main and settings.enabled:
            self._sink = _SinkProcess(sink_settings(settings, folder), say)

    def event(self, kind: str, **fields: Any) -> None:
        """Write one event; numbers in it become metrics of the run (or of the stage, if it has the field `stage`)."""
        if self.log is not None:
            self.log.write(kind, **fields)

    @contextmanager
    def stage(self, name: str) -> Iterator[StageTracker]:
        """A child run; its status is that of what ends the block."""
        self.event("stage_started", stage=name)
        status: Status = "FAILED"
        try:
            yield StageTracker(self.log, name)
            status = "FINISHED"
        except (StopRequested, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            self.event("stage_finished", stage=name, status=status)

    def artifact(self, path: Path, to: str | None = None, stage: str | None = None) -> None:
        """Send a file or folder inside the run folder to MLflow, under the artifact folder `to`."""
        if self.log is None:
            return
        target = inside(self.folder, path.resolve())
        if not target.exists():
            raise ArtifactError(f"{path}: is not there, so it cannot be an artifact", code="EXP-004")
        self.event("artifact", path=str(target.relative_to(self.folder.resolve())), to=to, stage=stage)

    def run_ids(self) -> dict[str, Any]:
        """MLflow's ids as far as they are known: run_id, stages. Empty if there are none yet."""
        path = self.folder / RUN_FILE
        record = read_json(path) if path.is_file() else {}
        return {key: record[key] for key in ("run_id", "stages") if key in record}

    def finish(self, status: Status) -> None:
        """Write the end, let the sink send what is left, say what could not be sent. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self.event("run_finished", status=status)
        if self._sink is not None:
            self._sink.close()
        if self.log is not None:
            if self.log.lost:
                self._say(f"QG-IO-003 {self.log.lost} events could not be written to {self.log.path}")
            self.log.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish("FINISHED")
        elif issubclass(kind, (StopRequested, KeyboardInterrupt, SystemExit)):
            self.finish("KILLED")
        else:
            text = str(error) if isinstance(error, QuietGooseError) else f"{kind.__name__}: {error}"
            self.event("error", message=text[:2000])
            self.finish("FAILED")


class _SinkProcess:
    """The sink, its pipe and the thread that listens to it."""

    def __init__(self, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._say = say
        self._state = "connecting"
        self._http = str(settings["uri"]).startswith("http")
        self._folder = settings["folder"]
        command = [
            sys.executable,
            "-m",
            "quietgoose.train.mlflow_sink",
        ]  # secrets go through the pipe, not through `ps`
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the listener reports a sink that is gone
            self._process.stdin.write(json.dumps(settings) + "\n")
            self._process.stdin.flush()
        threading.Thread(target=self._listen, name="quietgoose-tracking", daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            self._state = message["state"]
            if message.get("say"):
                self._say(redact(message["say"]))
        if self._state != "done":
            self._state = "gone"

    def close(self, patience: float | None = None) -> bool:
        """Let the sink finish: by default a minute if it gets through, seconds if it does not. True if all was sent."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        started = time.monotonic()
        while self._process.poll() is None and time.monotonic() - started < (patience or self._patience()):
            time.sleep(0.05)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.returncode != 0:
            self._say(
                "QG-TRACK-002 MLflow did not get all events; events.jsonl has them. "
                f"Send the rest with: quietgoose sync {self._folder}"
            )
        return self._process.returncode == 0

    def _patience(self) -> float:
        if self._state == "failing":
            return FAILING_SECONDS
        return HTTP_SECONDS if self._http and self._state == "connecting" else CLOSING_SECONDS


def sync(folder: Path, say: Callable[[str], None], credentials: str | None = None) -> bool:
    """Send what a run's MLflow has not got yet, by the settings in its recipe.yaml; True if all was sent.

    Raises RecipeError CFG-006 if `folder` is no run folder.
    """
    tracking = TrackingSettings(**read_yaml(folder / "recipe.yaml").get("tracking", {}))
    if tracking.uri and f"{MASK}@" in tracking.uri:  # the saved recipe holds no password
        tracking.uri = tracking.uri.replace(f"{MASK}@", "")
    tracking.credentials = credentials or tracking.credentials
    return _SinkProcess(sink_settings(tracking, folder), say).close(patience=SYNC_SECONDS)


def log_tables(
    uri: str, experiment: str, credentials: str | None, folder: Path, name: str, facts: Mapping[str, Any],
    values: Mapping[str, float], files: Sequence[Path],
) -> str:  # fmt: skip
    """Tables that stand on disk as one finished MLflow run: `facts` become parameters, `values` metrics, `files` artifacts. One line
    that says how it went: a server that does not answer costs a warning, as while training."""
    from .mlflow_sink import log_whole_run

    settings = sink_settings(TrackingSettings(uri=uri, experiment=experiment, credentials=credentials), folder)
    try:
        run = log_whole_run(settings, name, facts, values, files)
    except Exception as error:  # of MLflow, its store or the connection
        reason = redact(str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__)
        return f"QG-TRACK-001 MLflow at {redact(uri)} did not take the tables ({reason}); they are in {files[0].parent}"
    return f"logged to MLflow: experiment {experiment}, run {run}"


def sink_settings(settings: TrackingSettings, folder: Path) -> dict[str, Any]:
    """What the sink needs; user and password are taken out of the URL, secrets are registered for redaction."""
    root = folder.resolve()
    uri = settings.uri or f"sqlite:///{root / 'mlflow.db'}"
    secrets: dict[str, str] = {}
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and "@" in parts.netloc:
        user, _, host = parts.netloc.rpartition("@")
        name, _, password = user.partition(":")
        secrets = {"username": unquote(name), "password": unquote(password)}
        uri = urlunsplit(parts._replace(netloc=host))
    if settings.credentials:
        secrets = read_credentials(Path(settings.credentials).expanduser())
    for key in ("password", "token"):
        redact.add(secrets.get(key, ""))
    return {
        "folder": str(root), "uri": uri, "secrets": secrets, "experiment": settings.experiment,
        "artifacts": _artifacts(uri), "system_metrics": settings.system_metrics,
    }  # fmt: skip


def _artifacts(uri: str) -> str | None:
    """Beside a SQLite file; a server knows its own place."""
    path = uri.removeprefix("sqlite:///")
    return str(Path(path).resolve().parent / "mlartifacts") if path != uri else None


def memory_gib() -> float:
    """Largest memory so far: of the accelerator if torch uses one, else of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
