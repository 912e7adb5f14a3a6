"""The watcher in one process: signals, forked children, the stop file, and what it leaves behind."""

import multiprocessing
import os
import signal
import socket
import subprocess
import time

import pytest
import torch

from skyrl.distributed import hang_monitor, phases
from skyrl.distributed.init import World
from skyrl.distributed.stop import SIGNALS, StopRequest, heard_signals
from skyrl.distributed.watchdog import Watchdog
from skyrl.run_dir import mark_stop


@pytest.fixture
def hangup():
    """SIGHUP as a terminal gives it, also where the tests themselves run under nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def watch(tmp_path, hangup):
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    one = Watchdog(world, tmp_path, hang_seconds=0.0, patience=0.0, save_by=None)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    one.start()
    phases.enter("training", 3)
    yield one
    one.close()
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.set_wakeup_fd(-1) == -1


def soon(condition, seconds=3.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP", "SIGINT"])
def test_a_signal_is_a_request(watch, name):
    code = 130 if name == "SIGINT" else 75
    assert not watch.stop_requested()
    os.kill(os.getpid(), getattr(signal, name))
    assert soon(watch.stop_requested) and watch.stop_request.reason == name and watch.stop_request.exit_code == code
    assert (watch.stop_request.rank, watch.stop_request.phase, watch.stop_request.step) == (0, "training", 3)
    os.kill(os.getpid(), getattr(signal, name))  # again, within what torchrun may repeat
    time.sleep(0.3)
    assert watch.stop_request.reason == name


def test_what_nohup_ignores_stays_ignored(hangup):
    assert set(heard_signals()) == set(SIGNALS)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert set(SIGNALS) - set(heard_signals()) == {signal.SIGHUP}


def _sleep():
    time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_dies_of_signals_and_does_not_speak_for_us(watch):
    child = multiprocessing.get_context("fork").Process(target=_sleep)
    child.start()
    time.sleep(0.2)
    child.terminate()
    child.join(5)
    assert child.exitcode == -signal.SIGTERM
    time.sleep(0.3)
    assert not watch.stop_requested()


def test_a_stop_file_counts_once_the_folder_is_ours(watch, tmp_path):
    (tmp_path / "stop").touch()
    time.sleep(1.3)
    assert not watch.stop_requested()
    watch.claim()
    assert soon(watch.stop_requested) and watch.stop_request.reason == "stop file"


def test_after_an_error_signals_are_python_s_again_and_the_bundle_can_be_written(watch, tmp_path):
    watch.claim()
    watch.disarm()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    place, details = watch.crash_report("what went wrong\nand how")
    (bundle,) = tmp_path.glob("crash-*")
    assert place == " in training, step 3" and str(bundle) in details
    assert "what went wrong\nand how" in (bundle / "report.txt").read_text()
    assert "test_watch.py" in (bundle / "stacks" / "rank-0.txt").read_text()


def test_a_bundle_that_cannot_be_written_does_not_hide_the_error(watch, tmp_path):
    watch.hang_monitor.folder = tmp_path / "file"
    watch.hang_monitor.folder.write_text("in the way")
    watch.claim()
    assert "no crash bundle: " in watch.crash_report("what went wrong")[1]


def test_the_mark_names_its_launcher(tmp_path):
    mark_stop(tmp_path, "SIGTERM", StopRequest("SIGTERM", 0, "training", 3).exit_code)
    assert f'"launcher": {os.getppid()}' in (tmp_path / "requeue").read_text()


def test_only_a_process_of_the_job_is_killed():
    """A number may be another process's by now, or in another container of the same host name."""
    with subprocess.Popen(["sleep", "60"]) as stranger:
        status = {"host": socket.gethostname(), "process": stranger.pid, "started": "1"}
        hang_monitor._kill(status, signal.SIGKILL)
        hang_monitor._kill(
            {**status, "host": "elsewhere", "started": hang_monitor._started(stranger.pid)}, signal.SIGKILL
        )
        assert stranger.poll() is None
        hang_monitor._kill({**status, "started": hang_monitor._started(stranger.pid)}, signal.SIGKILL)
        assert stranger.wait(10) == -signal.SIGKILL
    hang_monitor._kill({**status, "started": ""}, signal.SIGKILL)  # gone
