"""Events first, MLflow beside: R17 (a server that is down, errs, hangs or comes back), S8 (secrets), S11 (no network)."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from quietgoose.base.errors import NumericError, SecurityError, StopRequested
from quietgoose.train import mlflow_sink, tracking
from quietgoose.train.console import Console, open_log
from quietgoose.train.events import EventLog
from quietgoose.train.recipe import TrackingSettings
from quietgoose.train.redaction import Redactor, redact
from quietgoose.train.tracking import Tracker
from quietgoose.train.types import StepReport

STEP_SECONDS = 0.05


def report(step: int) -> StepReport:
    losses = {f"expert_{i}": 1.0 / (step + 1) for i in range(12)}
    return StepReport(step, 1.0 / (step + 1), losses, {"expert_0": 0.5}, 1e-3, 4096, STEP_SECONDS)


def train(folder: Path, uri: str | None = None, steps: int = 100, first: int = 0) -> tuple[list[str], float, float]:
    """A run of one stage; (what was said, mean seconds of a callback, seconds to end)."""
    said: list[str] = []
    settings = TrackingSettings(uri=uri, system_metrics=False)
    with Tracker(settings, folder, settings_of_run={"a.b": 1}, name="run", main=True, say=said.append) as tracker:
        with tracker.stage("experts") as callback:
            started = time.perf_counter()
            for step in range(first, first + steps):
                callback.on_step(report(step))
            spent = (time.perf_counter() - started) / steps
        ended = time.perf_counter()
    return said, spent, time.perf_counter() - ended


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def client(folder: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def place(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


class Stub(BaseHTTPRequestHandler):
    """A tracking server that errs or hangs."""

    hang: threading.Event | None = None

    def do_GET(self) -> None:
        if self.hang is not None:
            self.hang.wait(30)
        self.send_response(500)
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(params=["refused", "500s", "hangs"])
def bad_server(request: pytest.FixtureRequest) -> Iterator[str]:
    released = threading.Event()
    handler = type("Handler", (Stub,), {"hang": released if request.param == "hangs" else None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    uri = f"http://127.0.0.1:{server.server_port}"
    if request.param == "refused":
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield uri
    released.set()
    if request.param != "refused":
        server.shutdown()
        server.server_close()


# ---------------------------------------------------------------------- R17


def test_r17_bad_server_costs_a_warning(bad_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "HTTP_SECONDS", 4.0)
    said, per_step, ending = train(tmp_path, bad_server)
    assert per_step < 0.01 * STEP_SECONDS, f"{per_step / STEP_SECONDS:.1%} of a step"
    assert ending < 8.0
    assert sum("QG-TRACK-001" in line for line in said) <= 1
    assert sum("QG-TRACK-002" in line for line in said) == 1
    kinds = [event["kind"] for event in events(tmp_path)]
    assert kinds == ["run_started", "stage_started", *["step"] * 100, "stage_finished", "run_finished"]


def test_r17_sync_fills_in(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    missing = tmp_path / "missing"
    missing.write_text("a file where the store's folder should be")
    said, _, _ = train(tmp_path / "run", f"sqlite:///{missing / 'mlflow.db'}", steps=20)
    assert any("QG-TRACK-002" in line for line in said)
    missing.unlink()
    missing.mkdir()
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(f"tracking: {{uri: 'sqlite:///{missing / 'mlflow.db'}', system_metrics: false}}\n")
    assert tracking.sync(tmp_path / "run", said.append)
    record = place(tmp_path / "run")
    history = client(missing).get_metric_history(record["stages"]["experts"], "loss/expert_3")
    assert [metric.step for metric in history] == list(range(20))
    assert client(missing).get_run(record["run_id"]).info.status == "FINISHED"


def test_local_store_resume_and_kill(tmp_path: Path) -> None:
    """Killed by SIGKILL: KILLED in MLflow. Started again: the same runs, FINISHED, every step once."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); import test_tracking as t; from pathlib import Path\n"
        "s = t.TrackingSettings(system_metrics=False)\n"
        "k = t.Tracker(s, Path(sys.argv[1]), settings_of_run={'a.b': 1}, name='run', main=True, say=print)\n"
        "with k.stage('experts') as c:\n"
        "    [c.on_step(t.report(i)) for i in range(10)]\n"
        "    print('ready', flush=True); time.sleep(120)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    wait_for(lambda: (tmp_path / "run.json").exists() and place(tmp_path).get("sent", 0) >= 12)
    first = place(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: place(tmp_path)["status"] == "KILLED")
    store = client(tmp_path)
    assert store.get_run(first["run_id"]).info.status == "KILLED"
    assert store.get_run(first["stages"]["experts"]).info.status == "KILLED"

    with (tmp_path / "events.jsonl").open("a") as handle:
        handle.write('{"kind": "step", "torn')
    train(tmp_path, steps=10, first=10)
    second = place(tmp_path)
    assert (second["run_id"], second["stages"]) == (first["run_id"], first["stages"])
    assert store.get_run(first["run_id"]).info.status == "FINISHED"
    assert store.get_run(first["run_id"]).data.params == {"a.b": "1"}
    child = store.get_run(first["stages"]["experts"])
    assert child.data.tags["mlflow.parentRunId"] == first["run_id"]
    history = store.get_metric_history(child.info.run_id, "loss")
    assert [metric.step for metric in history] == list(range(20))
    assert [event["step"] for event in events(tmp_path) if event["kind"] == "step"] == list(range(20))


def test_an_error_is_forgotten_once_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in mlflow_sink.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    settings = tracking.sink_settings(TrackingSettings(system_metrics=False), tmp_path)
    found = []
    for error in (NumericError("nan"), NumericError("nan again"), StopRequested("asked", saved=True), None):
        with contextlib.suppress(NumericError, StopRequested):
            with Tracker(TrackingSettings(enabled=False), tmp_path, settings_of_run={}, name="r", main=True, say=print):
                if error is not None:
                    raise error
        sink = mlflow_sink.Sink(settings)
        while sink.push():
            pass
        run = sink.client.get_run(place(tmp_path)["run_id"])
        found.append((run.info.status, run.data.tags.get("error")))
    assert found == [
        ("FAILED", "QG-NUM-001 nan"), ("FAILED", "QG-NUM-001 nan again"), ("KILLED", None), ("FINISHED", None),
    ]  # fmt: skip


def test_tables_become_one_finished_run(bad_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in mlflow_sink.ENVIRONMENT.items():  # set in this process too, and taken back after the test
        monkeypatch.setenv(name, value)
    table = tmp_path / "results.md"
    table.write_text("| arm |")
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    values = {"accuracy/base/all": 0.25, "nats/base/all": float("nan")}
    given = ("tables", None, tmp_path, "export on test", {"k": 2}, values, [table])
    said = tracking.log_tables(store, *given)
    run = client(tmp_path).get_run(said.rpartition(" ")[2])
    assert (run.info.status, run.info.run_name, run.data.params) == ("FINISHED", "export on test", {"k": "2"})
    assert run.data.metrics["accuracy/base/all"] == 0.25
    assert [one.path for one in client(tmp_path).list_artifacts(run.info.run_id)] == ["results.md"]
    assert tracking.log_tables(store, *given).startswith("logged to MLflow: experiment tables, run ")
    refused = tracking.log_tables(bad_server, *given)
    assert refused.startswith(f"QG-TRACK-001 MLflow at {bad_server} did not take the tables")
    assert str(tmp_path) in refused


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("error", "status"),
    [(StopRequested("asked", saved=True), "KILLED"), (NumericError("nan"), "FAILED"), (ValueError("x"), "FAILED")],
)
def test_status_follows_the_error(tmp_path: Path, error: Exception, status: str) -> None:
    settings = TrackingSettings(enabled=False)
    with pytest.raises(type(error)):  # noqa: PT012
        with Tracker(settings, tmp_path, settings_of_run={}, name="r", main=True, say=print) as tracker:
            with tracker.stage("gates"):
                raise error
    found = {event["kind"]: event.get("status") for event in events(tmp_path)}
    assert found["stage_finished"] == found["run_finished"] == status


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Tracker(TrackingSettings(), tmp_path, settings_of_run={}, name="r", main=False, say=print) as tracker:
        with tracker.stage("gates") as callback:
            callback.on_step(report(0))
        tracker.artifact(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_artifacts_stay_inside_the_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "other").write_text("x")
    settings = TrackingSettings(enabled=False)
    tracker = Tracker(settings, tmp_path / "run", settings_of_run={}, name="r", main=True, say=print)
    with pytest.raises(SecurityError):
        tracker.artifact(tmp_path / "other")


def test_full_disk_costs_events_not_the_run(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path; from quietgoose.train.events import EventLog\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "log = EventLog(Path(sys.argv[1]), lambda text: print(text))\n"
        "[log.write('step', step=i) for i in range(100)]; print(log.lost)\n"
    )
    path = tmp_path / "events.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "QG-IO-003" in lines[0]
    kept = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert kept == list(range(len(kept)))
    assert len(kept) + int(lines[-1]) == 100
    assert len(lines) == 2, "the warning comes once"


# ---------------------------------------------------------------------- S8


CANARY = "c4n4ry-pa55word-0123456789"


def test_s8_secrets_appear_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "HTTP_SECONDS", 3.0)
    stream = io.StringIO()
    console = Console(main=True, stream=stream)
    uri = f"http://user:{CANARY}@127.0.0.1:9"
    tracker = Tracker(
        TrackingSettings(uri=uri),
        tmp_path,
        settings_of_run={"tracking.uri": uri},
        name="r",
        main=True,
        say=console.line,
    )
    assert tracker._sink is not None
    command = Path(f"/proc/{tracker._sink._process.pid}/cmdline").read_bytes()
    environment = Path(f"/proc/{tracker._sink._process.pid}/environ").read_bytes()
    open_log(tmp_path, 0)
    import logging

    try:
        raise ValueError(f"request to {uri} failed, Authorization: Bearer {CANARY}")
    except ValueError as error:
        logging.getLogger("quietgoose").exception("went wrong")
        console.line(str(error))
        tracker.event("error", message=str(error))
    tracker.finish("FAILED")
    assert CANARY.encode() not in command + environment
    assert "***" in stream.getvalue()
    assert CANARY not in stream.getvalue()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"events.jsonl", "rank0.log"} <= {path.name for path in files}
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path


def test_s8_traceback_of_the_entry_point(tmp_path: Path) -> None:
    code = (
        "from quietgoose.train.redaction import install_excepthook; install_excepthook(); import os\n"
        "raise RuntimeError('token is ' + os.environ['HF_TOKEN'])\n"
    )
    environment = {**os.environ, "HF_TOKEN": CANARY}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert "token is ***" in done.stderr
    assert CANARY not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://me:hunter22@host/x", "https://***@host/x"),
        ("Authorization: Bearer abcdefghij", "Authorization: Bearer ***"),
        ("hf_abcdefghijklmnopqrst", "***"),
        ("sqlite:////folder/mlflow.db at user@host", "sqlite:////folder/mlflow.db at user@host"),
    ],
)
def test_redaction_of_shapes(text: str, wanted: str) -> None:
    assert Redactor({})(text) == wanted


def test_redaction_by_name() -> None:
    redactor = Redactor({"MY_API_KEY": "value-one", "TOKENIZERS_PARALLELISM": "value-two"})
    assert redactor("value-one value-two") == "*** value-two"
    assert redactor.value({"a": ["value-one"], "password": "short", "tokens": 3}) == {
        "a": ["***"], "password": "***", "tokens": 3,
    }  # fmt: skip


# ---------------------------------------------------------------------- S11, events, console


def test_s11_local_tracking_opens_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sink inherits a Python that notes every host it is asked to reach."""
    tried = tmp_path / "tried"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import socket\n"
        "def note(self, address):\n"
        "    if self.family != socket.AF_UNIX:\n"
        f"        open({str(tried)!r}, 'a').write(f'{{address}}\\n')\n"
        "        raise OSError(f'blocked {address}')\n"
        "socket.socket.connect = socket.socket.connect_ex = note\n"
        f"open({str(tmp_path / 'patched')!r}, 'w').close()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    said, _, _ = train(tmp_path / "run", steps=3)
    assert said == []
    assert (tmp_path / "patched").exists(), "the sink did run under the patch"
    assert not tried.exists(), tried.read_text()
    assert place(tmp_path / "run")["status"] == "FINISHED"


def test_events_hold_no_nan(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", print)
    log.write("step", step=0, losses={"a": float("nan"), "b": float("inf"), "c": 1.0})
    log.close()
    assert events(tmp_path)[0]["losses"] == {"a": "nan", "b": "inf", "c": 1.0}


def test_plain_console_shows_rate_and_time_left() -> None:
    stream = io.StringIO()
    console = Console(main=True, stream=stream, plain_seconds=0.0)
    with console.stage("experts", 10, first=4) as callback:
        callback.on_step(report(4))
        callback.on_event("step_skipped", code="QG-NUM-001", step=5, reason="nan")
    text = stream.getvalue()
    assert "continues at step 4 of 10" in text
    assert "experts: step 5 of 10, loss 0.2000, 81,920 tokens/s, 0 s left" in text
    assert "QG-NUM-001 experts: step skipped: step 5, reason nan" in text
    assert "\x1b" not in text


def test_other_ranks_are_silent() -> None:
    stream = io.StringIO()
    console = Console(main=False, stream=stream, plain_seconds=0.0)
    with console.stage("experts", 10) as callback:
        callback.on_step(report(0))
    console.progress("evaluate")("base", 1, 1)
    console.line("x")
    assert stream.getvalue() == ""


def test_redactor_of_the_process_is_used_by_events(tmp_path: Path) -> None:
    redact.add("registered-secret")
    log = EventLog(tmp_path / "events.jsonl", print)
    log.write("note", text="a registered-secret b")
    log.close()
    assert events(tmp_path)[0]["text"] == "a *** b"
