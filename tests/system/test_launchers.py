"""Under real torchrun: what a user sees when a rank fails, is killed, or the launcher itself dies."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launcher import LETTERS, environment, lines_in, torchrun, torchrun_command

from skyrl.checkpoint.folder import list_checkpoints
from skyrl.planner.device import torch_release

pytestmark = pytest.mark.ranks


def processes_of(place: Path) -> list[int]:
    """Living processes that were started in this folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve() == place and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(condition, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def start(place: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*torchrun_command(2), *LETTERS, *options],
        cwd=place,
        env=environment(),
        stdout=(place / "stdout").open("w"),
        stderr=(place / "stderr").open("w"),
        start_new_session=True,
    )


def test_a_reward_that_raises_on_rank_1(tmp_path):
    done = torchrun(*LETTERS, "env.options.trouble=raise", "env.options.rank=1", "run.dir=run", cwd=tmp_path)
    assert done.code != 0
    assert len(done.errors) == 1 and "rank 1: environment letters.step" in done.errors[0]
    # Where the installed skyrl does not keep torchrun quiet (launch/torchrun.py), its report ends with our line.
    report = done.stderr.rpartition("Root Cause")[2]
    assert "raised KeyError: 'no such answer'" in report and len(report.splitlines()) <= 12
    before = done.stderr.partition("Traceback")[0]
    assert len(before.splitlines()) <= 6 and processes_of(tmp_path) == []


def test_what_is_killed_ends_the_job_and_the_same_command_goes_on(warm, tmp_path):
    """A rank, then the launcher itself, which leaves no orphans."""
    metrics, same = tmp_path / "run" / "metrics.jsonl", ("run.dir=run", "env.options.sleep=0.05")
    endless = (*same, "batch.num_steps=1000")
    job = start(tmp_path, *endless)
    assert wait_for(lambda: lines_in(metrics) >= 5, 120)
    ranks = [pid for pid in processes_of(tmp_path) if pid != job.pid]
    env = {pid: (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0") for pid in ranks}
    (victim,) = [pid for pid in ranks if b"RANK=1" in env[pid]]
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert job.wait(30) != 0 and time.monotonic() - killed < 30
    lines = (tmp_path / "stderr").read_text().splitlines()
    told = [line for line in lines if line.startswith("skyrl: error:")]
    most = 1 if torch_release() >= (2, 8) else 2  # torchrun of 2.7 asks no handler of ours, and tells it once more
    assert 1 <= len(told) <= most and f"rank 1 (process {victim}) ended without a message" in told[0]
    assert not any("gloo" in line for line in lines) and wait_for(lambda: processes_of(tmp_path) == [], 5)
    assert list_checkpoints(tmp_path / "run" / "checkpoints")
    job = start(tmp_path, *endless)
    assert wait_for(lambda: lines_in(metrics) >= 7, 120)
    assert len(processes_of(tmp_path)) >= 3
    job.kill()
    job.wait()
    assert wait_for(lambda: processes_of(tmp_path) == [], 10)
    told = (tmp_path / "stdout").read_text()
    assert (tmp_path / "stderr").read_text() == "" and "resuming from" in told
    assert [line for line in told.splitlines() if len(line) > 110 and not line.startswith(("advisory ", "run  "))] == []
    longer = lines_in(metrics)
    done = warm.run(*LETTERS, *same, f"batch.num_steps={longer}", cwd=tmp_path, ranks=2)
    assert done.code == 0 and done.stderr == "" and "resuming from" in done.stdout, done.stderr
    assert lines_in(metrics) == longer + 4
