"""Stops, restarts and hangs under torchrun itself, which signals, kills and restarts ranks in its own way."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launcher import LETTERS, environment, lines_in, torchrun_command
from test_launchers import processes_of, wait_for

from skyrl.run_dir import read_metrics
from skyrl.tracking.base import without_wall_clock

pytestmark = pytest.mark.ranks
RUN = [*LETTERS, "run.dir=run", "plugins=[letters,pace]"]


def records(run):
    return [without_wall_clock(record) for record in read_metrics(run / "metrics.jsonl")]


def start(place: Path, *options: str, flags=(), **env: str) -> subprocess.Popen:
    command = torchrun_command(2)
    at = command.index("-m", 2)
    return subprocess.Popen(
        [*command[:at], *flags, *command[at:], *RUN, *options],
        cwd=place,
        env=environment(**env),
        stdout=(place / "stdout").open("a"),
        stderr=(place / "stderr").open("a"),
        start_new_session=True,
    )


def ranks_of(place: Path, job: subprocess.Popen) -> dict[int, int]:
    """rank -> process id."""
    found = {}
    for pid in processes_of(place):
        for entry in (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK=") and pid != job.pid:
                found[int(entry[5:])] = pid
    return found


def stops(place):
    return [json.loads(line) for line in (place / "run" / "stops.jsonl").read_text().splitlines()]


def in_phase(place, rank=1):
    assert wait_for((place / f"in-{rank}").exists, 90), (place / "stderr").read_text()
    (place / f"in-{rank}").unlink()


@pytest.mark.slow
def test_torchrun_passes_sigterm_on_and_again_while_saving(whole, tmp_path):
    job = start(tmp_path, SKYRL_PACE="generation:7:0.4")
    in_phase(tmp_path)
    ranks = ranks_of(tmp_path, job)
    job.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    for _ in range(8):  # Slurm signals every process of the step, and does so again
        time.sleep(0.1)
        for pid in ranks.values():
            if pid in processes_of(tmp_path):
                os.kill(pid, signal.SIGTERM)
    assert job.wait(40) != 0 and time.monotonic() - asked < 20
    (stop,) = stops(tmp_path)
    assert stop["reason"] == "SIGTERM" and stop["phase"] == "generation" and stop["seconds"] < 10
    text = (tmp_path / "stderr").read_text()
    assert "skyrl: error" not in text and (tmp_path / "run" / "requeue").exists()
    assert lines_in(tmp_path / "run" / "metrics.jsonl") == 6 and wait_for(lambda: processes_of(tmp_path) == [], 5)
    again = start(tmp_path)
    assert again.wait(90) == 0 and records(tmp_path / "run") == records(whole)


@pytest.mark.slow
def test_torchrun_restarts_all_ranks_from_the_last_checkpoint(whole, tmp_path):
    """kill -9 of a rank: one command, a second attempt, the numbers of the uninterrupted run. A stop is no failure."""
    job = start(tmp_path, flags=["--max-restarts=3"], SKYRL_PACE="generation:8:0.4")
    in_phase(tmp_path)
    time.sleep(1.0)  # the watchdog tells the others of a new phase within 0.1 s
    os.kill(ranks_of(tmp_path, job)[1], signal.SIGKILL)
    assert wait_for(lambda: "resuming from" in (tmp_path / "stdout").read_text(), 90)
    (tmp_path / "in-1").unlink(missing_ok=True)
    in_phase(tmp_path)  # the second attempt is there again
    text = (tmp_path / "stderr").read_text()
    assert "rank 1 (process" in text and "ended without a message (rank 1 was in generation, step 8)" in text
    os.kill(ranks_of(tmp_path, job)[0], signal.SIGUSR1)
    assert job.wait(90) != 0  # the restarts that are left end at once
    assert [stop["reason"] for stop in stops(tmp_path)] == ["SIGUSR1"] and (tmp_path / "run" / "requeue").exists()
    assert (tmp_path / "stdout").read_text().count("resuming from") == 1
    (tmp_path / "in-1").unlink(missing_ok=True)  # of a further step of the generation that was stopped
    again = start(tmp_path, flags=["--max-restarts=3"], SKYRL_PACE="generation:9:0.4")
    in_phase(tmp_path)
    os.kill(ranks_of(tmp_path, again)[0], signal.SIGKILL)
    assert again.wait(120) == 0, (tmp_path / "stderr").read_text()
    assert (tmp_path / "stdout").read_text().count("resuming from") == 3
    assert records(tmp_path / "run") == records(whole)


@pytest.mark.slow
def test_the_line_about_a_lost_rank_comes_however_long_its_bundle_takes(tmp_path):
    """torchrun's SIGTERM makes a thread tell it; the main thread, which sees the lost rank too, must not end first."""
    job = start(tmp_path, "plugins=[letters,pace,slow_bundle]", SKYRL_PACE="generation:8:0.4")
    in_phase(tmp_path)
    time.sleep(1.0)  # the watchdog tells the others of a new phase within 0.1 s
    os.kill(ranks_of(tmp_path, job)[1], signal.SIGKILL)
    assert job.wait(60) != 0
    text = (tmp_path / "stderr").read_text()
    assert "ended without a message (rank 1 was in generation, step 8)" in text and "details in" in text


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_within_a_minute(tmp_path):
    job = start(tmp_path, "run.hang_seconds=4", SKYRL_PACE="training:7:1")
    in_phase(tmp_path)
    time.sleep(0.4)
    os.kill(ranks_of(tmp_path, job)[1], signal.SIGSTOP)
    stopped = time.monotonic()
    assert job.wait(60) != 0
    seconds = time.monotonic() - stopped
    assert seconds < 4 + 15  # not torchrun's 30 s more for a process that does not hear it
    text = (tmp_path / "stderr").read_text()
    assert "does not answer any more" in text and "its process is stopped (SIGSTOP)" in text
    assert "does not answer any more" in text.rpartition("Root Cause")[2]  # torchrun's last words are ours
