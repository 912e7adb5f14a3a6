"""The `tinker` command of the newest release against the server: what it lists, changes, downloads and deletes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from clients import NEWEST, client_environment, drive, release_path
from hub import MODEL
from serving import Server

STEPS = ["create", "tokenizer", "learn", "save", "records"]


class Cli:
    """`tinker --format json <words>` in a folder."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.folder = folder
        self.env = client_environment(server.url, release_path(NEWEST, download=True), HOME=str(folder))

    def __call__(self, *words: str, code: int = 0) -> str:
        command = [sys.executable, "-W", "ignore", "-m", "tinker.cli", "--format", "json", *words]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def json(self, *words: str) -> dict:
        return json.loads(self(*words))


@pytest.mark.tinker
@pytest.mark.timeout(600)
def test_commands(server: Server, hub: Path, tmp_path: Path) -> None:
    facts = drive(NEWEST, server.url, hub, download=True, base_model=MODEL, only=STEPS)
    assert facts["records"]["ok"], facts["log"][-2000:]
    state, run_id = facts["save"]["state_path"], facts["records"]["run"]["training_run_id"]
    cli = Cli(server, tmp_path)

    assert NEWEST in cli("version")
    assert MODEL in cli("model", "list")
    assert run_id in cli("run", "list", "--limit", "0")
    assert MODEL in cli("run", "info", run_id)
    listed = cli("checkpoint", "list", "--run-id", run_id)
    assert state in listed and state.replace("/weights/", "/sampler_weights/") in listed
    assert state in cli("checkpoint", "list", "--limit", "0")
    assert state in cli("checkpoint", "info", state)
    cli("checkpoint", "set-ttl", state, "--ttl", "7200")
    assert "expires_at" in cli("checkpoint", "info", state)
    cli("checkpoint", "set-ttl", state, "--remove")
    cli("checkpoint", "publish", state)
    cli("checkpoint", "unpublish", state)
    cli("billing", "usage", "2026-01-01", "2026-01-02")
    cli("billing", "checkpoint-storage")

    cli("checkpoint", "download", state, "--output", str(tmp_path))
    files = {path.name: path for path in tmp_path.rglob("*") if path.is_file()}
    config = json.loads(files["adapter_config.json"].read_text())
    assert config["r"] == 8 and files["adapter_model.safetensors"].stat().st_size > 1000
    assert "external_weights" not in cli("checkpoint", "list", "--run-id", run_id), "the export was to be deleted"

    cli("checkpoint", "delete", state, "--yes")
    assert state not in cli("checkpoint", "list", "--run-id", run_id)
    told = json.loads(cli("session", "export-trace", run_id.partition(":train:")[0]))
    kinds = {event["name"] for event in json.loads((tmp_path / told["destination"]).read_bytes())["traceEvents"]}
    assert {"TrainRequest runs", "OptimStep waits"} <= kinds
    assert server.alive()
