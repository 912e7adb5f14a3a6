"""What this rank is doing, and since when it stands still. Told by the loop, read by the watchdog's thread.

Progress is a heartbeat (a step of the sampler), a change of phase, an agreement begun or ended, or another line of code
on the main thread's stack. Durations are of the clock that leaves pauses out; a wall clock that jumps changes nothing.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from skyrl.envs import clock

OPENING, LOADING, SAVING, FINISHING, BETWEEN_PHASES = "opening", "loading", "saving", "finishing", "between phases"
IN_HOOK = "a hook of the user's"
SLOW = (OPENING, LOADING, SAVING, FINISHING, IN_HOOK)  # disks and compilers: nothing there says that it goes on
PLAYING = ("generation", "evaluation")
SLOW_FACTOR = 10  # how much longer these may stand still, and whatever is done for the first time
LEARNED_FACTOR = 3  # of the longest stretch in that phase that ended well: work queued on a GPU shows no progress
LIBRARY = "/torch/distributed/"
LOGGER = "/c10d_logger.py"  # wraps every collective
WATCHERS = ("skyrl-watch", "skyrl-peers", "skyrl-clock")
SHORT_WAIT = 0.002  # seconds; shorter waits for other ranks are not kept
BETWEEN = ("/torch/_ops.py", "/torch/utils/_contextlib.py")  # stand between a collective and its caller


@dataclass
class RankStatus:
    """This rank's phase and its progress. Written by the main thread, but for `moved`, `stack` and `longest`."""

    phase: str = OPENING
    step: int = 0
    since: float = field(default_factory=clock.now)
    calls: int = 0  # agreements begun: the same number on every rank that is as far
    waits: str = ""  # the agreement it is in
    heartbeats: int = 0
    patience: float = 0.0  # seconds that a call of an environment may take by the user's own options
    seen: set[str] = field(default_factory=set)  # phases gone through once
    moved: float = field(default_factory=clock.now)
    stack: tuple[Any, ...] = ()
    longest: dict[str, float] = field(default_factory=dict)
    thread: int = field(default_factory=threading.get_ident)  # that runs the loop
    collective_bytes: int = 0  # given to collectives and not yet asked for by `collectives`
    waited: deque[tuple[str, float, float]] = field(default_factory=lambda: deque(maxlen=1000))  # newest waits


status = RankStatus()


def reset() -> None:
    """A new run begins in this process."""
    fresh = RankStatus()
    vars(status).update(vars(fresh))


def enter(phase: str, step: int) -> tuple[str, int]:
    """This rank is in `phase` of step `step` from now on; returns where it was."""
    before = status.phase, status.step
    status.seen.add(status.phase)
    status.phase, status.step, status.since = phase, step, clock.now()
    status.heartbeats += 1
    return before


@contextmanager
def inside(phase: str, step: int) -> Iterator[None]:
    """`phase` for the time of the block; after an error in it the phase stays what it was when things went wrong."""
    before = enter(phase, step)
    yield
    enter(*before)


def heartbeat() -> None:
    """Something was done that can be done again and again; a single assignment."""
    status.heartbeats += 1


@contextmanager
def waiting(name: str, num_bytes: int = 0) -> Iterator[None]:
    """Around a collective: this rank waits for the others. `num_bytes`: what it gives to it, where that is known."""
    status.calls += 1
    status.collective_bytes += num_bytes
    outer, status.waits = status.waits, name
    start = time.perf_counter()
    try:
        yield
    finally:
        status.waits = outer
        if (end := time.perf_counter()) - start > SHORT_WAIT:
            status.waited.append((f"wait {name}", start, end))


def collectives() -> tuple[int, list[tuple[str, float, float]]]:
    """Since the last call: bytes given to collectives whose size is known (sums, exchanges, the replicated strategy's
    gradients), and the longer waits in agreements, as (name, begin, end) by time.perf_counter."""
    found = status.collective_bytes, list(status.waited)
    status.collective_bytes = 0
    status.waited.clear()
    return found


def progress(now: float) -> tuple[float, str]:
    """(seconds without progress, the collective that this rank waits in or ""). Called by the watcher's thread."""
    stack = (status.heartbeats, status.calls, status.waits, status.phase, *_signature(main_frame()))
    if stack != status.stack:
        still = now - status.moved
        if status.stack and status.stack[3] == status.phase:
            status.longest[status.phase] = max(status.longest.get(status.phase, 0.0), still)
        status.stack, status.moved = stack, now
    return now - status.moved, status.waits or _waits_inside(main_frame())


def timeout(hang_seconds: float) -> float:
    """How long this rank may stand still where it is now."""
    least = max(hang_seconds, status.patience if status.phase in PLAYING else 0.0)
    if status.phase in SLOW or status.phase not in status.seen:
        return SLOW_FACTOR * least
    return max(least, LEARNED_FACTOR * status.longest.get(status.phase, 0.0))


def main_frame() -> FrameType | None:
    """The innermost frame of the thread that runs the loop."""
    return sys._current_frames().get(status.thread)


def _signature(frame: FrameType | None) -> list[int]:
    out = []
    while frame is not None:
        out += [id(frame.f_code), frame.f_lasti]
        frame = frame.f_back
    return out


def _waits_inside(frame: FrameType | None) -> str:
    """The function of torch.distributed that the main thread is in; "" when it runs anything else."""
    name = ""
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        if LIBRARY in file:
            name = name if file.endswith(LOGGER) else frame.f_code.co_name
        elif name or not file.endswith(BETWEEN):
            break
        frame = frame.f_back
    return name


def stacks() -> str:
    """Every thread's Python stack but the watchers', the main one first, innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = status.thread
    frames = sorted(sys._current_frames().items(), key=lambda pair: (pair[0] != main, pair[0]))
    parts = []
    for ident, frame in frames:
        if names.get(ident) not in WATCHERS:
            parts.append(f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)
