"""A base from the hub, by a hub of our own: what the recipe's `base.model: owner/name` fetches, keeps and refuses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from quietgoose.train.base_models import load_base
from quietgoose.train.nano import build_nano
from quietgoose.train.recipe import BaseSettings, NanoSettings

DRY = "/dry-run-ends"
COMMIT = "c0ffee" + "0" * 34
LOAD = """
import json, sys, urllib.error, urllib.request
from quietgoose.base.errors import QuietGooseError
from quietgoose.train.base_models import load_base
from quietgoose.train.recipe import BaseSettings

def tried(name, revision=None, meta=False):
    try:
        found = load_base(BaseSettings(model=name, revision=revision), meta=meta)
        return [found.id, found.sha256, found.tokenizer.decode(found.tokenizer("a 12")["input_ids"])]
    except QuietGooseError as error:
        return [error.code, error.message]

said = {"dry": tried("owner/tiny", meta=True)}
urllib.request.urlopen(sys.argv[1] + "/dry-run-ends")
said |= {"first": tried("owner/tiny"), "missing": tried("owner/none"), "pickled": tried("owner/pickled")}
urllib.request.urlopen(sys.argv[1] + "/die").read()
while True:
    try:
        urllib.request.urlopen(sys.argv[1], timeout=1)
    except urllib.error.HTTPError:
        continue
    except OSError:
        break
said |= {"offline": tried("owner/tiny"), "by_id": tried(said["first"][0]), "unseen": tried("owner/other")}
print(json.dumps(said))
"""


def etag_of(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The two answers that a download needs: what a revision holds, and its files by commit with their etag."""

    folders: dict[str, Path]
    asked: list[str]

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        self.asked.append(self.path)
        if parts == ["dry-run-ends"]:
            return self.answer(b"")
        if parts == ["die"]:
            threading.Thread(target=lambda: (self.server.shutdown(), self.server.server_close())).start()
            return self.answer(b"")
        folder = self.folders.get("/".join(parts[2:4] if parts[0] == "api" else parts[:2]))
        if folder is None:
            return self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        if parts[0] == "api" and parts[4] == "tree":
            entries = [(path, path.stat().st_size) for path in folder.iterdir()]
            listed = [{"type": "file", "path": p.name, "size": size, "oid": etag_of(p)} for p, size in entries]
            return self.answer(json.dumps(listed).encode())
        if parts[0] == "api":
            files = [{"rfilename": path.name} for path in folder.iterdir()]
            return self.answer(json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": files}).encode())
        file = folder / parts[-1]
        return self.answer(file.read_bytes(), 200, {"ETag": f'"{etag_of(file)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, data: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_a_base_by_its_name_on_the_hub(tmp_path: Path) -> None:
    model, tokenizer = build_nano(NanoSettings(layers=1, width=32, heads=2, kv_heads=1, mlp_width=48, context=64), 0)
    tiny, pickled = tmp_path / "tiny", tmp_path / "pickled"
    for folder in (tiny, pickled):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "pytorch_model.bin").write_bytes(b"not to be fetched")
        (folder / "modeling.py").write_text("raise SystemExit('not to be run')")
    (pickled / "model.safetensors").unlink()
    handler = type("Handler", (Hub,), {"folders": {"owner/tiny": tiny, "owner/pickled": pickled}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, url], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    server.shutdown()
    server.server_close()
    thread.join()
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["first"] == [f"owner/tiny@{COMMIT}", load_base(BaseSettings(model=str(tiny))).sha256, "a 12"]
    assert said["dry"] == [f"owner/tiny@{COMMIT}", "", "a 12"]
    before, after = (handler.asked[: handler.asked.index(DRY)], handler.asked[handler.asked.index(DRY) :])
    assert [sum("model.safetensors" in path for path in part) > 0 for part in (before, after)] == [False, True], (
        "a dry run fetches no weights"
    )
    assert said["offline"] == said["first"], "what was fetched once needs no network"
    assert said["by_id"] == said["first"], "an export names its base so"
    assert (said["missing"][0], said["pickled"][0], said["unseen"][0]) == ("QG-CFG-013", "QG-SEC-001", "QG-ENV-005")
    assert "no such model on the hub" in said["missing"][1]
    assert "give a local folder, or fetch it where there is a network" in said["unseen"][1]
    fetched = {path.rpartition("/")[2] for path in handler.asked if "/resolve/" in path}
    assert fetched == {path.name for path in tiny.iterdir()} - {"pytorch_model.bin", "modeling.py"}
    assert f"/owner/tiny/resolve/{COMMIT}/model.safetensors" in handler.asked, (
        "by commit, whatever the name points at later"
    )
