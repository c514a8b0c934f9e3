"""The process that follows events.jsonl and tells MLflow: `python -m quietgoose.train.mlflow_sink`, settings on stdin.

Started by train/tracking.py on rank 0, and by `quietgoose sync RUN`. It keeps its place in run.json, sends again what
failed (the same event sent twice is one row in MLflow, as its time stands in the event), and leaves when stdin closes or
its parent is gone, whatever ended the parent; a run without a recorded end is then marked KILLED. This is the only file
that imports MLflow; its defaults would block for 246 s at a server that is down, so they are set before the import.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..base.files import inside, read_json, write_atomic
from .events import NAME
from .redaction import redact

RUN_FILE = "run.json"
LOCK = ".tracking.lock"
BATCH_EVENTS = 300
BATCH_METRICS = 800
BATCH_PARAMETERS = 90
LONGEST_VALUE = 500
LOOK_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST")
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
}
STEP_FIELDS = (
    "loss",
    "learning_rate",
    "tokens_per_second",
    "images_per_second",
    "seconds",
    "memory_gib",
    "tokens",
    "images",
)


class Sink:
    """Sends events to one MLflow experiment. `push` sends the next few and returns how many."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.client = open_client(settings)
        self.settings = settings
        self.folder = Path(settings["folder"])
        self.place = self._load()
        self.monitor: Any = None
        self.refused = 0

    # ------------------------------------------------------------------ place in the log

    def _load(self) -> dict[str, Any]:
        path = self.folder / RUN_FILE
        wanted = {"uri": self.settings["uri"], "experiment": self.settings["experiment"]}
        record = read_json(path) if path.is_file() else {}
        if {key: record.get(key) for key in wanted} == wanted:
            return record
        return {**wanted, "offset": 0, "sent": 0, "stages": {}, "status": "RUNNING"}

    def _save(self) -> None:
        write_atomic(self.folder / RUN_FILE, json.dumps(self.place, indent=1) + "\n")

    def _next(self) -> tuple[list[dict[str, Any]], list[int]]:
        """The next complete lines and the offset after each."""
        events: list[dict[str, Any]] = []
        ends: list[int] = []
        path = self.folder / NAME
        if not path.is_file():
            return events, ends
        with path.open("rb") as handle:
            position = handle.seek(self.place["offset"])
            for line in handle:
                if not line.endswith(b"\n") or len(events) == BATCH_EVENTS:
                    break
                position += len(line)
                events.append(json.loads(line))
                ends.append(position)
        return events, ends

    # ------------------------------------------------------------------ sending

    def push(self) -> int:
        events, ends = self._next()
        number = 0
        while number < len(events):
            taken = self._steps(events, number) or self._one(events[number])
            number += taken
            self.place["offset"] = ends[number - 1]
            self.place["sent"] += taken
            self._save()
        return number

    def _steps(self, events: list[dict[str, Any]], first: int) -> int:
        """Send consecutive steps of one stage in one request; returns how many, 0 if the event is no step."""
        metrics: list[Any] = []
        stage = events[first].get("stage")
        taken = 0
        for event in events[first:]:
            if event["kind"] != "step" or event.get("stage") != stage or len(metrics) > BATCH_METRICS - 200:
                break
            metrics += _metrics(step_values(event), event, int(event["step"]))
            taken += 1
        if taken:
            with self._tolerant():
                self._log_metrics(self._run_of(stage), metrics)
        return taken

    def _one(self, event: dict[str, Any]) -> int:
        actions = {
            "run_started": self._run_started, "stage_started": self._stage_started, "artifact": self._artifact,
            "stage_finished": self._stage_finished, "run_finished": self._run_finished, "error": self._error,
        }  # fmt: skip
        with self._tolerant():
            actions.get(event["kind"], self._other)(event)
        return 1

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """An event the server will never take is counted and left out; everything else is tried again."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            self.refused += 1
            if self.refused == 1:
                tell("ok", f"QG-TRACK-003 MLflow refused an event: {_short(error)}; it stays in events.jsonl")

    def _run_started(self, event: dict[str, Any]) -> None:
        self.place["status"] = "RUNNING"
        if "run_id" in self.place:
            self.client.update_run(self.place["run_id"], status="RUNNING")
            self._forget_error()
        else:
            experiment = experiment_of(self.client, self.settings)
            run = self.client.create_run(experiment, start_time=_millis(event), run_name=event["name"])
            self.place["run_id"] = run.info.run_id
            self._save()
            self._parameters(event)
        if self.settings["system_metrics"] and self.monitor is None:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            resumed = self.place["sent"] > 0
            uri = self.settings["uri"]
            self.monitor = SystemMetricsMonitor(self.place["run_id"], resume_logging=resumed, tracking_uri=uri)
            self.monitor.start()

    def _parameters(self, event: Mapping[str, Any]) -> None:
        log_parameters(self.client, self.place["run_id"], event["settings"])

    def _stage_started(self, event: dict[str, Any]) -> None:
        stage = event["stage"]
        if stage in self.place["stages"]:
            self.client.update_run(self.place["stages"][stage], status="RUNNING")
            return
        parent = self.client.get_run(self.place["run_id"])
        run = self.client.create_run(
            parent.info.experiment_id, start_time=_millis(event), run_name=stage,
            tags={"mlflow.parentRunId": self.place["run_id"]},
        )  # fmt: skip
        self.place["stages"][stage] = run.info.run_id
        self._save()

    def _stage_finished(self, event: dict[str, Any]) -> None:
        self.client.set_terminated(self._run_of(event["stage"]), event["status"], _millis(event))

    def _run_finished(self, event: dict[str, Any]) -> None:
        self._stop_monitor()
        self.client.set_terminated(self.place["run_id"], event["status"], _millis(event))
        self.place["status"] = event["status"]

    def _artifact(self, event: dict[str, Any]) -> None:
        path = inside(self.folder, event["path"])
        run = self._run_of(event.get("stage"))
        if path.is_dir():
            self.client.log_artifacts(run, str(path), event.get("to") or path.name)
        elif path.is_file():
            self.client.log_artifact(run, str(path), event.get("to"))

    def _error(self, event: dict[str, Any]) -> None:
        self.client.set_tag(self.place["run_id"], "error", str(event["message"])[:LONGEST_VALUE])

    def _forget_error(self) -> None:
        """The error of an earlier start says nothing of this one, whose own would follow."""
        if "error" in self.client.get_run(self.place["run_id"]).data.tags:
            self.client.delete_tag(self.place["run_id"], "error")

    def _other(self, event: dict[str, Any]) -> None:
        content = {k: v for k, v in event.items() if k not in ("time", "elapsed", "kind", "stage", "step")}
        values = {f"{event['kind']}/{name}": value for name, value in numbers(content)}
        self._log_metrics(self._run_of(event.get("stage")), _metrics(values, event, int(event.get("step", 0))))

    def _log_metrics(self, run: str, metrics: list[Any]) -> None:
        for start in range(0, len(metrics), BATCH_METRICS):
            self.client.log_batch(run, metrics=metrics[start : start + BATCH_METRICS])

    def _run_of(self, stage: str | None) -> str:
        return self.place["stages"].get(stage, self.place["run_id"])

    def _stop_monitor(self) -> None:
        if self.monitor is not None:
            self.monitor.finish()
            self.monitor = None

    def orphaned(self) -> None:
        """The run's process is gone and left no end: mark what still runs as KILLED."""
        self._stop_monitor()
        if "run_id" not in self.place or self.place["status"] != "RUNNING":
            return
        for run in [*self.place["stages"].values(), self.place["run_id"]]:
            if self.client.get_run(run).info.status == "RUNNING":
                self.client.set_terminated(run, "KILLED")
        self.place["status"] = "KILLED"
        self._save()


def open_client(settings: Mapping[str, Any]) -> Any:
    """MLflow's client for `sink_settings`; what MLflow reads from the environment is set first."""
    os.environ.update(ENVIRONMENT)
    names = {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"}
    for key, value in settings["secrets"].items():
        os.environ[names.get(key, "MLFLOW_TRACKING_TOKEN")] = value
        redact.add(value)
    import mlflow
    from mlflow.tracking import MlflowClient

    mlflow.set_tracking_uri(settings["uri"])
    return MlflowClient(settings["uri"])


def experiment_of(client: Any, settings: Mapping[str, Any]) -> str:
    found = client.get_experiment_by_name(settings["experiment"])
    if found is not None:
        return found.experiment_id
    return client.create_experiment(settings["experiment"], settings["artifacts"])


def log_parameters(client: Any, run: str, settings: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    pairs = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in settings.items()]
    for start in range(0, len(pairs), BATCH_PARAMETERS):
        client.log_batch(run, params=pairs[start : start + BATCH_PARAMETERS])


def log_whole_run(
    settings: Mapping[str, Any], name: str, facts: Mapping[str, Any], values: Mapping[str, float], files: Sequence[Path]
) -> str:
    """A run that is over: parameters, metrics and files at once. Returns its id; raises what MLflow raises."""
    client = open_client(settings)
    event = {"time": time.time()}
    run = client.create_run(experiment_of(client, settings), start_time=_millis(event), run_name=name).info.run_id
    log_parameters(client, run, facts)
    client.log_batch(run, metrics=_metrics(values, event, 0))
    for file in files:
        client.log_artifact(run, str(file))
    client.set_terminated(run, "FINISHED", _millis({"time": time.time()}))
    return run


def step_values(event: Mapping[str, Any]) -> dict[str, float]:
    """Metric name -> value of a step."""
    values = {name: event[name] for name in STEP_FIELDS if name in event}
    values |= {f"loss/{name}": value for name, value in event.get("losses", {}).items()}
    values |= {f"gradient_norm/{name}": value for name, value in event.get("gradient_norms", {}).items()}
    return values | dict(event.get("extra", {})) | {"skipped": float(bool(event.get("skipped")))}


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, number) of every number inside dicts."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from numbers(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)


def _metrics(values: Mapping[str, Any], event: Mapping[str, Any], step: int) -> list[Any]:
    from mlflow.entities import Metric

    made = []
    for name, value in values.items():
        number = float(value)  # "nan" and "inf" are text in JSON
        key = "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)
        made.append(Metric(key, number if not math.isinf(number) else math.nan, _millis(event), step))
    return made


def _millis(event: Mapping[str, Any]) -> int:
    return int(event["time"] * 1000)


def _short(error: BaseException) -> str:
    return redact(str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__)


_listener: int | None = None
"""What the process that started this one reads from."""


def keep_stdout_apart() -> None:
    """MLflow prints to stdout (the address of a run that ended): only `tell` may write where the starter listens."""
    global _listener
    _listener = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def tell(state: str, say: str = "") -> None:
    """One line to the process that started this one; if it is gone there is nobody to tell."""
    if _listener is not None:
        with suppress(BrokenPipeError):
            os.write(_listener, (json.dumps({"state": state, "say": say}) + "\n").encode())


def follow(sink: Sink, ended: threading.Event) -> int:
    """Send until stdin is closed and nothing is left. Returns 0 if all was sent."""
    failures = 0
    while True:
        last = ended.is_set()
        try:
            sent = sink.push()
            if last and sent == 0:
                sink.orphaned()
                return 0
        except Exception as error:  # whatever it is, it must cost a warning and not the run
            failures += 1
            tell("failing", warning(sink, error) if failures == 1 else "")
            if last:
                return 1
            ended.wait(min(LONGEST_PAUSE_SECONDS, 2.0**failures))
            continue
        if sent or failures:
            tell("ok", "QG-TRACK-001 MLflow answers again" if failures else "")
            failures = 0
        if sent == 0:
            ended.wait(LOOK_SECONDS)


def warning(sink: Sink, error: Exception) -> str:
    where = redact(str(sink.settings["uri"]))
    return f"QG-TRACK-001 MLflow at {where} does not take events ({_short(error)}); they wait in {sink.folder / NAME}"


def watch_parent(ended: threading.Event) -> None:
    """Set `ended` when stdin closes or another process became the parent."""
    parent = os.getppid()

    def read() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    while not ended.wait(LOOK_SECONDS):
        if os.getppid() != parent:
            ended.set()


def main() -> int:
    keep_stdout_apart()
    settings = json.loads(sys.stdin.readline())
    for number in (signal.SIGINT, signal.SIGTERM):  # the run's end is told through the pipe, after its last event
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    ended = threading.Event()
    threading.Thread(target=watch_parent, args=(ended,), daemon=True).start()
    with (Path(settings["folder"]) / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the sink of an earlier start may still be sending
        code = follow(Sink(settings), ended)
    tell("done")
    return code


if __name__ == "__main__":
    code = main()
    os._exit(code)  # a request that hangs in a library thread must not hold the exit
