"""One clock for all deadlines: seconds for which this process has run.

A process that was stopped (`scontrol suspend`, SIGSTOP, a debugger, a laptop that slept) finds every deadline over when
it goes on, though it had no time to keep any. So a thread looks at the clock ten times a second. When it comes late,
and the process has used no processor meanwhile, the time between is taken out, and all deadlines lie as far ahead as
before. Code that keeps the other threads from running does use the processor: its time counts.
"""

from __future__ import annotations

import os
import threading
import time

TICK_SECONDS = 0.1
LATE_SECONDS = 1.0  # a turn so late is a pause
# Part of the time between, on a processor, from which it was no pause. A loaded machine gives a process a small part.
BUSY = 0.05

# Monotonic time and processor time of the last turn, and seconds of pauses before it. Replaced as a whole: signal
# handlers read it, which must not wait for a lock.
_turn: tuple[float, float, float] = (0.0, 0.0, 0.0)
_thread: threading.Thread | None = None


def now() -> float:
    """Monotonic seconds without pauses. Only differences mean something."""
    if _thread is None:
        _start()
    at, used, paused = _turn
    found = time.monotonic()
    if _is_pause(found - at, used):
        return at + TICK_SECONDS - paused  # the thread, which is to say so, has not had its turn yet
    return found - paused


def pauses() -> float:
    """Seconds for which this process has been stopped, since it first asked what time it is."""
    return time.monotonic() - now()


def _is_pause(seconds: float, used: float) -> bool:
    return seconds > TICK_SECONDS + LATE_SECONDS and time.process_time() - used < BUSY * seconds


def _start() -> None:
    global _turn, _thread
    _turn = time.monotonic(), time.process_time(), _turn[2]
    _thread = threading.Thread(target=_run, name="skyrl-clock", daemon=True)
    _thread.start()


def _run() -> None:
    global _turn
    while True:
        time.sleep(TICK_SECONDS)
        at, used, paused = _turn
        found = time.monotonic()
        if _is_pause(found - at, used):
            paused += found - at - TICK_SECONDS
        _turn = found, time.process_time(), paused


def _forget() -> None:
    """In a forked child, which has no such thread, and whose processor time begins anew."""
    global _thread
    _thread = None


os.register_at_fork(after_in_child=_forget)
