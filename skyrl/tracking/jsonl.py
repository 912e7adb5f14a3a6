"""metrics.jsonl: one line for each step, in full precision, complete up to the last line whatever kills the run."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from skyrl.run_dir import cut_metrics
from skyrl.tracking.base import Record, Sink
from skyrl.types import UserError


class JsonlSink(Sink):
    """Appends records to a file. Each line is handed to the system at once and synced at checkpoints."""

    def __init__(self, path: Path, *, resume_from: int | None = None) -> None:
        """resume_from: length in bytes to which the file is cut back first; None = it must be empty or absent."""
        self.path = Path(path)
        try:
            if resume_from is not None:
                self.notes = cut_metrics(self.path, resume_from)
            elif self.path.exists() and self.path.stat().st_size > 0:
                raise UserError(
                    f"{self.path}: holds metrics of an earlier run; resume it (run.resume=auto with a checkpoint in "
                    "its folder), give another run.dir or run.name, or move that folder away"
                )
            else:
                self.notes = []
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as problem:
            raise self._explain(problem) from None

    def write(self, record: Record) -> None:
        """Writes one line in one call, so that a kill cannot cut it (a power failure can, behind the last sync)."""
        line = (to_json(record) + "\n").encode()
        try:
            while line:  # a nearly full disk takes a part
                line = line[os.write(self._file, line) :]
        except OSError as problem:
            raise self._explain(problem) from None

    def sync(self) -> None:
        """Waits until the disk has every line."""
        try:
            os.fsync(self._file)
        except OSError as problem:
            raise self._explain(problem) from None

    def close(self) -> None:
        """Syncs and closes."""
        self.sync()
        os.close(self._file)

    def _explain(self, problem: OSError) -> UserError:
        return UserError(
            f"{self.path}: cannot be written ({problem.strerror}); free some space, make it writable, or give a "
            "run.dir on another disk"
        )


def to_json(record: Record) -> str:
    """One line of JSON; floats so that they come back bit for bit, and "nan", "inf", "-inf" as text."""
    plain = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(plain, allow_nan=False)


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, in order, with "nan", "inf" and "-inf" as floats again.

    A last line without its end, left by a power failure, is not a record. Raises UserError for any other bad line.
    """
    records: list[Record] = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            records.append(
                {k: float(v) if isinstance(v, str) and v in ("nan", "inf", "-inf") else v for k, v in record.items()}
            )
        except (ValueError, AttributeError):
            raise UserError(f"{path}, line {number}: not a record of metrics; remove the line") from None
    return records
