"""What a hub or the way to it does, as the exit code of the run: what may pass is tried again by a scheduler."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from skyrl.hub.locate import locate, name_for_others
from skyrl.types import PassingError, UserError


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        if not self.server.status:
            return  # the connection is cut
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    made = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize(("status", "code"), [(404, 2), (401, 2), (403, 2), (429, 1), (500, 1), (503, 1), (0, 1)])
def test_a_hub_that_is_busy_or_gone_is_worth_another_try(hub, status, code):
    hub.status = status
    with pytest.raises(UserError, match="model.path=lab/model: no folder .* and the hub gave no model") as told:
        locate("lab/model")
    assert told.value.exit_code == code and "\n" not in str(told.value)


def test_no_way_to_the_hub_may_pass_and_offline_mode_does_not(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(PassingError, match="refused"):
        locate("lab/model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as told:
        locate("lab/model")
    assert told.value.exit_code == 2


def test_others_see_no_path_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab/here").mkdir(parents=True)
    for path, name in {
        "lab/model": "lab/model",
        "tiny": "tiny",
        "lab/here": "here",
        "/home/me/models/x/": "x",
        "~/x.gguf": "x.gguf",
        "runs/sft/export": "sft",
        "../runs/sft/export/": "sft",
        "data/of/mine.jsonl": "mine.jsonl",
        "lab/set:main": "lab/set:main",
    }.items():
        assert name_for_others(path) == name
