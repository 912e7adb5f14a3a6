"""`skyrl-tx sweep-table`: the final numbers of the runs in a folder, one line a point, mean and spread over its seeds.

Two runs are the same point when their options differ in the seed alone (and in where and how they ran).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from skyrl.config.validation import ignored_on_resume
from skyrl.sweep import OBJECTIVE, RESULT, final_values
from skyrl.types import UserError

DEFAULT_METRICS = (OBJECTIVE, "reward:mean")
UNCOUNTED = ("seed", "batch.num_steps")  # a point's length is one of its options, whatever a resume may change


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"sweep-table: {message}; skyrl-tx sweep-table --help lists the flags")


@dataclass
class Point:
    """One combination of options: `options` are those that differ within the table, `runs` maps a seed to the final
    values of its run, `unfinished` are seeds without a result."""

    options: dict[str, Any]
    runs: dict[int, dict[str, float]] = field(default_factory=dict)
    unfinished: list[int] = field(default_factory=list)

    def spread(self, metric: str) -> dict[str, Any] | None:
        """Mean, standard deviation (of a sample; None for one run), least and greatest of a metric over finished runs;
        None when none has it."""
        values = {seed: run[metric] for seed, run in sorted(self.runs.items()) if metric in run}
        if not values:
            return None
        mean = sum(values.values()) / len(values)
        squares = sum((value - mean) ** 2 for value in values.values())
        return {
            "mean": mean,
            "std": math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None,
            "min": min(values.values()),
            "max": max(values.values()),
            "values": values,
        }


def read_points(folder: Path) -> list[Point]:
    """All points in `folder`, in the order of their options. Raises UserError for a folder without runs."""
    found: dict[str, tuple[dict[str, Any], Point]] = {}
    for path in sorted(folder.glob("*/config.yaml")):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            flat = _flat(config)
            seed = int(flat.pop("seed"))
        except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{path}: not the config of a run; move that folder away") from None
        schedule = str(flat.get("optim.schedule"))
        kept = {k: v for k, v in flat.items() if k in UNCOUNTED or not ignored_on_resume(k, schedule)}
        _, point = found.setdefault(json.dumps(kept, sort_keys=True, default=str), (kept, Point({})))
        if (path.parent / RESULT).exists():
            if seed in point.runs:
                raise UserError(f"{path.parent}: another run there has the same options and seed {seed}; move one away")
            point.runs[seed] = final_values(path.parent / "metrics.jsonl")
        else:
            point.unfinished.append(seed)
    if not found:
        raise UserError(f"sweep-table: no runs in {folder}; give the folder that holds them")
    everything = [kept for kept, _ in found.values()]
    differ = [
        k for k in sorted({k for kept in everything for k in kept}) if len({_text(kept, k) for kept in everything}) > 1
    ]
    for kept, point in found.values():
        point.options = {key: kept.get(key) for key in differ}
    return sorted((point for _, point in found.values()), key=lambda point: [_order(v) for v in point.options.values()])


def table(points: Sequence[Point], metrics: Sequence[str]) -> str:
    """The points as text: options that differ, seeds, and mean +- standard deviation of each metric."""
    options = list(points[0].options)
    rows = [[*options, "seeds", *metrics, "unfinished"]]
    for point in points:
        cells = [_cell(value) for value in point.options.values()]
        cells.append(",".join(map(str, sorted(point.runs))) or "-")
        for metric in metrics:
            spread = point.spread(metric)
            if spread is None:
                cells.append("-")
            else:
                cells.append(f"{spread['mean']:.4f}" + ("" if spread["std"] is None else f" +- {spread['std']:.4f}"))
        rows.append([*cells, ",".join(map(str, sorted(point.unfinished)))])
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def sweep_table(args: Sequence[str]) -> None:
    """Runs the command line. Raises UserError."""
    p = _Parser(prog="skyrl-tx sweep-table", allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    p.add_argument("folder", nargs="?", default="runs", help="folder of run folders (runs)")
    p.add_argument("--metric", action="append", default=[], help=f"repeat for more ({', '.join(DEFAULT_METRICS)})")
    p.add_argument("--json", action="store_true", help="every value, for programs")
    flags = p.parse_args(list(args))
    if not Path(flags.folder).is_dir():
        raise UserError(f"sweep-table: no folder {flags.folder} here; give the folder that holds the runs")
    points = read_points(Path(flags.folder))
    known = sorted({name for point in points for run in point.runs.values() for name in run})
    for metric in flags.metric:
        if known and metric not in known:
            raise UserError(f"sweep-table: --metric={metric}: no run has it; there are {', '.join(known)}")
    metrics = flags.metric or list(DEFAULT_METRICS)
    if not flags.json:
        print(table(points, metrics))
        return
    rows = [
        {
            "options": point.options,
            "seeds": sorted(point.runs),
            "unfinished": sorted(point.unfinished),
            "metrics": {metric: point.spread(metric) for metric in metrics},
        }
        for point in points
    ]
    print(json.dumps({"folder": flags.folder, "points": rows}, indent=1))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _text(values: dict[str, Any], key: str) -> str:
    return json.dumps(values.get(key), sort_keys=True, default=str)


def _order(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (0, float(value), "") if number else (1, 0.0, str(value))


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
