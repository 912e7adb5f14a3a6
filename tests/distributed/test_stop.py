"""Deadlines from options and from Slurm, and what a signal means for the exit code."""

import time
from datetime import datetime, timedelta, timezone

import pytest

from skyrl.config.schema import RunFolderConfig
from skyrl.distributed.stop import StopRequest, save_by
from skyrl.types import UserError


def left(text="", margin=10.0, environment=None):
    found = save_by(RunFolderConfig(must_save_by=text, save_margin_seconds=margin), environment or {})
    return None if found is None else found - time.monotonic()


def test_seconds_times_and_the_end_of_a_job():
    assert left() is None and left("never", environment={"SLURM_JOB_END_TIME": str(int(time.time()) + 100)}) is None
    assert left("100") == pytest.approx(90, abs=1) and left("+100", margin=0.0) == pytest.approx(100, abs=1)
    later = datetime.now(timezone.utc) + timedelta(seconds=100)
    assert left(later.isoformat()) == pytest.approx(90, abs=1)
    assert left(later.strftime("%Y-%m-%dT%H:%M:%SZ")) == pytest.approx(90, abs=2)
    local = (datetime.now() + timedelta(seconds=100)).isoformat(timespec="seconds")
    assert left(local) == pytest.approx(90, abs=2)
    job = {"SLURM_JOB_END_TIME": str(int(time.time()) + 60)}
    assert left(environment=job) == pytest.approx(50, abs=2)
    assert left("+100", environment=job) == pytest.approx(90, abs=2)  # what is typed counts
    assert left(environment={"SLURM_JOB_END_TIME": "4102444800"}) is None  # a job without a limit


def test_a_wall_clock_that_is_set_later_changes_nothing(monkeypatch):
    found = save_by(RunFolderConfig(must_save_by="+100", save_margin_seconds=0.0), {})
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert found - time.monotonic() == pytest.approx(100, abs=1)


@pytest.mark.parametrize("text", ["tomorrow", "2026-13-01", "1e400s"])
def test_a_time_that_cannot_be_read_is_refused(text):
    with pytest.raises(UserError, match=f"run.must_save_by={text}: neither a time like"):
        left(text)


def test_no_time_to_work_is_refused_unless_torchrun_has_started_again():
    with pytest.raises(UserError, match=r"run.must_save_by=\+5: 5 s from now, of which run.save_margin_seconds=10"):
        left("+5")
    assert left("+5", environment={"TORCHELASTIC_RESTART_COUNT": "1"}) == pytest.approx(0, abs=1)
    assert StopRequest("deadline", 0, "generation", 3).exit_code == 75


def test_a_ctrl_c_is_no_reason_to_queue_the_job_again():
    for reason, code in (("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130), ("stop file", 75)):
        assert StopRequest(reason, 3, "training", 7).exit_code == code
