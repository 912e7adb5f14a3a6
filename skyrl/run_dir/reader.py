"""What a run folder holds, for viewers: a run may be written meanwhile, and nothing here ever writes into it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from skyrl.run_dir.folder import (
    ADVISORIES,
    REQUEUE_FILE,
    ROLLOUT_NAME,
    STOPS,
    SYSTEM_NAME,
    is_locked,
    read_result,
    system_path,
)
from skyrl.types import UserError

OBJECTIVE = "eval/accuracy:mean"


@dataclass(frozen=True)
class RunReader:
    """One run, read from its files at each call. Where a file is absent, half written or damaged, what can be read is
    returned; `metrics` alone raises, for a line in the middle that is no record."""

    path: Path

    @property
    def name(self) -> str:
        """The folder's name, under which a person knows the run."""
        return self.path.name

    def state(self) -> str:
        """running, finished, evaluated, stopped or unfinished: see `run_state`."""
        return run_state(self.path)

    def config(self, number: int | None = None) -> dict[str, Any]:
        """All options of the last start, or of an earlier one that config.<number>.yaml keeps; {} if unreadable."""
        name = "config.yaml" if number is None else f"config.{number}.yaml"
        try:
            text = (self.path / name).read_text(encoding="utf-8")
            told = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return told if isinstance(told, dict) else {}

    def starts(self) -> list[dict[str, Any]]:
        """Versions, command and host of every start, oldest first."""
        try:
            told = json.loads((self.path / "versions.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [one for one in told if isinstance(one, dict)] if isinstance(told, list) else []

    def result(self) -> dict[str, Any]:
        """result.json of a run that has ended by itself; {} without."""
        return read_result(self.path) or {}

    def metrics(self, start: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The records from byte `start` on, and the byte where the next call goes on. A resumed run may cut the file
        back: a `start` behind its end reads it from the beginning, which the returned byte then shows."""
        path = self.path / "metrics.jsonl"
        try:
            size = path.stat().st_size
        except OSError:
            return [], 0
        return _read_lines(path, start if start <= size else 0)

    def system_ranks(self) -> list[int]:
        """The ranks of which tracking/system.py has kept something, in order."""
        names = [SYSTEM_NAME.fullmatch(path.name) for path in self.path.glob("system/*.jsonl")]
        return sorted(int(name[1]) for name in names if name is not None)

    def system(self, rank: int | None = None) -> list[dict[str, Any]]:
        """One line for each step of a rank, or of all ranks, one after the other: {"rank", "step", "phase", "time",
        "spans", "cpu", ...}. Times are Unix seconds; bytes are those of the step."""
        ranks = self.system_ranks() if rank is None else [rank]
        return [{"rank": one, **line} for one in ranks for line in _readable_lines(system_path(self.path, one))]

    def advisories(self) -> list[dict[str, Any]]:
        """What the run has said of itself, each once: {"name", "step", "text", "remedy"}."""
        return list({line["name"]: line for line in _readable_lines(self.path / ADVISORIES) if "name" in line}.values())

    def stops(self) -> list[dict[str, Any]]:
        """Its stops, oldest first: {"reason", "rank", "phase", "step", "done", "at", ...}."""
        return _readable_lines(self.path / STOPS)

    def dumps(self) -> list[str]:
        """Names of the dumped steps: "000010", "eval-000010"."""
        return dumps(self.path / "rollouts")

    def rollouts(self, name: str) -> Iterator[dict[str, Any]]:
        """The episodes of one dump, as tracking/rollouts.py wrote them."""
        return read_rollouts(self.path / "rollouts", name)

    def checkpoints(self) -> list[Path]:
        """Folders of finished checkpoints, oldest first."""
        found = [path for path in self.path.glob("checkpoints/*") if path.name.isdecimal() and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name))

    def crashes(self) -> list[Path]:
        """Folders of crash bundles (see tracking/crash_report.py), oldest first."""
        return sorted(path for path in self.path.glob("crash-*") if path.is_dir())


def find_runs(folder: Path) -> list[RunReader]:
    """The runs that lie in `folder`, oldest first by when they last wrote; [] for one without."""
    found: list[tuple[float, Path]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        for file in ("metrics.jsonl", "config.yaml"):
            try:
                found.append(((path / file).stat().st_mtime, path))
                break
            except OSError:
                continue
    return [RunReader(path) for _, path in sorted(found)]


def is_run(path: Path) -> bool:
    """Whether a run has begun there: it has metrics or options."""
    return any((path / file).exists() for file in ("metrics.jsonl", "config.yaml"))


def find_run(given: Path, what: str) -> RunReader:
    """The run that a person named by its folder, or by its name in runs/. Raises UserError, which begins with the
    command that asked, `what`."""
    path = given if given.is_dir() else Path("runs") / given
    if not path.is_dir():
        raise UserError(f"{what}: no run folder {given} here; skyrl-tx runs lists those in runs")
    if not is_run(path):
        raise UserError(f"{what}: {path} is no run: it has neither config.yaml nor metrics.jsonl")
    return RunReader(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order, with "nan", "inf" and "-inf" as floats again.

    A last line without its end, left by a power failure, is not a record. Raises UserError for any other bad line.
    """
    return _read_lines(Path(path), 0)[0]


def _read_lines(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    with open(path, "rb") as stream:
        stream.seek(start)
        data = stream.read()
    records: list[dict[str, Any]] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line).items()
            records.append({k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in record})
        except (ValueError, AttributeError):
            where = f"line {number}" + (f" after byte {start}" if start else "")
            raise UserError(f"{path}, {where}: not a record of metrics; remove the line") from None
    return records, start + len(data) - len(lines[-1])


def _readable_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; [] without it. Torn and damaged lines are left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [one for one in found if isinstance(one, dict)]


def read_rollouts(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The episodes of `name` (see write_rollouts) from all ranks' files, ranks in order."""
    matches = [(path, ROLLOUT_NAME.fullmatch(path.name)) for path in Path(folder).glob(f"{name}-r*.jsonl")]
    ranks = {int(m["rank"]): path for path, m in matches if m and path.name == f"{name}-r{m['rank']}.jsonl"}
    for _, path in sorted(ranks.items()):
        with open(path, encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)


def dumps(folder: Path) -> list[str]:
    """Names of what was dumped there, by step; of one step the evaluation last."""
    found = {
        path.name.rpartition("-r")[0] for path in Path(folder).glob("*.jsonl") if ROLLOUT_NAME.fullmatch(path.name)
    }
    return sorted(found, key=lambda name: (int(name.rpartition("-")[2]), "-" in name))


def final_values(metrics: Path) -> dict[str, float]:
    """The last value of every metric in a metrics.jsonl; {} without the file."""
    values: dict[str, float] = {}
    for record in read_metrics(metrics) if metrics.exists() else ():
        values.update({key: value for key, value in record.items() if key != "phase" and value is not None})
    return values


def run_state(folder: Path) -> str:
    """What a run folder is by its files: running (a process holds its lock), finished, evaluated (without training),
    stopped (it has saved and left, or a notice has ended it) or unfinished."""
    if is_locked(folder):
        return "running"
    if (told := read_result(folder)) is not None:
        return str(told.get("state", "finished"))
    return "stopped" if (folder / REQUEUE_FILE).exists() else "unfinished"
