"""The run folder: one live run at a time, its record of options and versions, metrics cut back to a checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from skyrl.run_dir import RunFolder, config_changes, cut_metrics, drop_rollouts
from skyrl.types import UserError

HOLDER = """
import sys, time
from pathlib import Path
from skyrl.run_dir import RunFolder
RunFolder(Path(sys.argv[1]), 0).open({"seed": 1})
print("held", flush=True)
time.sleep(60)
"""


def hold(path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_second_live_run_is_refused_and_a_killed_one_is_no_obstacle(tmp_path):
    process = hold(tmp_path / "run")
    try:
        with pytest.raises(UserError) as caught:
            RunFolder(tmp_path / "run", 0).open({"seed": 1})
        text = str(caught.value)
        assert f"process {process.pid} on {os.uname().nodename}" in text and "run.dir" in text and "\n" not in text
        assert RunFolder(tmp_path / "run", 1).open({"seed": 1}) == []  # other ranks of a run do not lock
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    folder = RunFolder(tmp_path / "run", 0)
    folder.open({"seed": 1})
    assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
    folder.close()
    RunFolder(tmp_path / "run", 0).open({"seed": 1})


def test_forked_child_does_not_hold_the_lock(tmp_path):
    folder = RunFolder(tmp_path, 0)
    folder.open({})
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b".")
        time.sleep(30)
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"."
        with pytest.raises(UserError, match="in use"):  # the child has not freed it either
            RunFolder(tmp_path, 0).open({})
        folder.close()
        RunFolder(tmp_path, 0).open({})
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_config_and_versions_are_kept_and_differences_told(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b", 0)
    config = {"seed": 1, "optim": {"lr": 1e-5}, "stop": ["x"]}
    assert folder.open(config, command=["train.py", "seed=1"]) == []
    folder.close()
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == config
    assert folder.open(config) == []
    folder.close()
    assert not (folder.path / "config.1.yaml").exists()
    (line,) = folder.open({"seed": 2, "optim": {"lr": 3e-5}, "stop": ["x"]})
    folder.close()
    assert "seed: 1 -> 2; optim.lr: 1e-05 -> 3e-05" in line and "stop" not in line
    assert yaml.safe_load((folder.path / "config.1.yaml").read_text()) == config
    assert yaml.safe_load((folder.path / "config.yaml").read_text())["seed"] == 2
    starts = json.loads((folder.path / "versions.json").read_text())
    assert len(starts) == 3 and starts[0]["command"] == ["train.py", "seed=1"]
    assert starts[0]["torch"] and starts[0]["python"] == sys.version.split()[0]


def test_config_changes_names_added_and_removed_values():
    assert config_changes({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": None}}) == [
        "a.d: (absent) -> None",
        "a.c: 2 -> (absent)",
    ]


def test_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run.dir=.*cannot be used") as caught:
        RunFolder(tmp_path / "file" / "run", 0).open({})
    assert "\n" not in str(caught.value)


def test_metrics_are_cut_back_to_the_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1}\n', b'{"step": 2}\n', b'{"step": 3}\n', b'{"st']
    path.write_bytes(b"".join(lines))
    assert cut_metrics(path, 24) == []
    assert path.read_bytes() == b"".join(lines[:2])
    assert cut_metrics(path, 24) == []
    (line,) = cut_metrics(path, 36)
    assert "missing" in line and path.read_bytes() == b"".join(lines[:2])
    with pytest.raises(UserError, match="not the end of a line"):
        cut_metrics(path, 5)
    assert path.read_bytes() == b"".join(lines[:2])
    assert cut_metrics(path, 0) == [] and path.read_bytes() == b""
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_rollouts_of_later_steps_are_dropped(tmp_path):
    for name in (
        "000010-r0.jsonl",
        "000020-r0.jsonl",
        "000020-r1.jsonl",
        "note-r0.jsonl",
        "000030.txt",
        "eval-000011-r0.jsonl",
    ):
        (tmp_path / name).write_text("")
    drop_rollouts(tmp_path, 10)
    assert sorted(os.listdir(tmp_path)) == ["000010-r0.jsonl", "000030.txt", "note-r0.jsonl"]
