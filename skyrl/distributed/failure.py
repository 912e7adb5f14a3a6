"""How a job ends when something fails: one rank says why, once, and every process is gone soon after.

Only what is needed between an error and the end of the process. Nothing here waits for another rank for longer than
it says, and nothing here makes a collective: after an error the others may be gone or stuck.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

SETTLE_SECONDS = 2.0  # how long we look for the rank that is gone
_TOLD = "skyrl/told"
_LOST = re.compile(
    r"Connection (closed|reset|refused|aborted)|Broken pipe|pair closure|Timed out waiting|timed out|NCCL|"
    r"Socket (Timeout|closed)|peer .*(closed|gone)",
    re.IGNORECASE,
)
_places: list[tuple[str, int]] = []  # (host, process id) of every rank
_PR_SET_PDEATHSIG = 1


def remember_ranks(group: Any) -> None:
    """Keeps host and process id of every rank, to name the one that is lost. Collective over `group`."""
    box: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(box, (socket.gethostname(), os.getpid()), group=group)
    _places[:] = box


def end_with_launcher() -> None:
    """Asks the system to end this process when the one that started it ends: a killed torchrun leaves no orphans."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` says that another rank is gone or does not answer, rather than that something is wrong here."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or _LOST.search(str(error).split("\n")[0]) is not None
    )


def hold() -> None:
    """Ignores SIGTERM from here on: torchrun sends it as soon as it sees the lost rank, and we have a line to print.

    The process must end by itself within seconds; torchrun kills it after 30."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def speak_first() -> bool:
    """True for the first rank of the job that asks, which then tells the error; True always without a process group."""
    store = _store()
    if store is None:
        return True
    try:
        return store.add(_TOLD, 1) == 1
    except RuntimeError:  # the store was in a rank that is gone; two lines are better than none
        return True


def is_told() -> bool:
    """Whether some rank has told an error already."""
    store = _store()
    if store is None:
        return False
    try:
        return store.check([_TOLD])
    except RuntimeError:
        return False


def about_lost_peer(error: BaseException) -> str | None:
    """One line that names the ranks that are gone, as far as this machine can tell; None when one has spoken itself.

    Waits up to SETTLE_SECONDS for the dying rank to be gone."""
    hold()
    until = time.monotonic() + SETTLE_SECONDS
    gone = ended_ranks()
    while not gone and not is_told() and time.monotonic() < until:
        time.sleep(0.05)
        gone = ended_ranks()
    if is_told():
        return None
    what = " ".join(str(error).split("\n")[0].split())
    if gone:
        names = " and ".join(f"rank {rank} (process {_places[rank][1]})" for rank in gone)
        return (
            f"{names} ended without a message: killed from outside (often by the system for want of memory: see "
            "dmesg) or crashed; what was saved is complete, and the same command goes on from the last checkpoint"
        )
    if re.search("timed out", what, re.IGNORECASE):
        return (
            f"another rank did not answer within run.collective_timeout_seconds ({what}): it hangs or is much slower; "
            "look at its output, or raise that limit; the same command goes on from the last checkpoint"
        )
    return (
        f"the connection to another rank is lost ({what}), and all ranks of this machine are alive: look at the other "
        "machines and the network; the same command goes on from the last checkpoint"
    )


def ended_ranks() -> list[int]:
    """Ranks of this machine whose process is gone."""
    here = socket.gethostname()
    return [rank for rank, (host, pid) in enumerate(_places) if host == here and _is_gone(pid)]


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # a zombie answers; its state stands behind the name, which may hold any character
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except ProcessLookupError:
        return True
    except OSError:  # no /proc here, or gone between the two lines, or another user's
        return sys.platform == "linux" and not Path(f"/proc/{pid}").exists()


def _store() -> Any:
    if not dist.is_initialized():
        return None
    return dist.distributed_c10d._get_default_store()
