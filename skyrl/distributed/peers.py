"""Whether the other ranks can still be reached; whatever is lost (process, node, network, store), a named end follows.

Each rank has a door: a port on which it listens. The system answers there for as long as the process exists, also while
it is busy or stopped. A process that is gone refuses, a node that is gone or cut off does not answer at all. So this
needs no store, which may be what is lost. A thread of its own knocks, since calls to a store that is gone never return.

One door of each other host is knocked at by the first rank of each host, and by all that wait for others.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from typing import Any

from skyrl.distributed import env, failure, phases
from skyrl.distributed.agreement import name_ranks
from skyrl.envs import clock
from skyrl.tracking.crash_report import write_bundle

log = logging.getLogger(__name__)

TURN_SECONDS = 0.5
KNOCK_SECONDS = 4.0  # between two knocks
ANSWER_SECONDS = 3.0  # that an answer may take
BACKLOG = 1024  # of knocks that the system may answer while this process is stopped
EARLY, STALE = 0.25, 0.7  # parts of run.hang_seconds: when who waits begins to knock; for how long all knocks must fail
HAND_OVER_SECONDS = 8.0  # in which the watchdog, if there is one, tells all others and ends this process
BUNDLE_SECONDS = 5.0  # the disk may be what is lost
FAILED = 1

current: Peers | None = None  # of this job, while it lives


class Peers:
    """The doors of all ranks. `verdict`: (ranks that are lost, why, in words), once it is known."""

    def __init__(
        self,
        rank: int,
        door: socket.socket,
        hosts: list[str],
        doors: list[tuple[str, int]],
        *,
        hang_seconds: float,
        collective_seconds: float,
    ) -> None:
        """`hosts` and `doors` (address, port) are by rank; `door` is this rank's own."""
        self.rank, self.hosts, self.doors, self._door = rank, hosts, doors, door
        self.hang_seconds, self.collective_seconds = hang_seconds, collective_seconds
        self.verdict: tuple[list[int], str] | None = None
        os.register_at_fork(after_in_child=door.close)  # a child that outlives us must not answer for us
        firsts = [hosts.index(host) for host in dict.fromkeys(hosts)]
        self._others = [other for other in firsts if hosts[other] != hosts[rank]]
        self._first = rank in firsts
        self._knocks: dict[int, tuple[socket.socket, float]] = {}
        # A door that has never answered says nothing: a firewall, perhaps. Nor does a process of this host that was
        # never seen: containers with one host name may have process numbers of their own.
        self._answered: set[int] = set()
        self._knocked = False
        self._failing: dict[int, tuple[float, str]] = {}  # rank -> (since when, why)
        self._next_knock = self._judged_at = 0.0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=phases.WATCHERS[1], daemon=True)
        self._thread.start()

    @classmethod
    def meet(cls, store: Any, rank: int, size: int, address: str, **limits: float) -> Peers:
        """All ranks' doors, told through `store`; this rank's is at `address`, which the others reach. Collective."""
        global current
        door = socket.create_server((address, 0), family=_family(address), backlog=BACKLOG)
        door.setblocking(False)
        store.set(f"peer/{rank}", json.dumps([socket.gethostname(), address, door.getsockname()[1]]))
        told = [json.loads(store.get(f"peer/{other}")) for other in range(size)]
        doors = [(address, port) for _, address, port in told]
        current = cls(rank, door, [host for host, *_ in told], doors, **limits)
        failure.find_lost = current.find_lost
        return current

    def set_limits(self, hang_seconds: float, collective_seconds: float) -> None:
        """Those of another run of a sweep."""
        self.hang_seconds, self.collective_seconds = hang_seconds, collective_seconds

    def close(self) -> None:
        """The job has ended: nobody is expected to answer any more."""
        global current
        current, failure.find_lost, self._closing = None, None, True
        self._thread.join(2 * TURN_SECONDS)
        self._door.close()

    def find_lost(self) -> dict[int, str]:
        """Rank -> why, of the ranks on other hosts that cannot be reached now; of hosts that have never answered none.
        Takes as long as an answer may."""
        known = {self.hosts[rank] for rank in self._answered}
        knocks = {rank: self._open(rank) for rank, host in enumerate(self.hosts) if host != self.hosts[self.rank]}
        found: dict[int, str] = {}
        until = time.monotonic() + ANSWER_SECONDS
        while knocks and time.monotonic() < until:
            time.sleep(0.05)
            for rank, why in [(rank, self._answer(knock)) for rank, knock in knocks.items()]:
                if why is not None:
                    knocks.pop(rank).close()
                    found[rank] = why
                    known |= {self.hosts[rank]} if not why else set()
        for rank, knock in knocks.items():
            knock.close()
            found[rank] = f"{self.hosts[rank]} does not answer"
        return {rank: why for rank, why in sorted(found.items()) if why and self.hosts[rank] in known}

    def _open(self, rank: int) -> socket.socket:
        knock = socket.socket(_family(self.doors[rank][0]), socket.SOCK_STREAM)
        knock.setblocking(False)
        with contextlib.suppress(OSError):
            knock.connect_ex(self.doors[rank])
        return knock

    def _run(self) -> None:
        while not self._closing:
            time.sleep(TURN_SECONDS)
            try:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(BACKLOG):
                        self._door.accept()[0].close()
                self._turn(clock.now())
            except Exception as error:  # out of descriptors, say; this thread is the last that watches, so it goes on
                if not self._closing:
                    log.warning("looking after the other ranks failed and is tried again: %s", error)

    def _turn(self, now: float) -> None:
        if self.verdict is not None:
            if now > self._judged_at + HAND_OVER_SECONDS:
                self._end_alone(*self.verdict)
            return
        still, waits = phases.progress(now)
        if (waits or env.watchdog is not None) and still > self.collective_seconds:
            limit = f"run.collective_timeout_seconds={self.collective_seconds:g}"
            does = f"waits in {waits}" if waits else "stands still"
            self._end_alone([], f"{does} for longer than {limit}: another rank hangs or is much slower")
        if not self.hang_seconds:
            return
        self._listen(now)
        due = self._first or not self._knocked or (waits and still > EARLY * self.hang_seconds)
        if now >= self._next_knock and due:
            self._next_knock, self._knocked = now + KNOCK_SECONDS, True
            self._knock(now)
        if any(now - since > STALE * self.hang_seconds for since, _ in self._failing.values()):
            self._judge(sorted(self._failing), now)
        elif waits and still > self.hang_seconds and (watch := env.watchdog) is not None:
            if watch.store is None:
                self._end_alone([0], "or who started it kept the store in which the ranks meet, and that is gone")
            if now - watch.turned_at > self.hang_seconds:
                self._end_alone([0], "or who started it does not answer any more: the store there stands still")

    def _knock(self, now: float) -> None:
        for rank in self._others:
            if rank not in self._knocks:
                self._knocks[rank] = self._open(rank), now
        here = {rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]}
        gone = set(failure.ended_ranks())
        for rank in here:
            self._note(rank, now, "its process is gone" if rank in gone else "")

    def _listen(self, now: float) -> None:
        for rank, (knock, begun) in list(self._knocks.items()):
            why = self._answer(knock)
            if why is None and now - begun < ANSWER_SECONDS:
                continue
            self._note(rank, now, f"{self.hosts[rank]} does not answer" if why is None else why)
            knock.close()
            del self._knocks[rank]

    def _answer(self, knock: socket.socket) -> str | None:
        """ "" for a door that answers, else why not; None while nothing is known."""
        if code := knock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return "its process is gone" if code == errno.ECONNREFUSED else os.strerror(code)
        try:
            knock.getpeername()
        except OSError:
            return None
        return ""

    def _note(self, rank: int, now: float, why: str) -> None:
        if why and rank in self._answered:
            self._failing[rank] = self._failing.get(rank, (now, ""))[0], why
        elif not why:
            self._answered.add(rank)
            self._failing.pop(rank, None)

    def _judge(self, lost: list[int], now: float) -> None:
        seconds = now - self._failing[lost[0]][0]
        why = ", ".join(dict.fromkeys(self._failing[rank][1] for rank in lost))
        here = self.hosts[self.rank]
        if len(self._others) > 1 and set(self._others) <= set(lost) and "process" not in why:
            what = f"cannot be reached (for {seconds:.0f} s; {why}): {here} is cut off from all other hosts"
        else:
            what = f"cannot be reached from {here} (for {seconds:.0f} s; {why})"
        there = {self.hosts[rank] for rank in lost if "process" not in self._failing[rank][1]}
        ranks = sorted({*lost, *(rank for rank, host in enumerate(self.hosts) if host in there)})
        self.verdict, self._judged_at = (ranks, what), now
        watch = env.watchdog
        if watch is None or watch.store is None or now - watch.turned_at > HAND_OVER_SECONDS:
            self._end_alone(ranks, what)

    def _end_alone(self, ranks: list[int], what: str) -> None:
        """Tells it, leaves a crash bundle if there is a disk for it, and ends this process."""
        handed_over = self.verdict is not None and clock.now() > self._judged_at + HAND_OVER_SECONDS
        who = name_ranks(self.hosts, ranks or [self.rank])
        line = f"{who} {what}; the same command goes on from the last checkpoint"
        if failure.claim_error_report() or handed_over:
            os.write(2, f"skyrl: error: {line}\n".encode())
            env.report_to_launcher(line)
        watch = env.watchdog
        if watch is not None and watch.claimed:
            table = {self.rank: watch.hang_monitor.report_status(0, *phases.progress(clock.now()))}
            write = threading.Thread(
                target=write_bundle, args=(watch.folder, line, table, {self.rank: phases.stacks()}), daemon=True
            )
            write.start()
            write.join(BUNDLE_SECONDS)
        os._exit(FAILED)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
