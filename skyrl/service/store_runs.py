"""Training runs and futures in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from skyrl.service.records import (
    Checkpoint,
    Json,
    ModelInfo,
    NotFound,
    Page,
    Run,
    RunState,
    Scope,
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
            return self._with_latest(db, _run(row, self._touched), owner)

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
            return Page([self._with_latest(db, _run(row, self._touched), owner) for row in rows], offset, limit, total)

    def touch_run(self, run_id: str) -> None:
        """Notes that a request for the run came now. In memory, where readers find it at once: see `flush_touched`."""
        with self._lock:
            self._touched[run_id] = self.micros()

    def flush_touched(self) -> None:
        """Writes what `touch_run` noted: one transaction for all requests since the last time."""
        with self._lock:
            touched, self._touched = self._touched, {}
        if touched:
            with self.write() as db:
                db.executemany(
                    "UPDATE runs SET last_request_at = max(last_request_at, ?) WHERE run_id = ?",
                    [(now, run_id) for run_id, now in touched.items()],
                )

    def close_run(self, run_id: str, owner: str, state: RunState = "closed") -> None:
        """The model is gone from memory (unloaded, or its session ended). Raises: NotFound."""
        with self.write() as db:
            done = db.execute("UPDATE runs SET state = ? WHERE run_id = ? AND owner = ?", (state, run_id, owner))
        if not done.rowcount:
            raise NotFound(f"training run {run_id}: not found")

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

    def record_future(self, request_id: str, owner: str, kind: str, model_id: str | None, result: Json) -> None:
        """Keeps the answer to a request whose effect outlives the process. The first answer stays."""
        with self.write() as db:
            db.execute(
                "INSERT OR IGNORE INTO futures (request_id, owner, kind, model_id, state, result, created_at,"
                " finished_at) VALUES (:id, :owner, :kind, :model, 'done', :result, :now, :now)",
                {"id": request_id, "owner": owner, "kind": kind, "model": model_id, "result": json.dumps(result),
                 "now": self.micros()},
            )  # fmt: skip

    def find_future(self, request_id: str, owner: str) -> Json | None:
        """The recorded answer to a request of this owner's, None when there is none."""
        with self.read() as db:
            row = db.execute(
                "SELECT result FROM futures WHERE request_id = ? AND owner = ? AND result IS NOT NULL",
                (request_id, owner),
            ).fetchone()
        return None if row is None else json.loads(row["result"])

    def prune_futures(self, seconds: float = 86400.0) -> int:
        """Throws away answers that are older than this; returns how many."""
        with self.write() as db:
            before = self.micros() - int(seconds * 1_000_000)
            return db.execute("DELETE FROM futures WHERE coalesce(finished_at, created_at) < ?", (before,)).rowcount

    def recover(self) -> list[str]:
        """At start: what a dead server had in memory is lost. Returns the ids of the runs that became so now.

        Runs that were open, and samplers of ephemeral snapshots. Servers before this one also recorded futures that
        had no answer yet, or one in memory only: nothing is left of those.
        """
        with self.write() as db:
            runs = db.execute("SELECT run_id FROM runs WHERE state = 'open' ORDER BY rowid").fetchall()
            db.execute("UPDATE runs SET state = 'lost' WHERE state = 'open'")
            db.execute("UPDATE samplers SET lost = 1 WHERE ephemeral_run IS NOT NULL")
            db.execute("DELETE FROM futures WHERE result IS NULL")
        return [row[0] for row in runs]

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


def _run(row: Row, touched: Mapping[str, int]) -> Run:
    return Run(
        **{key: row[key] for key in ("run_id", "session_id", "owner", "state")},
        facts=ModelInfo.parse(json.loads(row["facts"])),
        user_metadata=json.loads(row["user_metadata"]),
        created_at=from_micros(row["created_at"]),
        last_request_at=from_micros(max(row["last_request_at"], touched.get(row["run_id"], 0))),
    )
