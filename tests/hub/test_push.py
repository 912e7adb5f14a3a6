"""checkpoint.push_to_hub against the real client of the hub and a small server that answers as the hub does."""

import base64
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from loop import run_loop
from small import small_config

from skyrl.config.validation import check
from skyrl.hub.locate import download
from skyrl.hub.push import HubUpload, make_repository
from skyrl.types import PassingError, UserError

NAME = "lab/sorts-letters"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: what was committed, by path. `broken`: a path whose requests get 500."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories, self.blobs, self.broken, self.sent = {}, {}, "", 0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def tell(self, status, body, **headers):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self):
        hub, data = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        hub.blobs[hashlib.sha256(data).hexdigest()] = data
        hub.sent += len(data)
        self.tell(200, {})

    def do_GET(self):
        self.tell(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    def do_POST(self):
        hub, data = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if hub.broken and hub.broken in self.path:
            return self.tell(500, {"error": "the disk is full"})
        if self.headers.get("Authorization") != "Bearer hf_writes":
            return self.tell(401, {"error": "Invalid username or password."})
        if self.path == "/api/validate-yaml":
            return self.tell(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != "lab":
                return self.tell(403, {"error": "You don't have the rights to create a model under this namespace"})
            if name in hub.repositories:
                return self.tell(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
            hub.repositories[name] = {}
            hub.private = asked.get("visibility", "private" if asked.get("private") else "public")
            return self.tell(200, {"url": f"{hub.url}/{name}", "name": name})
        if "/preupload/" in self.path:
            files = [one["path"] for one in json.loads(data)["files"]]
            modes = [
                {"path": path, "uploadMode": "lfs" if path.endswith("safetensors") else "regular"} for path in files
            ]
            return self.tell(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(data)["objects"]
            for one in objects:
                if one["oid"] not in hub.blobs:
                    one["actions"] = {"upload": {"href": f"{hub.url}/blobs/{one['oid']}"}}
            return self.tell(200, {"transfer": "basic", "objects": objects})
        assert f"/api/models/{NAME}/commit/" in self.path, self.path
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                hub.message = value["summary"]
            elif line["key"] == "file":
                hub.repositories[NAME][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.repositories[NAME][value["path"]] = hub.blobs[value["oid"]]
        oid = "a" * 40
        return self.tell(200, {"commitUrl": f"{hub.url}/{NAME}/commit/{oid}", "commitOid": oid, "success": True})


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", made.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # files by Git LFS, which is plain HTTP
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    yield made
    made.shutdown()
    made.server_close()


def train(folder: Path) -> None:
    more = ["checkpoint.export=true", f"checkpoint.push_to_hub={NAME}", "batch.num_steps=1", "tracking.console=lines"]
    run_loop(folder, *more)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_export_of_a_run_is_on_the_hub(tmp_path, hub, capsys):
    hub.broken = "/commit/"
    train(tmp_path / "sorts")  # the upload fails at its last request; the run does not
    said = capsys.readouterr().out
    assert f"not sent: checkpoint.push_to_hub={NAME}: " in said and "the disk is full" in said
    assert f"hf upload {NAME} {tmp_path / 'sorts/export'}" in said
    exported = files_of(tmp_path / "sorts/export")
    assert hub.repositories == {NAME: {}} and hub.private == "private" and "model.safetensors" in exported
    hub.broken, before = "", hub.sent
    train(tmp_path / "sorts")  # the same command on a finished run: sends what is not there yet
    assert f"hub         {hub.url}/{NAME}/commit/" in capsys.readouterr().out
    assert hub.repositories[NAME] == files_of(tmp_path / "sorts/export") and hub.sent == before > 0
    assert hub.message == "skyrl: sorts, step 1"


def test_who_cannot_write_is_refused_before_the_first_step(tmp_path, hub, monkeypatch):
    for name, words in {"others/model": "rights to create a model", NAME: "Invalid username or password"}.items():
        with pytest.raises(UserError, match=f"checkpoint.push_to_hub={name}: .*{words}") as told:
            make_repository(name, True)
        assert "\n" not in str(told.value)
        monkeypatch.setenv("HF_TOKEN", "hf_reads")
    with pytest.raises(UserError, match="refuses"):
        train(tmp_path / "run")
    assert not (tmp_path / "run/metrics.jsonl").exists() and hub.repositories == {}
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no token; set HF_TOKEN"):
        make_repository(NAME, True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        make_repository(NAME, True)


def test_a_hub_that_does_not_answer_is_a_warning(hub, monkeypatch):
    hub.broken = "/repos/create"
    assert "the disk is full" in make_repository(NAME, False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "refused (http://127.0.0.1:1 gives no answer of use" in make_repository(NAME, False)


def test_a_hub_that_falls_silent_holds_no_gpu(tmp_path, hub, monkeypatch):
    """It takes the connection and never answers, as behind some firewalls."""
    monkeypatch.setattr("skyrl.hub.locate.SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None)
    )  # between tries
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        assert "timed out" in make_repository(NAME, True)
        with pytest.raises(PassingError, match="."):
            download(NAME, ["*.json"])
        told = HubUpload(tmp_path, NAME, "skyrl").wait(60.0)
        assert (
            told is not None and told.startswith(f"not sent: checkpoint.push_to_hub={NAME}: ") and "timed out" in told
        )


@pytest.mark.parametrize(
    "name", ["model", "lab/", "/model", "a/b/c", "lab/x--y", "lab/x.git", "lab/-x", "lab/x-", "lab/ü"]
)
def test_names_that_no_repository_can_have(name):
    with pytest.raises(UserError, match="a repository of the hub is owner/name"):
        check(small_config(f"checkpoint.push_to_hub='{name}'"))
    with pytest.raises(UserError, match="sends the export, which"):
        check(small_config(f"checkpoint.push_to_hub={NAME}", "checkpoint.export=false"))
