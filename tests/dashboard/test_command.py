"""`skyrl-tx dashboard`: what it refuses in one line, and that it lives beside a run and ends with it."""

import re
import socket
import subprocess
import sys
import threading
import urllib.request

import anyio
import pytest
from viewing import client_of, make_run, record

from skyrl.config.load import load_config
from skyrl.config.validation import check
from skyrl.dashboard import board
from skyrl.dashboard.command import dashboard
from skyrl.dashboard.index import RunIndex
from skyrl.tracking.jsonl import to_json
from skyrl.types import UserError
from skyrl.web import beside


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))


def test_mistakes_are_one_line(tmp_path):
    make_run(tmp_path, "one")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for args, said in (
            ([str(tmp_path / "none")], "no folder"),
            ([str(tmp_path), "other"], "other: give one folder, and options as dashboard.option=value"),
            ([str(tmp_path), "dashboard.prot=1"], "dashboard.prot: no such option; did you mean dashboard.port"),
            ([str(tmp_path), "--port", "99999"], "dashboard.port=99999: must be at most 65535"),
            ([str(tmp_path), "--path-prefix", "x/"], "dashboard.path_prefix=x/: must begin with /"),
            ([str(tmp_path), "--prot", "1"], "--prot"),
            ([str(tmp_path), "--port", port], f"dashboard.port={port}: Address already in use; give another"),
        ):
            with pytest.raises(UserError) as caught:
                dashboard(args)
            assert said in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_options_of_the_dashboard_need_it_and_change_nothing_of_a_run():
    with pytest.raises(UserError, match="dashboard.port=1: has an effect only with dashboard.enabled=true"):
        check(load_config(["dashboard.port=1"]))
    on, off = load_config(["dashboard.enabled=true", "dashboard.port=1"]), load_config([])
    assert on.run.name == off.run.name


def test_live_pages_are_told_when_the_run_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "EVENT_SECONDS", 0.05)
    run = make_run(tmp_path, "one")
    index = RunIndex(tmp_path)
    client = client_of(index)
    shared = client.app.state.board

    def change():
        with open(run / "metrics.jsonl", "a") as stream:
            stream.write(to_json(record(6)) + "\n")
        index._refresh(index.entries()[0])
        threading.Timer(0.6, shared.close).start()  # the stream ends then, and with it the request

    threading.Timer(0.2, change).start()
    told = client.get("/runs/one/events")
    assert told.headers["content-type"].startswith("text/event-stream")
    assert told.text.startswith("retry:") and told.text.count("event: changed") == 1
    assert client.get("/runs/none/events").status_code == 404


def test_no_more_pages_are_live_than_the_bound_however_many_ask_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "MAX_STREAMS", 3)
    app = client_of(RunIndex(tmp_path)).app
    shared, statuses, left = app.state.board, [], anyio.Event()
    scope = {"type": "http", "method": "GET", "path": "/events", "query_string": b"", "headers": [], "root_path": ""}

    async def receive():
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.start":
            await anyio.sleep(0)
            statuses.append(message["status"])
            if len(statuses) == 10:
                assert shared.streams == 3
                left.set()

    async def ask_all():
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(app, dict(scope), receive, send)

    anyio.run(ask_all)
    assert sorted(statuses) == [200] * 3 + [503] * 7 and shared.streams == 0


@pytest.mark.slow
def test_it_serves_beside_a_run_and_ends_with_it(tmp_path, monkeypatch):
    make_run(tmp_path / "runs", "one")
    started, popen = [], subprocess.Popen

    def noted(command, **options):
        monkeypatch.setattr(subprocess, "Popen", popen)
        started.append(popen(command, stdout=subprocess.PIPE, text=True, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", noted)
    cfg = load_config(["dashboard.enabled=true", "dashboard.port=0"])
    with beside.dashboard_beside(cfg.dashboard, tmp_path / "runs"):
        line = started[0].stdout.readline()
        url = re.search(r"http://[^\s;/]*", line)[0]
        assert urllib.request.urlopen(f"{url}/login", timeout=20).status == 200
        again = [sys.executable, "-m", "skyrl", "dashboard", str(tmp_path / "runs"), "--port", url.rpartition(":")[2]]
        second = subprocess.run(again, capture_output=True, text=True, timeout=120)
        assert second.returncode == 2 and len(second.stderr.splitlines()) == 1 and "already in use" in second.stderr
    assert started[0].wait(timeout=60) == 0
