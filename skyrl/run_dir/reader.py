"""What a run folder holds, for viewers: a run may be written meanwhile, and nothing here ever writes into it."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from skyrl.files import open_plain
from skyrl.run_dir.folder import (
    ADVISORIES,
    RECORDINGS,
    REQUEUE_FILE,
    ROLLOUT_NAME,
    STOPS,
    SYSTEM_NAME,
    is_locked,
    read_json,
    read_result,
    system_path,
)
from skyrl.types import UserError

OBJECTIVE = "eval/accuracy:mean"
# Sections of config.yaml that viewers read.
SECTIONS = "run model env data batch warmup algorithm eval checkpoint tracking".split()
# What each line of these has at least; one without is damaged.
METRICS_HAVE, SYSTEM_HAS, ADVISORIES_HAVE = ("step", "phase"), ("step",), ("name", "step", "text", "remedy")
# What an episode and a turn have that do not say it themselves.
EPISODE: dict[str, Any] = {"index": 0, "expected": None, "metrics": {}, "objectives": {}}
EPISODE |= dict.fromkeys(("uid", "stop", "invalid"), "")
TURN: dict[str, Any] = {"context": [], "tokens": [], "logprobs": [], "version": None}
TURN |= dict.fromkeys(("context_text", "text", "stop"), "")


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
            with open_plain(self.path / name, self.path) as stream:
                told = yaml.load(stream, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return {}
        whole = isinstance(told, dict) and all(isinstance(told.get(name) or {}, dict) for name in SECTIONS)
        return told if whole else {}

    def options(self, what: str) -> dict[str, Any]:
        """`config` for a command, `what`, that goes by it. Raises UserError for none."""
        if not (found := self.config()):
            raise UserError(f"{what}: {self.path / 'config.yaml'} is missing or damaged, so nobody knows what was run")
        return found

    def starts(self) -> list[dict[str, Any]]:
        """Versions, command and host of every start, oldest first."""
        told = read_json(self.path, "versions.json")
        starts = [one for one in told if isinstance(one, dict)] if isinstance(told, list) else []
        return [one for one in starts if isinstance(one.get("command") or [], list)]

    def recordings(self) -> list[Path]:
        """The recorded episodes, <step>.gif, by step."""
        return sorted(path for path in self.path.glob(f"{RECORDINGS}/*.gif") if path.stem.isdecimal())

    def result(self) -> dict[str, Any]:
        """result.json of a run that has ended by itself; {} without."""
        return read_result(self.path) or {}

    def metrics(self, start: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The records from byte `start` on, and the byte where the next call goes on. A resumed run may cut the file
        back: a `start` behind its end reads it from the beginning, which the returned byte then shows."""
        path = self.path / "metrics.jsonl"
        return _read_lines(path, start if start <= self.size("metrics.jsonl") else 0) if path.exists() else ([], 0)

    def system_ranks(self) -> list[int]:
        """The ranks of which tracking/system.py has kept something, in order."""
        names = [SYSTEM_NAME.fullmatch(path.name) for path in self.path.glob("system/*.jsonl")]
        return sorted(int(name[1]) for name in names if name is not None)

    def system(self, rank: int | None = None) -> list[dict[str, Any]]:
        """One line for each step of a rank, or of all ranks, one after the other: {"rank", "step", "phase", "time",
        "spans", "cpu", ...}. Times are Unix seconds; bytes are those of the step."""
        ranks = self.system_ranks() if rank is None else [rank]
        return [{"rank": one, **line} for one in ranks for line in self.lines(str(system_path(Path(), one)))[0]]

    def advisories(self) -> list[dict[str, Any]]:
        """What the run has said of itself, each once: {"name", "step", "text", "remedy"}."""
        found = _readable_lines(self.path / ADVISORIES, ADVISORIES_HAVE)
        return list({str(line["name"]): line for line in found}.values())

    def stops(self) -> list[dict[str, Any]]:
        """Its stops, oldest first: {"reason", "rank", "phase", "step", "done", "at", ...}."""
        return _readable_lines(self.path / STOPS)

    def lines(self, file: str, start: int = 0, limit: int = -1) -> tuple[list[dict[str, Any]], int]:
        """The records of another file of JSON lines, or a part of `limit` bytes or one line if that is longer, from
        byte `start` on; and the byte after them. Lines that are no records are left out; ([], 0) without the file.
        Raises UserError where what is to be read of metrics.jsonl begins with such a line."""
        needs = METRICS_HAVE if file == "metrics.jsonl" else SYSTEM_HAS
        try:
            return _read_lines(self.path / file, start, limit, needs, self.path)
        except OSError:
            return [], 0

    def before(self, file: str, end: int, count: int = 64) -> bytes:
        """The `count` bytes of a file that end at byte `end`: those that were read last are there again, unless the
        file was cut back and grew anew. b"" where it is shorter than `end`."""
        try:
            with open_plain(self.path / file, self.path) as stream:
                stream.seek(max(0, end - count))
                data = stream.read(min(end, count))
        except OSError:
            return b""
        return data if len(data) == min(end, count) else b""

    def size(self, file: str) -> int:
        """Bytes of a file of the run; 0 without it."""
        try:
            return os.stat(self.path / file).st_size
        except OSError:
            return 0

    def check_outside(self, out: Path, option: str) -> None:
        """Raises UserError for a file to write that lies in the run's folder, or is a folder itself."""
        if out.is_dir() or out.resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"{option}: give a file outside of the run's folder, which is the run's alone")

    def logs(self) -> list[str]:
        """Names of the logs that a launcher has left in the folder."""
        found = (path for pattern in ("*.log", "*.out", "*.err") for path in self.path.glob(pattern))
        return sorted(path.name for path in found if path.is_file())

    def stamp(self) -> list[int]:
        """Numbers that are others after each write of metrics or options, each start and the end of the run."""
        found = []
        for file in ("metrics.jsonl", "config.yaml", "versions.json", "result.json"):
            try:
                told = os.stat(self.path / file)
                found += [told.st_size, told.st_mtime_ns]
            except OSError:
                found += [0, 0]
        return found

    def typed(self) -> dict[str, str]:
        """Options of the command that started the run last, but for where it is; option -> value as typed."""
        command = (self.starts() or [{}])[-1].get("command") or [""]
        places = ("-", "hydra", "run.name=", "run.dir=", "tracking.", "dashboard.", "dry_run=")
        words = [str(word) for word in command[1:] if "=" in str(word) and not str(word).startswith(places)]
        return {option: value for option, _, value in (word.partition("=") for word in words)}

    def dumps(self) -> list[str]:
        """Names of the dumped steps: "000010", "eval-000010"."""
        return dumps(self.path / "rollouts")

    def rollouts(self, name: str) -> Iterator[dict[str, Any]]:
        """The episodes of one dump, as tracking/rollouts.py wrote them."""
        return read_rollouts(self.path / "rollouts", name)

    def episodes(self, name: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """(rank, byte of its line, episode) of one dump, ranks in order; lines that are no episodes are left out."""
        for rank, path in _rank_files(self.path / "rollouts", name):
            start = 0
            for line in _lines_of(path):
                if (episode := _episode(line)) is not None:
                    yield rank, start, episode
                start += len(line)

    def dumps_with(self, uid: str, most: int = 200) -> list[str]:
        """Of the newest `most` dumps those with an episode of a prompt; only the beginnings of lines are looked at."""
        start, found = b'{"uid": ' + json.dumps(uid, ensure_ascii=False).encode() + b",", []
        for name in self.dumps()[-most:]:
            if any(line.startswith(start) for path in self.dump_files(name) for line in _lines_of(path)):
                found.append(name)
        return found

    def dump_files(self, name: str) -> list[Path]:
        """Each rank's part of a dump, ranks in order."""
        return [path for _, path in _rank_files(self.path / "rollouts", name)]

    def episode(self, name: str, rank: int, start: int) -> dict[str, Any] | None:
        """The episode whose line begins at a byte of a rank's part of a dump; None without."""
        path = dict(_rank_files(self.path / "rollouts", name)).get(rank)
        with contextlib.suppress(OSError):
            if path is not None:
                with open_plain(path, self.path) as stream:
                    stream.seek(start)
                    return _episode(stream.readline())
        return None

    def token_texts(self) -> dict[int, str]:
        """Token id -> its text alone, of the tokens that were dumped; {} for a run of an earlier release."""
        found: dict[int, str] = {}
        for path in (self.path / "rollouts").glob("tokens-r*.json"):
            with contextlib.suppress(ValueError, AttributeError):
                told = read_json(self.path, f"rollouts/{path.name}")
                found |= {int(token): str(text) for token, text in told.items()}
        return found

    def trained(self, dump: str) -> dict[str, Any]:
        """Row of a dumped step ("<uid>/<sample>/<part>", as rollout.to_rows calls it) -> {"first": place of its first
        trained token, "advantages", "logprobs": from there on} (tracking.rollouts.write_trained); {} without."""
        found: dict[str, Any] = {}
        for path in self.dump_files(dump):
            told = read_json(self.path, f"rollouts/{path.name}.trained") or {}
            found |= {name: None if name in found else row for name, row in told.items()}  # of two: which, is not known
        return found

    def checkpoints(self) -> list[Path]:
        """Folders of finished checkpoints, oldest first."""
        found = [path for path in self.path.glob("checkpoints/*") if path.name.isdecimal() and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name))

    def crashes(self) -> list[Path]:
        """Folders of crash bundles (see tracking/crash_report.py), oldest first."""
        return sorted(path for path in self.path.glob("crash-*") if path.is_dir() and not path.is_symlink())


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


def total_steps(config: dict[str, Any], phase: str) -> int | None:
    """The last step of a phase ("" = of the run), counted over all phases as everywhere; None where the options do not
    say it, as with data.epochs."""
    if phase == "evaluate" or (config.get("data") or {}).get("epochs"):
        return None
    warmup, batch = ((config.get(name) or {}).get("num_steps", 0) for name in ("warmup", "batch"))
    return warmup + (0 if phase in ("warmup", "sft") or config.get("trainer") == "sft" else batch) or None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order, with "nan", "inf" and "-inf" as floats again.

    A last line without its end, left by a power failure, is not a record. Raises UserError for any other bad line.
    """
    return _read_lines(Path(path), 0)[0]


def _read_lines(
    path: Path, start: int, limit: int = -1, needs: Collection[str] = METRICS_HAVE, root: Path | None = None
) -> tuple[list[dict[str, Any]], int]:
    strict = needs is METRICS_HAVE
    try:
        with open_plain(path, root or path.parent) as stream:
            stream.seek(start)
            data = stream.read(limit)
            while limit > 0 and b"\n" not in data and (more := stream.read(limit)):
                data += more
    except OSError as problem:
        if strict and not isinstance(problem, FileNotFoundError):
            raise UserError(f"{path}: cannot be read ({problem.strerror})") from None
        raise
    records: list[dict[str, Any]] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        record = _parsed(line, needs)
        if record is not None:
            if b'nan"' in line or b'inf"' in line:
                record = {k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in record.items()}
            records.append(record)
        elif strict and records and limit > 0:  # what is before it first; the next call begins with it
            return records, start + sum(len(line) + 1 for line in lines[: number - 1])
        elif strict:
            where = f"line {number}" + (f" after byte {start}" if start else "")
            raise UserError(f"{path}, {where}: not a record of metrics; remove the line")
    return records, start + len(data) - len(lines[-1])


def _readable_lines(path: Path, needs: Collection[str] = ()) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; [] without it. Torn and damaged lines are left out."""
    try:
        return _read_lines(path, 0, needs=needs)[0]
    except OSError:
        return []


def _lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a part of a dump; none where it is no more, or not to be read."""
    with contextlib.suppress(OSError), open_plain(path, path.parent.parent) as stream:
        yield from stream


def _parsed(line: bytes, needs: Collection[str] = ()) -> dict[str, Any] | None:
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(told, dict) and all(name in told for name in needs) and isinstance(told.get("step", 0), int)
    return told if whole else None


def _episode(line: bytes) -> dict[str, Any] | None:
    told = _parsed(line, ("turns",)) or {"turns": None}
    if not isinstance(told["turns"], list) or not all(isinstance(turn, dict) for turn in told["turns"]):
        return None
    turns = [{**TURN, **turn, "reward": turn.get("reward") or 0.0} for turn in told["turns"]]
    reward = math.nan if told.get("reward") is None else told["reward"]
    return {**EPISODE, **told, "reward": reward, "turns": turns}


def read_rollouts(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The episodes of `name` (see write_rollouts) of all ranks, in order. Raises UserError for a line that is none."""
    for _, path in _rank_files(folder, name):
        for number, line in enumerate(_lines_of(path), start=1):
            if line.endswith(b"\n"):  # else it is being written
                if (episode := _episode(line)) is None:
                    raise UserError(f"{path}, line {number}: not an episode; move that file away")
                yield episode


def _rank_files(folder: Path, name: str) -> list[tuple[int, Path]]:
    matches = [(path, ROLLOUT_NAME.fullmatch(path.name)) for path in Path(folder).glob(f"{name}-r*.jsonl")]
    return sorted((int(m["rank"]), path) for path, m in matches if m and path.name == f"{name}-r{m['rank']}.jsonl")


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
