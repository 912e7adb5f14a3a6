"""A thread beside the loop, on every rank: hears signals, the clock and the other ranks, and sees when one hangs.

It makes no collective. What ranks tell each other goes through keys of the store in which they met (torchrun's, or rank
0's), over a connection of its own, twice a second: the status of this rank, that the run shall stop, that it is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import DistError

from skyrl.distributed import env, failure, peers, phases
from skyrl.distributed.hang_monitor import HangMonitor
from skyrl.distributed.init import World, own_store
from skyrl.distributed.stop import (
    INTERRUPTED,
    SIGNALS,
    STOP_FILE,
    StopRequest,
    asked_by_file,
    heard_signals,
)
from skyrl.envs import clock
from skyrl.run_dir import mark_stop

LISTEN_SECONDS = 0.1
EXCHANGE_SECONDS = 0.5
STOP_FILE_SECONDS = 1.0
AGAIN_SECONDS = 2.0  # torchrun passes on a Ctrl-C that the terminal has sent us already
STORE_SECONDS = 20.0
CRASH_REPORT_SECONDS = 2.0

_runs = 0  # of this process; ranks count alike


class Watchdog:
    """Knows whether this rank has been asked to stop (`stop_request`), where the others are, and who hangs.

    One for each run; `start` takes over stop.SIGNALS, `close` gives them back.
    """

    def __init__(
        self, world: World, folder: Path, *, hang_seconds: float, patience: float, save_by: float | None
    ) -> None:
        global _runs
        _runs += 1
        phases.reset()
        phases.status.patience = patience
        self.world, self.folder, self.save_by = world, Path(folder), save_by
        self.stop_request: StopRequest | None = None
        self.stop_requested_at = 0.0
        self.claimed = False  # rank 0 holds the run folder
        # One connection for each thread. Made now: to connect to a store that is gone takes as long as to join.
        self.store, words = own_store(f"watch/{_runs}"), own_store(f"watch/{_runs}")
        if self.store is not None:
            self.store.set_timeout(timedelta(seconds=STORE_SECONDS))
            words.set_timeout(timedelta(seconds=CRASH_REPORT_SECONDS))
        self.hang_monitor = HangMonitor(world, self.folder, self.store, words, hang_seconds)
        self._unsent = False
        self._news = 0
        self._turns = 0
        self._sent: tuple[str, int] = ("", 0)
        self.turned_at = self._next_exchange = self._next_file = clock.now()
        self._closing = self._disarmed = False
        self._before: dict[int, Any] = {}
        self._signal_sockets: tuple[socket.socket, socket.socket] | None = None
        self._thread = threading.Thread(target=self._run, name=phases.WATCHERS[0], daemon=True)

    # ---- from the main thread

    def start(self) -> None:
        """Begins to listen. A watch of an earlier run that failed ends."""
        if env.watchdog is not None:
            env.watchdog.close()
        if threading.current_thread() is threading.main_thread():
            self._signal_sockets = socket.socketpair()
            for one in self._signal_sockets:
                one.setblocking(False)
            # Python runs handlers between two lines of the main thread, which may wait for other ranks for long. This
            # descriptor is written at once, and the handlers themselves do nothing.
            signal.set_wakeup_fd(self._signal_sockets[1].fileno(), warn_on_full_buffer=False)
            for number in heard_signals():
                self._before[number] = signal.signal(number, _ignore)
            os.register_at_fork(after_in_child=self._restore_signals_in_child)
        self.hang_monitor.prepare()
        env.watchdog = self
        failure.describe_rank = self.hang_monitor.describe
        self._thread.start()

    def close(self) -> None:
        """Gives the signals back and ends the thread."""
        self._closing, env.watchdog = True, None
        self.disarm()
        self._thread.join(STORE_SECONDS)
        failure.describe_rank = None
        if self._signal_sockets is not None:
            for one in self._signal_sockets:
                one.close()
            self._signal_sockets = None

    def disarm(self) -> None:
        """After an error: gives the signals back and suspects nobody any more. `crash_report` still works."""
        self._disarmed = True
        self.hang_monitor.hang_seconds = 0.0
        if self._before:
            signal.set_wakeup_fd(-1)
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._before = {}

    def claim(self) -> None:
        """The run folder is this run's: stop files there are for us, and crash bundles may be written."""
        self.claimed = self.hang_monitor.ready = True

    def stop_requested(self) -> bool:
        """Whether this rank has heard that the run shall stop. Not the same on every rank at a given moment."""
        return self.stop_request is not None

    def crash_report(self, report: str) -> tuple[str, str]:
        """After an error of this rank: where it was (" in <phase>, step <n>") and where the crash bundle is."""
        status = phases.status
        place = f" in {status.phase}, step {status.step}"
        bundle = self.hang_monitor.leave_bundle(f"rank {self.world.rank}{place}:\n{report}")
        return place, f"; details in {bundle}" if bundle else ""

    # ---- the thread

    def _run(self) -> None:
        while not self._closing:
            try:
                self._turn()
            except DistError:
                # The store lives in the launcher or in rank 0: it is gone, and so are we soon. Signals still count.
                self.store = self.hang_monitor.store = None

    def _turn(self) -> None:
        self._listen()
        now = self.turned_at = clock.now()
        if peers.current is not None and peers.current.verdict is not None:
            self.hang_monitor.accuse(*peers.current.verdict)
        if self.save_by is not None and time.monotonic() >= self.save_by and self.stop_request is None:
            self._ask("deadline")
        if self.world.is_leader and now >= self._next_file:
            self._next_file = now + STOP_FILE_SECONDS
            if self.claimed and self.stop_request is None and (self.folder / STOP_FILE).exists():
                self._ask(asked_by_file(self.folder / STOP_FILE))
        still, waits = phases.progress(now)
        if now >= self._next_exchange or self._sent != (phases.status.phase, phases.status.step):
            self._next_exchange = now + EXCHANGE_SECONDS
            self._exchange(still, waits)
            self.hang_monitor.check(now, still, waits)
        if self.stop_request is not None and phases.status.phase == phases.OPENING and not self._unsent:
            self._leave_at_once(self.stop_request.exit_code)

    def _exchange(self, still: float, waits: str) -> None:
        if self.store is None:
            self._unsent = False
            return
        self._turns += 1
        self._sent = phases.status.phase, phases.status.step
        text = json.dumps(self.hang_monitor.report_status(self._turns, still, waits))
        self.store.set(f"status/{self.world.rank}", text)
        if self._unsent and self.stop_request is not None:
            self.store.compare_set("stop", "", json.dumps(asdict(self.stop_request)))
            self.store.add("news", 1)
            self._unsent = False
        news = self.store.add("news", 0)
        if news == self._news:
            return
        self._news = news
        if self.stop_request is None and self.store.check(["stop"]):
            self.stop_requested_at = time.monotonic()
            self.stop_request = StopRequest(**json.loads(self.store.get("stop")))
        if self.store.check(["decision"]):
            self.hang_monitor.exit_if_declared()

    def _ask(self, reason: str) -> None:
        """Wants a stop, here at once and elsewhere with the next exchange."""
        status = phases.status
        self.stop_requested_at = time.monotonic()
        self.stop_request = StopRequest(reason, self.world.rank, status.phase, status.step)
        self._unsent = True
        self._next_exchange = 0.0

    # ---- signals

    def _listen(self) -> None:
        if self._signal_sockets is None:
            time.sleep(LISTEN_SECONDS)
            return
        ready, _, _ = select.select([self._signal_sockets[0]], [], [], LISTEN_SECONDS)
        if ready:
            with contextlib.suppress(BlockingIOError):
                for number in self._signal_sockets[0].recv(4096):
                    self._signal(number)

    def _signal(self, number: int) -> None:
        if number not in SIGNALS or self._disarmed:
            return  # once the main thread has an error it decides what is told, and when we end
        name = signal.Signals(number).name
        if number == signal.SIGTERM and self.stop_request is None:
            gone = failure.ended_ranks()
            if gone or failure.error_reported():
                self._end_with_the_others(gone)
        if self.stop_request is None:
            self._ask(name)
            if number == signal.SIGINT and self.world.is_leader and phases.status.phase != phases.OPENING:
                _say("interrupted: stops with a save; once more ends at once")
        elif number == signal.SIGINT and time.monotonic() - self.stop_requested_at > AGAIN_SECONDS:
            if failure.claim_error_report():
                _say("error: interrupted; the same command goes on from the last checkpoint")
            os._exit(INTERRUPTED)

    def _end_with_the_others(self, gone: list[int]) -> None:
        """torchrun ends us because another rank has ended; if it could not say so itself, we do."""
        if gone and not failure.error_reported() and failure.claim_error_report():
            failure.reporting = True  # the main thread, which soon sees the lost rank too, must not end us before
            self.hang_monitor.report_lost_ranks(gone)
        os._exit(128 + signal.SIGTERM)

    def _leave_at_once(self, code: int) -> None:
        """Nothing has been done yet that could be lost: loading is not waited for."""
        if self.world.is_leader:
            assert self.stop_request is not None
            if self.claimed:
                with contextlib.suppress(OSError):
                    mark_stop(self.folder, self.stop_request.reason, self.stop_request.exit_code)
            _say(f"stopped by {self.stop_request.reason} while opening; the same command starts again")
        elif self.store is not None:
            time.sleep(2 * EXCHANGE_SECONDS)
        os._exit(code)

    def _restore_signals_in_child(self) -> None:
        """In a forked child: it must die of signals as any process does, and not speak for us."""
        if self._signal_sockets is None:
            return
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) is _ignore:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _ignore(number: int, frame: FrameType | None) -> None:
    """What arrives is read from the wakeup descriptor."""


def _say(text: str) -> None:
    # not print: the main thread may hold the stream's lock
    os.write(2, f"skyrl: {text}\n".encode())
