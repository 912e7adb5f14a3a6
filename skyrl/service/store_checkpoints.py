"""Rows of checkpoints in the store. The row is the truth: a folder that no row names does not exist for anyone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from skyrl.service.records import (
    Checkpoint,
    CheckpointPath,
    ModelInfo,
    NotFound,
    Page,
    Usage,
    from_micros,
)
from skyrl.service.store_db import Database, Row, check_page
from skyrl.types import UserError

MIN_TTL = 3600
MAX_TTL = 315_576_000  # ten years of 365.25 days
# For a table called c: what may still be seen. An expired one is gone from then on, whenever its files go.
LIVE = "(NOT c.missing AND (c.expires_at IS NULL OR c.expires_at > :now))"


class Checkpoints(Database):
    """Checkpoints. Of another owner's that is not published, every method says NotFound."""

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
        facts: ModelInfo,
        has_optimizer: bool,
        ttl_seconds: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> tuple[Checkpoint, str | None]:
        """Commits a checkpoint whose folder is on the disk: once this returns, it is saved. Synced to the disk.

        Returns its record, and the version that it replaces (whose folder is to be deleted). Overwriting starts anew:
        not published, the new ttl and metadata. Raises as `require_free`, and UserError for a ttl out of range.
        """
        check_ttl(ttl_seconds)
        now = self.micros()
        values = {
            "run_id": path.run_id, "kind": path.kind, "name": path.name, "owner": owner, "version": version,
            "created_at": now, "size_bytes": size_bytes, "expires_at": _expiry(now, ttl_seconds),
            "user_metadata": json.dumps(dict(user_metadata or {})), "facts": json.dumps(facts.dump()),
            "has_optimizer": int(has_optimizer),
        }  # fmt: skip
        with self.write(durable=True) as db:
            earlier = self._require_free(db, path, owner, overwrite)
            if earlier is not None:
                db.execute("DELETE FROM checkpoints WHERE run_id = :run_id AND kind = :kind AND name = :name", values)
            names = ", ".join(values)
            db.execute(f"INSERT INTO checkpoints ({names}) VALUES (:{', :'.join(values)})", values)
            row = _row(db, path)
        return checkpoint_of(row), earlier

    def get_checkpoint(self, path: CheckpointPath, reader: str) -> Checkpoint:
        """A checkpoint that is the reader's own or published. Raises: NotFound, also when it has expired; UserError
        when its folder is damaged."""
        with self.read() as db:
            row = _row(db, path)
        if row is None or not (row["owner"] == reader or row["public"]) or self._expired(row):
            raise _no_checkpoint(path)
        if row["missing"]:
            raise UserError(f"checkpoint {path.uri}: its files were lost or damaged on the disk; delete it")
        return checkpoint_of(row)

    def list_checkpoints(
        self, owner: str, *, limit: int = 100, offset: int = 0, kinds: Sequence[str] | None = None
    ) -> Page[Checkpoint]:
        """The owner's checkpoints of all runs, newest first; only those of some kinds if given."""
        check_page(limit, offset)
        values = {"owner": owner, "now": self.micros(), "limit": limit, "offset": offset}
        some = ""
        if kinds is not None:
            values |= {f"kind{i}": kind for i, kind in enumerate(kinds)}
            some = f" AND kind IN ({', '.join(f':kind{i}' for i in range(len(kinds)))})"
        with self.read() as db:
            (total,) = db.execute(
                f"SELECT count(*) FROM checkpoints c WHERE owner = :owner AND {LIVE}{some}", values
            ).fetchone()
            rows = db.execute(
                f"SELECT * FROM checkpoints c WHERE owner = :owner AND {LIVE}{some}"
                " ORDER BY created_at DESC, rowid DESC LIMIT :limit OFFSET :offset",
                values,
            )
            return Page([checkpoint_of(row) for row in rows], offset, limit, total)

    def all_checkpoints(self) -> list[Checkpoint]:
        """Of all owners, also expired and missing ones: what `reconcile` compares with the disk."""
        with self.read() as db:
            return [checkpoint_of(row) for row in db.execute("SELECT * FROM checkpoints ORDER BY rowid")]

    def version_of(self, path: CheckpointPath) -> str | None:
        """The version that a path stands for, whoever owns it; None when there is no such row."""
        with self.read() as db:
            row = _row(db, path)
        return None if row is None else row["version"]

    def set_public(self, path: CheckpointPath, owner: str, public: bool) -> None:
        """Publishes a checkpoint or takes that back; no error if it is so already. Raises: NotFound."""
        self._update(path, owner, "public = ?", int(public))

    def set_ttl(self, path: CheckpointPath, owner: str, ttl_seconds: int | None) -> None:
        """Lets a checkpoint expire so many seconds from now, None = never. Raises: NotFound, UserError."""
        check_ttl(ttl_seconds)
        self._update(path, owner, "expires_at = ?", _expiry(self.micros(), ttl_seconds))

    def set_missing(self, path: CheckpointPath, version: str, missing: bool) -> None:
        """Marks whether the folder of this version is not whole."""
        with self.write(durable=True) as db:
            db.execute(
                "UPDATE checkpoints SET missing = ? WHERE run_id = ? AND kind = ? AND name = ? AND version = ?",
                (int(missing), path.run_id, path.kind, path.name, version),
            )

    def delete_checkpoint(self, path: CheckpointPath, owner: str) -> str:
        """Forgets a checkpoint; returns the version whose folder is to be deleted. Raises: NotFound."""
        with self.write(durable=True) as db:
            row = _row(db, path)
            if row is None or row["owner"] != owner:
                raise _no_checkpoint(path)
            db.execute(
                "DELETE FROM checkpoints WHERE run_id = ? AND kind = ? AND name = ?",
                (path.run_id, path.kind, path.name),
            )
        return row["version"]

    def forget_expired(self) -> list[Checkpoint]:
        """Removes the rows of all checkpoints that have expired, and returns them: their folders are to be deleted."""
        with self.write(durable=True) as db:
            gone = db.execute("SELECT * FROM checkpoints WHERE expires_at <= ?", (self.micros(),)).fetchall()
            db.executemany(
                "DELETE FROM checkpoints WHERE run_id = ? AND kind = ? AND name = ?",
                [(row["run_id"], row["kind"], row["name"]) for row in gone],
            )
        return [checkpoint_of(row) for row in gone]

    def due_for_expiry(self) -> list[Checkpoint]:
        """Checkpoints of all owners whose time is over and whose rows are still there."""
        with self.read() as db:
            rows = db.execute("SELECT * FROM checkpoints WHERE expires_at <= ?", (self.micros(),))
            return [checkpoint_of(row) for row in rows]

    def usage(self, owner: str, project_id: str | None = None) -> list[Usage]:
        """Space of the owner's checkpoints, by project."""
        where = "" if project_id is None else " AND coalesce(s.project_id, 'default') = :project"
        with self.read() as db:
            rows = db.execute(
                "SELECT s.project_id, count(*), sum(c.size_bytes) FROM checkpoints c JOIN runs r USING (run_id)"
                f" JOIN sessions s USING (session_id) WHERE c.owner = :owner AND {LIVE}{where}"
                " GROUP BY s.project_id ORDER BY s.project_id",
                {"owner": owner, "now": self.micros(), "project": project_id},
            )
            return [Usage(owner, project, count, size) for project, count, size in rows]

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
        with self.write(durable=True) as db:
            done = db.execute(
                f"UPDATE checkpoints SET {what} WHERE run_id = ? AND kind = ? AND name = ? AND owner = ?"
                " AND (expires_at IS NULL OR expires_at > ?)",
                (value, path.run_id, path.kind, path.name, owner, self.micros()),
            )
        if not done.rowcount:
            raise _no_checkpoint(path)


def check_ttl(seconds: int | None) -> None:
    """Raises: UserError unless None or 3600 to 315576000 (ten years)."""
    if seconds is not None and not MIN_TTL <= seconds <= MAX_TTL:
        raise UserError(f"ttl_seconds={seconds}: give {MIN_TTL} to {MAX_TTL}, or null to keep it for ever")


def checkpoint_of(row: Row) -> Checkpoint:
    """The record of a row of the table."""
    return Checkpoint(
        path=CheckpointPath(row["run_id"], row["kind"], row["name"]),
        owner=row["owner"],
        version=row["version"],
        created_at=from_micros(row["created_at"]),
        size_bytes=row["size_bytes"],
        public=bool(row["public"]),
        expires_at=None if row["expires_at"] is None else from_micros(row["expires_at"]),
        user_metadata=json.loads(row["user_metadata"]),
        facts=ModelInfo.parse(json.loads(row["facts"])),
        has_optimizer=bool(row["has_optimizer"]),
        missing=bool(row["missing"]),
    )


def _expiry(now: int, ttl_seconds: int | None) -> int | None:
    return None if ttl_seconds is None else now + ttl_seconds * 1_000_000


def _row(db, path: CheckpointPath) -> Row | None:
    return db.execute(
        "SELECT * FROM checkpoints WHERE run_id = ? AND kind = ? AND name = ?", (path.run_id, path.kind, path.name)
    ).fetchone()


def _no_checkpoint(path: CheckpointPath) -> NotFound:
    return NotFound(f"checkpoint {path.uri}: not found")
