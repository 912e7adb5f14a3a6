"""Starts a launcher below us and passes signals on to its ranks: a signal reaches the ranks, and them alone.

torchrun answers a signal by ending its ranks within 30 seconds, and dies of SIGUSR1. So it runs in a session of its
own, out of reach of the terminal and of Slurm, and what we hear goes to the ranks; it ends when they have.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from skyrl.distributed.stop import SIGNALS, TEMPORARY, heard_signals

PATIENCE_SECONDS = 600.0  # from a second Ctrl-C nothing is waited for; from a first signal a save may take so long
_PDEATHSIG = 1


class Child:
    """A launcher below this process, and what this process has heard. `heard`: signals, oldest first. `early`: a
    signal has ended ranks, or torchrun without any, before they listened; there was nothing to save."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], *, stdin: int | None = None, through: bool = False
    ) -> None:
        self.heard: list[int] = []
        self.early = False
        self.through = through
        self.process = subprocess.Popen(
            list(command), env=dict(environment), stdin=stdin, start_new_session=True, preexec_fn=_end_with(os.getpid())
        )

    def send(self, number: int) -> None:
        """Passes a signal to the ranks below the launcher; to the launcher itself while there are none.

        `through`: the launcher is srun, which passes SIGUSR1 on to its tasks on all nodes.
        """
        self.heard.append(number)
        if self.through:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGUSR1)
            return
        ranks = ranks_below(self.process.pid)
        self.early |= not ranks or any(not catches(pid, number) for pid in ranks)
        for pid in ranks or [self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number if ranks else signal.SIGTERM)

    def kill(self) -> None:
        """Ends launcher and ranks at once."""
        for pid in [*ranks_below(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code, 128 + number after a signal; kills what does not end long after it was asked to."""
        until = None
        while True:
            try:
                code = self.process.wait(0.2)
                return code if code >= 0 else 128 - code
            except subprocess.TimeoutExpired:
                pass
            if self.heard and until is None:
                until = time.monotonic() + PATIENCE_SECONDS
            if self.heard.count(signal.SIGINT) > 1 or (until is not None and time.monotonic() > until):
                self.kill()


def run(
    command: Sequence[str], environment: Mapping[str, str], *, remote_commands: bool = False, through: bool = False
) -> tuple[int, Child]:
    """Runs a launcher to its end, passing signals to its ranks; (exit code, the child as it was).

    remote_commands: lines on standard input are names of signals to pass on, and its end asks the ranks to stop: so a
    launcher on another host ends with the one who started it, whatever way that one ended. through: see Child.send.
    """
    child = Child(command, environment, stdin=subprocess.DEVNULL if remote_commands else None, through=through)
    with passing(child.send):
        if remote_commands:
            threading.Thread(target=_follow_remote_commands, args=(child,), daemon=True).start()
        return child.wait(), child


@contextlib.contextmanager
def passing(send: Callable[[int], None]):
    """While inside, what asks for a stop goes to `send`."""

    def handle(number: int, frame: FrameType | None) -> None:
        send(number)

    before = {number: signal.signal(number, handle) for number in heard_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ranks_below(pid: int) -> list[int]:
    """Processes started directly by `pid` that have a rank."""
    with contextlib.suppress(psutil.Error):
        return sorted(child.pid for child in psutil.Process(pid).children() if _has_rank(child))
    return []


def _has_rank(process: psutil.Process) -> bool:
    try:
        return "LOCAL_RANK" in process.environ()
    except psutil.Error:  # ended meanwhile
        return False


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, or ignores it; False for one that has ended."""
    try:
        text = (Path("/proc") / str(pid) / "status").read_text()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in text.splitlines() if line.startswith(("SigCgt:", "SigIgn:"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def _follow_remote_commands(child: Child) -> None:
    for line in sys.stdin:
        number = getattr(signal, line.strip(), None)
        if number in SIGNALS:
            child.send(number)
    child.send(signal.SIGTERM)


def _end_with(parent: int) -> Callable[[], None]:
    """For the child, before its program starts: SIGTERM when this process dies, even of kill -9."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if library is not None:
            library.prctl(_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(TEMPORARY)  # it died before we asked

    return prepare
