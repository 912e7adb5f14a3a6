"""Numbers of a file of JSON lines, column by column: read once, kept on disk in blocks, thinned for a screen.

A file of 100,000 steps takes seconds to parse and milliseconds to read as columns. Whole blocks go to `store`, which
only grows; the rest, the tail, lives in memory. What `state` returns says how much of the JSON lines the store holds,
so a later process goes on from there.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from skyrl.run_dir import RunReader

CHUNK_BYTES = 8 << 20  # of JSON, parsed at a time: others read in between
BLOCK_ROWS = 4096
SUMMED = ("sampled_tokens:sum", "tokens:sum", "trained_tokens:sum", "time/step_seconds:sum")
Flat = Callable[[dict[str, Any]], dict[str, Any]]


class Columns:
    """The columns of one file of a run. Safe to use from several threads.

    A block of R rows holds C columns of R float64 one after the other: the first C of `names`, which only grows. What a
    record does not have, or has as words, is NaN.
    """

    def __init__(
        self,
        run: RunReader,
        file: str,
        flat: Flat = dict,
        store: Path | None = None,
        writable: bool = True,
        state: Any = None,
    ) -> None:
        """flat: what makes names and numbers of a record. store: folder of the blocks, None to keep all in memory;
        `writable` False: another process writes it. state: what `state` gave to an earlier process."""
        self.run, self.file, self._flat, self._folder, self._writable = run, file, flat, store, writable
        self.lock = threading.RLock()
        self._clear()
        if isinstance(state, dict) and store is not None:
            try:
                self._load(state)
            except (KeyError, TypeError, ValueError, OSError):
                self._clear()

    def _clear(self) -> None:
        self.names: list[str] = []
        self.generation = secrets.token_hex(4)  # of the store's name: blocks of a file that was cut back are not ours
        self._blocks: list[tuple[int, int]] = []  # (rows, columns)
        # Bytes of the JSON lines that were read, how these end, and SUMMED so far; the same for what the blocks hold.
        self._at: tuple[int, bytes, list[float]] = (0, b"", [0.0] * len(SUMMED))
        self._kept, self._tail = self._at, np.empty((0, 0))

    def _load(self, state: dict[str, Any]) -> None:
        self.names, self.generation, self._blocks = state["names"], state["generation"], state["blocks"]
        self._at = self._kept = (int(state["read"]), bytes.fromhex(state["mark"]), state["sums"])
        if self._store is not None and self._blocks and self._store.stat().st_size < self._stored_bytes:
            raise ValueError

    def state(self) -> dict[str, Any]:
        """What a later process needs to go on from the blocks, as JSON can hold it."""
        with self.lock:
            read, mark, sums = self._kept
            names = self.names[: self._blocks[-1][1]] if self._blocks else []
            kept = {"generation": self.generation, "blocks": list(self._blocks), "sums": sums}
            return {"names": names, "read": read, "mark": mark.hex(), **kept}

    def sum(self, name: str) -> float:
        """The sum of a column that is among SUMMED."""
        return self._at[2][SUMMED.index(name)]

    @property
    def _store(self) -> Path | None:
        return None if self._folder is None else self._folder / f"{self.generation}.f8"

    @property
    def _stored_bytes(self) -> int:
        return 8 * sum(rows * columns for rows, columns in self._blocks)

    @property
    def rows(self) -> int:
        """How many records the blocks and the tail have."""
        return sum(rows for rows, _ in self._blocks) + self._tail.shape[1]

    @property
    def memory(self) -> int:
        """Bytes of the tail."""
        return self._tail.nbytes

    def update(self) -> bool:
        """Reads what is new, at most CHUNK_BYTES; whether there was anything. A file that was cut back, and may have
        grown again, is read anew. Raises UserError for a line of metrics.jsonl that is no record."""
        with self.lock:
            read, mark, sums = self._at
            if read and self.run.before(self.file, read, len(mark)) != mark:
                self.drop_store()
                self._clear()
                read, mark, sums = self._at
            records, end = self.run.lines(self.file, read, CHUNK_BYTES)
            if end <= read:
                return False
            new = self._append([self._flat(record) for record in records])
            self._at = (end, self.run.before(self.file, end), [a + b for a, b in zip(sums, new, strict=True)])
            if self._tail.shape[1] >= BLOCK_ROWS:
                self.flush()
            return True

    def update_all(self) -> None:
        """Reads all that is new. Raises UserError as `update` does."""
        while self.update():
            pass

    def _append(self, records: list[dict[str, Any]]) -> list[float]:
        """Adds rows to the tail; their SUMMED."""
        known = dict.fromkeys(self.names)
        for keys in dict.fromkeys(tuple(record) for record in records):
            known.update(dict.fromkeys(keys))
        known.pop("phase", None)
        self.names = list(known)
        rows = [[*map(record.get, self.names)] for record in records]
        try:
            new = np.array(rows, np.float64)  # None becomes NaN
        except (TypeError, ValueError, OverflowError):  # a list, words, or more digits than a float has
            plain = [[v if isinstance(v, (int, float)) and abs(v) < 1e300 else None for v in row] for row in rows]
            new = np.array(plain, np.float64)
        new = new.reshape(len(records), len(self.names)).T
        old = np.full((len(self.names), self._tail.shape[1]), np.nan)
        old[: len(self._tail)] = self._tail
        self._tail = np.concatenate([old, new], axis=1)
        return [float(np.nansum(new[self.names.index(name)])) if name in known else 0.0 for name in SUMMED]

    def flush(self) -> None:
        """Moves the tail to the store. Without a store, or where it cannot be written, it stays in memory."""
        with self.lock:
            if self._store is None or not self._writable or not self._tail.size:
                return
            try:
                handle = os.open(self._store, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    data, start = memoryview(self._tail.tobytes()), self._stored_bytes
                    while data:
                        count = os.pwrite(handle, data, start)
                        data, start = data[count:], start + count
                finally:
                    os.close(handle)
            except OSError:
                self._writable = False  # what is there can be read still
                return
            self._blocks.append((self._tail.shape[1], len(self.names)))
            self._kept, self._tail = self._at, np.empty((0, 0))

    def drop_tail(self) -> None:
        """Forgets the tail; the next update reads it again."""
        with self.lock:
            self._at, self._tail = self._kept, np.empty((0, 0))

    def drop_store(self) -> None:
        """Deletes the blocks, which hold a file that is no more."""
        if self._store is not None and self._writable:
            self._store.unlink(missing_ok=True)

    def get(self, name: str) -> np.ndarray:
        """A column, one number for each record."""
        with self.lock:
            if name not in self.names:
                return np.full(self.rows, np.nan)
            index = self.names.index(name)
            try:
                parts = self._stored(index)
            except OSError:  # the process that writes the store has begun it anew
                self._clear()
                self.update_all()
                return self.get(name)
            if self._tail.shape[1]:
                parts.append(self._tail[index] if index < len(self._tail) else np.full(self._tail.shape[1], np.nan))
            return np.concatenate(parts) if parts else np.empty(0)

    def _stored(self, index: int) -> list[np.ndarray]:
        parts, start = [], 0
        if self._blocks and self._store is not None:
            with open(self._store, "rb", buffering=0) as stream:
                for rows, columns in self._blocks:
                    part = np.full(rows, np.nan)
                    if index < columns:
                        part = np.frombuffer(os.pread(stream.fileno(), rows * 8, start + index * rows * 8))
                    parts.append(part)
                    start += rows * columns * 8
        return parts

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the records that have the metric."""
        with self.lock:
            values, steps = self.get(name), self.get("step")
        there = ~np.isnan(values) & ~np.isnan(steps)
        return steps[there], values[there]

    def last(self, name: str) -> float | None:
        """The newest value of a column, None without."""
        with self.lock:
            tail = self._tail[self.names.index(name)] if name in self.names and self._tail.size else np.empty(0)
            values = tail if len(tail) and not np.isnan(tail[-1]) else self.series(name)[1]
        return float(values[-1]) if len(values) else None


def thin(values: np.ndarray, points: int) -> np.ndarray:
    """Indices of about `points` values that look like all of them when they are drawn: the least and the greatest of
    equal parts, in order, with the first and the last."""
    count = len(values)
    if count <= points:
        return np.arange(count)
    width = -(-count // max(1, points // 2))
    padded = np.concatenate([values, np.full(-count % width, values[-1])]).reshape(-1, width)
    starts = np.arange(len(padded)) * width
    chosen = np.concatenate([starts + padded.argmin(1), starts + padded.argmax(1), [0, count - 1]])
    return np.unique(np.minimum(chosen, count - 1))


@np.errstate(invalid="ignore")  # of values that are infinite
def mean_and_spread(series: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps, mean, standard deviation of a sample) over runs that have the same options but for the seed; at each step
    over those runs that have it. NaN where only one does."""
    steps = max((x for x, _ in series), key=len)
    same = all(np.array_equal(x, steps[: len(x)]) for x, _ in series)  # as a rule: they began at the same step
    steps = steps if same else np.unique(np.concatenate([x for x, _ in series]))
    places: list[Any] = [slice(len(x)) if same else np.searchsorted(steps, x) for x, _ in series]
    counts, sums, squares = np.zeros((3, len(steps)))
    for place, (_, y) in zip(places, series, strict=True):
        counts[place] += 1
        sums[place] += y
    mean = sums / counts
    for place, (_, y) in zip(places, series, strict=True):
        squares[place] += (y - mean[place]) ** 2
    return steps, mean, np.sqrt(squares / np.where(counts > 1, counts - 1, np.nan))
