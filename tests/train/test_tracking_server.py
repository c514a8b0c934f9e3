"""R17: an MLflow server that answers, dies in the middle of a run, and comes back."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from quietgoose.train import tracking
from quietgoose.train.recipe import TrackingSettings
from quietgoose.train.stop import read_outcome, run_guarded
from quietgoose.train.tracking import Tracker

from .test_tracking import events, report, wait_for


class Server(ThreadingHTTPServer):
    """As much of MLflow's REST interface as a run needs; what it was told survives a restart."""

    def __init__(self, port: int = 0, kept: dict[str, Any] | None = None) -> None:
        super().__init__(("127.0.0.1", port), Rest)
        self.kept = kept or {"runs": [], "status": {}, "steps": [], "parameters": 0}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        kept = self.kept
        if name == "runs/create":
            kept["runs"].append(given["run_name"])
            return {"run": self.run(len(kept["runs"]))}
        if name == "runs/log-batch":
            kept["steps"] += [m["step"] for m in given.get("metrics", ()) if m["key"] == "loss"]
            kept["parameters"] += len(given.get("params", ()))
        if name == "runs/update":
            kept["status"][given["run_id"]] = given.get("status")
        experiment = {
            "experiment_id": "1",
            "name": "quietgoose",
            "lifecycle_stage": "active",
            "artifact_location": "/none",
        }
        answers = {
            "experiments/get-by-name": {"experiment": experiment}, "runs/get": {"run": self.run(1)},
            "runs/update": {"run_info": self.run(1)["info"]},
        }  # fmt: skip
        return answers.get(name, {})

    def run(self, number: int) -> dict[str, Any]:
        name = f"run{number}"
        info = {"run_id": name, "run_uuid": name, "experiment_id": "1", "lifecycle_stage": "active", "start_time": 1}
        return {
            "info": {**info, "status": self.kept["status"].get(name, "RUNNING"), "artifact_uri": "/none"},
            "data": {},
        }

    def die(self) -> None:
        self.shutdown()
        self.server_close()


class Rest(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        given = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        body = json.dumps(self.server.answer(self.path.partition("?")[0].partition("mlflow/")[2], given)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_r17_a_server_that_dies_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with 0, one warning and all of its events; `sync` sends the rest to the same runs, every step once."""
    monkeypatch.setattr(tracking, "FAILING_SECONDS", 1.0)
    server, said = Server(), []
    uri = f"http://127.0.0.1:{server.server_port}"
    (tmp_path / "recipe.yaml").write_text(f"tracking: {{uri: '{uri}', system_metrics: false}}\n")

    def work() -> None:
        settings = TrackingSettings(uri=uri, system_metrics=False)
        with (
            Tracker(settings, tmp_path, settings_of_run={"a.b": 1}, name="run", main=True, say=said.append) as tracker,
            tracker.stage("experts") as callback,
        ):
            for step in range(40):
                if step == 20:
                    wait_for(lambda: len(server.kept["steps"]) == 20)
                    server.die()
                callback.on_step(report(step))
            wait_for(lambda: any("QG-TRACK-001" in line for line in said))

    assert run_guarded(tmp_path, work) == 0
    assert read_outcome(tmp_path) == 0
    assert [line[:12] for line in said] == ["QG-TRACK-001", "QG-TRACK-002"]
    assert "quietgoose sync" in said[1]
    assert [e["step"] for e in events(tmp_path) if e["kind"] == "step"] == list(range(40))
    assert events(tmp_path)[-1]["status"] == "FINISHED"
    again = Server(server.server_port, server.kept)
    assert tracking.sync(tmp_path, said.append)
    assert again.kept["runs"] == ["run", "experts"], "no run is made twice"
    assert again.kept["steps"] == list(range(40))
    assert again.kept["status"] == {"run1": "FINISHED", "run2": "FINISHED"}
    assert again.kept["parameters"] == 1
    assert len(said) == 2, "MLflow's own words do not reach the console"
    again.die()
