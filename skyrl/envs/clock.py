"""One clock for all deadlines: seconds for which this process has run.

A process that was stopped (`scontrol suspend`, SIGSTOP, a debugger, a laptop that slept) finds every deadline over when
it goes on, though it had no time to keep any. So a thread looks at the clock ten times a second. When it comes late,
and no thread of the process has moved meanwhile, the time between is taken out, and all deadlines lie as far ahead as
before. Code that keeps the interpreter to itself, whether it computes or waits, is no pause, and its time counts: our
thread asks for the interpreter every few milliseconds (sys.getswitchinterval), and the system counts that.
"""

from __future__ import annotations

import os
import resource
import threading
import time

TICK_SECONDS = 0.1
LATE_SECONDS = 1.0  # a turn so late is a pause
# Waits of our threads in a second, from which it was no pause: about 200 while code holds the interpreter, none while
# the process is stopped. A process that hardly gets a processor makes few, and is forgiven as well.
WAITS = 10

# Monotonic time and number of waits at the last turn, and seconds of pauses before it. Replaced as a whole: signal
# handlers read it, which must not wait for a lock.
_turn: tuple[float, int, float] = (0.0, 0, 0.0)
_thread: threading.Thread | None = None


def now() -> float:
    """Monotonic seconds without pauses. Only differences mean something."""
    if _thread is None:
        _start()
    at, waits, paused = _turn
    found = time.monotonic()
    if _is_pause(found - at, waits):
        return at + TICK_SECONDS - paused  # the thread, which is to say so, has not had its turn yet
    return found - paused


def _is_pause(seconds: float, waits: int) -> bool:
    return seconds > TICK_SECONDS + LATE_SECONDS and _waits() - waits < WAITS * seconds


def _waits() -> int:
    """How often threads of this process have waited for something so far (voluntary switches)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


def _start() -> None:
    global _turn, _thread
    _turn = time.monotonic(), _waits(), _turn[2]
    _thread = threading.Thread(target=_run, name="skyrl-clock", daemon=True)
    _thread.start()


def _run() -> None:
    global _turn
    while True:
        time.sleep(TICK_SECONDS)
        at, waits, paused = _turn
        found = time.monotonic()
        if _is_pause(found - at, waits):
            paused += found - at - TICK_SECONDS
        _turn = found, _waits(), paused


def _forget() -> None:
    """In a forked child, which has no such thread, and whose waits are counted anew."""
    global _thread
    _thread = None


os.register_at_fork(after_in_child=_forget)
