"""What a server answers before its model is loaded, and what waits for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import pytest
from small import service_options
from system.launcher import environment, free_port

from skyrl.config.load import as_overrides, load_config
from skyrl.distributed.init import shutdown
from skyrl.service import app, routes_work, server
from skyrl.service.frontend import open_door
from skyrl.service.server import open_service
from skyrl.types import UserError

LORA = {"rank": 4}


def post(http: httpx.Client, path: str, **body: Any) -> httpx.Response:
    return http.post(f"/api/v1/{path}", json=body)


def test_records_are_answered_before_the_model_is_loaded_and_work_waits_for_it(tmp_path, monkeypatch):
    cfg = load_config(as_overrides(service_options(tmp_path, "service.port=0")), mode="serve")
    door = open_door(cfg).result()
    found: dict[str, httpx.Response] = {}
    with httpx.Client(base_url=door.server.url, timeout=60) as http:
        try:
            assert http.get("/api/v1/healthz").json() == {"status": "ok"}
            session = post(http, "create_session", tags=["early"]).json()["session_id"]
            assert post(http, "session_heartbeat", session_id=session).status_code == 200
            assert http.get("/api/v1/sessions").json()["sessions"] == [session]
            made = post(http, "create_model", session_id=session, model_seq_id=0, base_model="tiny", lora_config=LORA)
            monkeypatch.setattr(routes_work, "POLL_SECONDS", 0.1)
            waits = post(http, "retrieve_future", request_id=made.json()["request_id"])
            assert waits.status_code == 408 and "being loaded" in waits.json()["queue_state_reason"]
            refused = post(
                http, "create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model="x"
            )
            assert refused.status_code == 400 and "not served here; there are: tiny" in refused.text

            monkeypatch.setattr(app, "LOAD_SECONDS", 0.1)
            ask = {"model": "tiny", "prompt": "1+1=", "max_tokens": 2}
            for early in (http.get("/api/v1/get_server_capabilities"), http.post("/v1/completions", json=ask)):
                assert early.status_code == 503 and early.headers["retry-after"] == "1"
                assert "the model is being loaded; ask again" in early.text
            assert http.get("/api/v1/readyz").status_code == 503
            monkeypatch.undo()

            def wait() -> None:
                with httpx.Client(base_url=door.server.url, timeout=60) as other:
                    found["facts"] = other.get("/api/v1/get_server_capabilities")
                    found["text"] = other.post("/v1/completions", json=ask)

            waiting = threading.Thread(target=wait)
            waiting.start()
            service = open_service(cfg, lambda: door.frontend)
            assert service is not None
            worker = threading.Thread(target=service.worker.run)
            worker.start()
            waiting.join(60)
            assert found["facts"].json()["supported_models"][0]["max_context_length"] == service.engine.max_row_tokens
            assert found["text"].json()["usage"]["completion_tokens"] == 2, found["text"].text
            assert http.get("/api/v1/readyz").json() == {"status": "ok"}
            done = post(http, "retrieve_future", request_id=made.json()["request_id"])
            assert done.json() == {"type": "create_model", "model_id": f"{session}:train:0"}
            service.worker.stop("the end")
            worker.join(60)
        finally:
            door.close()
            shutdown()


def serve(folder: Path, *options: str, ranks: int, launcher: bool = False) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    small = [f"{name}={value}" for name, value in service_options(folder / "state", *options).items()]
    command = [sys.executable, *(torchrun if launcher or ranks > 1 else ()), "-m", "skyrl.serve", *small]
    return subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_address_in_use_is_one_line_on_any_number_of_ranks(ranks, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = serve(tmp_path, f"service.port={port}", ranks=ranks)
        _, told = process.communicate(timeout=120)
    lines = [line for line in told.splitlines() if line.startswith("skyrl: error")]
    assert len(lines) == 1 and f"service.port={port}" in lines[0] and "Traceback" not in lines[0], told
    assert process.returncode == 2


def test_a_door_that_cannot_open_is_told_before_the_weights_are_loaded(tmp_path, monkeypatch):
    """With several ranks all raise it together, which needs their meeting but not minutes of loading."""
    cfg = load_config(as_overrides(service_options(tmp_path, "service.port=0")), mode="serve")
    door: Future[Any] = Future()
    door.set_exception(UserError("the address is in use"))
    monkeypatch.setattr(server, "make_plan", lambda *args, **more: pytest.fail("the weights are loaded"))
    with pytest.raises(UserError, match="in use"):
        server.serve(cfg, door)
    shutdown()


def test_weights_that_cannot_be_loaded_close_the_door(tmp_path):
    cfg = load_config(as_overrides(service_options(tmp_path, "service.port=0")), mode="serve")
    door = open_door(cfg)
    with pytest.raises(UserError, match="no room"), pytest.MonkeyPatch.context() as patch:

        def refuse(*args: Any, **more: Any) -> Any:
            raise UserError("no room")

        patch.setattr(server, "make_plan", refuse)
        server.serve(cfg, door)
    shutdown()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{door.result().server.url}/api/v1/healthz")
    open_door(cfg).result().close()  # the folder is free for another server


@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "sent"), [(2, signal.SIGTERM), (2, signal.SIGKILL), (1, signal.SIGKILL)])
def test_a_signal_to_torchrun_while_the_model_is_loaded_ends_the_server_at_once(ranks, sent, tmp_path):
    """A rank that outlived it would hold the address and the folder, and answer the next server's clients."""
    port = free_port()
    process = serve(tmp_path, f"service.port={port}", ranks=ranks, launcher=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            httpx.get(f"http://127.0.0.1:{port}/api/v1/healthz", timeout=5)
            break
        except httpx.HTTPError:
            time.sleep(0.02)
    os.kill(process.pid, sent)
    start = time.monotonic()
    _, told = process.communicate(timeout=60)
    assert time.monotonic() - start < 10 and "Traceback" not in told, told  # all ranks have let go of stderr
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/api/v1/healthz")


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_loading_serving_and_the_end_are_told_once(ranks, tmp_path):
    """Weights may take minutes to load, and a stopping server may have work in hand; silence says neither."""
    port = free_port()
    process = serve(tmp_path, f"service.port={port}", ranks=ranks)
    told = ""
    while "turns end" not in told and (line := process.stderr.readline()):
        told += line
    process.send_signal(signal.SIGTERM)
    told += process.communicate(timeout=60)[1]
    said = [line for line in told.splitlines() if line.startswith("skyrl: ")]
    starts = [" ".join(line.split()[:2]).rstrip(";") for line in said]
    assert starts == ["skyrl: loading", "skyrl: serving", "skyrl: clients:", "skyrl: turns", "skyrl: stopped"], told
    assert said[0].endswith(f"door: http://127.0.0.1:{port}")
