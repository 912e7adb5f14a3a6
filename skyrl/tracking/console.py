"""Progress for people: one live line on a terminal, aligned plain lines elsewhere. No numbers are made here."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections import deque
from typing import Any, NamedTuple, TextIO

from skyrl.tracking.base import Record, Sink


class Column(NamedTuple):
    """A column of the table: `keys` are metrics of which the first present counts. On a narrow terminal those of the
    highest `rank` are left out first."""

    title: str
    width: int
    keys: tuple[str, ...]
    form: str
    rank: int


HELD_OUT = Column("held-out", 8, ("eval/accuracy:mean", "eval/divergence:mean", "eval/nll:mean"), "{:.3f}", 0)
_ENTROPY = Column("entropy", 7, ("entropy:mean",), "{:.3f}", 0)
_GRADIENT = Column("grad norm", 9, ("grad_norm:mean",), "{:.2g}", 1)
_SPEED = Column("tokens/s", 8, ("speed/tokens_per_second:mean",), "{:,.0f}", 2)
_LOSS = Column("loss", 8, ("loss:mean", "distill/divergence:mean", "nll:mean", "loss:sum"), "{:.4f}", 0)
_SUPERVISED = (_LOSS, HELD_OUT, _ENTROPY, _GRADIENT, _SPEED)
# The surrogate loss of RL is not among them: on fresh samples it is 0 whatever the policy learns.
_COLUMNS = {
    "rl": (
        Column("reward", 6, ("reward:mean",), "{:.3f}", 0),
        HELD_OUT,
        _ENTROPY,
        Column("length", 6, ("length:mean",), "{:.1f}", 0),
        Column("trunc", 5, ("cut_by_length:mean",), "{:.0%}", 0),
        Column("KL", 7, ("kl_reference:mean", "kl/behaviour_reference:mean", "approx_kl:mean"), "{:.1e}", 4),
        _GRADIENT,
        Column("gap", 7, ("logprob_gap:mean",), "{:.1e}", 3),
        _SPEED,
    ),
    "control": (
        Column("reward", 9, ("reward:mean",), "{:,.1f}", 0),
        Column("held-out", 9, ("eval/reward:mean",), "{:,.1f}", 0),
        Column("length", 7, ("length:mean",), "{:,.1f}", 1),
        _ENTROPY,
        Column("KL", 7, ("approx_kl:mean",), "{:.1e}", 2),
        _GRADIENT,
        Column("steps/s", 8, ("speed/env_steps_per_second:mean",), "{:,.0f}", 2),
    ),
    **dict.fromkeys(("warmup", "sft", "dpo", "reward_model", "distill"), _SUPERVISED),
}
_LEFT = 7
_PLAIN_SECONDS = 2.0
_PROGRESS_SECONDS = 15.0  # between plain lines about a span that is under way, and before the first
_LIVE_SECONDS = 0.2
_STEPS_AVERAGED = 20


class ConsoleSink(Sink):
    """Prints step, reward, last held-out accuracy (divergence or nll where there is none), entropy, lengths, gradient,
    gap, tokens/s and time left.

    totals: the last step of each phase, for "3/100" and the time left. live: rewrites one line with ANSI codes, and
    leaves a line behind at each evaluation; otherwise prints a line at each evaluation, at the end of a phase, and at
    most one in 2 seconds besides.
    """

    def __init__(self, totals: dict[str, int], *, stream: TextIO, live: bool) -> None:
        self.totals, self.stream, self.live = totals, stream, live
        self._phase = ""
        self._last: dict[str, float] = {}
        self._seconds: deque[float] = deque(maxlen=_STEPS_AVERAGED)
        self._line = ""
        self._printed = self._told = -math.inf

    def write(self, record: Record) -> None:
        """Shows one finished step."""
        phase, step = str(record["phase"]), int(record["step"])
        if phase == "evaluate":  # of which there is a table
            return
        if phase != self._phase:
            self._begin_phase(phase)
        evaluated = any(key.startswith("eval/") for key in record)
        self._last |= {key: float(record[key]) for key in HELD_OUT.keys if key in record}
        if step > 0:  # step 0 is the evaluation before the first step
            self._seconds.append(float(record.get("time/step_seconds:sum", 0.0)))
        self._line = self._row(phase, step, record)
        lasting = evaluated or step >= self.totals.get(phase, math.inf)
        if self.live:
            self._print(f"\r\x1b[K{self._fit(self._line)}" + ("\n" if lasting else ""))
            if lasting:
                self._line = ""
        elif lasting or time.monotonic() - self._printed >= _PLAIN_SECONDS:
            self._print(self._line + "\n")
            self._printed = time.monotonic()

    def begin(self, name: str) -> None:
        """Names what is under way at the end of the live line."""
        self._told = time.monotonic()
        if self.live:
            self._under_way(f"{name} ...")

    def progress(self, name: str, done: int, total: int) -> None:
        """Shows how far the span under way is: on the live line, or in a plain line once in a while."""
        now = time.monotonic()
        if now - self._told < (_LIVE_SECONDS if self.live else _PROGRESS_SECONDS):
            return
        self._told = now
        if self.live:
            self._under_way(f"{name} {done}/{total}")
        else:
            self._print(f"  {name}: {done} of {total}\n")

    def say(self, text: str) -> None:
        """Prints a message above the live line."""
        self._print(f"\r\x1b[K{text}\n{self._fit(self._line)}" if self.live else text + "\n")

    def close(self) -> None:
        """Ends the live line."""
        if self.live:
            self._print("\r\x1b[K" + (self._line + "\n" if self._line else ""))

    def _under_way(self, text: str) -> None:
        room = shutil.get_terminal_size().columns - len(text) - 3
        self._print(f"\r\x1b[K{self._line[: max(room, 0)]}  {text}")

    def _columns(self, phase: str) -> list[Column]:
        """The columns that fit; all of them where lines need not."""
        columns = list(_COLUMNS.get(phase, _COLUMNS["rl"]))
        room = shutil.get_terminal_size().columns - 1 if self.live else math.inf
        while self._step_width() + _LEFT + 2 + sum(column.width + 2 for column in columns) > room:
            worst = max(columns, key=lambda column: column.rank)
            if not worst.rank:
                break
            columns.remove(worst)
        return columns

    def _begin_phase(self, phase: str) -> None:
        self._phase = phase
        self._seconds.clear()
        titles = [("step", self._step_width()), *((c.title, c.width) for c in self._columns(phase)), ("left", _LEFT)]
        header = "  ".join(f"{title:>{size}}" for title, size in titles)
        self._print(f"\r\x1b[K{self._fit(header)}\n" if self.live else f"{header}\n")

    def _step_width(self) -> int:
        totals = {name: total for name, total in self.totals.items() if total} | {
            self._phase: self.totals.get(self._phase, 9999)
        }
        return max(len(name) + 2 + 2 * len(str(total)) for name, total in totals.items())

    def _row(self, phase: str, step: int, record: dict[str, Any]) -> str:
        total = self.totals.get(phase)
        place = f"{phase} {step}" + (f"/{total}" if total else "")
        cells = [f"{place:>{self._step_width()}}"]
        for column in self._columns(phase):
            source = self._last if column is HELD_OUT else record  # it stays until the next one
            value = next((float(source[key]) for key in column.keys if key in source), None)
            text = "-" if value is None else column.form.format(value)
            cells.append(f"{text:>{column.width}}")
        left = (total - step) * statistics.fmean(self._seconds) if total and self._seconds else None
        return "  ".join([*cells, f"{duration(left):>{_LEFT}}"])

    def _fit(self, line: str) -> str:
        # A line that wraps could not be rewritten.
        return line[: max(shutil.get_terminal_size().columns - 1, 20)]

    def _print(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def duration(seconds: float | None) -> str:
    """Seconds as "42s", "3m 05s" or "2h 10m"; "-" for None."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"
