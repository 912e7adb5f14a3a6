"""What the service remembers over restarts: sessions, sampling sessions, training runs and checkpoints.

The row of a checkpoint is the truth: a folder that no row names does not exist for anyone. Saving and deleting, which
concern rows and folders both, are in checkpoints.py; the transactions below all this are in database.py.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from skyrl.service.storage.database import Database, Row, check_page
from skyrl.service.storage.records import (
    FINISH_REASONS,
    CheckpointPath,
    CheckpointQuery,
    CheckpointRecord,
    Json,
    ModelInfo,
    NotFound,
    Page,
    RunState,
    SamplingSession,
    Scope,
    SearchPage,
    SearchQuery,
    Session,
    SessionQuery,
    StorageError,
    TrainingRun,
    checkpoint_of,
    from_micros,
    present,
)
from skyrl.types import UserError

T = TypeVar("T")
ACTIVE_SECONDS = 300  # a session that was silent longer is not called active
SESSIONS_AT_ONCE = 500  # rows that one transaction of the housekeeping changes
MIN_TTL = 3600
MAX_TTL = 315_576_000  # ten years of 365.25 days
# For a table called c: what may still be seen. An expired one is gone from then on, whenever its files go.
LIVE = "(NOT c.missing AND (c.expires_at IS NULL OR c.expires_at > :now))"
_SAVED = f"FROM checkpoints c JOIN runs r USING (run_id) WHERE r.session_id = s.session_id AND {LIVE}"
_TALLY = f"""(SELECT count(*) {_SAVED}) AS checkpoints_count,
    (SELECT coalesce(sum(c.size_bytes), 0) {_SAVED}) AS checkpoint_bytes"""
_KEY = "run_id = :run_id AND kind = :kind AND name = :name"  # of a checkpoint: the fields of its path
# Another owner's run may be seen when one of its checkpoints is published.
_SEEN = {
    "owned": "owner = :owner",
    "accessible": f"(owner = :owner OR EXISTS (SELECT 1 FROM checkpoints c WHERE c.run_id = runs.run_id AND c.public"
    f" AND {LIVE}))",
}


class Store(Database):
    """Store(path): one SQLite file. Thread-safe; transactions are short. Every getter takes the owner who asks, and
    another owner's thing is NotFound, except what is published.

    Raises: UserError, one line, for what a person can mend: the disk, the file, a value out of range.
    """

    def __init__(self, path: Path | str, *, now: Callable[[], float] = time.time) -> None:
        super().__init__(path, now=now)
        self._opened = self.micros()
        with self.read() as db:
            self.live.add(db.execute("SELECT session_id, owner, last_heartbeat FROM sessions WHERE status = 'active'"))

    # ---- sessions and samplers -------------------------------------------------------------------------------------

    def create_session(
        self,
        owner: str,
        *,
        tags: Sequence[str] = (),
        user_metadata: Mapping[str, str] | None = None,
        sdk_version: str = "",
        project_id: str | None = None,
        display_name: str | None = None,
    ) -> Session:
        """A new session with an id like "s-0123456789ab"."""
        session_id, now = f"s-{secrets.token_hex(6)}", self.micros()
        values = {
            "session_id": session_id, "owner": owner, "tags": json.dumps(list(tags)),
            "user_metadata": json.dumps(dict(user_metadata or {})), "sdk_version": sdk_version,
            "project_id": project_id, "display_name": display_name,
            "folded_name": (display_name or "").casefold(), "created_at": now, "last_heartbeat": now,
        }  # fmt: skip
        with self.write() as db:
            _insert(db, "sessions", values)
        self.live.add([(session_id, owner, now)])
        return self.get_session(session_id, owner)

    def heartbeat(self, session_id: str, owner: str) -> None:
        """Notes, in memory alone, that the session's client lives. Raises: NotFound, also when it has ended."""
        if not self.live.touch(session_id, owner):
            ended = self.get_session(session_id, owner).status or {}
            raise NotFound(f"session {session_id}: has ended ({ended.get('detail') or ended.get('type')})")

    def end_silent_sessions(self, seconds: float) -> int:
        """Ends the sessions that were silent for so long (0 = none), first on record, then in memory; how many."""
        ended, told = 0, json.dumps({"detail": f"its client was silent for {seconds:g} s"})
        while seconds and (part := self.live.silent(seconds, SESSIONS_AT_ONCE)):  # anew: some may be heard meanwhile
            with self.write() as db:
                db.executemany(
                    "UPDATE sessions SET status = 'cancelled', detail = ?, last_heartbeat = max(last_heartbeat, ?)"
                    " WHERE session_id = ? AND status = 'active'",
                    [(told, self.live.last_heard(name), name) for name in part],
                )
            for name in part:
                self.live.remove(name)
            ended += len(part)
        return ended

    def finish_session(self, session_id: str, owner: str, reason: str, detail: str | None = None) -> None:
        """The client says that it is done; the first word on how a session ended stays. Raises: NotFound, UserError."""
        if reason not in FINISH_REASONS:
            raise UserError(f"session {session_id}: finish reason {reason!r}; give one of {', '.join(FINISH_REASONS)}")
        told = json.dumps(present(reason={"type": reason}, detail=detail))
        self.get_session(session_id, owner)
        self.make_room()
        with self.write() as db:
            db.execute(
                "UPDATE sessions SET status = 'client_finished', reason = ?, detail = ?"
                " WHERE session_id = ? AND status = 'active'",
                (reason, told, session_id),
            )
        self.live.remove(session_id)

    def set_project(self, session_id: str, owner: str, project_id: str | None) -> None:
        """Moves a session, and with it its runs and checkpoints, to a project. Raises: NotFound."""
        sql = "UPDATE sessions SET project_id = ? WHERE session_id = ? AND owner = ?"
        with self.write() as db:
            if not db.execute(sql, (project_id, session_id, owner)).rowcount:
                raise _no_session(session_id)

    def get_session(self, session_id: str, owner: str) -> Session:
        """One session with its runs, samplers and what its checkpoints take. Raises: NotFound."""
        with self.read() as db:
            found = db.execute(
                f"SELECT s.*, {_TALLY} FROM sessions s WHERE session_id = :id AND owner = :owner",
                {"id": session_id, "owner": owner, "now": self.micros()},
            ).fetchone()
            if found is None:
                raise _no_session(session_id)
            runs, samplers = (
                tuple(row[0] for row in db.execute(f"{query} WHERE session_id = ? ORDER BY rowid", (session_id,)))
                for query in ("SELECT run_id FROM runs", "SELECT sampler_id FROM samplers")
            )
        return self._session(found, runs, samplers)

    def list_sessions(self, owner: str, *, limit: int = 100, offset: int = 0) -> Page[str]:
        """Ids of the owner's sessions, newest first. No session is shared: "accessible" ones are the same."""
        source = "FROM sessions WHERE owner = :owner"
        return self._page(source, {"owner": owner}, limit, offset, lambda _, row: row["session_id"], order="session_id")

    def _page(
        self,
        source: str,
        values: dict[str, Any],
        limit: int,
        offset: int,
        read: Callable[[sqlite3.Connection, Row], T],
        order: str = "rowid",
    ) -> Page[T]:
        """A part of a list, newest first: `source` is the whole of it in SQL, from FROM on; of one time `order`
        decides."""
        check_page(limit, offset)
        with self.read() as db:
            (total,) = db.execute(f"SELECT count(*) {source}", values).fetchone()
            order = f"ORDER BY created_at DESC, {order} DESC LIMIT :limit OFFSET :offset"
            rows = db.execute(f"SELECT * {source} {order}", {**values, "limit": limit, "offset": offset})
            return Page([read(db, row) for row in rows.fetchall()], offset, limit, total)

    def search_sessions(self, owner: str, query: SessionQuery) -> SearchPage[Session]:
        """The owner's sessions that match."""
        where, values = query.condition(lambda: self.live.heard_since(self.micros() - ACTIVE_SECONDS * 1_000_000))
        sql = f"SELECT s.*, {_TALLY} FROM sessions s WHERE s.owner = :owner AND {where}"
        rows, last = self._search(owner, query, f"{sql} ORDER BY created_at DESC, session_id DESC", values)
        return SearchPage(
            [self._session(row) for row in rows], last and {**last[0], "last_session_id": last[1]["session_id"]}
        )

    def _search(self, owner: str, query: SearchQuery, sql: str, values: dict[str, Any]) -> tuple[list[Row], Any]:
        """The rows of a page, and (the time, the row) with which it ends, None where there is no further page."""
        if not query.owner.has(owner):
            return [], None
        values = {**values, "owner": owner, "now": self.micros(), "limit": query.limit + 1}
        with self.read() as db:
            rows = db.execute(f"{sql} LIMIT :limit", values).fetchall()
        if len(rows) <= query.limit:
            return rows, None
        last = rows[query.limit - 1]
        return rows[:-1], (present(last_created_at=from_micros(last["created_at"])), last)

    def create_sampler(
        self,
        session_id: str,
        owner: str,
        seq_id: int,
        base_model: str,
        *,
        model_path: str | None = None,
        version: str | None = None,
        ephemeral_run: str | None = None,
    ) -> SamplingSession:
        """The sampling session "{session}:sample:{seq_id}". version: that of the checkpoint at model_path.

        Raises: NotFound for the session, UserError when the number is taken.
        """
        sampler_id = f"{session_id}:sample:{seq_id}"
        values = {
            "sampler_id": sampler_id, "session_id": session_id, "owner": owner, "base_model": base_model,
            "model_path": model_path, "version": version, "ephemeral_run": ephemeral_run, "created_at": self.micros(),
        }  # fmt: skip
        with self.write() as db:
            _require_session(db, session_id, owner)
            made = _insert(db, "samplers", values)
        if not made:
            raise UserError(f"sampling session {sampler_id}: exists; give another sampling_session_seq_id")
        return self.get_sampler(sampler_id, owner)

    def get_sampler(self, sampler_id: str, owner: str) -> SamplingSession:
        """One sampling session. Raises: NotFound."""
        with self.read() as db:
            row = db.execute(
                "SELECT * FROM samplers WHERE sampler_id = ? AND owner = ?", (sampler_id, owner)
            ).fetchone()
        if row is None:
            raise NotFound(f"sampling session {sampler_id}: not found")
        fields = ("sampler_id", "session_id", "owner", "base_model", "model_path", "version", "ephemeral_run")
        return SamplingSession(**{key: row[key] for key in fields}, created_at=from_micros(row["created_at"]))

    def join_sampler(self, sampler_id: str, owner: str) -> int:
        """A number for one more client of a sampling session: 1, 2, ... (the first client is 0). Raises: NotFound."""
        which = ("WHERE sampler_id = ? AND owner = ?", (sampler_id, owner))
        with self.write() as db:
            db.execute(f"UPDATE samplers SET clients = clients + 1 {which[0]}", which[1])
            row = db.execute(f"SELECT clients FROM samplers {which[0]}", which[1]).fetchone()
        if row is None:
            raise NotFound(f"sampling session {sampler_id}: not found")
        return row[0]

    def _session(self, row: Row, runs: tuple[str, ...] = (), samplers: tuple[str, ...] = ()) -> Session:
        status: Json | None = {"type": row["status"], **json.loads(row["detail"])}
        last_heartbeat = max(row["last_heartbeat"], self.live.last_heard(row["session_id"]))
        if row["status"] == "active" and last_heartbeat < self.micros() - ACTIVE_SECONDS * 1_000_000:
            status = None
        return Session(
            **{key: row[key] for key in ("session_id", "owner", "sdk_version", "project_id", "display_name")},
            tags=tuple(json.loads(row["tags"])),
            user_metadata=json.loads(row["user_metadata"]),
            created_at=from_micros(row["created_at"]),
            last_heartbeat=from_micros(last_heartbeat),
            status=status,
            run_ids=runs,
            sampler_ids=samplers,
            checkpoints_count=row["checkpoints_count"],
            checkpoint_bytes=row["checkpoint_bytes"],
        )

    # ---- runs ------------------------------------------------------------------------------------------------------

    def create_run(
        self,
        session_id: str,
        owner: str,
        model_seq_id: int,
        info: ModelInfo,
        user_metadata: Mapping[str, str] | None = None,
    ) -> TrainingRun:
        """The run "{session}:train:{model_seq_id}", open. Raises: NotFound for the session, UserError if it exists."""
        run_id, now = f"{session_id}:train:{model_seq_id}", self.micros()
        values = {
            "run_id": run_id, "session_id": session_id, "owner": owner, "facts": json.dumps(info.dump()),
            "user_metadata": json.dumps(dict(user_metadata or {})), "created_at": now, "last_request_at": now,
            "state": "open",
        }  # fmt: skip
        with self.write() as db:
            _require_session(db, session_id, owner)
            made = _insert(db, "runs", values)
        if not made:
            raise UserError(f"model {run_id}: exists; give another model_seq_id")
        return self.get_run(run_id, owner)

    def get_run(self, run_id: str, owner: str, *, scope: Scope = "owned") -> TrainingRun:
        """One run with its newest checkpoints, of another owner's run only published ones. Raises: NotFound."""
        with self.read() as db:
            values = {"id": run_id, "owner": owner, "now": self.micros()}
            row = db.execute(f"SELECT * FROM runs WHERE run_id = :id AND {seen(scope)}", values).fetchone()
            if row is None:
                raise NotFound(f"training run {run_id}: not found")
            return self._with_latest(db, _run(row, self.touched), owner)

    def list_runs(self, owner: str, *, limit: int = 100, offset: int = 0, scope: Scope = "owned",
                  project_id: str | None = None) -> Page[TrainingRun]:  # fmt: skip
        """Runs, newest first. accessible: other owners' too that have a published checkpoint."""
        where = seen(scope)
        if project_id is not None:
            where += (
                " AND session_id IN (SELECT session_id FROM sessions WHERE coalesce(project_id, 'default') = :project)"
            )
        values = {"owner": owner, "now": self.micros(), "project": project_id}

        def read(db: sqlite3.Connection, row: Row) -> TrainingRun:
            return self._with_latest(db, _run(row, self.touched), owner)

        return self._page(f"FROM runs WHERE {where}", values, limit, offset, read)

    def close_run(self, run_id: str, owner: str, state: RunState = "closed") -> None:
        """The model goes from memory (unloaded, or its session ended). Raises: NotFound."""
        self.make_room()
        with self.write() as db:
            done = db.execute("UPDATE runs SET state = ? WHERE run_id = ? AND owner = ?", (state, run_id, owner))
        if not done.rowcount:
            raise NotFound(f"training run {run_id}: not found")

    def forget_run(self, run_id: str) -> None:
        """Takes back a run of which nothing came."""
        self.make_room()
        with self.write() as db:
            db.execute("DELETE FROM runs WHERE run_id = ?", (run_id,))

    def run_checkpoints(self, run_id: str, owner: str) -> list[CheckpointRecord]:
        """All checkpoints of a run, newest first; of another owner's run the published ones. Raises: NotFound when
        there is no such run or nothing of it may be seen."""
        self.get_run(run_id, owner, scope="accessible")
        with self.read() as db:
            rows = db.execute(
                f"SELECT * FROM checkpoints c WHERE run_id = :run AND {LIVE} AND (owner = :owner OR public)"
                " ORDER BY created_at DESC, rowid DESC",
                {"run": run_id, "owner": owner, "now": self.micros()},
            )
            return [checkpoint_of(row) for row in rows]

    def recover(self) -> int:
        """Runs that were open when the store was opened are lost: their server has died. Returns how many became so
        now."""
        if not self._opened:
            return 0
        with self.write() as db:
            sql = "UPDATE runs SET state = 'lost' WHERE state = 'open' AND created_at <= ?"
            changed = db.execute(sql, (self._opened,)).rowcount
        self._opened = 0  # that is done, once for all
        return changed

    def _with_latest(self, db, run: TrainingRun, reader: str) -> TrainingRun:
        found = {}
        for kind in ("weights", "sampler_weights"):
            row = db.execute(
                f"SELECT * FROM checkpoints c WHERE run_id = :run AND kind = :kind AND {LIVE}"
                " AND (owner = :owner OR public) ORDER BY created_at DESC, rowid DESC LIMIT 1",
                {"run": run.run_id, "kind": kind, "owner": reader, "now": self.micros()},
            ).fetchone()
            found[kind] = checkpoint_of(row) if row else None
        return replace(run, last_checkpoint=found["weights"], last_sampler_checkpoint=found["sampler_weights"])

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def require_free(self, path: CheckpointPath, owner: str, *, overwrite: bool) -> None:
        """Raises: NotFound unless the run is the owner's; UserError if the name is taken and may not be overwritten."""
        with self.read() as db:
            self._require_free(db, path, owner, overwrite)

    def add_checkpoint(
        self,
        path: CheckpointPath,
        owner: str,
        *,
        version: str,
        size_bytes: int,
        info: ModelInfo,
        has_optimizer: bool,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> tuple[CheckpointRecord, str | None]:
        """Commits a checkpoint whose folder is on the disk: once this returns, it is saved. Synced to the disk.

        Returns its record, and the version that it replaces (whose folder is to be deleted). Overwriting starts anew:
        not published, the new ttl and metadata. Raises as `require_free`, and UserError for a ttl out of range.
        """
        check_ttl(ttl_seconds)
        now = self.micros()
        values = {
            **asdict(path), "owner": owner, "version": version,
            "created_at": now, "size_bytes": size_bytes, "expires_at": _expiry(now, ttl_seconds),
            "user_metadata": json.dumps(dict(user_metadata or {})), "facts": json.dumps(info.dump()),
            "has_optimizer": int(has_optimizer),
        }  # fmt: skip
        with self.write(durable=True) as db:
            if (earlier := self._require_free(db, path, owner, overwrite)) is not None:
                db.execute(f"DELETE FROM checkpoints WHERE {_KEY}", values)
            _insert(db, "checkpoints", values)
            row = _row(db, path)
        assert row is not None and row["version"] == version, f"{path.uri}: two rows"
        return checkpoint_of(row), earlier

    def get_checkpoint(self, path: CheckpointPath, reader: str) -> CheckpointRecord:
        """A checkpoint that is the reader's own or published. Raises: NotFound, also when it has expired;
        StorageError when its folder is damaged."""
        with self.read() as db:
            row = _row(db, path)
        if row is None or not (row["owner"] == reader or row["public"]) or self._expired(row):
            raise _no_checkpoint(path)
        if row["missing"]:
            raise StorageError(f"checkpoint {path.uri}: its files were lost or damaged on the disk; delete it")
        return checkpoint_of(row)

    def list_checkpoints(
        self, owner: str, *, limit: int = 100, offset: int = 0, kinds: Sequence[str] | None = None
    ) -> Page[CheckpointRecord]:
        """The owner's checkpoints of all runs, newest first; only those of some kinds if given."""
        values = {"owner": owner, "now": self.micros(), "kinds": json.dumps(kinds)}
        some = "" if kinds is None else " AND kind IN (SELECT value FROM json_each(:kinds))"
        source = f"FROM checkpoints c WHERE owner = :owner AND {LIVE}{some}"
        return self._page(source, values, limit, offset, lambda _, row: checkpoint_of(row))

    def search_checkpoints(self, owner: str, query: CheckpointQuery) -> SearchPage[CheckpointRecord]:
        """The owner's checkpoints that match."""
        where, values = query.condition()
        sql = (
            "SELECT c.* FROM checkpoints c JOIN runs r USING (run_id) JOIN sessions s USING (session_id)"
            f" WHERE c.owner = :owner AND {LIVE} AND {where} ORDER BY c.created_at DESC, c.version DESC"
        )
        rows, last = self._search(owner, query, sql, values)
        return SearchPage(
            list(map(checkpoint_of, rows)), last and {**last[0], "last_checkpoint_uuid": last[1]["version"]}
        )

    def all_checkpoints(self) -> list[CheckpointRecord]:
        """Of all owners, also expired and missing ones: what `reconcile` compares with the disk."""
        with self.read() as db:
            return [checkpoint_of(row) for row in db.execute("SELECT * FROM checkpoints ORDER BY rowid")]

    def version_of(self, path: CheckpointPath, owner: str | None = None) -> str | None:
        """The version that a path stands for; None when there is no such row of this owner's (None: of anyone's)."""
        with self.read() as db:
            row = _row(db, path)
        return row["version"] if row is not None and owner in (None, row["owner"]) else None

    def set_public(self, path: CheckpointPath, owner: str, public: bool) -> None:
        """Publishes a checkpoint or takes that back; no error if it is so already. Raises: NotFound."""
        self._update(path, owner, "public", int(public))

    def set_ttl(self, path: CheckpointPath, owner: str, ttl_seconds: int | None) -> None:
        """Lets a checkpoint expire so many seconds from now, None = never. Raises: NotFound, UserError."""
        check_ttl(ttl_seconds)
        self._update(path, owner, "expires_at", _expiry(self.micros(), ttl_seconds))

    def set_missing(self, path: CheckpointPath, version: str, missing: bool) -> None:
        """Marks whether the folder of this version is not whole."""
        with self.write(durable=True) as db:
            db.execute(
                f"UPDATE checkpoints SET missing = :missing WHERE {_KEY} AND version = :version",
                {**asdict(path), "missing": int(missing), "version": version},
            )

    def delete_checkpoint(self, path: CheckpointPath, owner: str) -> str:
        """Forgets a checkpoint; returns the version whose folder is to be deleted. Raises: NotFound."""
        self.make_room()
        with self.write(durable=True) as db:
            row = _row(db, path)
            if row is None or row["owner"] != owner:
                raise _no_checkpoint(path)
            db.execute(f"DELETE FROM checkpoints WHERE {_KEY}", asdict(path))
        return row["version"]

    def expired_checkpoints(self) -> list[CheckpointRecord]:
        """All whose time is over; nobody sees them any more."""
        with self.read() as db:
            return [
                checkpoint_of(row)
                for row in db.execute("SELECT * FROM checkpoints WHERE expires_at <= ?", (self.micros(),))
            ]

    def forget(self, checkpoints: Sequence[CheckpointRecord]) -> None:
        """Removes the rows of these versions."""
        self.make_room()
        with self.write(durable=True) as db:
            db.executemany(
                f"DELETE FROM checkpoints WHERE {_KEY} AND version = :version",
                [{**asdict(one.path), "version": one.version} for one in checkpoints],
            )

    def usage(self, owner: str, project_id: str | None = None) -> list[Json]:
        """Space of the owner's checkpoints, by project: items of billing/usage/checkpoints/current; a gigabyte is 10^9
        bytes."""
        where = "" if project_id is None else " AND coalesce(s.project_id, 'default') = :project"
        with self.read() as db:
            rows = db.execute(
                "SELECT s.project_id, count(*), sum(c.size_bytes) FROM checkpoints c JOIN runs r USING (run_id)"
                f" JOIN sessions s USING (session_id) WHERE c.owner = :owner AND {LIVE}{where}"
                " GROUP BY s.project_id ORDER BY s.project_id",
                {"owner": owner, "now": self.micros(), "project": project_id},
            )
            return [
                present(project_id=project, org_user_urn=owner, checkpoint_count=count, size_bytes=size,
                        size_gigabytes=size / 1e9)
                for project, count, size in rows
            ]  # fmt: skip

    def _expired(self, row: Row) -> bool:
        return row["expires_at"] is not None and row["expires_at"] <= self.micros()

    def _require_free(self, db, path: CheckpointPath, owner: str, overwrite: bool) -> str | None:
        """The version that would be replaced. An expired one, or one whose folder is gone, is in nobody's way."""
        run = db.execute("SELECT 1 FROM runs WHERE run_id = ? AND owner = ?", (path.run_id, owner)).fetchone()
        if run is None:
            raise NotFound(f"training run {path.run_id}: not found")
        row = _row(db, path)
        if row is not None and not (overwrite or self._expired(row) or row["missing"]):
            raise UserError(f"checkpoint {path.uri}: exists; choose another name, delete it, or save with overwrite")
        return row["version"] if row is not None else None

    def _update(self, path: CheckpointPath, owner: str, what: str, value: int | None) -> None:
        """Sets one column of a checkpoint that has not expired."""
        values = {**asdict(path), "owner": owner, "value": value, "now": self.micros()}
        with self.write(durable=True) as db:
            done = db.execute(
                f"UPDATE checkpoints SET {what} = :value WHERE {_KEY} AND owner = :owner"
                " AND (expires_at IS NULL OR expires_at > :now)",
                values,
            )
        if not done.rowcount:
            raise _no_checkpoint(path)


def _insert(db: sqlite3.Connection, table: str, values: Mapping[str, Any]) -> bool:
    """A new row, column -> value. False when one with its key is there already: that one stays."""
    columns = ", ".join(values), ", :".join(values)
    done = db.execute(f"INSERT INTO {table} ({columns[0]}) VALUES (:{columns[1]}) ON CONFLICT DO NOTHING", values)
    return done.rowcount > 0


def _require_session(db: Any, session_id: str, owner: str) -> None:
    """Inside a transaction. Raises: NotFound unless the session exists and is the owner's; UserError when it has ended:
    nothing new can belong to it."""
    row = db.execute("SELECT status FROM sessions WHERE session_id = ? AND owner = ?", (session_id, owner)).fetchone()
    if row is None:
        raise _no_session(session_id)
    if row["status"] != "active":
        raise UserError(f"session {session_id}: has ended; go on with a new service client")


def _no_session(session_id: str) -> NotFound:
    return NotFound(f"session {session_id}: not found")


def seen(scope: str) -> str:
    """The SQL condition of what may be seen. Raises: UserError for another word."""
    if scope not in _SEEN:
        raise UserError(f"access_scope={scope!r}; give one of {', '.join(_SEEN)}")
    return _SEEN[scope]


def _run(row: Row, touched: Mapping[str, int]) -> TrainingRun:
    return TrainingRun(
        **{key: row[key] for key in ("run_id", "session_id", "owner", "state")},
        info=ModelInfo.parse(json.loads(row["facts"])),
        user_metadata=json.loads(row["user_metadata"]),
        created_at=from_micros(row["created_at"]),
        last_request_at=from_micros(max(row["last_request_at"], touched.get(row["run_id"], 0))),
    )


def check_ttl(seconds: int | None) -> None:
    """Raises: UserError unless None or 3600 to 315576000 (ten years)."""
    if seconds is not None and not MIN_TTL <= seconds <= MAX_TTL:
        raise UserError(f"ttl_seconds={seconds}: give {MIN_TTL} to {MAX_TTL}, or null to keep it for ever")


def _expiry(now: int, ttl_seconds: int | None) -> int | None:
    return None if ttl_seconds is None else now + ttl_seconds * 1_000_000


def _row(db: sqlite3.Connection, path: CheckpointPath) -> Row | None:
    return db.execute(f"SELECT * FROM checkpoints WHERE {_KEY}", asdict(path)).fetchone()


def _no_checkpoint(path: CheckpointPath) -> NotFound:
    return NotFound(f"checkpoint {path.uri}: not found")
