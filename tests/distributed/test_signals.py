"""Signals to a program whose leader ends the job: who hears of them, and which torchrun is ended."""

import os
import signal
import subprocess
import sys
from threading import Event

import pytest
import torch.distributed as dist

from skyrl.distributed import env, failure

RANK = "from skyrl.distributed.env import end_launcher; end_launcher(); print('left alone')"
STARTER = """
import os, subprocess, sys
os.environ.update({})
sys.exit(subprocess.run([sys.executable, "-c", {!r}]).returncode)
"""
LOADING = """
import time
from skyrl.distributed.env import leave_at_signals
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
    ],
)
def test_only_the_torchrun_that_started_us_is_ended(given, added, code):
    around = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "SKYRL_LEFT"))}
    program = STARTER.format(added, RANK)
    done = subprocess.run([sys.executable, "-c", program, "torch"], env={**around, **given}, capture_output=True)
    assert done.returncode == code, done.stderr


@pytest.fixture
def signals(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    wakeup = signal.set_wakeup_fd(-1)
    monkeypatch.setattr(failure, "_at_the_end", [])
    yield
    signal.set_wakeup_fd(wakeup)
    for number, handler in before.items():
        signal.signal(number, handler)


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
