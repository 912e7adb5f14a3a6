"""`skyrl-tx top`: a run while it goes, in a terminal: curves, what each rank does, the last rollouts, advisories.

Only escape codes that every terminal knows; the screen is given back however the program ends. A pipe gets one frame.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from skyrl.args import Parser, path_arg
from skyrl.report.charts import braille, curves_of, cut
from skyrl.report.show import step_seconds
from skyrl.run_dir.reader import RunReader, find_run, total_steps
from skyrl.tracking.console import duration

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the second screen without a cursor, and back
LEAST = (40, 10)  # columns and lines
METRICS, SECONDS = "metrics.jsonl", 2.0  # between two looks
TAIL = 1 << 16  # bytes of a rank's file that are read for its last step


def top(args: Sequence[str]) -> None:
    """Runs the command line. Raises UserError."""
    p = Parser(prog="skyrl-tx top", description="A run while it goes: curves, ranks, rollouts, advisories. q leaves.")
    p.add_argument("run", type=path_arg, help="a run folder, or the name of one in runs")
    p.add_argument("--once", action="store_true", help="prints one frame, as it does into a pipe")
    given = p.parse_args(list(args))
    view = LiveRun(find_run(given.run, "top"))
    if given.once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        view.poll()
        print("\n".join(line.rstrip() for line in frame(view, *_size())))
        return
    with contextlib.suppress(KeyboardInterrupt), _screen():
        left = False
        while not left:
            view.poll()
            shown = "\x1b[K\r\n".join(frame(view, *_size()))
            sys.stdout.write(f"\x1b[H{shown}\x1b[K\x1b[J")
            sys.stdout.flush()
            left = _wait(SECONDS)


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """The second screen, and keys as they are pressed: Ctrl-C is one, so is Ctrl-Z, which would leave the shell with
    our screen."""
    stdin, before = sys.stdin.fileno(), termios.tcgetattr(sys.stdin.fileno())
    handlers = {n: signal.signal(n, lambda n, _: sys.exit(128 + n)) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        mode = termios.tcgetattr(stdin)
        mode[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
        termios.tcsetattr(stdin, termios.TCSADRAIN, mode)
        sys.stdout.write(ENTER)
        yield
    finally:
        with contextlib.suppress(OSError):  # the terminal may be gone
            sys.stdout.write(LEAVE)
            sys.stdout.flush()
            termios.tcsetattr(stdin, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _wait(seconds: float) -> bool:
    """Until the next look, a key or another size of the window; whether q was pressed, or there is no keyboard."""
    size, end = _size(), time.monotonic() + seconds
    while time.monotonic() < end and _size() == size:
        if select.select([sys.stdin], [], [], 0.2)[0]:
            keys = os.read(sys.stdin.fileno(), 64)
            return not keys or b"q" in keys.lower() or b"\x03" in keys
    return False


@dataclass
class LiveRun:
    """What was read of a run so far; `poll` reads what is new."""

    reader: RunReader
    records: list[dict[str, Any]] = field(default_factory=list)
    byte: int = 0
    seen: bytes = b""  # the last of what was read

    def poll(self) -> None:
        """Reads on. A run that has gone on from a checkpoint has cut its metrics back: then all are read again. Raises
        UserError for a file that is damaged."""
        if self.reader.before(METRICS, self.byte) != self.seen:
            self.records, self.byte = [], 0
        new, self.byte = self.reader.metrics(self.byte)
        self.records, self.seen = [*self.records, *new], self.reader.before(METRICS, self.byte)


def frame(view: LiveRun, columns: int, lines: int) -> list[str]:
    """One picture, at most `lines` lines of `columns` characters."""
    if columns < LEAST[0] or lines < LEAST[1]:
        return [cut(f"{LEAST[0]} x {LEAST[1]} at least", columns)]
    end = [cut(f"! {one['name']}: {one['text']}", columns) for one in view.reader.advisories()[-2:]]
    rollouts = _rollouts(view.reader, max(2, lines // 6), columns)
    ranks = _ranks(view.reader, columns, max(1, lines // 8))
    rest = lines - 3 - len(end) - len(rollouts) - len(ranks)
    body = _charts(view.records, columns, rest) if view.records else ["", "no step has ended yet"]
    shown = [_head(view, columns), *body[:rest], *ranks, *rollouts, *end]
    return [*shown, *[""] * (lines - 1 - len(shown)), cut("q leaves", columns)]


def _head(view: LiveRun, columns: int) -> str:
    last, state = (view.records or [{}])[-1], view.reader.state()
    phase, step = str(last.get("phase", "")), int(last.get("step", 0))
    total = total_steps(view.reader.config(), phase)
    text = f"{view.reader.name}  {state}  {phase} step {step}" + (f"/{total}" if total else "")
    if (seconds := step_seconds(view.records)) and total and state == "running":
        text += f"  {duration(seconds * (total - step))} left"
    with contextlib.suppress(OSError):
        age = time.time() - (view.reader.path / METRICS).stat().st_mtime
        text += f"  last step {duration(max(0.0, age))} ago"
    return cut(text, columns)


def _charts(records: Sequence[dict[str, Any]], columns: int, lines: int) -> list[str]:
    """As many curves as there is room for, side by side."""
    curves = curves_of(records)
    across = max(1, columns // 38)
    width = columns // across - 2
    down = max(1, min(-(-len(curves) // across), lines // 4))
    height = max(1, min(8, lines // down - 1))
    out = []
    for row in range(0, min(len(curves), down * across), across):
        cells = []
        for title, points in curves[row : row + across]:
            low, high = min(y for _, y in points), max(y for _, y in points)
            label = cut(f"{title} {points[-1][1]:.3g} ({low:.3g} to {high:.3g})", width)
            cells.append([label, *braille(points, width, height)])
        out += ["  ".join(f"{cell[n]:<{width}}" for cell in cells) for n in range(height + 1)]
    return out


def _ranks(reader: RunReader, columns: int, most: int) -> list[str]:
    """What each rank's last step went to, and its load: "rank 0 [generation...training......] cpu 99% 1.2 GiB"."""
    lines = []
    for rank in reader.system_ranks()[:most]:
        file = f"system/rank-{rank}.jsonl"
        for one in reader.lines(file, max(0, reader.size(file) - TAIL))[0][-1:]:
            found = one.get("spans", [])
            spans = [s for s in found if not any(o[1] <= s[1] and s[2] <= o[2] for o in found if o is not s)]
            loads = [("cpu", one.get("cpu"), one.get("memory_gib"))]
            loads += [("gpu", gpu.get("util"), gpu.get("memory_gib")) for gpu in one.get("gpus") or ()]
            load = " ".join(f"{name} {used or 0:.0f}% {gib or 0:.1f} GiB" for name, used, gib in loads)
            width, total = max(10, columns - len(load) - 12), sum(s[2] - s[1] for s in spans) or 1.0
            sizes = [(str(s[0]), round((s[2] - s[1]) / total * width)) for s in spans]
            bar = "".join(cut(name, size).ljust(size, ".") for name, size in sizes)
            lines.append(cut(f"rank {rank} [{bar}] {load}", columns))
    return lines


def _rollouts(reader: RunReader, count: int, columns: int) -> list[str]:
    """The last episodes that were dumped, one a line: reward, and how the last answer ends."""
    names = [name for name in reader.dumps() if name.isdecimal()]
    lines = []
    with contextlib.suppress(OSError, ValueError, IndexError, TypeError):  # damaged, or cut back at this moment
        for one in islice(reader.rollouts(names[-1]), count):
            text = one["turns"][-1]["text"] if one["turns"] else one["invalid"]
            lines.append(cut(f"{float(one['reward']):>7.3g} {one['stop']:<7} {one['uid']}: {text[:1000]}", columns))
    return [f"rollouts of step {int(names[-1])}", *lines] if lines else []


def _size() -> os.terminal_size:
    """Columns and lines of the terminal now. COLUMNS and LINES, which may be from before a resize, count in a pipe."""
    try:
        return os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        return shutil.get_terminal_size((80, 24))
