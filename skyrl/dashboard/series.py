"""Numbers for the charts: a run's metrics, and the same metric of many runs, with means over seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from skyrl.dashboard.board import Dashboard
from skyrl.dashboard.columns import Columns, mean_and_spread, thin
from skyrl.dashboard.index import RunEntry, differing
from skyrl.run_dir import OBJECTIVE
from skyrl.tracking.metric_docs import explain
from skyrl.web.http import HttpError, reply, whole_number

POINTS, ALL_POINTS = 800, 60_000  # of one line, and of all lines of a chart
MAX_RUNS = 200  # in one chart
AXES = {"step": "", "tokens": "sampled_tokens:sum", "hours": "time/step_seconds:sum"}
SPREADS = {"reward:mean": "reward_std:mean"}
COUNTS = {OBJECTIVE: "eval/episodes:sum"}  # of the trials that a share was measured on
Band = tuple[np.ndarray, np.ndarray] | None


def board_of(request: Request) -> Dashboard:
    """The dashboard that a request is for."""
    return request.scope["app"].state.board


def run_series(request: Request) -> Response:
    """Lines of one run, as JSON. Query: key (several; "system:<rank>:<name>" is of the machine), axis, points."""
    entry, axis = board_of(request).entry(request), axis_of(request)
    points = min(10_000, max(2, whole_number(request, "points", POINTS)))
    least, most = limit_of(request, "least"), limit_of(request, "most")
    found = []
    for key in request.query_params.getlist("key")[:100]:
        columns, name, label = entry.metrics, key, key
        if key.startswith("system:"):
            _, rank, name = (key.split(":", 2) + ["", ""])[:3]
            if not rank.isdecimal() or int(rank) not in entry.run.system_ranks():
                continue
            columns, label = entry.system(int(rank)), f"rank {rank} {name}"
            axis = "step"
        x, y, band = within(*line_of(columns, name, axis), least, most)
        found.append(as_json(label, x, y, points, band, said=explain(key)))
    return reply({"axis": axis, "series": found})


def line_of(columns: Columns, name: str, axis: str) -> tuple[np.ndarray, np.ndarray, Band]:
    """(places on the axis, values, spread around them where one is known) of a metric."""
    with columns.lock:
        y = columns.get(name)
        x = columns.get("step") if axis == "step" else np.cumsum(np.nan_to_num(columns.get(AXES[axis])))
        spread = columns.get(SPREADS[name]) if name in SPREADS else None
        counts = columns.get(COUNTS[name]) if name in COUNTS else None
    there = ~np.isnan(y) & ~np.isnan(x)
    x, y = x[there] / (3600.0 if axis == "hours" else 1.0), y[there]
    if spread is not None and len(y):
        return x, y, (y - spread[there], y + spread[there])
    return x, y, wilson(y, counts[there]) if counts is not None and len(y) else None


def within(x: np.ndarray, y: np.ndarray, band: Band, least: float, most: float) -> tuple[np.ndarray, np.ndarray, Band]:
    """The part of a line between two places of its axis, with one point more at each end."""
    first, end = max(0, int(np.searchsorted(x, least)) - 1), int(np.searchsorted(x, most, "right")) + 1
    return x[first:end], y[first:end], None if band is None else (band[0][first:end], band[1][first:end])


def limit_of(request: Request, name: str) -> float:
    """An end of the axis that the query names. Raises HttpError."""
    try:
        return float(request.query_params.get(name, "-inf" if name == "least" else "inf"))
    except ValueError:
        raise HttpError(400, f"{name}: give a number") from None


def wilson(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of a share of `count` trials (Wilson 1927; Brown, Cai and DasGupta 2001, section 3.1.1)."""
    z2 = 1.959964**2
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = (share + z2 / (2 * count)) / (1 + z2 / count)
        half = np.sqrt(share * (1 - share) * z2 / count + z2 * z2 / (4 * count * count)) / (1 + z2 / count)
    return centre - half, centre + half


def as_json(label: str, x: np.ndarray, y: np.ndarray, points: int, band: Band = None, **more: Any) -> dict[str, Any]:
    """A line thinned to about `points`."""
    at = thin(y, points)
    found = {"label": label.encode("utf-8", "replace").decode(), "x": _plain(x[at]), "y": _plain(y[at]), **more}
    if band is not None:
        found |= {"lo": _plain(band[0][at]), "hi": _plain(band[1][at])}
    return found


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values.tolist()]


def axis_of(request: Request) -> str:
    """The axis that the query names. Raises HttpError."""
    axis = request.query_params.get("axis", "step")
    if axis not in AXES:
        raise HttpError(400, f"axis={axis[:40]!r}; choose one of: {', '.join(AXES)}")
    return axis


# ---- several runs


def chosen(request: Request) -> tuple[list[RunEntry], int]:
    """(the runs that the query names, or the newest; how many there are beside them)."""
    board = board_of(request)
    if request.state.viewer.run is not None:
        raise HttpError(403, f"you came by a link to the run {request.state.viewer.run}, which shows no other")
    names = request.query_params.getlist("run")
    if names:
        return [board.named(request, name) for name in names[:MAX_RUNS]], max(0, len(names) - MAX_RUNS)
    entries = [entry for entry in board.index.entries() if entry.about]
    return [board.index.whole(entry) for entry in entries[:MAX_RUNS]], max(0, len(entries) - MAX_RUNS)


def points_of(entries: list[RunEntry]) -> dict[str, list[RunEntry]]:
    """Runs with the same options but for the seed, under a name that says what is peculiar to them."""
    groups: dict[str, list[RunEntry]] = defaultdict(list)
    for entry in entries:
        groups[entry.about.get("point") or entry.run.name].append(entry)
    heads = [group[0].about.get("typed", {}) for group in groups.values()]
    common = {item for item in heads[0].items() if all(item in head.items() for head in heads)} if heads else set()
    found: dict[str, list[RunEntry]] = {}
    for head, group in zip(heads, groups.values(), strict=True):
        said = " ".join(f"{k}={v}" for k, v in head.items() if (k, v) not in common and k != "seed")
        name = said or group[0].run.name
        while name in found:
            name += " "
        found[name] = group
    return found


def compare(request: Request) -> Response:
    """The page that compares runs: a chart of one metric, final values, and the options in which they differ."""
    entries, left_out = chosen(request)
    names = sorted({name for entry in entries for name in entry.metrics.names if name not in ("step", "phase")})
    usual = next((name for name in (OBJECTIVE, "reward:mean", "loss:sum") if name in names), "reward:mean")
    metric, grouped = request.query_params.get("metric") or usual, request.query_params.get("by", "seeds") == "seeds"
    rows = list[dict[str, Any]]()
    for name, group in points_of(entries).items():
        values = {entry.run.name: entry.metrics.last(metric) for entry in group}
        numbers = [value for value in values.values() if value is not None]
        spread = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
        mean = float(np.mean(numbers)) if numbers else None
        rows.append({"name": name.strip(), "values": values, "mean": mean, "spread": spread, "runs": group})
    differ = list(differing({entry.run.name: entry.run.config() for entry in entries})) if len(entries) <= 20 else []
    rows.sort(key=lambda row: -math.inf if row["mean"] is None else row["mean"], reverse=True)
    asked: dict[str, Any] = {"metric": metric, "metrics": names, "grouped": grouped, "axis": axis_of(request)}
    asked |= {"axes": list(AXES), "picked": request.query_params.getlist("run"), "left_out": left_out}
    return board_of(request).page(request, "compare.html", entries=entries, rows=rows, differ=differ, **asked)


def compare_series(request: Request) -> Response:
    """One metric of several runs, as JSON. Query: metric, run (several; none = the newest), by=seeds|runs, axis."""
    entries, _ = chosen(request)
    metric, axis = request.query_params.get("metric", ""), axis_of(request)
    groups = points_of(entries) if request.query_params.get("by", "seeds") == "seeds" else {}
    if not groups:
        groups = {entry.run.name: [entry] for entry in entries}
    points = max(40, min(POINTS, ALL_POINTS // max(1, len(groups))))
    found = []
    for name, group in groups.items():
        having = [entry.metrics for entry in group if metric in entry.metrics.names]
        if len(having) == 1:
            found.append(as_json(name.strip(), *line_of(having[0], metric, axis)[:2], points))
        elif having:
            lines = [line_of(columns, metric, "step") for columns in having]
            x, mean, spread = mean_and_spread([(x, y) for x, y, _ in lines])
            if axis != "step":  # runs meet at their steps, which are then drawn at the mean of their places
                places = [line_of(columns, metric, axis)[0] for columns in having]
                x = mean_and_spread([(x, place) for (x, *_), place in zip(lines, places, strict=True)])[1]
            label = f"{name.strip()} (mean of {len(lines)})"
            found.append(as_json(label, x, mean, points, (mean - spread, mean + spread)))
    return reply({"axis": axis, "series": found, "said": explain(metric)})
