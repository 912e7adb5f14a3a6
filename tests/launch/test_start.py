"""Real starts: over two "hosts" of this machine, stopped by a signal, and finished on one node."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launcher import LETTERS, environment, lines_in

pytestmark = pytest.mark.ranks
# Instead of ssh: another session of this machine, with the line that ssh would run.
HERE = "sh -c"
SLOWER = ["env.options.sleep=0.05"]


def start(place: Path, *flags: str, options=()) -> subprocess.Popen:
    command = [sys.executable, "-m", "skyrl.cli", "launch", *flags, "--", "train", *LETTERS, "run.dir=run", *options]
    clean = {name: value for name, value in environment().items() if not name.startswith("SLURM_")}
    return subprocess.Popen(
        command, cwd=place, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def wait_for(condition, seconds, process):
    until = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(process.communicate())
        time.sleep(0.05)


def stop_on_two_hosts(tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    two = ("--nproc", "1", "--hosts", "localhost,127.0.0.1", "--rsh", f"{HERE} {{line}}")
    job = start(tmp_path, *two, options=SLOWER)
    wait_for(lambda: lines_in(metrics) >= 3, 120, job)
    job.send_signal(signal.SIGUSR1)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 75, err
    assert "stopped by SIGUSR1" in out and (tmp_path / "run" / "requeue").exists()
    assert err.count("--node-rank=") == 2 and err.count("skyrl.launch.torchrun") == 2


@pytest.mark.slow
def test_two_hosts_stop_at_a_signal(tmp_path):
    stop_on_two_hosts(tmp_path)


@pytest.mark.slow
def test_one_node_goes_on_where_two_hosts_stopped(tmp_path):
    stop_on_two_hosts(tmp_path)
    job = start(tmp_path, "--nproc", "2", options=SLOWER)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0 and "resuming from" in out and "done: held-out" in out, err
    assert lines_in(tmp_path / "run" / "metrics.jsonl") == 10 and not (tmp_path / "run" / "requeue").exists()


def test_a_signal_before_there_is_anything_to_save(tmp_path):
    job = start(tmp_path, "--nproc", "2")
    wait_for(lambda: len(ranks_of(job.pid)) == 2, 60, job)
    job.terminate()
    out, err = job.communicate(timeout=60)
    assert job.returncode == 75 and not (tmp_path / "run" / "metrics.jsonl").exists(), err


def ranks_of(launcher: int) -> list[int]:
    from skyrl.launch.processes import ranks_below

    below = [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if (entry / "stat").exists() and (entry / "stat").read_text().rpartition(")")[2].split()[1] == str(launcher)
    ]
    return [rank for pid in below for rank in ranks_below(pid)]
