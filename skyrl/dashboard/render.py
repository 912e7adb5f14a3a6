"""The templates of all pages, and how these write numbers, sizes and times."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import skyrl
from skyrl.tracking.console import duration
from skyrl.tracking.metric_docs import explain

HERE = Path(__file__).parent


def make_templates(prefix: str) -> Environment:
    """The templates of a dashboard that lies below the path `prefix`. What a page forgets to give is an error."""
    found = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    found.filters |= {"num": number, "size": size, "ago": ago, "when": when, "span": duration, "explain": explain}
    version = max(path.stat().st_mtime_ns for path in (HERE / "static").iterdir())  # browsers keep what has not changed
    found.globals |= {"prefix": prefix, "explain": explain, "release": skyrl.__version__, "version": f"{version:x}"}
    return found


def number(value: Any, digits: int = 4) -> str:
    """A number for eyes: as many digits as tell something, thousands apart; "–" for none."""
    if value is None or value == "":
        return "–"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.{digits}g}"


def size(count: float) -> str:
    """Bytes in the largest unit of which there is at least one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def ago(at: float | None) -> str:
    """How long ago a moment was; a moment in the future, by a clock that was set, counts as now."""
    return "–" if not at else f"{duration(max(0.0, time.time() - at))} ago"


def when(at: float | None) -> str:
    """A moment in UTC."""
    return "–" if not at else datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
