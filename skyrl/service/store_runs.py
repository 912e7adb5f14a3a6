"""Training runs and futures in the store."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import replace

from skyrl.service.messages import Category
from skyrl.service.records import (
    Checkpoint,
    Json,
    ModelInfo,
    NotFound,
    Page,
    Run,
    RunState,
    Scope,
    StoredFuture,
    from_micros,
)
from skyrl.service.store_checkpoints import LIVE, Checkpoints, checkpoint_of
from skyrl.service.store_db import Row, check_page
from skyrl.service.store_sessions import require_session
from skyrl.types import UserError

# Another owner's run may be seen when one of its checkpoints is published.
_SEEN = {
    "owned": "owner = :owner",
    "accessible": f"(owner = :owner OR EXISTS (SELECT 1 FROM checkpoints c WHERE c.run_id = runs.run_id AND c.public"
    f" AND {LIVE}))",
}


class Runs(Checkpoints):
    """Runs and futures, over the checkpoints."""

    def create_run(
        self,
        session_id: str,
        owner: str,
        model_seq_id: int,
        facts: ModelInfo,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Run:
        """The run "{session}:train:{model_seq_id}", open. Raises: NotFound for the session, UserError if it exists."""
        run_id, now = f"{session_id}:train:{model_seq_id}", self.micros()
        with self.write() as db:
            require_session(db, session_id, owner)
            done = db.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, 'open') ON CONFLICT DO NOTHING",
                (
                    run_id,
                    session_id,
                    owner,
                    json.dumps(facts.dump()),
                    json.dumps(dict(user_metadata or {})),
                    now,
                    now,
                ),
            )
        if not done.rowcount:
            raise UserError(f"model {run_id}: exists; give another model_seq_id")
        return self.get_run(run_id, owner)

    def get_run(self, run_id: str, owner: str, *, scope: Scope = "owned") -> Run:
        """One run with its newest checkpoints, of another owner's run only published ones. Raises: NotFound."""
        with self.read() as db:
            values = {"id": run_id, "owner": owner, "now": self.micros()}
            row = db.execute(f"SELECT * FROM runs WHERE run_id = :id AND {_seen(scope)}", values).fetchone()
            if row is None:
                raise NotFound(f"training run {run_id}: not found")
            return self._with_latest(db, _run(row), owner)

    def list_runs(self, owner: str, *, limit: int = 100, offset: int = 0, scope: Scope = "owned",
                  project_id: str | None = None) -> Page[Run]:  # fmt: skip
        """Runs, newest first. accessible: other owners' too that have a published checkpoint."""
        check_page(limit, offset)
        where = _seen(scope)
        if project_id is not None:
            where += (
                " AND session_id IN (SELECT session_id FROM sessions WHERE coalesce(project_id, 'default') = :project)"
            )
        values = {"owner": owner, "now": self.micros(), "limit": limit, "offset": offset, "project": project_id}
        with self.read() as db:
            (total,) = db.execute(f"SELECT count(*) FROM runs WHERE {where}", values).fetchone()
            order = "ORDER BY created_at DESC, rowid DESC LIMIT :limit OFFSET :offset"
            rows = db.execute(f"SELECT * FROM runs WHERE {where} {order}", values).fetchall()
            return Page([self._with_latest(db, _run(row), owner) for row in rows], offset, limit, total)

    def touch_run(self, run_id: str, owner: str) -> None:
        """Notes that a request for the run came now. Raises: NotFound."""
        self._update_run("last_request_at = max(last_request_at, ?)", self.micros(), run_id, owner)

    def close_run(self, run_id: str, owner: str, state: RunState = "closed") -> None:
        """The model is gone from memory (unloaded, or its session ended). Raises: NotFound."""
        self._update_run("state = ?", state, run_id, owner)

    def run_checkpoints(self, run_id: str, owner: str) -> list[Checkpoint]:
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

    def add_future(
        self,
        owner: str,
        kind: str,
        *,
        model_id: str | None = None,
        dedup: str | None = None,
        request_id: str | None = None,
    ) -> tuple[StoredFuture, bool]:
        """A pending future, and True; or the owner's earlier one with the same `dedup` key, and False.

        Touches the run `model_id`. request_id: a fresh one if not given. dedup: the desk's text for (model, seq_id) or
        (session, kind, seq_id).
        """
        request_id, now = request_id or f"r-{secrets.token_hex(12)}", self.micros()
        with self.write() as db:
            done = db.execute(
                "INSERT INTO futures (request_id, owner, kind, model_id, dedup, state, created_at)"
                " VALUES (?, ?, ?, ?, ?, 'pending', ?) ON CONFLICT (owner, dedup) DO NOTHING",
                (request_id, owner, kind, model_id, dedup, now),
            )
            if not done.rowcount:
                earlier = db.execute("SELECT * FROM futures WHERE owner = ? AND dedup = ?", (owner, dedup)).fetchone()
                return _future(earlier), False
            if model_id is not None:
                db.execute("UPDATE runs SET last_request_at = ? WHERE run_id = ? AND owner = ?", (now, model_id, owner))
            return _future(db.execute("SELECT * FROM futures WHERE request_id = ?", (request_id,)).fetchone()), True

    def finish_future(
        self, request_id: str, *, result: Json | None = None, error: str = "", category: Category = "unknown",
        failed: bool = False,
    ) -> None:  # fmt: skip
        """The request is done (result: its small JSON answer, None if that stays in memory) or failed with an error.

        Not synced: what a save promises was synced with the checkpoint's row. The first end of a future stays: a second
        one is a mistake of the caller's, RuntimeError.
        """
        state = "failed" if failed or error else "done"
        text = None if result is None else json.dumps(result)
        with self.write() as db:
            done = db.execute(
                "UPDATE futures SET state = ?, result = ?, error = ?, category = ?, finished_at = ?"
                " WHERE request_id = ? AND state = 'pending'",
                (state, text, error, category, self.micros(), request_id),
            )
        if not done.rowcount:
            raise RuntimeError(f"future {request_id}: not pending, cannot finish as {state}")

    def get_future(self, request_id: str, owner: str) -> StoredFuture:
        """One future. Raises: NotFound, also for one that was thrown away."""
        with self.read() as db:
            row = db.execute("SELECT * FROM futures WHERE request_id = ? AND owner = ?", (request_id, owner)).fetchone()
        if row is None:
            raise NotFound(f"request {request_id}: not found")
        return _future(row)

    def prune_futures(self, seconds: float = 86400.0) -> int:
        """Throws away futures that ended so long ago or were lost; returns how many. Pending ones stay."""
        with self.write() as db:
            return db.execute(
                "DELETE FROM futures WHERE state != 'pending' AND coalesce(finished_at, created_at) < ?",
                (self.micros() - int(seconds * 1_000_000),),
            ).rowcount

    def recover(self) -> tuple[list[str], list[str]]:
        """At start: what a dead server had in memory is lost. Returns (run ids, request ids) that became so now.

        Runs that were open, futures pending or with a result in memory only, samplers of ephemeral snapshots.
        """
        lost = "state = 'pending' OR (state = 'done' AND result IS NULL)"
        with self.write() as db:
            runs = db.execute("SELECT run_id FROM runs WHERE state = 'open' ORDER BY rowid").fetchall()
            futures = db.execute(f"SELECT request_id FROM futures WHERE {lost} ORDER BY rowid").fetchall()
            db.execute("UPDATE runs SET state = 'lost' WHERE state = 'open'")
            db.execute(f"UPDATE futures SET state = 'lost' WHERE {lost}")
            db.execute("UPDATE samplers SET lost = 1 WHERE ephemeral_run IS NOT NULL")
        return [row[0] for row in runs], [row[0] for row in futures]

    def _update_run(self, what: str, value: int | str, run_id: str, owner: str) -> None:
        with self.write() as db:
            done = db.execute(f"UPDATE runs SET {what} WHERE run_id = ? AND owner = ?", (value, run_id, owner))
        if not done.rowcount:
            raise NotFound(f"training run {run_id}: not found")

    def _with_latest(self, db, run: Run, reader: str) -> Run:
        found = {}
        for kind in ("weights", "sampler_weights"):
            row = db.execute(
                f"SELECT * FROM checkpoints c WHERE run_id = :run AND kind = :kind AND {LIVE}"
                " AND (owner = :owner OR public) ORDER BY created_at DESC, rowid DESC LIMIT 1",
                {"run": run.run_id, "kind": kind, "owner": reader, "now": self.micros()},
            ).fetchone()
            found[kind] = checkpoint_of(row) if row else None
        return replace(run, last_checkpoint=found["weights"], last_sampler_checkpoint=found["sampler_weights"])


def _seen(scope: Scope) -> str:
    if scope not in _SEEN:
        raise UserError(f"access_scope={scope!r}; give one of {', '.join(_SEEN)}")
    return _SEEN[scope]


def _run(row: Row) -> Run:
    return Run(
        **{key: row[key] for key in ("run_id", "session_id", "owner", "state")},
        facts=ModelInfo.parse(json.loads(row["facts"])),
        user_metadata=json.loads(row["user_metadata"]),
        created_at=from_micros(row["created_at"]),
        last_request_at=from_micros(row["last_request_at"]),
    )


def _future(row: Row) -> StoredFuture:
    return StoredFuture(
        **{key: row[key] for key in ("request_id", "owner", "kind", "model_id", "state", "error", "category")},
        result=None if row["result"] is None else json.loads(row["result"]),
        created_at=from_micros(row["created_at"]),
        finished_at=None if row["finished_at"] is None else from_micros(row["finished_at"]),
    )
