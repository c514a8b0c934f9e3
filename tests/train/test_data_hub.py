"""Datasets by name, from a hub of our own: what is fetched once needs no network, and a hub that does not answer is told at once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet

COMMIT = "c0ffee" + "0" * 34
LOAD = """
import sys
from quietgoose.base.errors import QuietGooseError
from quietgoose.train.data.hub import load_hub_dataset
from quietgoose.train.data.image_sources import open_source
from quietgoose.train.data.rows import DatasetSource
from quietgoose.train.image_settings import ImageSettings
try:
    if sys.argv[1] == "images":
        open_source(ImageSettings(source="owner/other"), "owner/other", "train")
    elif sys.argv[1] == "rows":
        list(DatasetSource("owner/other", "train").raw(None))
    print(load_hub_dataset("owner/tiny", split="train")["prompt"])
except QuietGooseError as error:
    print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """What `load_dataset` asks of a hub: the dataset's description, the list of its files, and the files."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        listed = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.files.items()
        ]
        if path.startswith((f"datasets/owner/tiny/resolve/{COMMIT}/", "datasets/owner/tiny/resolve/main/")):
            data = self.files.get(path.split("/", 5)[5])
            headers = {"ETag": f'"{hashlib.sha1(data or b"").hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self.answer(
                data or b"", 200 if data else 404, headers if data else {"X-Error-Code": "EntryNotFound"}
            )
        if path.startswith("api/datasets/owner/tiny/tree/"):
            return self.answer(json.dumps(listed).encode())
        if path.startswith("api/datasets/owner/tiny"):
            files = [{"rfilename": name} for name in self.files]
            return self.answer(json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": files}).encode())
        return self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:  # paths-info
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        found = [
            {
                "type": "file",
                "path": name,
                "size": len(self.files[name]),
                "oid": hashlib.sha1(self.files[name]).hexdigest(),
            }
            for name in asked
            if name in self.files
        ]
        self.answer(json.dumps(found).encode())

    def answer(self, data: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def load(what: str, url: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "no_proxy": "*"}
    environment.pop("HF_DATASETS_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-c", LOAD, what], env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def test_a_dataset_is_fetched_once_and_a_silent_hub_is_told_at_once(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"]}), tmp_path / "train.parquet")
    files = {"README.md": b"# tiny\n", "train-0.parquet": (tmp_path / "train.parquet").read_bytes()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"files": files}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    first = load("tiny", url, tmp_path / "home")
    server.shutdown()
    server.server_close()
    thread.join()
    assert "['a', 'b']" in first.stdout, first.stderr[-3000:]
    started = time.monotonic()
    offline, images, rows = (load(what, url, tmp_path / "home") for what in ("tiny", "images", "rows"))
    assert "['a', 'b']" in offline.stdout, offline.stderr[-3000:]
    assert images.stdout.startswith("QG-DATA-040 images: owner/other: neither a file or folder here nor a dataset")
    assert "--images.source FILE.parquet --images.test FILE.parquet" in images.stdout
    assert rows.stdout.startswith("QG-DATA-002 owner/other: no file or folder here")
    for done in (offline, images, rows):
        assert "Retry" not in done.stderr
    assert time.monotonic() - started < 60, "three starts and no waiting"


def test_the_setting_of_the_libraries_is_restored() -> None:
    import datasets.config
    from huggingface_hub import constants
    from quietgoose.train.data.hub import hub_answers, without_network

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    with without_network():
        assert not hub_answers("owner/tiny")
        assert constants.HF_HUB_OFFLINE
    now = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    assert now == before
