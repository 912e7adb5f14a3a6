"""When a run has to stop: by a signal, by a file, by the clock. Who asks, and what the others are told.

Nothing here waits or makes a collective; watchdog.py carries a request to the other ranks, and the loop agrees on it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from skyrl.config.run_rules import read_window
from skyrl.config.schema import RunFolderConfig
from skyrl.run_dir.folder import INTERRUPTED
from skyrl.types import UserError

TEMPORARY = 75  # EX_TEMPFAIL: start me again
# What batch systems send besides SIGTERM: SIGUSR1 or SIGUSR2 before a time limit, SIGXCPU at one of CPU time, SIGHUP at
# the end of a terminal.
OF_BATCH = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)
SIGNALS = (signal.SIGTERM, *OF_BATCH, signal.SIGINT)
STOP_FILE = "stop"
STOP_COMMAND = "skyrl-tx stop"
STOP_FOR_GOOD = "for good"  # in that file, as `skyrl-tx stop` writes it: no reason to queue the job again
END_OF_JOB = "SLURM_JOB_END_TIME"
LONGEST_JOB = 10 * 365 * 86400  # Slurm writes a far date for a job without a limit


def asked_by_file(path: Path) -> str:
    """The reason that a stop file gives, by what is in it."""
    try:
        return STOP_COMMAND if path.read_text(encoding="utf-8").strip() == STOP_FOR_GOOD else "stop file"
    except (OSError, ValueError):
        return "stop file"


def heard_signals() -> list[signal.Signals]:
    """Those of SIGNALS that this process listens to: not a SIGHUP that nohup has told it to ignore."""
    return [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]


@dataclass(frozen=True)
class StopRequest:
    """Why a run stops: what was seen, on which rank, and what that rank was doing."""

    reason: str
    rank: int
    phase: str
    step: int

    @property
    def exit_code(self) -> int:
        """What the process ends with: a person's Ctrl-C or `skyrl-tx stop` is no reason to queue the job again."""
        return INTERRUPTED if self.reason in ("SIGINT", STOP_COMMAND) else TEMPORARY


def save_by(options: RunFolderConfig, environment: Mapping[str, str] = os.environ) -> float | None:
    """The time.monotonic() at which to stop: run.must_save_by, else Slurm's end of this job, or the
    end of run.window if that is sooner, less run.save_margin_seconds. None: no deadline.

    The wall clock is read once, here: if it is set while the run goes on, nothing changes. Raises UserError for a time
    that cannot be read, and for one that leaves nothing before the margin (a job queued again would stop at once,
    over and over); after a restart by torchrun the run stops at once instead.
    """
    wall, now = time.time(), time.monotonic()
    left = _seconds_left(options.must_save_by, environment.get(END_OF_JOB, ""), wall)
    window = read_window(options, datetime.fromtimestamp(wall))
    if window is not None and (left is None or window.begins_in or window.ends_in < left):
        return now + (0.0 if window.begins_in else window.ends_in - options.save_margin_seconds)
    if left is None:
        return None
    name = f"run.must_save_by={options.must_save_by}" if options.must_save_by else f"{END_OF_JOB}"
    margin = options.save_margin_seconds
    if left <= margin and environment.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        raise UserError(
            f"{name}: {left:.0f} s from now, of which run.save_margin_seconds={margin:g} are kept for saving: no time "
            "to work; give the job more time, or lower that margin"
        )
    return now + max(0.0, left - margin)


def _seconds_left(text: str, end_of_job: str, wall: float) -> float | None:
    if text == "never":
        return None
    if not text:
        if not end_of_job.isdecimal() or float(end_of_job) - wall > LONGEST_JOB:
            return None
        return float(end_of_job) - wall
    try:
        return float(text)
    except ValueError:
        pass  # a time, then
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() - wall
    except (ValueError, OverflowError):
        raise UserError(
            f"run.must_save_by={text}: neither a time like 2026-05-01T18:30:00 (this machine's, unless it ends in Z or "
            "an offset) nor seconds from the start, nor never"
        ) from None
