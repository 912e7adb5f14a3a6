"""Rules of the group run and of checkpoint.push_to_hub; run.window, the times of the day between which a run works."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from skyrl.config.options import all_options
from skyrl.config.schema import RunConfig, RunFolderConfig
from skyrl.types import UserError

_TIME = r"([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?"
WINDOW = re.compile(f"{_TIME}-{_TIME}", re.ASCII)
DAY_SECONDS = 86400.0
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/(?=[A-Za-z0-9])[\w.-]{1,96}(?<![-.])", re.ASCII)


def run_problems(cfg: RunConfig) -> Iterator[str]:
    """A line for each rule that the group breaks; raises the UserError of a window that is none."""
    known = {"versions", "code", "data", *(option.path.partition(".")[0] for option in all_options())}
    for name in cfg.run.allow_different:
        if re.split(r"[./]", name)[0] not in known:
            yield (
                f"run.allow_different=[{name}]: no such thing is compared; give versions, code, data, model, the name "
                "of an option, or a part of these as the error names it"
            )
    read_window(cfg.run, datetime.now())
    if cfg.run.world_size and not cfg.dry_run:
        yield (
            f"run.world_size={cfg.run.world_size}: only for a dry run; a real run counts its processes (torchrun "
            "--nproc_per_node), or add dry_run=true"
        )
    if name := cfg.checkpoint.push_to_hub:
        if not HUB_NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
            yield (
                f"checkpoint.push_to_hub={name}: a repository of the hub is owner/name, of letters, digits, _, - and . "
                "(no -- or ..), the name of at most 96 and without .git at its end"
            )
        if not cfg.checkpoint.export:
            yield f"checkpoint.push_to_hub={name}: sends the export, which checkpoint.export=false leaves out"


@dataclass(frozen=True)
class Window:
    """What run.window says at one moment: seconds until it begins (0 inside of it, with time to work), and until the
    end of the one that is open or comes next."""

    begins_in: float
    ends_in: float


def read_window(options: RunFolderConfig, now: datetime) -> Window | None:
    """The window as seen at `now`, a time of the local clock; None without one. What is left of an open window counts
    as closed when it is no longer than the margin for saving: the run would stop at once.

    Raises UserError for a text that is no window, and for a window that has no time beside that margin.
    """
    if not options.window:
        return None
    name, margin = f"run.window={options.window}", options.save_margin_seconds
    if (parts := WINDOW.fullmatch(options.window)) is None:
        raise UserError(f"{name}: give two times of the day, as 22:00-06:00, midnight being 00:00; all day is none")
    numbers = [int(part or 0) for part in parts.groups()]
    begin, end = (now.replace(hour=h, minute=m, second=s, microsecond=0) for h, m, s in (numbers[:3], numbers[3:]))
    length = (end - begin).total_seconds() % DAY_SECONDS
    if length <= margin:
        raise UserError(
            f"{name}: open for {length:.0f} s a day, of which run.save_margin_seconds={margin:g} are kept for saving: "
            "it never has time to work; give a longer window, or lower that margin"
        )
    # Both ends by the clock on the wall, also in the night in which it is put forward or back.
    for start in (begin + timedelta(days=day) for day in (-1, 0, 1, 2)):
        begins, ends = (one.timestamp() - now.timestamp() for one in (start, start + timedelta(seconds=length)))
        if ends - max(0.0, begins) > margin:
            return Window(max(0.0, begins), ends)
    raise AssertionError("a window begins every day")


def closed_until(options: RunFolderConfig, now: datetime | None = None) -> datetime | None:
    """When run.window begins, if it is closed at `now` (by default: now); None while it is open or without one."""
    if (window := read_window(options, now := now or datetime.now())) is None or window.begins_in == 0:
        return None
    return datetime.fromtimestamp(round(now.timestamp() + window.begins_in))  # a sum of wall times knows no summer time
