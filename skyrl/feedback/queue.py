"""The durable queue of live feedback: answers that were given, what people said of them, which step learned from it.

One SQLite file that several processes of one machine share: servers write answers and feedback, a trainer takes rows.
An answer is joined with its feedback by (episode, choice), which the answer's owner alone can name.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from skyrl.config.schema import FeedbackConfig
from skyrl.types import Floats, Ints, UserError

FILE = "feedback.sqlite"
APPLICATION_ID = 0x534B4642
BUSY_SECONDS = 30.0
TIDY_SECONDS = 3600.0
WAITING, NEVER = 0, -1  # in the column `step`: nobody has learned from it yet; nobody will
COLUMNS = 11  # of an answer: its fields, in this order
SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  episode TEXT NOT NULL, choice INTEGER NOT NULL, owner TEXT NOT NULL, weights TEXT NOT NULL, version INTEGER NOT NULL,
  prompt BLOB NOT NULL, tokens BLOB NOT NULL, logprobs BLOB NOT NULL, stop TEXT NOT NULL, problem TEXT NOT NULL,
  at REAL NOT NULL, PRIMARY KEY (episode, choice));
CREATE INDEX IF NOT EXISTS answers_at ON answers (at);
CREATE TABLE IF NOT EXISTS feedback (
  id INTEGER PRIMARY KEY, episode TEXT NOT NULL, choice INTEGER NOT NULL, owner TEXT NOT NULL, key TEXT NOT NULL,
  objectives TEXT NOT NULL, comment TEXT NOT NULL, at REAL NOT NULL, step INTEGER NOT NULL,
  UNIQUE (episode, choice));
CREATE UNIQUE INDEX IF NOT EXISTS feedback_key ON feedback (owner, key) WHERE key != '';
CREATE INDEX IF NOT EXISTS feedback_step ON feedback (step);
"""
_JOINED = "FROM feedback f JOIN answers a ON a.episode = f.episode AND a.choice = f.choice WHERE a.weights = :weights"
_FRESH = "abs(a.version - :version) <= :versions AND a.at >= :since"
_IS_RATED = "EXISTS (SELECT 1 FROM feedback f WHERE f.episode = answers.episode AND f.choice = answers.choice)"


@dataclass(frozen=True)
class KeptAnswer:
    """One answer as it was drawn: the ids that were read, and the tokens [L] with their log-probabilities under the
    weights that drew them. `weights` names the model, `version` counts its optimizer steps, `at` is Unix time.
    `problem`: why nothing can be learned from it, "" when it can. Once it is rated, `objectives` are what was said, so
    many `seconds` later."""

    episode: str
    choice: int
    owner: str
    weights: str
    version: int
    prompt: Ints
    tokens: Ints
    logprobs: Floats
    stop: Literal["stop", "length"]
    problem: str = ""
    at: float = field(default_factory=time.time)
    objectives: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What somebody said of an answer: named objectives, of which a plain reward is called "reward". `key` belongs to
    one post; "" = none was given."""

    episode: str
    choice: int
    objectives: dict[str, float]
    comment: str = ""
    key: str = ""


class FeedbackRefused(UserError):
    """Feedback that is shut out. `reason` is the word it is counted under, `status` that of HTTP."""

    def __init__(self, reason: str, status: int, text: str) -> None:
        super().__init__(text)
        self.reason, self.status = reason, status


class FeedbackQueue:
    """The queue in `folder`, which is made. Thread-safe. Raises UserError when the disk refuses, or the file is another
    program's.

    Feedback is on the disk before `give` returns, and so is every answer before it (one log, written in order). What
    is learned from is kept: it is the record of what the weights were made of.
    """

    def __init__(self, folder: Path, options: FeedbackConfig) -> None:
        self.folder, self.options = folder, options
        self._lock, self._next_tidy = threading.Lock(), 0.0
        self.refused: Counter[tuple[str, str]] = Counter()  # (owner, reason), since this process has opened it
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                folder / FILE, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            ours = self._db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
            if not ours and self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise UserError(f"feedback.folder={folder}: {FILE} is another program's; give another folder")
            if self._db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise UserError(f"feedback.folder={folder}: this file system has no WAL mode; give one on a local disk")
            self._db.executescript(f"{SCHEMA}PRAGMA application_id = {APPLICATION_ID};")
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"feedback.folder={folder}: {error}; give a folder that can be written") from error

    def close(self) -> None:
        """Lets go of the file. No call may follow."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self, begin: str, synchronous: str = "FULL") -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute(f"PRAGMA synchronous = {synchronous}")
                self._db.execute(begin)
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                text = f"feedback.folder={self.folder}: {error}; free space there, or check its rights"
                raise FeedbackRefused("disk", 503, text) from error
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    # ---- servers write -------------------------------------------------------------------------------------------

    def add(self, answers: Sequence[KeptAnswer]) -> None:
        """Keeps answers, before their client has them. Old ones that nobody rated go, once an hour."""
        values = [list(vars(one).values())[:COLUMNS] for one in answers]
        rows = [[value.tobytes() if isinstance(value, np.ndarray) else value for value in row] for row in values]
        with self._transaction("BEGIN IMMEDIATE", "NORMAL") as db:
            db.executemany(f"INSERT INTO answers VALUES ({', '.join('?' * COLUMNS)})", rows)
            if time.monotonic() >= self._next_tidy:
                self._next_tidy = time.monotonic() + TIDY_SECONDS
                oldest = time.time() - self.options.max_seconds
                db.execute(f"DELETE FROM answers WHERE at < ? AND NOT {_IS_RATED}", (oldest,))

    def give(self, owner: str, said: Verdict) -> tuple[bool, str]:
        """Queues feedback of `owner`; returns whether it is new (False: a repetition, which changes nothing), and why
        nothing is learned from it ("" when it is).

        Raises FeedbackRefused for an answer that is not the owner's or not known, is too old, or has feedback already.
        """
        place = (said.episode, said.choice)
        content = (*place, json.dumps(said.objectives, sort_keys=True), said.comment)
        with self._transaction("BEGIN IMMEDIATE") as db:
            answer = db.execute(
                "SELECT owner, problem, at FROM answers WHERE episode = ? AND choice = ?", place
            ).fetchone()
            if answer is None or answer[0] != owner:  # told alike: ids are not to be guessed
                reason = "unknown" if answer is None else "forged"
                raise FeedbackRefused(reason, 404, f"feedback: no answer {said.episode[:100]!r}, choice {said.choice}")
            for known in db.execute(
                "SELECT episode, choice, objectives, comment FROM feedback WHERE (episode = ? AND choice = ?) "
                "OR (owner = ? AND key = ? AND key != '')",
                (*place, owner, said.key),
            ):
                if known == content:
                    return False, answer[1]
                what = "this answer has" if known[:2] == place else "idempotency_key was used for an answer that has"
                raise FeedbackRefused("duplicate", 409, f"feedback: {what} its feedback already; each is rated once")
            if answer[2] < time.time() - self.options.max_seconds:
                limit = f"feedback.max_seconds={self.options.max_seconds:g}"
                raise FeedbackRefused("expired", 410, f"feedback: this answer is older than {limit}")
            db.execute(
                "INSERT INTO feedback (episode, choice, objectives, comment, owner, key, at, step) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*content, owner, said.key, time.time(), NEVER if answer[1] else WAITING),
            )
            return True, answer[1]

    # ---- a trainer reads -----------------------------------------------------------------------------------------

    def take(self, weights: str, step: int, count: int, *, version: int, shared: bool = False) -> list[KeptAnswer]:
        """The rows of one step: `count` answers of `weights`, those rated first first; [] while there are fewer.

        They are marked with the step, on the disk, before this returns. A step that was taken already, and is done
        again because its trainer went back to an earlier checkpoint, gets the very same rows: so what is in the weights
        of a checkpoint of step n are the rows of the steps up to n, each once.
        Rows whose version is too far from `version`, or that were answered too long ago, are never taken. With
        `shared`, several keys: no key has more than feedback.max_share of the rows.
        """
        options = self.options
        share = max(1, int(options.max_share * count)) if shared else count
        known = {"weights": weights, "version": version, "versions": options.max_versions, "share": share}
        known |= {"step": step, "count": count, "since": time.time() - options.max_seconds}
        waits = f"{_JOINED} AND f.step = {WAITING}"
        turn = f"SELECT f.id, row_number() OVER (PARTITION BY f.owner ORDER BY f.id) AS n {waits} AND {_FRESH}"
        chosen = f"SELECT id FROM ({turn}) WHERE n <= :share ORDER BY id LIMIT :count"
        old = f"SELECT f.id {waits} AND NOT ({_FRESH})"
        rows = f"SELECT a.*, f.objectives, f.at {_JOINED} AND f.step = :step ORDER BY f.id"
        with self._transaction("BEGIN") as db:
            found = db.execute(rows, known).fetchall()
            enough = not found and len(db.execute(chosen, known).fetchall()) == count
        if enough:
            with self._transaction("BEGIN IMMEDIATE") as db:
                db.execute(f"UPDATE feedback SET step = :step WHERE id IN ({chosen})", known)
                db.execute(f"UPDATE feedback SET step = {NEVER} WHERE id IN ({old})", known)
                found = db.execute(rows, known).fetchall()
        parts = (map(np.frombuffer, row[5:8], (np.int64, np.int64, np.float32)) for row in found)
        said = ((json.loads(row[11]), row[12] - row[10]) for row in found)
        columns = ((*row[:5], *a, *row[8:11], *b) for row, a, b in zip(found, parts, said, strict=True))
        return [KeptAnswer(*values) for values in columns]

    def counts(self, owner: str | None = None) -> dict[str, int]:
        """How much feedback waits, was taken by a step, or is never taken (too old, or nothing to learn from), and how
        much this process has shut out, by reason; of one owner or (None) of all."""
        parts = {"waiting": f"step = {WAITING}", "taken": "step > 0", "dropped": f"step = {NEVER}"}
        columns = ", ".join(f"count(*) FILTER (WHERE {which})" for which in parts.values())
        with self._transaction("BEGIN") as db:
            found = db.execute(f"SELECT {columns} FROM feedback WHERE owner = ?1 OR ?1 IS NULL", (owner,)).fetchone()
        counts = Counter(dict(zip(parts, found, strict=True)))
        for (whose, reason), count in list(self.refused.items()):
            counts[f"refused_{reason}"] += count if owner in (None, whose) else 0
        return counts
