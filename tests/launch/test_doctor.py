"""skyrl-tx doctor: a whole report of this machine, and what it says when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl.launch.doctor import Finding, check_gpus, collective, cpus, disk, doctor, file_system, network, text
from skyrl.launch.machine import Gpu
from skyrl.types import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ranks
def test_the_whole_report(tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        [sys.executable, "-m", "skyrl.cli", "doctor", str(tmp_path / "runs"), "--json"],
        env={**clean, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    report = json.loads(done.stdout)
    found = {finding["check"]: finding for finding in report["findings"]}
    assert done.returncode == (0 if report["ok"] else 1) and report["seconds"] < 60
    for check in ("python", "torch", "gpus", "cpus", "memory", "shared memory", "open files", "disk", "gloo", "clock"):
        assert found[check]["status"] in ("ok", "warn"), found[check]
    assert "synced write" in found["disk speed"]["seen"] and "a sum of 4 MiB" in found["gloo"]["seen"]
    assert all(finding["todo"] for finding in report["findings"] if finding["status"] != "ok")
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (found,) = disk(tmp_path / "file" / "runs" if os.geteuid() else Path("/proc/1/runs"))
    assert found.status == "fail" and "give" in found.todo


def test_an_interface_that_is_not_there(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    found = {finding.check: finding for finding in network()}
    assert found["interface chosen"].status == "fail" and "NCCL_SOCKET_IFNAME=ib7" in found["interface chosen"].seen
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    assert "interface chosen" not in {finding.check for finding in network()}


@pytest.mark.slow
@pytest.mark.ranks
def test_a_collective_that_fails(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    (found,) = [finding for finding in collective() if finding.check == "gloo"]
    assert found.status == "fail" and "ib7" in found.seen and "GLOO_SOCKET_IFNAME" in found.todo


def test_gpus_that_are_missing_different_or_wrong():
    told = {"version": "2.13.0", "cuda": "13.0", "nccl": "2.28.0", "count": 2, "errors": [0.01, 0.02]}
    one, other = Gpu(0, "a", "H100", 81920), Gpu(1, "b", "A100", 40960)
    assert [finding.status for finding in check_gpus([one, one], 2, told)] == ["ok", "ok"]
    assert "different GPUs" in list(check_gpus([one, other], 2, told))[1].todo
    wrong = list(check_gpus([one, one], 2, {**told, "errors": [0.01, float("nan")]}))
    assert wrong[1].seen.endswith("wrong products on 1")
    missing = list(check_gpus([one, other], 2, {**told, "cuda": None, "count": 0}))
    assert missing[0].status == "fail" and "sees 0 of 2 GPUs" in missing[0].seen
    refused = "strategy.device=auto: this machine has GPUs (x), but torch is built for the CPU alone; install another"
    (same,) = check_gpus([one, other], 2, {**told, "refused": refused})  # what a run would say
    assert (same.status, same.todo) == ("fail", "install another") and "for the CPU alone" in same.seen
    assert next(check_gpus([one, one], 2, {**told, "notes": ["slower"]})).todo == "slower"


def test_cores(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    (found,) = cpus()
    assert found.status == "warn" and "OMP_NUM_THREADS" in found.todo
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (found,) = cpus()
    assert found.status == "ok" or "cgroup" in found.seen


def test_text_and_mistakes(tmp_path):
    shown = ["warn  interface chosen  seen", "                        -> do", "ok    a                 b"]
    assert text([Finding("interface chosen", "warn", "seen", "do"), Finding("a", "ok", "b")]).splitlines() == shown
    assert file_system(tmp_path) != ""
    with pytest.raises(UserError, match="unrecognized arguments: --jsn"):
        doctor(["--jsn"])
