"""Signals to a program whose leader ends the job: who hears of them, and which torchrun is ended."""

import os
import signal
import subprocess
import sys
from threading import Event

import psutil
import pytest
import torch.distributed as dist

from skyrl.distributed import env, failure
from skyrl.distributed.stop import OF_BATCH, SIGNALS
from skyrl.launch import rank

RANK = "from skyrl.distributed.env import end_launcher; end_launcher(); print('left alone')"
STARTER = """
import os, subprocess, sys
os.environ.update({})
sys.exit(subprocess.run([sys.executable, "-c", {!r}]).returncode)
"""
LOADING = """
import time
from skyrl.serve import leave_at_signals
leave_at_signals()
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    "given, added, code",
    [
        ({}, {"TORCHELASTIC_ERROR_FILE": "a"}, -signal.SIGKILL),  # torchrun
        ({"TORCHELASTIC_ERROR_FILE": "a"}, {"TORCHELASTIC_ERROR_FILE": "b"}, -signal.SIGKILL),  # torchrun below another
        ({"TORCHELASTIC_ERROR_FILE": "a"}, {"PATH_TO": "torch"}, 0),  # a script below torchrun, with us below it
        ({}, {}, 0),
        ({}, {"TORCHELASTIC_ERROR_FILE": "a", env.LAUNCHED: "x"}, 0),  # torchrun below skyrl-tx launch
        # a torchrun that launch/torchrun.py keeps quiet: of this machine alone, and of several
        ({}, {"TORCHELASTIC_ERROR_FILE": "a", env.EXIT_FILE: "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, 0),
        (
            {},
            {"TORCHELASTIC_ERROR_FILE": "a", env.EXIT_FILE: "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"},
            -signal.SIGKILL,
        ),
    ],
)
def test_only_the_torchrun_that_started_us_is_ended(given, added, code):
    around = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "SKYRL_"))}
    program = STARTER.format(added, RANK)
    done = subprocess.run([sys.executable, "-c", program, "torch"], env={**around, **given}, capture_output=True)
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize("launcher", ["gone", "not reaped", "lives"])
@pytest.mark.parametrize("leads", [True, False])
def test_a_rank_whose_torchrun_was_killed_before_it_could_ask_ends(launcher, leads, tmp_path):
    """Without a parent that could end, it would hold an address, and answer clients, for ever. What a rank left behind
    in a session of another stays."""
    with subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE) as ended:
        ended.stdout.read()
        if launcher == "gone":
            ended.wait()
        (tmp_path / env.PID_FILE).write_text(str(os.getpid() if launcher == "lives" else ended.pid))
        program = "from skyrl.distributed.env import end_with_launcher; end_with_launcher()"
        given = {**os.environ, env.ERROR_FILE: "a", env.EXIT_FILE: str(tmp_path / "code")}
        done = subprocess.run([sys.executable, "-c", program], env=given, start_new_session=leads, capture_output=True)
    assert done.returncode == (-signal.SIGKILL if leads and launcher != "lives" else 0), done.stderr


def test_who_takes_in_orphans_is_no_torchrun(monkeypatch):
    """It has no error file either; a systemd of the same person would be killed with all that runs below it."""
    with subprocess.Popen(["sleep", "60"]) as systemd:
        monkeypatch.setattr(env.os, "getppid", lambda: systemd.pid)
        monkeypatch.setenv(env.ERROR_FILE, "a")
        env.end_launcher()
        assert psutil.Process(systemd.pid).is_running()
        systemd.terminate()
        assert systemd.wait() == -signal.SIGTERM


@pytest.fixture
def signals(monkeypatch):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(-1)
    monkeypatch.setattr(failure, "_at_the_end", [])
    yield
    signal.set_wakeup_fd(wakeup)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", OF_BATCH)
@pytest.mark.parametrize("leader", [True, False])
def test_a_server_that_a_batch_system_stops_is_to_be_queued_again(signals, number, leader):
    """Its own handlers come after the launcher's, which has to know of the signal for its exit code 75."""
    signal.signal(number, signal.SIG_DFL)
    asked, stopped = rank._listen("serve"), Event()
    if leader:
        failure.signals_stop(stopped.set)
    else:
        failure.leave_signals_to_leader()
    os.kill(os.getpid(), number)
    assert asked == [number] and stopped.is_set() == leader


def test_a_signal_on_another_machine_reaches_the_leader(signals):
    store, stopped = dist.HashStore(), Event()
    failure.signals_stop(stopped.set, store)
    failure.leave_signals_to_leader(store)  # of the other machine
    assert not stopped.wait(2 * failure.HEED_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.wait(10)


def test_a_signal_before_the_server_listens_ends_it_with_its_torchrun(tmp_path):
    program = STARTER.format({"TORCHELASTIC_ERROR_FILE": "a", "LOCAL_RANK": "0"}, "import os" + LOADING)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as torchrun:
        os.kill(int(torchrun.stdout.readline()), signal.SIGTERM)
        assert torchrun.wait(10) == -signal.SIGKILL
