"""All runs of a folder as the pages need them: read in the background, newest first, and remembered in a cache.

The cache lies in the user's cache folder and never in a run. One process writes it; others over the same folder of runs
read it and keep what is newer in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skyrl.config.load import flat
from skyrl.config.validation import ignored_on_resume
from skyrl.dashboard.columns import Columns
from skyrl.files import write_atomic
from skyrl.run_dir import OBJECTIVE, RunReader, find_runs
from skyrl.types import UserError

VERSION = 1
TAIL_BYTES = 256 << 20  # of all runs in memory
IDLE_SECONDS = 60.0  # after which the tail of a run that does not grow goes to the store
SAVE_SECONDS = 30.0
LISTED = ("step", OBJECTIVE, "reward:mean", "loss:sum")  # what the table of runs shows
UNKNOWN: dict[str, Any] = {
    "state": "unfinished",
    "typed": {},
    "tags": [],
    "seed": None,
    "changed": 0.0,
    "last": dict.fromkeys(LISTED),
}


class RunEntry:
    """One run: its columns, and what the table and the filters need of its other files."""

    def __init__(self, run: RunReader, store: Path | None, writable: bool, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.run, self._store, self._writable = run, store, writable
        self.lock = threading.Lock()
        self.metrics = Columns(run, "metrics.jsonl", dict, store, writable, state.get("metrics"))
        self._system: dict[int, Columns] = {}
        self._system_states = state.get("system", {})
        self.stamp: list[int] = state.get("stamp", [])
        self.about: dict[str, Any] = state.get("about", {})  # state, typed, tags, point, seed, last, problem, changed

    def refresh(self) -> bool:
        """Reads what is new; whether there was anything."""
        with self.lock:
            stamp = self.run.stamp()
            if stamp == self.stamp and self.about.get("state") != "running":
                return False
            state, changed = self.run.state(), stamp != self.stamp
            if changed:
                options = flat(self.run.config())
                self.about |= {
                    "typed": self.run.typed(),
                    "tags": [str(tag) for tag in options.get("tracking.tags") or ()],
                    "seed": options.get("seed"),
                    "point": point_of(options),
                    "changed": max(stamp[1::2]) / 1e9,
                    "problem": "",
                }
                try:
                    self.metrics.update_all()
                except UserError as error:
                    self.about["problem"] = str(error)
                self.about["last"] = {key: self.metrics.last(key) for key in LISTED}
                self.stamp = stamp
            changed = changed or state != self.about.get("state")
            self.about["state"] = state
            return changed

    def system(self, rank: int) -> Columns:
        """What tracking/system.py has seen of a rank, as columns."""
        with self.lock:
            if rank not in self._system:
                file, state = f"system/rank-{rank}.jsonl", self._system_states.get(str(rank))
                self._system[rank] = Columns(self.run, file, flat_system, self._store, self._writable, state)
        self._system[rank].update_all()
        return self._system[rank]

    def columns(self) -> list[Columns]:
        """All that is read of the run so far."""
        return [self.metrics, *self._system.values()]

    def saved(self) -> dict[str, Any]:
        """What `state` of a later process may be, as JSON can hold it."""
        system = self._system_states | {str(rank): one.state() for rank, one in self._system.items()}
        return {"stamp": self.stamp, "about": self.about, "metrics": self.metrics.state(), "system": system}


class RunIndex:
    """The runs of a folder. `start` reads them in a thread; `version` is another number after each change."""

    def __init__(self, runs: Path, cache: Path | None = None, *, only: str | None = None) -> None:
        """cache: a folder for all dashboards of this user, None = all in memory. only: name of the one run to show."""
        self.runs, self.only = Path(runs), only
        self.version, self.unread = 0, 0
        self._entries: dict[str, RunEntry] = {}
        self._recent: OrderedDict[int, tuple[Columns, int]] = OrderedDict()
        self._held = 0  # bytes of these; a sum over ten thousand runs for each of them would take minutes
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._store: Path | None = None
        self._guard, self._unsaved, self._saved_at = -1, False, 0.0
        if cache is not None:
            self._open_cache(Path(cache) / hashlib.sha256(os.path.realpath(runs).encode()).hexdigest()[:16])
        self._states = self._load()

    def _open_cache(self, folder: Path) -> None:
        """Without a folder that can be written all is kept in memory."""
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._guard = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._store = folder
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if self._guard >= 0:
                os.close(self._guard)
            self._guard = -1

    def _load(self) -> dict[str, Any]:
        if self._store is None:
            return {}
        try:
            told = json.loads((self._store / "index.json").read_text(encoding="utf-8"))
            return dict(told["runs"]) if told["version"] == VERSION else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def start(self) -> None:
        """Begins to read; what an earlier process knew is there at once."""
        self.unread = sum(not entry.about for entry in self._scan())
        if self.only is None and self._store is not None and self._guard >= 0:
            for state in self._states.values():  # of runs that were deleted meanwhile
                with contextlib.suppress(KeyError, TypeError, OSError):
                    for kept in (state["metrics"], *state["system"].values()):
                        (self._store / f"{kept['generation']}.f8").unlink(missing_ok=True)
            self._states, self._unsaved = {}, True
        self._thread = threading.Thread(target=self._work, name="skyrl-runs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and keeps what was read."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._save()
        if self._guard >= 0:
            os.close(self._guard)
            self._guard = -1

    def _scan(self) -> list[RunEntry]:
        """The runs that are there now, newest first."""
        found: dict[str, RunEntry] = {}
        try:
            self.runs.stat()  # a disk that is away for a moment is not a folder without runs
            for run in reversed(find_runs(self.runs)):
                if self.only in (None, run.name):
                    found[run.name] = self._entries.get(run.name) or RunEntry(
                        run, self._store, self._guard >= 0, self._states.pop(run.name, None)
                    )
        except OSError:
            return list(self._entries.values())
        for gone in self._entries.keys() - found.keys():
            for columns in self._entries[gone].columns():
                columns.drop_store()
        if found.keys() != self._entries.keys():
            self.version += 1
        self._entries = found
        return list(found.values())

    def _work(self) -> None:
        while not self._stop.is_set():
            begun = time.perf_counter()
            entries = self._scan()
            self.unread = sum(not entry.about for entry in entries)
            for entry in entries:
                if self._stop.is_set():
                    return
                self.unread -= not entry.about
                self._refresh(entry)
            if time.time() - self._saved_at > SAVE_SECONDS:
                self._save()
            # Ten thousand runs on a slow disk are looked at less often than ten.
            self._stop.wait(max(1.0, 10 * (time.perf_counter() - begun)))

    def _refresh(self, entry: RunEntry) -> None:
        try:
            if entry.refresh():
                self.version += 1
                self._unsaved = True
            elif entry.metrics.memory and time.time() - entry.about.get("changed", 0.0) > IDLE_SECONDS:
                entry.metrics.flush()
                self._unsaved = True
        except OSError:  # it is being deleted
            pass
        except Exception as error:  # whatever its files hold: the other runs go on
            problem = f"its files cannot be read ({type(error).__name__}: {error})"
            entry.about = {**UNKNOWN, "point": entry.run.name, **entry.about, "problem": problem}
        self._remember(entry)

    def _remember(self, entry: RunEntry) -> None:
        """Bounds the memory of all tails."""
        with self._lock:
            for columns in entry.columns():
                self._held -= self._recent.pop(id(columns), (columns, 0))[1]
                if size := columns.memory:
                    self._recent[id(columns)] = columns, size
                    self._held += size
            while self._held > TAIL_BYTES and len(self._recent) > 1:
                _, (columns, size) = self._recent.popitem(last=False)
                self._held -= size
                columns.flush()
                columns.drop_tail()

    def _save(self) -> None:
        if self._guard < 0 or not self._unsaved:
            return
        assert self._store is not None
        self._unsaved, self._saved_at = False, time.time()
        runs = {**self._states, **{name: entry.saved() for name, entry in self._entries.items() if entry.about}}
        with contextlib.suppress(OSError):
            write_atomic(self._store / "index.json", json.dumps({"version": VERSION, "runs": runs}))

    def entries(self) -> list[RunEntry]:
        """All runs, newest first, as far as they are read."""
        return list(self._entries.values())

    def mark(self, name: str | None) -> Any:
        """What is another value after a change of a run, or without a name of any."""
        entry = self._entries.get(name or "")
        return self.version if entry is None else [entry.stamp, entry.about.get("state")]

    def get(self, name: str) -> RunEntry | None:
        """A run, read to its end; None where there is none of that name."""
        entry = self._entries.get(name)
        if entry is None or not entry.run.path.is_dir():
            return None
        self._refresh(entry)
        return self.whole(entry) if entry.about else None

    def whole(self, entry: RunEntry) -> RunEntry:
        """The entry with all of its metrics: those of a run that was not looked at may be in the store but for the
        tail."""
        with contextlib.suppress(UserError):
            entry.metrics.update_all()
        self._remember(entry)
        return entry


def point_of(options: dict[str, Any]) -> str:
    """Equal for runs whose options differ in the seed alone, and in where and how they ran; as in skyrl.sweep."""
    schedule = str(options.get("optim.schedule"))
    kept = {
        k: v
        for k, v in options.items()
        if k != "seed" and (k == "batch.num_steps" or not ignored_on_resume(k, schedule))
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]


def flat_system(record: dict[str, Any]) -> dict[str, Any]:
    """A line of system/rank-<n>.jsonl as numbers: GPUs by their place, interfaces by their names."""
    found = {key: value for key, value in record.items() if isinstance(value, (int, float))}
    for name, (sent, received) in (record.get("interfaces") or {}).items():
        found |= {f"{name}/sent_bytes": sent, f"{name}/recv_bytes": received}
    for place, gpu in enumerate(record.get("gpus") or ()):
        found |= {f"gpu{place}/{key}": value for key, value in gpu.items()}
    return found


def differing(configs: dict[str, dict[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """(option, its value in each config) for all options in which some of the configs differ, in the order of the
    first."""
    flats = [flat(config) for config in configs.values()]
    for key in dict.fromkeys(key for one in flats for key in one):
        values = [one.get(key) for one in flats]
        if any(value != values[0] for value in values):
            yield key, values
