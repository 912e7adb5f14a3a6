"""How a job ends when something fails: one rank says why, once, and every process is gone soon after.

Only what is needed between an error and the end of the process. Nothing here waits for another rank for longer than
it says, and nothing here makes a collective: after an error the others may be gone or stuck.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch.distributed as dist

from skyrl.distributed import env
from skyrl.distributed.faults import classify
from skyrl.distributed.stop import OF_BATCH, SIGNALS, heard_signals

SETTLE_SECONDS = 2.0  # how long we look for the rank that is gone
HEED_SECONDS = 0.25  # between looks at what ranks of other machines have heard
SIGNALLED = "signalled"
_processes: list[tuple[str, int]] = []  # (host, process id) of every rank
_shared_folder: list[Path] = []  # the folder in which ranks of this machine leave word for each other
_at_the_end: list[Callable[[], None]] = []
reporting = False  # a thread of this process tells an error, and ends the process when it has
find_lost: Callable[[], dict[int, str]] | None = None  # ranks on other hosts that cannot be reached, and why
describe_rank: Callable[[int], str] | None = None  # what a rank did last, while a watch knows it


def remember_ranks(group: Any, local_rank: int) -> None:
    """Keeps host and process id of every rank, to name the one that is lost. Collective over `group`.

    The ranks of a machine also agree on a folder in which the first that tells an error leaves word. Not the group's
    store: without torchrun it lives in rank 0 and dies with it.
    """
    box: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(box, (socket.gethostname(), os.getpid(), _make_shared_folder(local_rank)), group=group)
    _processes[:] = [(host, pid) for host, pid, _ in box]
    _shared_folder[:] = [Path(folder) for host, _, folder in box if folder and host == socket.gethostname()][:1]


def _make_shared_folder(local_rank: int) -> str:
    if file := os.environ.get(env.ERROR_FILE):
        return str(Path(file).parent.parent)  # torchrun's folder of one attempt, with a folder for each local rank
    try:
        return tempfile.mkdtemp(prefix="skyrl-") if local_rank == 0 else ""
    except OSError:  # a full disk; then each rank speaks for itself
        return ""


def forget_ranks() -> None:
    """The job has ended well: removes what `remember_ranks` made."""
    if not os.environ.get(env.ERROR_FILE):
        for folder in _shared_folder:
            shutil.rmtree(folder, ignore_errors=True)  # another rank of this machine may be faster
    _processes.clear()
    _shared_folder.clear()


def end_with_launcher() -> None:
    """As env.end_with_launcher; and when torchrun ends this process because another rank was lost, it says so first."""
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, partial(_ended_by_launcher, before if callable(before) else signal.SIG_DFL))
    env.end_with_launcher()


def _ended_by_launcher(usual: Any, number: int, frame: FrameType | None) -> None:
    """The `usual` handler, or the end with a line about a rank that is gone and could not speak for itself."""
    gone = ended_ranks()
    if gone and not error_reported() and claim_error_report():
        if env.watchdog is not None:  # with a crash bundle, also when this comes while the run is being closed
            env.watchdog.hang_monitor.report_lost_ranks(gone)
        else:
            # not print: what it interrupts may be a print
            os.write(2, f"skyrl: error: {about_ranks(gone)}\n".encode())
    signal.signal(signal.SIGTERM, signal.SIG_DFL if gone else usual)
    os.kill(os.getpid(), signal.SIGTERM)


def signals_stop(stop: Callable[[], None], store: Any = None) -> None:
    """Calls `stop` at the signals of stop.SIGNALS, for a program that ends well then. `store`: where ranks of other
    machines leave word of theirs, which count alike; `stop` is called from a thread then.

    torchrun, which passes on the signals that it gets, waits for its ranks and then prints a traceback about the
    signal, whatever their exit codes. So the leader's process kills it as its very last act. Not when the signal came
    to this process alone: then torchrun knows of none, and ends well by itself."""
    received: list[int] = []
    others = shared_file(SIGNALLED) if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1" else None

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        stop()

    def heed_others() -> None:
        with contextlib.suppress(RuntimeError):  # the ranks part
            while not store.check([SIGNALLED]):
                time.sleep(HEED_SECONDS)
            elsewhere.set()
            stop()

    def end_launcher() -> None:
        # torchrun, too, waits for those of other machines, which are gone after a signal.
        if elsewhere.is_set() or received and (others is None or others.exists()):
            env.end_launcher()

    elsewhere = threading.Event()
    _at_the_end.append(end_launcher)
    _hear(handle)
    if store is not None:
        threading.Thread(target=heed_others, name="skyrl-signals", daemon=True).start()


def leave_signals_to_leader(store: Any = None) -> None:
    """The same signals do nothing here but leave word that they came: the leader ends the job. `store`: for a leader
    on another machine.

    A process that waits for the others of a collective runs no handler; a thread hears of signals there as well."""
    word, first = shared_file(SIGNALLED), os.environ.get("LOCAL_RANK") == "0"
    here, there = socket.socketpair()
    there.setblocking(False)

    def tell() -> None:
        while number := here.recv(1):  # of any signal that has a handler
            if number[0] not in SIGNALS:
                continue
            if word is not None:
                word.touch()
            if store is not None:
                store.set(SIGNALLED, "1")

    def end_launcher() -> None:
        if first and word is not None and word.exists():
            env.end_launcher()

    _hear(lambda number, frame: None)
    signal.set_wakeup_fd(there.detach())
    threading.Thread(target=tell, name="skyrl-signals", daemon=True).start()
    _at_the_end.append(end_launcher)


def _hear(handle: Callable[[int, FrameType | None], None]) -> None:
    """Handles the signals of stop.SIGNALS, but for those that launch/rank.py passes on as SIGTERM: it notes them, since
    a server that a batch system has stopped is to be queued again."""
    for number in heard_signals():
        if number not in OF_BATCH or not callable(signal.getsignal(number)):
            signal.signal(number, handle)


@atexit.register  # before the end of the group of ranks is registered, and so called after it
def _very_last() -> None:
    for action in _at_the_end:
        action()


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` says that another rank is gone or does not answer, rather than that something is wrong here."""
    fault = classify(error)
    return fault is not None and fault.kind == "lost"


def restore_sigterm() -> None:
    """SIGTERM ends this process at once again: it has an error of its own, and another rank may tell it first."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def ignore_sigterm() -> None:
    """Ignores SIGTERM from here on: torchrun sends it as soon as it sees the lost rank, and we have a line to print.

    The process must end by itself within seconds; torchrun kills it after 30."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def claim_error_report() -> bool:
    """True for the first rank of this machine that asks, which then tells the error."""
    for folder in _shared_folder:
        try:
            os.close(os.open(folder / "told", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:  # two lines are better than none
            return True
    return True


def shared_file(name: str) -> Path | None:
    """A file that ranks of this machine share while the job lives; None when there is no place for one."""
    return _shared_folder[0] / name if _shared_folder else None


def error_reported() -> bool:
    """Whether some rank of this machine has told an error already."""
    return any((folder / "told").exists() for folder in _shared_folder)


def about_lost_peer(error: BaseException) -> str | None:
    """One line that names the ranks that are gone, as far as this machine can tell; None when one has spoken itself.

    Waits up to SETTLE_SECONDS for the dying rank to be gone."""
    ignore_sigterm()
    until = time.monotonic() + SETTLE_SECONDS
    gone = ended_ranks()
    while not gone and not error_reported() and time.monotonic() < until:
        time.sleep(0.05)
        gone = ended_ranks()
    if error_reported():
        return None
    if gone:
        return about_ranks(gone)
    if find_lost is not None and (lost := find_lost()):
        told = "; ".join(f"rank {rank}{where_is(rank)}: {why}" for rank, why in list(lost.items())[:4])
        return (
            f"{told} (killed from outside, crashed, or its node is gone): look at its output and dmesg there; the same "
            "command goes on from the last checkpoint"
        )
    fault = classify(error)
    what = fault.what if fault is not None else str(error).split("\n")[0]
    if re.search("timed out|timing out|timeout", what, re.IGNORECASE):
        return (
            f"another rank did not answer within run.collective_timeout_seconds ({what}): it hangs or is much slower; "
            "look at its output, or raise that limit; the same command goes on from the last checkpoint"
        )
    return (
        f"the connection to another rank is lost ({what}), and all ranks of this machine are alive: look at the other "
        "machines and the network; the same command goes on from the last checkpoint"
    )


def about_ranks(gone: list[int]) -> str:
    """One line about ranks that have ended and could not say why."""
    names = " and ".join(f"rank {rank} (process {_processes[rank][1]})" for rank in gone)
    doing = [f"rank {rank}{text}" for rank in gone if describe_rank is not None and (text := describe_rank(rank))]
    known = f" ({'; '.join(doing)})" if doing else ""
    return (
        f"{names} ended without a message{known}: killed from outside (often by the system for want of memory: see "
        "dmesg) or crashed; what was saved is complete, and the same command goes on from the last checkpoint"
    )


def where_is(rank: int) -> str:
    """Process and host of a rank, in brackets; "" before all ranks know of each other."""
    return f" (process {_processes[rank][1]} on {_processes[rank][0]})" if _processes else ""


def ended_ranks() -> list[int]:
    """Ranks of this machine whose process is gone."""
    here = socket.gethostname()
    return [rank for rank, (host, pid) in enumerate(_processes) if host == here and _is_gone(pid)]


def _is_gone(pid: int) -> bool:
    try:  # a zombie, whose parent has not looked yet, still has its number
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # another user's
        return False
