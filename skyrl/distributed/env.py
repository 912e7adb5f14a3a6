"""This process's rank as the environment says it, its end below a launcher, and what the rest of skyrl may know of a
group of ranks without importing torch."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun gives each rank one of its own
LAUNCHED = "SKYRL_LEFT"  # set by skyrl-tx launch: a file that says that ranks left before they had anything to save
EXIT_FILE = "SKYRL_EXIT_FILE"  # set by launch.torchrun: where local rank 0 leaves its exit code, which torchrun hides
PID_FILE = "pid"  # of that torchrun, beside EXIT_FILE; both go when it ends, unless it is killed
# Set by distributed.init and distributed.watchdog, which import torch; read by main.py, which must not.
in_group = False  # this process is one of a group of ranks
watchdog: Any = None  # the Watchdog that listens, while a run or a server lives
planned_memory = ""  # of one rank, in words, once there is a plan


def rank() -> int:
    """This process's rank under a launcher, 0 without one or where it is no number (place.take_place refuses that)."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isdecimal() else 0


def world_size() -> int:
    """Processes of this job, 1 without a launcher."""
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdecimal() else 1


def report_to_launcher(text: str) -> None:
    """Leaves the text where torchrun looks for it, so that its own report ends with it."""
    if path := os.environ.get(ERROR_FILE):
        with contextlib.suppress(OSError), open(path, "w") as file:
            extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)


def leave_exit_code(code: int) -> None:
    """Leaves this process's exit code where a torchrun that wants it looks (launch/torchrun.py)."""
    path = os.environ.get(EXIT_FILE)
    if path and os.environ.get("LOCAL_RANK") == "0":
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write(str(code))


def _torchrun() -> psutil.Process | None:
    """The torchrun that has started this process. None where that is not our parent: a script that only handed its
    variables on has the same error file as we, and whoever takes in orphans (init, systemd) is no Python."""
    mine = os.environ.get(ERROR_FILE)
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if mine is not None and parent.environ().get(ERROR_FILE) != mine and "python" in parent.exe():
            return parent
    return None


def _torchrun_was_killed() -> bool:
    """Whether launch/torchrun.py started this process (as the leader of a session) and was killed: its file is there,
    and it is not."""
    with contextlib.suppress(OSError, ValueError):
        launcher = int(Path(os.environ.get(EXIT_FILE, "")).with_name(PID_FILE).read_text())
        with contextlib.suppress(psutil.NoSuchProcess):
            return os.getsid(0) == os.getpid() and psutil.Process(launcher).status() == psutil.STATUS_ZOMBIE
        return True
    return False


def end_launcher() -> None:
    """Kills the torchrun that has started this process, which would print a traceback about the signal that it got,
    whatever becomes of its ranks. Nothing below skyrl-tx launch, where torchrun gets no signal, nor on one machine
    where launch/torchrun.py keeps it quiet."""
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    parent = None if LAUNCHED in os.environ or (EXIT_FILE in os.environ and alone) else _torchrun()
    with contextlib.suppress(psutil.Error):
        if parent is not None:
            parent.kill()


def end_with_launcher() -> None:
    """This process ends when the launcher that started it does: a killed torchrun leaves no orphans, which would hold a
    folder and an address until they give up waiting for each other (Linux). Nothing for a process alone."""
    killed = _torchrun_was_killed()
    if sys.platform != "linux" or (world_size() == 1 and not killed and _torchrun() is None):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if killed or os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)
