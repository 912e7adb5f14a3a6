"""metrics.jsonl: one line for each step, in full precision, complete up to the last line whatever kills the run."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

from skyrl.files import explain_write
from skyrl.run_dir import cut_metrics
from skyrl.tracking.base import Record, Sink
from skyrl.types import UserError


class JsonlSink(Sink):
    """Appends records to a file. Each line is handed to the system at once and synced at checkpoints."""

    def __init__(self, path: Path, *, resume_from: int | None = None) -> None:
        """resume_from: length in bytes to which the file is cut back first; None = it must be empty or absent."""
        self.path, self.notes = Path(path), []  # lines worth showing
        remedy = "free some space, make it writable, or give a run.dir on another disk"
        self._explained = partial(explain_write, self.path, remedy)
        with self._explained():
            if resume_from is not None:
                self.notes = cut_metrics(self.path, resume_from)
            elif self.path.exists() and self.path.stat().st_size > 0:
                raise UserError(
                    f"{self.path}: holds metrics of an earlier run; resume it (run.resume=auto with a checkpoint in "
                    "its folder), give another run.dir or run.name, or move that folder away"
                )
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, record: Record) -> None:
        """Writes one line in one call, so that a kill cannot cut it (a power failure can, behind the last sync)."""
        line = (to_json(record) + "\n").encode()
        with self._explained():
            while line:  # a nearly full disk takes a part
                line = line[os.write(self._file, line) :]

    def sync(self) -> None:
        """Waits until the disk has every line."""
        with self._explained():
            os.fsync(self._file)

    def close(self) -> None:
        self.sync()
        os.close(self._file)


def to_json(record: Record) -> str:
    """One line of JSON: floats come back bit for bit, "nan", "inf" and "-inf" as text."""
    return json.dumps(plain(record), allow_nan=False, ensure_ascii=False)


def plain(value: Any) -> Any:
    """The value with numbers that are not finite as text: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(below) for key, below in value.items()}
    return [plain(below) for below in value] if isinstance(value, list) else value
