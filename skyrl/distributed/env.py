"""This process's rank as the environment says it, its end below a launcher, and what the rest of skyrl may know of a
group of ranks without importing torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from types import FrameType
from typing import Any

import psutil

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun gives each rank one of its own
LAUNCHED = "SKYRL_LEFT"  # set by skyrl-tx launch: a file that says that ranks left before they had anything to save
EXIT_FILE = "SKYRL_EXIT_FILE"  # set by launch.torchrun: where local rank 0 leaves its exit code, which torchrun hides
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
    path = os.environ.get(ERROR_FILE)
    if path:
        with contextlib.suppress(OSError), open(path, "w") as file:
            extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)


def leave_exit_code(code: int) -> None:
    """Leaves this process's exit code where a torchrun that wants it looks (launch/torchrun.py)."""
    path = os.environ.get(EXIT_FILE)
    if path and os.environ.get("LOCAL_RANK") == "0":
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write(str(code))


def end_launcher() -> None:
    """Kills the torchrun that has started this process, which would print a traceback about the signal that it got,
    whatever becomes of its ranks. Nothing where that is not our parent: a script that only handed its variables on has
    the same error file as we. Nothing below skyrl-tx launch either, where torchrun gets no signal, nor on one machine
    where launch/torchrun.py keeps it quiet."""
    mine = os.environ.get(ERROR_FILE)
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if mine is None or LAUNCHED in os.environ or (EXIT_FILE in os.environ and alone):
        return
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if parent.environ().get(ERROR_FILE) != mine:
            parent.kill()


def leave_at_signals() -> None:
    """Until a server listens itself, SIGTERM and SIGINT end its ranks below torchrun at once, and that with them."""
    if ERROR_FILE not in os.environ or LAUNCHED in os.environ:
        return

    def leave(number: int, frame: FrameType | None) -> None:
        if os.environ.get("LOCAL_RANK") == "0":
            end_launcher()
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
