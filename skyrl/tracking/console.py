"""Progress for people: one live line on a terminal, aligned plain lines elsewhere. No numbers are made here."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections import deque
from typing import Any, TextIO

from skyrl.tracking.base import Record, Sink

# (title, width, keys of which the first present counts, format)
_COLUMNS: list[tuple[str, int, tuple[str, ...], str]] = [
    ("loss", 8, ("loss:sum", "loss:mean"), "{:.4f}"),
    ("reward", 7, ("reward:mean",), "{:.3f}"),
    ("accuracy", 8, ("eval/accuracy:mean",), "{:.3f}"),
    ("entropy", 7, ("entropy:mean",), "{:.3f}"),
    ("lp gap", 7, ("logprob_gap:mean",), "{:.1e}"),
    ("tokens/s", 8, ("speed/tokens_per_second:mean",), "{:,.0f}"),
]
_LEFT = 7  # with this, a row fits into 80 columns
_PLAIN_SECONDS = 2.0
_STEPS_AVERAGED = 20


class ConsoleSink(Sink):
    """Prints step, loss, reward, last accuracy, entropy, log-prob gap, tokens/s and time left.

    totals: steps of each phase, for "3/100" and the time left. live: rewrites one line with ANSI codes, and leaves a
    line behind at each evaluation; otherwise prints a line at each evaluation, at the end of a phase, and at most one
    in 2 seconds besides.
    """

    def __init__(self, totals: dict[str, int], *, stream: TextIO, live: bool) -> None:
        self.totals, self.stream, self.live = totals, stream, live
        self._phase = ""
        self._last: dict[str, float] = {}
        self._seconds: deque[float] = deque(maxlen=_STEPS_AVERAGED)
        self._line = ""
        self._printed = -math.inf

    def write(self, record: Record) -> None:
        """Shows one finished step."""
        phase, step = str(record["phase"]), int(record["step"])
        if phase != self._phase:
            self._begin_phase(phase)
        evaluated = any(key.startswith("eval/") for key in record)
        for _, _, keys, _ in _COLUMNS:
            self._last |= {key: float(record[key]) for key in keys if key in record}
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
        if self.live:
            self._print(f"\r\x1b[K{self._fit(f'{self._line}  {name} ...')}")

    def say(self, text: str) -> None:
        """Prints a message above the live line."""
        self._print(f"\r\x1b[K{text}\n{self._fit(self._line)}" if self.live else text + "\n")

    def close(self) -> None:
        """Ends the live line."""
        if self.live:
            self._print("\r\x1b[K" + (self._line + "\n" if self._line else ""))

    def _begin_phase(self, phase: str) -> None:
        self._phase = phase
        self._last = {key: value for key, value in self._last.items() if key.startswith("eval/")}
        self._seconds.clear()
        width = self._step_width(phase)
        titles = [("step", width), *((title, size) for title, size, _, _ in _COLUMNS), ("left", _LEFT)]
        header = "  ".join(f"{title:>{size}}" for title, size in titles)
        self._print(f"\r\x1b[K{self._fit(header)}\n" if self.live else f"{header}\n")

    def _step_width(self, phase: str) -> int:
        phases = {**{name: total for name, total in self.totals.items() if total}, phase: self.totals.get(phase, 9999)}
        return max(len(name) + 2 + 2 * len(str(total)) for name, total in phases.items())

    def _row(self, phase: str, step: int, record: dict[str, Any]) -> str:
        total = self.totals.get(phase)
        place = f"{phase} {step}" + (f"/{total}" if total else "")
        cells = [f"{place:>{self._step_width(phase)}}"]
        for _, size, keys, form in _COLUMNS:
            source = self._last if keys[0].startswith("eval/") else record  # accuracy stays until the next one
            value = next((float(source[key]) for key in keys if key in source), None)
            text = "-" if value is None else form.format(value)
            if text.startswith("-0.") and float(text) == 0:
                text = text[1:]  # a group's advantages sum to zero, and so does the loss, rounding aside
            cells.append(f"{text:>{size}}")
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
