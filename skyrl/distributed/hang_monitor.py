"""Who hangs, and how that ends: one rank says it with the stack of the one that hangs, and every process is gone.

Each rank keeps its status (phase, step, what it waits in) under its own key in the store. A rank whose own main thread
stands still outside any collective suspects itself. A rank that waits for others reads their statuses: one that is not
written any more belongs to a process that is stopped, keeps the interpreter, or is gone with its machine. When all
wait, their collectives do not fit together. A rank that is slow but moves is never suspected.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any, TextIO

import psutil

from skyrl.distributed import failure, phases
from skyrl.distributed.env import report_to_launcher
from skyrl.distributed.init import World
from skyrl.distributed.peers import EARLY, STALE
from skyrl.envs import clock
from skyrl.tracking.crash_report import write_bundle

FAILED = 1
LOOK_SECONDS = 1.0
NEARLY = 0.8  # of its patience: hangs as much as the one who is suspected
STACK_SECONDS = 2.0  # how long stacks of the others are waited for
END_SECONDS = 15.0  # after a decision nobody lives longer
GOODBYE_SECONDS = 0.7
MONITORS = 4  # ranks that look at the others, besides the first of each machine: reading all statuses is N keys
STACK_SIGNAL = signal.SIGRTMIN + 3  # no batch system sends it
MAX_STACK = 64 << 10
STATES = {
    psutil.STATUS_STOPPED: ", its process is stopped (SIGSTOP)",
    psutil.STATUS_ZOMBIE: ", its process is gone",
    psutil.STATUS_DISK_SLEEP: ", its process waits for a disk",
}


class HangMonitor:
    """Statuses of all ranks, decisions, stacks. Used by the watcher's thread, over `store`; `describe` and
    `leave_bundle` by the main thread, over `words`."""

    def __init__(self, world: World, folder: Path, store: Any, words: Any, hang_seconds: float) -> None:
        self.world, self.folder, self.hang_seconds = world, folder, hang_seconds
        self.store, self.words = store, words
        self.ready = False  # the run folder is ours: a bundle may be written
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> (its count, when we first saw that count)
        self._next_look = 0.0
        self._over_at: float | None = None
        self._dump: TextIO | None = None

    def prepare(self) -> None:
        """Lets another rank of this machine have our stack even when the interpreter does not run any more."""
        if self.world.size > 1 and (path := failure.shared_file(f"stack-{self.world.rank}")) is not None:
            self._dump = open(path, "w")  # noqa: SIM115 - faulthandler needs it until the process ends
            faulthandler.register(STACK_SIGNAL, file=self._dump, all_threads=True)

    # ---- statuses

    def report_status(self, count: int, still: float, waits: str) -> dict[str, Any]:
        """This rank's status as the others read it. `count` grows each time; durations are in seconds."""
        status = phases.status
        return {
            "count": count,
            "phase": status.phase,
            "step": status.step,
            "seconds_in_phase": round(clock.now() - status.since, 1),
            "seconds_without_progress": round(still, 1),
            "waits_in": waits,
            "agreements": status.calls,
            "patience": phases.timeout(self.hang_seconds),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": _started(os.getpid()),
        }

    def read_statuses(self, store: Any = None) -> dict[int, dict[str, Any]]:
        """rank -> its status, of those that have told one; our own only, without a store."""
        store = store if store is not None else self.store
        if store is None:
            return {self.world.rank: self.report_status(0, *phases.progress(clock.now()))}
        keys = [f"status/{rank}" for rank in range(self.world.size)]
        if not store.check(keys):
            keys = [key for key in keys if store.check([key])]
        return {int(key.split("/")[1]): json.loads(text) for key, text in zip(keys, store.multi_get(keys), strict=True)}

    def describe(self, rank: int) -> str:
        """Words like " was in <phase>, step <n>" about a rank, as far as it is known; "" else."""
        try:
            status = self.read_statuses(self.words).get(rank)
        except RuntimeError:  # the store is gone too
            return ""
        return f" was in {status['phase']}, step {status['step']}" if status else ""

    # ---- checking

    def check(self, now: float, still: float, waits: str) -> None:
        """Suspects whoever hangs. `still`: seconds for which this rank has made no progress, waiting in `waits`."""
        if self._over_at is not None and now > self._over_at:
            os._exit(FAILED)
        patience = phases.timeout(self.hang_seconds)
        if not self.hang_seconds or self._over_at is not None or still < EARLY * patience:
            self._seen = {}
            return
        if not waits:
            if still > patience:
                self.accuse(self._still_ones(), f"makes no progress (for {still:.0f} s)")
            return
        monitor = self.world.rank < MONITORS or self.world.local_rank == 0
        if self.store is None or not monitor or now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        table = self.read_statuses()
        silent = self._silent(table, now)
        if still <= patience:
            return
        if silent:
            self.accuse(silent, f"does not answer any more (for at least {now - self._seen[silent[0]][1]:.0f} s)")
        elif all(p["waits_in"] and p["seconds_without_progress"] > p["patience"] for p in table.values()):
            least = min(status["agreements"] for status in table.values())
            behind = [rank for rank, status in table.items() if status["agreements"] == least]
            what = "waits, as all ranks do, in a collective that the others are not in"
            self.accuse(behind, f"{what} (for {still:.0f} s)")

    def _still_ones(self) -> list[int]:
        """Us, and those who stand still as we do (on GPUs a rank that waits for another looks like one that hangs)."""
        me = self.world.rank
        others = self.read_statuses().items() if self.store is not None else []
        still = [
            rank for rank, p in others if not p["waits_in"] and p["seconds_without_progress"] > p["patience"] * NEARLY
        ]
        return sorted({me, *still})

    def _silent(self, table: dict[int, dict[str, Any]], now: float) -> list[int]:
        out = []
        for rank, status in table.items():
            count, since = self._seen.get(rank, (-1, now))
            if count != status["count"]:
                self._seen[rank] = (status["count"], now)
            elif rank != self.world.rank and now - since > STALE * status["patience"]:
                out.append(rank)
        return out

    def accuse(self, hung_ranks: list[int], what: str) -> None:
        """Says that these ranks hang or are lost, to all, and ends this process."""
        decision = json.dumps({"by": self.world.rank, "kind": "hang", "hung_ranks": hung_ranks, "what": what})
        if self.store is not None:
            if self.store.compare_set("decision", "", decision).decode() != decision:
                return  # another rank was faster
            self.store.add("news", 1)
        failure.claim_error_report()
        self._declare_hung(hung_ranks, what)

    def _declare_hung(self, hung_ranks: list[int], what: str) -> None:
        """Collects stacks, tells, writes the bundle, ends."""
        stacks = self._gather_stacks(hung_ranks)
        table = self.read_statuses()
        lines = []
        for rank in hung_ranks:
            status = table.get(rank)
            who, where = failure.where_is(rank), ""
            if status:
                who = f" (process {status['process']} on {status['host']})"
                where = f"; it was in {status['phase']}, step {status['step']}"
            lines.append(f"rank {rank}{who} {what}{where}{_state(status)}")
        waiting = sorted({p["waits_in"] for r, p in table.items() if r not in hung_ranks and p["waits_in"]})
        others = f"; other ranks wait in {', '.join(waiting)}" if waiting else ""
        loops = {rank: text.split("\n\nThread ")[0].rstrip() for rank, text in stacks.items()}  # of the main thread
        told = "\n".join(f"stack of rank {rank}:\n{loops.get(rank, '(not known)')}" for rank in hung_ranks[:4])
        bundle = write_bundle(self.folder, "\n".join([*lines, "", told]), table, stacks) if self.ready else ""
        head = (
            f"{'; '.join(lines)}{others} (run.hang_seconds={self.hang_seconds:g})"
            + (f"; details in {bundle}" if bundle else "")
            + "; the same command goes on from the last checkpoint"
        )
        os.write(2, f"skyrl: error: {head}\n{told}\n".encode())
        report_to_launcher(f"{head}\n{told}")
        if self.store is not None:
            self.store.set("end", "1")
            time.sleep(GOODBYE_SECONDS)  # the store may live in this process
        self._end(hung_ranks, table)

    # ---- the others' side

    def exit_if_declared(self) -> None:
        """Another rank has said that it is over: gives our stack. After a hang ends this process with the others."""
        if self._over_at is not None:
            return
        self._over_at = clock.now() + END_SECONDS
        decision = json.loads(self.store.get("decision"))
        if decision["by"] == self.world.rank:
            return
        self._give_stack(self.world.rank, phases.stacks())
        if decision["kind"] != "hang":
            return
        self._fetch_from_neighbours(decision["hung_ranks"])
        while clock.now() < self._over_at and not self.store.check(["end"]):
            time.sleep(0.1)
        if self.world.is_leader:
            time.sleep(GOODBYE_SECONDS)
        self._end(decision["hung_ranks"], self.read_statuses())

    def _give_stack(self, rank: int, text: str) -> None:
        self.store.set(f"stack/{rank}", text[-MAX_STACK:])

    def _gather_stacks(
        self, hung_ranks: list[int], store: Any = None, seconds: float = STACK_SECONDS
    ) -> dict[int, str]:
        """Stacks that arrive in time. Those of hung ranks are fetched from outside where they do not give them."""
        store, me = store if store is not None else self.store, self.world.rank
        if store is None:
            return {me: phases.stacks()}
        store.set(f"stack/{me}", phases.stacks()[-MAX_STACK:])
        wanted = set(range(self.world.size))
        until = clock.now() + seconds
        fetched = False
        while clock.now() < until and not all(store.check([f"stack/{rank}"]) for rank in wanted):
            time.sleep(0.05)
            if hung_ranks and not fetched and clock.now() > until - seconds / 2:
                fetched = True
                self._fetch_from_neighbours(hung_ranks)
        return {r: store.get(f"stack/{r}").decode(errors="replace") for r in wanted if store.check([f"stack/{r}"])}

    def _fetch_from_neighbours(self, hung_ranks: list[int]) -> None:
        """Stacks of hung ranks of this machine whose watcher does not run: faulthandler writes them at a signal."""
        table = self.read_statuses()
        here = [rank for rank, status in table.items() if status["host"] == socket.gethostname()]
        if self.world.rank != min((rank for rank in here if rank not in hung_ranks), default=self.world.rank):
            return
        for rank in hung_ranks:
            if rank == self.world.rank or rank not in here or self.store.check([f"stack/{rank}"]):
                continue
            path = failure.shared_file(f"stack-{rank}")
            if _state(table[rank]) or path is None:
                self._give_stack(rank, f"(none{_state(table[rank])})\n")
                continue
            _kill(table[rank], STACK_SIGNAL)
            time.sleep(0.3)
            self._give_stack(rank, path.read_text() if path.exists() else "")

    def _end(self, hung_ranks: list[int], table: dict[int, dict[str, Any]]) -> None:
        """This process ends, and those of this machine that cannot end by themselves."""
        for rank in hung_ranks:
            if rank in table and rank != self.world.rank:
                _kill(table[rank], signal.SIGKILL)
        os._exit(FAILED)

    # ---- errors, from the main thread

    def leave_bundle(self, report: str) -> str:
        """After an error of this rank: asks the others for their stacks, writes the bundle, returns where it is or why
        there is none; "" before the run folder is known. Takes two seconds at most when the others answer."""
        if not self.ready:
            return ""
        table, stacks = {}, {self.world.rank: phases.stacks()}
        try:
            store = self.words
            if store is not None:
                store.compare_set("decision", "", json.dumps({"by": self.world.rank, "kind": "error"}))
                store.add("news", 1)
            table = self.read_statuses(store)
            stacks = self._gather_stacks([], store, STACK_SECONDS / 2)
        except RuntimeError as error:  # the store is gone with the launcher or rank 0; what we know is ours
            report = f"{report}\n(no word from the other ranks: {str(error).splitlines()[0]})"
        return write_bundle(self.folder, report, table, stacks)

    def report_lost_ranks(self, gone: list[int]) -> None:
        """The line about ranks that have ended without a word, and the bundle."""
        line = failure.about_ranks(gone)
        bundle = self.leave_bundle(line)
        line += f"; details in {bundle}" if bundle else ""
        os.write(2, f"skyrl: error: {line}\n".encode())
        report_to_launcher(line)


def _started(process: int) -> str:
    """When a process of this machine started, in the kernel's ticks; "" of one that is not there."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _kill(status: dict[str, Any], number: int) -> None:
    """Sends a signal to the process of a status, if it is of this machine and still that of the job: its number may be
    another's by now, or mean another process, as in containers of one host name."""
    if status["host"] == socket.gethostname() and status["started"] == _started(status["process"]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(status["process"], number)


def _state(status: dict[str, Any] | None) -> str:
    """What the system says of a process of this machine that does not run."""
    if status is None or status["host"] != socket.gethostname():
        return ""
    try:
        return STATES.get(psutil.Process(status["process"]).status(), "")
    except psutil.Error:
        return "; its process is gone"
