"""The database below the store: one SQLite file in WAL mode, connections that threads borrow, short transactions; which
sessions live, in memory; and the log of futures, which is all of it that the scheduler sees.

A transaction that acknowledges a save is synced to the disk (synchronous=FULL), and with it everything written before;
other ones survive the death of the process, and not always that of the machine.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import secrets
import shutil
import sqlite3
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skyrl.envs import clock
from skyrl.files import disk_lack
from skyrl.service.messages import CreateModel, LoadWeights, Request, RequestOutcome, Result, SaveWeights, UnloadModel
from skyrl.service.storage.records import StorageError
from skyrl.types import UserError

log = logging.getLogger("skyrl.service")

SCHEMA_VERSION = 2  # schema.sql; from_version_1.sql makes it of the one before
APPLICATION_ID = 0x736B7972  # "skyr": another program's SQLite file is refused
BUSY_SECONDS = 30.0
MAX_LIMIT = 1000
KEEP_SECONDS = 86400.0  # for so long a recorded answer can be asked for
RESERVE_BYTES = 1 << 19  # of a file that is given up when the disk is full, so that deleting has room
REQUEST_ID = re.compile("[0-9a-f]{32}")
EPOCH = 8  # characters of a request id that are the same for all requests of one server process
LOST = "this request was lost when the server restarted; go on from the last saved state"
Row = sqlite3.Row
# What SQLite says of a disk, a file or another process (Python 3.10 gives no error codes).
_OF_THE_DISK = ("disk is full", "readonly database", "disk I/O error", "unable to open", "not a database", "malformed",
                "is locked", "locking protocol", "large file support")  # fmt: skip


class LiveSessions:
    """The sessions that have not ended, in memory: when each was last heard of, by a heartbeat or a request.
    Thread-safe; nothing here waits for a disk, so a full one makes no client look silent.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        """now: seconds since 1970. The silence of a session is not measured by it, unless a test brings its own: a
        clock that is set forward must end nobody, and neither a pause of this process, in which nobody can be heard."""
        self._now, self._steady = now, clock.now if now is time.time else now
        self._lock = threading.Lock()
        # session -> [owner, last heard in microseconds since 1970, the same in running time]; longest silent first
        self._heard: OrderedDict[str, list[Any]] = OrderedDict()

    def add(self, rows: Iterable[tuple[str, str, int]]) -> None:
        """Sessions as (id, owner, last heard in microseconds since 1970). Their silence begins now: while the server
        was away, they could not be heard."""
        with self._lock:
            moment = self._steady()
            self._heard.update((name, [owner, micros, moment]) for name, owner, micros in rows)

    def touch(self, session_id: str, owner: str) -> bool:
        """The session was heard of now. False, and nothing done, when it does not live or is not this owner's."""
        with self._lock:
            heard = self._heard.get(session_id)
            if heard is None or owner != heard[0]:
                return False
            heard[1], heard[2] = max(heard[1], int(self._now() * 1_000_000)), self._steady()
            self._heard.move_to_end(session_id)
            return True

    def remove(self, session_id: str) -> None:
        """The session has ended."""
        with self._lock:
            self._heard.pop(session_id, None)

    def last_heard(self, session_id: str) -> int:
        """In microseconds since 1970; 0 for a session that does not live."""
        heard = self._heard.get(session_id)
        return heard[1] if heard else 0

    def ended(self, session_ids: Iterable[str], silent_seconds: float = 0) -> set[str]:
        """Those of some sessions that do not live, or were silent for so long (0 = however long)."""
        with self._lock:
            before = self._steady() - silent_seconds if silent_seconds else float("-inf")
            return {name for name in session_ids if name not in self._heard or self._heard[name][2] < before}

    def silent(self, seconds: float, most: int) -> list[str]:
        """Up to `most` that were silent for so long, the longest first."""
        with self._lock:
            before = self._steady() - seconds
            silent = itertools.takewhile(lambda item: item[1][2] < before, self._heard.items())
            return [name for name, _ in itertools.islice(silent, most)]

    def heard_since(self, micros: int) -> list[str]:
        """Sessions that were heard at that time or later."""
        with self._lock:
            return [name for name, heard in self._heard.items() if heard[1] >= micros]


class Database:
    """The file and its transactions. Thread-safe: each transaction borrows a connection, and returns it.

    now: seconds since 1970, for tests. Raises: UserError when the file cannot be opened or is not ours.
    """

    def __init__(self, path: Path | str, *, now: Callable[[], float] = time.time) -> None:
        self.path, self._now = Path(path), now
        self._idle: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self.live = LiveSessions(now)
        self.touched: dict[str, int] = {}  # run -> time of its last request, where that is not in the table yet
        self._closed = False
        self._reserve = self.path.with_name(f"{self.path.name}.reserve")
        self.make_room()
        try:
            with self._explained(), self._connection() as connection:
                self._prepare(connection)
                (self.store_id,) = connection.execute("SELECT value FROM facts WHERE key = 'store_id'").fetchone()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the connections that are not in use; the others close as they come back. No call may follow."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def micros(self) -> int:
        """The time now in microseconds since 1970, as it stands in the tables."""
        return int(self._now() * 1_000_000)

    def free_bytes(self) -> int:
        """Space on the disk. Raises: StorageError."""
        with self._explained():
            return shutil.disk_usage(self.path.parent).free

    def make_room(self) -> None:
        """Before what frees space or memory is written: gives up the reserve when there is no other space."""
        if self._reserve.exists() and self.free_bytes() < RESERVE_BYTES:
            self._reserve.unlink(missing_ok=True)

    def keep_reserve(self) -> None:
        """Sets some space aside for that, once there is plenty. Raises: StorageError."""
        if not self._reserve.exists() and self.free_bytes() > 4 * RESERVE_BYTES:
            with self._explained():
                self._reserve.write_bytes(bytes(RESERVE_BYTES))

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection on which all statements see the same state."""
        with self._transaction("BEGIN") as connection:
            yield connection

    @contextmanager
    def write(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction: committed at the end, undone if the body raises. durable: synced to the disk before this
        returns. Raises: UserError when the disk is full or the file cannot be written."""
        with self._transaction("BEGIN IMMEDIATE", "FULL" if durable else "NORMAL") as connection:
            yield connection

    @contextmanager
    def _transaction(self, begin: str, synchronous: str = "") -> Iterator[sqlite3.Connection]:
        with self._explained(), self._connection() as connection:
            if synchronous:
                connection.execute(f"PRAGMA synchronous = {synchronous}")
            connection.execute(begin)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk has ended it already
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the store {self.path} is closed")
            connection = self._idle.pop() if self._idle else None
        connection = connection or self._open()
        try:
            yield connection
        finally:
            with self._lock:
                keep = not self._closed
                if keep:
                    self._idle.append(connection)
            if not keep:
                connection.close()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.row_factory = Row
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and application != APPLICATION_ID:
            raise UserError(f"store {self.path}: another program's database; give another file")
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise UserError(f"store {self.path}: this file system has no WAL mode; put the file on a local disk")
        if connection.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION:
            return  # nothing is written, for the disk may be full
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise UserError(
                    f"store {self.path}: schema {version}, this skyrl knows up to {SCHEMA_VERSION}; use a newer skyrl"
                )
            if version < SCHEMA_VERSION:
                script = Path(__file__).with_name("from_version_1.sql" if version else "schema.sql")
                for statement in script.read_text(encoding="utf-8").split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            if version == 0:
                connection.execute("INSERT INTO facts VALUES ('store_id', ?)", (secrets.token_hex(16),))
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A person's line for what is wrong with the disk, the file or a text; mistakes of ours stay as they are."""
        try:
            yield
        except UnicodeEncodeError:
            raise UserError("text with half a surrogate pair: cannot be stored; send valid Unicode") from None
        except OverflowError:
            raise UserError("number beyond 64 bits: cannot be stored; send a smaller one") from None
        except (sqlite3.DatabaseError, OSError) as error:
            if isinstance(error, sqlite3.Error) and not any(words in str(error) for words in _OF_THE_DISK):
                raise
            lack = disk_lack(self.path)  # SQLite says "unable to open" or "I/O error" as well
            raise StorageError(
                f"store {self.path}: {error}{lack and f' ({lack})'}; free space there, check its rights, or give "
                "another file"
            ) from error


def check_page(limit: int, offset: int) -> None:
    """Raises: UserError unless 0 <= limit <= 1000 and 0 <= offset < 2^63."""
    if not 0 <= limit <= MAX_LIMIT:
        raise UserError(f"limit={limit}: give 0 to {MAX_LIMIT}")
    if not 0 <= offset < 2**63:
        raise UserError(f"offset={offset}: give 0 or more")


def has_lasting_effect(request: Request) -> bool:
    """Whether something of this request is still there after a restart: a run, or a checkpoint. Weights loaded into
    an open model and snapshots without a name end with the process."""
    if isinstance(request, SaveWeights):
        return request.name is not None or request.kind != "sampler_weights"
    if isinstance(request, LoadWeights):
        return request.model_id is None
    return isinstance(request, (CreateModel, UnloadModel))


class FutureLog:
    """What of the scheduler's memory outlives the process. Thread-safe.

    Only requests with a lasting effect are recorded, and only once they are done: whoever asks for the future of one of
    these after a restart finds that it was run, and nobody runs it again.
    """

    def __init__(self, database: Database) -> None:
        self._database, self._lock = database, threading.Lock()
        self._epoch = uuid.uuid4().hex[:EPOCH]
        self._unwritten: dict[str, tuple[str, str, str, int]] = {}  # rows of answers that the disk refused

    def new_id(self) -> str:
        """The id of a new request."""
        return self._epoch + uuid.uuid4().hex[EPOCH:]

    def touch(self, name: str, owner: str) -> bool:
        """A request for a model or a sampling session was accepted: its session was heard of, and its run has a last
        request. Memory only; `tidy` writes it. False when the session has ended, or is another owner's: nothing new is
        to be accepted."""
        if not self._database.live.touch(name.partition(":")[0], owner):
            return False
        if ":train:" in name:
            with self._lock:
                self._database.touched[name] = self._database.micros()
        return True

    def record(self, request_id: str, owner: str, request: Request, result: Result) -> None:
        """A request is done; to be called before anybody is told. Writes nothing unless its effect is lasting. Never
        fails: what the disk refuses stays in memory, and is written when there is space again."""
        if has_lasting_effect(request) and isinstance(result, dict):
            with self._lock:
                self._unwritten[request_id] = (request_id, owner, json.dumps(result), self._database.micros())
            try:
                self._write_answers()
            except Exception as error:  # the work itself is done, and who asked for it has to be told
                log.warning("an answer is not on record yet: %s", error)

    def _write_answers(self) -> None:
        with self._lock:
            waiting = list(self._unwritten.values())
        if waiting:
            with self._database.write() as db:
                db.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", waiting)
            with self._lock:
                for row in waiting:
                    self._unwritten.pop(row[0], None)

    def recall(self, request_id: str, owner: str) -> RequestOutcome:
        """What is known of a request that the scheduler does not have: a recorded answer, or (by its id, which tells
        the process that gave it out) that it ended with an earlier server."""
        with self._lock:
            waiting = self._unwritten.get(request_id)
        if waiting is not None and waiting[1] == owner:
            return RequestOutcome("done", result=json.loads(waiting[2]))
        with self._database.read() as db:
            row = db.execute(
                "SELECT result FROM answers WHERE request_id = ? AND owner = ?", (request_id, owner)
            ).fetchone()
        if row is not None:
            return RequestOutcome("done", result=json.loads(row["result"]))
        if REQUEST_ID.fullmatch(request_id) and not request_id.startswith(self._epoch):
            return RequestOutcome("failed", error=LOST, category="server")
        return RequestOutcome("unknown")

    def tidy(self) -> None:
        """Writes down what the disk refused before, and the times of last requests: one transaction for all requests
        since the last call. Throws away answers that are a day old."""
        self._write_answers()
        before = self._database.micros() - int(KEEP_SECONDS * 1_000_000)
        with self._database.read() as db:
            old = db.execute("SELECT 1 FROM answers WHERE created_at < ?", (before,)).fetchone()
        with self._lock:
            touched, self._database.touched = self._database.touched, {}
        if not (old or touched):
            return
        try:
            with self._database.write() as db:
                db.execute("DELETE FROM answers WHERE created_at < ?", (before,))
                db.executemany(
                    "UPDATE runs SET last_request_at = max(last_request_at, ?) WHERE run_id = ?",
                    [(now, run_id) for run_id, now in touched.items()],
                )
        except BaseException:
            with self._lock:
                self._database.touched = touched | self._database.touched
            raise
