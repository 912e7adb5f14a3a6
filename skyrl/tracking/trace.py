"""Timelines in Chrome's trace format, for ui.perfetto.dev: of the steps of a run, of the requests of a server."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from typing import Any

from skyrl.args import Parser, path_arg
from skyrl.files import explain_write, write_atomic
from skyrl.run_dir import find_run
from skyrl.types import UserError

SHOWN = ("cpu", "memory_gib", "host_memory_gib", "collective_bytes")  # beside the spans, as curves
REQUESTS = 20_000  # newest ones that a server remembers


def chrome_trace(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The spans and a few curves of lines as `RunReader.system` gives them: a row for each rank, times in microseconds
    since the first span (otherData.start, Unix seconds)."""
    lines = [line for line in lines if line.get("spans")]
    start = min((span[1] for line in lines for span in line["spans"]), default=0.0)
    events: list[dict[str, Any]] = []
    for rank in sorted({line["rank"] for line in lines}):
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
    for line in lines:
        whole = [f"step {line['step']} ({line['phase']})", min(span[1] for span in line["spans"]), line["time"]]
        for name, begin, end in [whole, *sorted(line["spans"], key=lambda span: (span[1], -span[2]))]:
            times = {"ts": round((begin - start) * 1e6, 1), "dur": round(max(0.0, end - begin) * 1e6, 1)}
            events.append({"ph": "X", "name": name, "pid": line["rank"], "tid": 0, **times})
        curves = {key: line[key] for key in SHOWN if key in line}
        for number, gpu in enumerate(line.get("gpus", ())):
            curves |= {f"gpu {number} {key}": value for key, value in gpu.items()}
        for name, value in curves.items():
            at = round((line["time"] - start) * 1e6, 1)
            events.append({"ph": "C", "pid": line["rank"], "name": name, "ts": at, "args": {"value": value}})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"start": start}}


def trace(args: list[str]) -> None:
    """The command line of skyrl-tx trace. Raises UserError."""
    p = Parser(prog="skyrl-tx trace", description="The timeline of a run's steps, for ui.perfetto.dev.")
    p.add_argument("run", type=path_arg, help="a run folder, or the name of one in runs")
    p.add_argument("--steps", default="", help="A:B, from step A to step B (default: the last 20)")
    p.add_argument("-o", "--output", type=path_arg, default="trace.json", help="the file to write (trace.json)")
    given = p.parse_args(args)
    run = find_run(given.run, "trace")
    run.check_outside(given.output, f"trace -o {given.output}")
    lines = [line for line in run.system() if line.get("spans") and line.keys() >= {"time", "phase"}]
    if not lines:
        raise UserError(f"trace: {run.path} has no system/rank-*.jsonl: was it run with tracking.system=false?")
    steps = sorted({line["step"] for line in lines})
    match = re.fullmatch(r"(\d+):(\d+)", given.steps or f"{max(steps[-20:][0], 0)}:{steps[-1]}")
    wanted = [one for one in steps if match and int(match[1]) <= one <= int(match[2])]
    if not wanted:
        raise UserError(
            f"trace --steps {given.steps}: give A:B within {steps[0]}:{steps[-1]}, the steps that were kept"
        )
    made = chrome_trace(line for line in lines if line["step"] in wanted)
    with explain_write(given.output, "give another -o", "trace"):
        write_atomic(given.output, json.dumps(made))
    print(f"wrote {given.output}: steps {wanted[0]} to {wanted[-1]}; open it in ui.perfetto.dev or chrome://tracing")


class RequestLog:
    """The newest requests of a server, for timelines, and counts of all since its start, for Prometheus. `now`: the
    clock of the times given. Its callers hold a lock."""

    def __init__(self, now: float) -> None:
        self._wall = time.time() - now
        self._newest: deque[tuple[str, str, float, float, float]] = deque(maxlen=REQUESTS)
        self._totals: defaultdict[str, float] = defaultdict(float)

    def add(self, pending: Any) -> None:
        """Takes a request that is settled (service/pending.py)."""
        kind = type(pending.request).__name__
        started = pending.started or pending.finished  # one that never ran has only waited
        self._newest.append((pending.session, kind, pending.arrived, started, pending.finished))
        self._totals[f"requests/{kind}/{pending.outcome.state}:total"] += 1
        self._totals[f"requests/{kind}/seconds:total"] += pending.finished - pending.arrived

    def values(self) -> dict[str, float]:
        """Requests and their seconds from arrival to answer, by kind, since the start."""
        return dict(self._totals)

    def trace(self, session: str) -> dict[str, Any]:
        """The requests of a session: how long each has waited, and run, a row for each kind."""
        mine = [one for one in list(self._newest) if one[0] == session]
        start, kinds = min((one[2] for one in mine), default=0.0), sorted({one[1] for one in mine})
        events: list[dict[str, Any]] = []
        for number, kind in enumerate(kinds):
            events.append({"ph": "M", "pid": 0, "tid": number, "name": "thread_name", "args": {"name": kind}})
        for count, (_, kind, arrived, started, finished) in enumerate(mine):
            for name, begin, end in (("waits", arrived, started), ("runs", started, finished)):
                # async events: requests of one kind overlap
                about = {"pid": 0, "tid": kinds.index(kind), "cat": kind, "id": count, "name": f"{kind} {name}"}
                events += [{"ph": "b", "ts": round((begin - start) * 1e6, 1), **about}]
                events += [{"ph": "e", "ts": round((end - start) * 1e6, 1), **about}]
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"start": start + self._wall}}
