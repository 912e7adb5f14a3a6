"""The pages about runs: their table, one run, its phases, checkpoints, options and logs."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from skyrl.checkpoint.folder import Best, read_checkpoint
from skyrl.config.load import flat
from skyrl.dashboard.index import RunEntry, differing
from skyrl.dashboard.series import board_of
from skyrl.run_dir.reader import OBJECTIVE, total_steps
from skyrl.types import UserError
from skyrl.web.http import HttpError, whole_number

PAGE_RUNS = 100
LOG_BYTES = 512 << 10  # the end of a file, as much as a page shows
SPAN_BYTES = 1 << 20  # of a rank's file, in which the last steps are looked for
PHASE_STEPS, PHASE_RANKS = 12, 16
# Title, metrics (patterns); a chart is there where a metric is. What no chart has stands under "More".
PANELS = (
    ("Reward", ("reward:mean",)),
    ("Held-out accuracy", (OBJECTIVE,)),
    ("Objectives", ("reward/*:mean",)),
    ("Held-out reward and objectives", ("eval/reward:mean", "eval/reward/*:mean")),
    ("Held-out avg@k, pass@k and majority@k", ("eval/*@*:mean",)),
    ("Held-out sets", ("eval/*/accuracy:mean",)),
    ("Multipliers of bounds", ("multiplier/*",)),
    ("Loss", ("loss:sum", "loss:mean", "nll:*", "loss/*", "value_loss:*", "critic/*")),
    ("KL", ("kl_reference:mean", "kl/*:mean", "approx_kl:mean")),
    ("Log-prob gap, sampler to trainer", ("logprob_gap:mean", "logprob_gap_kl:mean")),
    ("Entropy", ("entropy:mean",)),
    ("Response length", ("length:mean", "length:max", "turns:mean")),
    ("Truncated share", ("cut_by_length:mean", "eval/cut_by_length:mean")),
    ("Gradient norm", ("grad_norm:mean",)),
    ("Ratio and clipping", ("ratio:*", "clipped:mean")),
    ("Tokens per second", ("speed/*tokens_per_second:mean",)),
    ("Model FLOPs utilisation", ("speed/mfu:mean",)),
    ("Seconds of a step", ("time/*_seconds:sum",)),
    ("Peak memory (GiB)", ("memory/*",)),
)
SYSTEM = (
    ("GPU utilisation (%)", "gpu*/util"),
    ("GPU memory (GiB)", "gpu*/memory_gib"),
    ("GPU power (W)", "gpu*/power_w"),
    ("GPU temperature (°C)", "gpu*/temperature_c"),
    ("CPU of the process (%)", "cpu"),
    ("Memory (GiB)", "*memory_gib"),
    ("Network of the host, bytes of a step", "net_*_bytes"),
    ("Our collectives, bytes of a step", "collective_bytes"),
    ("Disk written, bytes of a step", "disk_written_bytes"),
    ("Disk free (GiB)", "disk_free_gib"),
)


def runs(request: Request) -> Response:
    """The table of runs: searched, filtered, a page at a time. Someone with a link to one run goes there."""
    board, query = board_of(request), request.query_params
    if request.state.viewer.run is not None:
        return RedirectResponse(board.url("runs", request.state.viewer.run), 303)
    entries = [entry for entry in board.index.entries() if entry.about]
    states = sorted({entry.about["state"] for entry in entries})
    tags = sorted({tag for entry in entries for tag in entry.about["tags"]})
    words, state, tag = query.get("q", "").lower().split(), query.get("state", ""), query.get("tag", "")
    kept = [
        entry
        for entry in entries
        if (not state or entry.about["state"] == state)
        and (not tag or tag in entry.about["tags"])
        and all(word in _searched(entry) for word in words)
    ]
    at = whole_number(request, "page", 0)
    asked: dict[str, Any] = {"states": states, "tags": tags, "folder": board.index.runs}
    asked |= {"query": {"q": query.get("q", ""), "state": state, "tag": tag}, "all_count": len(entries)}
    asked |= {"entries": kept[at * PAGE_RUNS : (at + 1) * PAGE_RUNS], "count": len(kept), "at": at}
    return board.page(request, "runs.html", **asked, pages=-(-len(kept) // PAGE_RUNS))


def _searched(entry: RunEntry) -> str:
    typed = " ".join(f"{key}={value}" for key, value in entry.about["typed"].items())
    return f"{entry.run.name} {typed} {' '.join(entry.about['tags'])} {entry.about['state']}".lower()


def run(request: Request) -> Response:
    """One run: what it is, how far it is, its charts."""
    board = board_of(request)
    entry = board.entry(request)
    names = [name for name in entry.metrics.names if name not in ("step", "phase")]
    panels, used = [], set()
    for title, patterns in PANELS:
        keys = [name for pattern in patterns for name in names if fnmatch.fnmatchcase(name, pattern)]
        if keys:
            panels.append((title, list(dict.fromkeys(keys))[:12]))
            used.update(panels[-1][1])
    ranks = entry.run.system_ranks()
    same = [one.run.name for one in board.index.entries() if one.about.get("point") == entry.about["point"]]
    about: dict[str, Any] = {"facts": facts(entry, len(ranks)), "seeds": same if len(same) > 1 else []}
    about |= {"advisories": entry.run.advisories(), "ranks": ranks, "steps": PHASE_STEPS, "panels": panels}
    about |= {"more": sorted(set(names) - used), "system": _system_panels(entry, ranks)}
    return board.page(request, "run.html", entry=entry, **about)


def _system_panels(entry: RunEntry, ranks: list[int]) -> list[tuple[str, list[str]]]:
    if not ranks:
        return []
    names = entry.system(ranks[0]).names
    found = []
    for title, pattern in SYSTEM:
        keys = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        lines = [f"system:{rank}:{name}" for rank in ranks[:PHASE_RANKS] for name in keys]
        if lines:
            found.append((title, lines))
    return found


def facts(entry: RunEntry, ranks: int) -> list[tuple[str, Any, str]]:
    """(what, value, explanation) for the head of a run's page."""
    last, total_of = entry.metrics.last, entry.metrics.sum
    total = total_steps(entry.run.config(), "evaluate" if entry.about["state"] == "evaluated" else "")
    seconds = total_of("time/step_seconds:sum")
    step = last("step")
    done = None if step is None else f"{step:.0f}" + (f" of {total}" if total else "")
    names = entry.system(entry.run.system_ranks()[0]).names if ranks else []
    device = "GPU" if any(name.startswith("gpu") for name in names) else "Device"
    return [
        ("Step", done, "finished, over all phases"),
        ("Reward", last("reward:mean"), "of the last step"),
        ("Held-out accuracy", last(OBJECTIVE), "of the last evaluation"),
        ("Tokens per second", last("speed/tokens_per_second:mean"), "of the last step"),
        ("MFU", last("speed/mfu:mean"), "model FLOPs utilisation of the last step; absent where the peak is not known"),
        ("Tokens sampled", total_of("sampled_tokens:sum"), "in all steps of training"),
        ("Tokens trained", total_of("tokens:sum"), "through training forward passes, in all steps"),
        (f"{device}-hours", seconds * max(1, ranks) / 3600, f"seconds of all steps on {max(1, ranks)} ranks"),
    ]


def phases(request: Request) -> Response:
    """What each rank did in the last steps, as a drawing with a table. Query: steps."""
    board = board_of(request)
    entry = board.entry(request)
    steps = max(1, min(200, whole_number(request, "steps", PHASE_STEPS)))
    ranks = entry.run.system_ranks()
    lanes: dict[int, list[tuple[str, float, float, int, int]]] = {}
    for rank in ranks[:PHASE_RANKS]:
        file = f"system/rank-{rank}.jsonl"
        end = entry.run.size(file)
        records, _ = entry.run.lines(file, max(0, end - SPAN_BYTES))
        lanes[rank] = _spans(records[-steps:])
    begin = min((start for lane in lanes.values() for _, start, *_ in lane), default=0.0)
    length = max((stop - begin for lane in lanes.values() for _, _, stop, *_ in lane), default=0.0)
    kinds = list(dict.fromkeys(name for lane in lanes.values() for name, *_ in lane))
    sums: dict[int, dict[str, float]] = {rank: defaultdict(float) for rank in lanes}
    for rank, lane in lanes.items():
        for name, start, stop, *_ in lane:
            sums[rank][name] += stop - start
    values: dict[str, Any] = {"lanes": lanes, "begin": begin, "length": max(length, 1e-9), "kinds": kinds, "sums": sums}
    return board.page(request, "phases.html", entry=entry, steps=steps, hidden=len(ranks) - len(lanes), **values)


def _spans(records: list[dict[str, Any]]) -> list[tuple[str, float, float, int, int]]:
    """(phase, start, end, step, how many phases it lies in) of consecutive steps; what is before a pause of an hour
    or a clock that was set is left out."""
    found: list[tuple[str, float, float, int]] = []
    for record in records:
        step, spans = int(record.get("step", 0)), record.get("spans") or ()
        new = [(str(name), float(start), float(stop), step) for name, start, stop in spans if stop >= start]
        if new and found and not -1.0 <= min(one[1] for one in new) - max(one[2] for one in found) <= 3600.0:
            found = []
        found += new
    nested: list[tuple[str, float, float, int, int]] = []
    around: list[float] = []
    for name, start, stop, step in sorted(found, key=lambda one: (one[1], -one[2])):
        around = [end for end in around if end >= stop]
        nested.append((name, start, stop, step, len(around)))
        around.append(stop)
    return nested


def checkpoints(request: Request) -> Response:
    """What the run has saved."""
    board = board_of(request)
    entry = board.entry(request)
    found, problems = [], []
    for path in entry.run.checkpoints():
        try:
            found.append(read_checkpoint(path))
        except UserError as error:
            problems.append(str(error))
    options = entry.run.config().get("checkpoint") or {}
    best = Best(options.get("best_metric", OBJECTIVE), options.get("best_mode", "max")).of(found)
    rows = [(info, sum(file["bytes"] for file in info.files.values()), info is best) for info in reversed(found)]
    at = {info.tag: info.path.stat().st_mtime for info in found if info.path.is_dir()}
    return board.page(request, "checkpoints.html", entry=entry, rows=rows, problems=problems, at=at)


def config(request: Request) -> Response:
    """All options, and where they differ from an earlier start (number) or another run (with)."""
    board = board_of(request)
    entry = board.entry(request)
    other, start = request.query_params.get("with", ""), request.query_params.get("start", "")
    now, than, differ = entry.run.config(), "", None
    if other:
        than, differ = other, list(differing({"": now, other: board.named(request, other).run.config()}))
    elif start:
        before = entry.run.config(int(start)) if start.isdecimal() and len(start) < 6 else {}
        if not before:
            raise HttpError(404, f"this run keeps no options of an earlier start {start[:20]!r}")
        than, differ = f"start {start}", list(differing({"": now, start: before}))
    earlier = [number for number in range(1, 100) if entry.run.size(f"config.{number}.yaml")]
    names = [] if request.state.viewer.run else [one.run.name for one in board.index.entries()[:500]]
    values: dict[str, Any] = {"than": than, "differ": differ, "earlier": earlier, "names": names, "other": other}
    return board.page(request, "config.html", entry=entry, options=flat(now), **values)


def logs(request: Request) -> Response:
    """Starts, what was noticed, log files and crash bundles."""
    board = board_of(request)
    entry = board.entry(request)
    files = [(name, entry.run.size(name)) for name in entry.run.logs()]
    bundles = [
        (bundle.name, [(name, entry.run.size(name)) for name in _files_of(entry, bundle)])
        for bundle in reversed(entry.run.crashes())
    ]
    told: dict[str, Any] = {"starts": entry.run.starts()[::-1], "advisories": entry.run.advisories()}
    return board.page(request, "logs.html", entry=entry, files=files, bundles=bundles, **told)


def _files_of(entry: RunEntry, bundle: Path) -> list[str]:
    return sorted(str(path.relative_to(entry.run.path)) for path in bundle.rglob("*") if path.is_file())


def log_file(request: Request) -> Response:
    """The end of a log or of a file of a crash bundle, as text."""
    board = board_of(request)
    entry, file = board.entry(request), request.path_params["file"]
    known = [*entry.run.logs(), *(name for bundle in entry.run.crashes() for name in _files_of(entry, bundle))]
    if file not in known:
        raise HttpError(404, f"this run has no log {file[:200]!r}")
    end = entry.run.size(file)
    text = entry.run.before(file, end, LOG_BYTES).decode("utf-8", "replace")
    return board.page(request, "log.html", entry=entry, file=file, text=text, cut=end > LOG_BYTES, end=end)
