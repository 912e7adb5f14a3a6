"""Sessions and sampling sessions in the store."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from skyrl.service.records import (
    Json,
    NotFound,
    Page,
    Sampler,
    SearchPage,
    Session,
    from_micros,
    present,
    to_micros,
)
from skyrl.service.store_db import Database, Row, check_page
from skyrl.types import UserError

ACTIVE_SECONDS = 300  # a session that was silent longer is not called active
FINISH_REASONS = ("success", "errored", "interrupted")
STATUSES = ("active", "cancelled", "client_finished", "failed")
MAX_SEARCH = 200
_TALLY = """(SELECT count(*) FROM checkpoints c JOIN runs r USING (run_id) WHERE r.session_id = s.session_id
    AND NOT c.missing AND (c.expires_at IS NULL OR c.expires_at > :now)) AS checkpoints_count,
    (SELECT coalesce(sum(c.size_bytes), 0) FROM checkpoints c JOIN runs r USING (run_id)
    WHERE r.session_id = s.session_id AND NOT c.missing
    AND (c.expires_at IS NULL OR c.expires_at > :now)) AS checkpoint_bytes"""


@dataclass(frozen=True)
class StatusQuery:
    """One status to search for; reasons only narrow "client_finished"."""

    type: Literal["active", "cancelled", "client_finished", "failed"]
    reasons: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.type not in STATUSES:
            raise UserError(f"sessions/search: status {self.type!r}; give one of {', '.join(STATUSES)}")
        if self.reasons is not None and (
            self.type != "client_finished" or not set(self.reasons) <= set(FINISH_REASONS)
        ):
            raise UserError(
                f"sessions/search: reasons {list(self.reasons)} of status {self.type}; only client_finished has "
                f"reasons, out of {', '.join(FINISH_REASONS)}"
            )


@dataclass(frozen=True)
class SessionQuery:
    """What to search for; None = anything. With both session_id and display_name, either one is enough.

    display_name: words that must each occur, whatever their case. owners: None = the caller's own.
    """

    session_id: str | None = None
    project_ids: tuple[str, ...] | None = None
    user_metadata: Mapping[str, str] | None = None
    display_name: str | None = None
    owners: tuple[str, ...] | None = None
    statuses: tuple[StatusQuery, ...] | None = None
    limit: int = 50
    cursor: tuple[datetime, str] | None = None


class Sessions(Database):
    """Sessions and samplers. Of another owner's, every method says NotFound."""

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
        values = (
            session_id,
            owner,
            json.dumps(list(tags)),
            json.dumps(dict(user_metadata or {})),
            sdk_version,
            project_id,
            display_name,
            (display_name or "").casefold(),
            now,
            now,
        )
        with self.write() as db:
            db.execute(
                "INSERT INTO sessions (session_id, owner, tags, user_metadata, sdk_version, project_id, display_name,"
                " folded_name, created_at, last_heartbeat) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                values,
            )
        return self.get_session(session_id, owner)

    def heartbeat(self, session_id: str, owner: str) -> None:
        """Notes that the session's client lives. Raises: NotFound."""
        self._update_session("last_heartbeat = max(last_heartbeat, ?)", (self.micros(),), session_id, owner)

    def finish_session(self, session_id: str, owner: str, reason: str, detail: str | None = None) -> None:
        """The client says that it is done; the first word on how a session ended stays. Raises: NotFound, UserError."""
        if reason not in FINISH_REASONS:
            raise UserError(f"session {session_id}: finish reason {reason!r}; give one of {', '.join(FINISH_REASONS)}")
        self._end_session(session_id, owner, "client_finished", reason, present(reason={"type": reason}, detail=detail))

    def fail_session(
        self, session_id: str, owner: str, category: Literal["user", "internal"], reason: Json, message: str
    ) -> None:
        """Ends a session that failed; reason as in the protocol: {"type": "request", "request_id": ...} and such."""
        self._end_session(
            session_id, owner, "failed", None, {"category": category, "reason": reason, "message": message}
        )

    def set_project(self, session_id: str, owner: str, project_id: str | None) -> None:
        """Moves a session, and with it its runs and checkpoints, to a project. Raises: NotFound."""
        self._update_session("project_id = ?", (project_id,), session_id, owner)

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
        check_page(limit, offset)
        with self.read() as db:
            (total,) = db.execute("SELECT count(*) FROM sessions WHERE owner = ?", (owner,)).fetchone()
            rows = db.execute(
                "SELECT session_id FROM sessions WHERE owner = ? ORDER BY created_at DESC, session_id DESC"
                " LIMIT ? OFFSET ?",
                (owner, limit, offset),
            )
            return Page([row[0] for row in rows], offset, limit, total)

    def search_sessions(self, owner: str, query: SessionQuery) -> SearchPage:
        """The owner's sessions that match, newest first, `query.limit` (1 to 200) at a time."""
        if not 1 <= query.limit <= MAX_SEARCH:
            raise UserError(f"sessions/search: limit={query.limit}; give 1 to {MAX_SEARCH}")
        if query.owners is not None and owner not in query.owners:
            return SearchPage([], None)
        alive = self.micros() - ACTIVE_SECONDS * 1_000_000
        where, values = _conditions(query, alive)
        sql = f"SELECT s.*, {_TALLY} FROM sessions s WHERE {' AND '.join(['owner = :owner', *where])}"
        values.update(owner=owner, now=self.micros(), limit=query.limit + 1)
        with self.read() as db:
            rows = db.execute(f"{sql} ORDER BY created_at DESC, session_id DESC LIMIT :limit", values).fetchall()
        found = [self._session(row) for row in rows[: query.limit]]
        more = len(rows) > query.limit
        return SearchPage(found, (found[-1].created_at, found[-1].session_id) if more else None)

    def silent_sessions(self, seconds: float) -> list[Session]:
        """Sessions of all owners that have not ended and were not heard of for so long, for the desk to free models."""
        with self.read() as db:
            rows = db.execute(
                f"SELECT s.*, {_TALLY} FROM sessions s WHERE status = 'active' AND last_heartbeat < :before",
                {"now": self.micros(), "before": self.micros() - int(seconds * 1_000_000)},
            ).fetchall()
        return [self._session(row) for row in rows]

    def ended_sessions(self) -> set[str]:
        """Ids of all owners' sessions that have ended, well or not."""
        with self.read() as db:
            return {row[0] for row in db.execute("SELECT session_id FROM sessions WHERE status != 'active'")}

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
    ) -> Sampler:
        """The sampling session "{session}:sample:{seq_id}". version: that of the checkpoint at model_path.

        Raises: NotFound for the session, UserError when the number is taken.
        """
        sampler_id = f"{session_id}:sample:{seq_id}"
        with self.write() as db:
            require_session(db, session_id, owner)
            done = db.execute(
                "INSERT INTO samplers (sampler_id, session_id, owner, base_model, model_path, version, ephemeral_run,"
                " created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (sampler_id, session_id, owner, base_model, model_path, version, ephemeral_run, self.micros()),
            )
        if not done.rowcount:
            raise UserError(f"sampling session {sampler_id}: exists; give another sampling_session_seq_id")
        return self.get_sampler(sampler_id, owner)

    def get_sampler(self, sampler_id: str, owner: str) -> Sampler:
        """One sampling session. Raises: NotFound."""
        with self.read() as db:
            row = db.execute(
                "SELECT * FROM samplers WHERE sampler_id = ? AND owner = ?", (sampler_id, owner)
            ).fetchone()
        if row is None:
            raise NotFound(f"sampling session {sampler_id}: not found")
        fields = ("sampler_id", "session_id", "owner", "base_model", "model_path", "version", "ephemeral_run")
        return Sampler(
            **{key: row[key] for key in fields}, created_at=from_micros(row["created_at"]), lost=bool(row["lost"])
        )

    def join_sampler(self, sampler_id: str, owner: str) -> int:
        """A number for one more client of a sampling session: 1, 2, ... (the first client is 0). Raises: NotFound."""
        with self.write() as db:
            db.execute(
                "UPDATE samplers SET clients = clients + 1 WHERE sampler_id = ? AND owner = ?", (sampler_id, owner)
            )
            row = db.execute(
                "SELECT clients FROM samplers WHERE sampler_id = ? AND owner = ?", (sampler_id, owner)
            ).fetchone()
        if row is None:
            raise NotFound(f"sampling session {sampler_id}: not found")
        return row[0]

    def _update_session(self, what: str, values: tuple[Any, ...], session_id: str, owner: str) -> None:
        with self.write() as db:
            done = db.execute(
                f"UPDATE sessions SET {what} WHERE session_id = ? AND owner = ?", (*values, session_id, owner)
            )
        if not done.rowcount:
            raise _no_session(session_id)

    def _end_session(self, session_id: str, owner: str, status: str, reason: str | None, detail: Json) -> None:
        with self.write() as db:
            require_session(db, session_id, owner)
            db.execute(
                "UPDATE sessions SET status = ?, reason = ?, detail = ? WHERE session_id = ? AND status = 'active'",
                (status, reason, json.dumps(detail), session_id),
            )

    def _session(self, row: Row, runs: tuple[str, ...] = (), samplers: tuple[str, ...] = ()) -> Session:
        status: Json | None = {"type": row["status"], **json.loads(row["detail"])}
        if row["status"] == "active" and row["last_heartbeat"] < self.micros() - ACTIVE_SECONDS * 1_000_000:
            status = None
        return Session(
            **{key: row[key] for key in ("session_id", "owner", "sdk_version", "project_id", "display_name")},
            tags=tuple(json.loads(row["tags"])),
            user_metadata=json.loads(row["user_metadata"]),
            created_at=from_micros(row["created_at"]),
            last_heartbeat=from_micros(row["last_heartbeat"]),
            status=status,
            run_ids=runs,
            sampler_ids=samplers,
            checkpoints_count=row["checkpoints_count"],
            checkpoint_bytes=row["checkpoint_bytes"],
        )


def require_session(db: Any, session_id: str, owner: str) -> None:
    """Inside a transaction. Raises: NotFound unless the session exists and is the owner's."""
    if db.execute("SELECT 1 FROM sessions WHERE session_id = ? AND owner = ?", (session_id, owner)).fetchone() is None:
        raise _no_session(session_id)


def _no_session(session_id: str) -> NotFound:
    return NotFound(f"session {session_id}: not found")


def _conditions(query: SessionQuery, alive: int) -> tuple[list[str], dict[str, Any]]:
    """SQL of a search, values apart. alive: the oldest heartbeat of an active session, in microseconds."""
    where: list[str] = []
    values: dict[str, Any] = {}

    def bind(value: Any) -> str:
        values[f"v{len(values)}"] = value
        return f":v{len(values) - 1}"

    names = [f"instr(folded_name, {bind(word)})" for word in (query.display_name or "").casefold().split()]
    either = [f"s.session_id = {bind(query.session_id)}"] if query.session_id is not None else []
    if query.display_name is not None:
        either.append(f"({' AND '.join(names) or '0'})")
    if either:
        where.append(f"({' OR '.join(either)})")
    if query.project_ids is not None:
        wanted = ", ".join(bind(project) for project in query.project_ids)
        where.append(f"coalesce(project_id, 'default') IN ({wanted})")
    for key, value in (query.user_metadata or {}).items():
        where.append(
            f"EXISTS (SELECT 1 FROM json_each(s.user_metadata) j WHERE j.key = {bind(key)} AND j.value = {bind(value)})"
        )
    if query.statuses is not None:
        where.append(f"({' OR '.join(_status(status, bind, alive) for status in query.statuses) or '0'})")
    if query.cursor is not None:
        moment, session_id = bind(to_micros(query.cursor[0])), bind(query.cursor[1])
        where.append(f"(s.created_at, s.session_id) < ({moment}, {session_id})")
    return where, values


def _status(query: StatusQuery, bind: Any, alive: int) -> str:
    if query.type == "active":
        return f"(status = 'active' AND last_heartbeat >= {bind(alive)})"
    if query.reasons is None:
        return f"status = {bind(query.type)}"
    return f"(status = 'client_finished' AND reason IN ({', '.join(bind(reason) for reason in query.reasons)}))"
