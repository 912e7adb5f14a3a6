"""Where rows and folders of checkpoints meet: saving, deleting, expiry, and putting both right at start.

The order is always the same. Saving: the folder is on the disk, then the row is committed, then the caller may
acknowledge. Deleting: the row goes first. So a crash leaves folders without rows, never rows without folders.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl.service.archive import Archive
from skyrl.service.archive_content import Content
from skyrl.service.archive_files import check_recipients
from skyrl.service.records import Checkpoint, CheckpointPath, ModelInfo
from skyrl.service.store import Store
from skyrl.service.store_checkpoints import check_ttl
from skyrl.types import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reconciled:
    """What was found at start. missing: rows whose folders are not whole (marked, and readable no more)."""

    missing: list[str]
    lines: list[str]  # everything worth telling a person, the missing ones first


def save_checkpoint(
    store: Store,
    archive: Archive,
    path: CheckpointPath,
    owner: str,
    content: Content,
    *,
    ttl_seconds: int | None = None,
    user_metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    recipients: Sequence[str] = (),
) -> Checkpoint:
    """Saves a checkpoint; when this returns, it is on the disk and known, and may be acknowledged.

    Raises: UserError (a name that is taken, ttl, recipients, disk), NotFound for the run; then nothing was changed.
    """
    _check(store, path, owner, ttl_seconds, overwrite, recipients)
    written = archive.write(path, content, recipients=recipients)
    return _commit(
        store, archive, path, owner, written,
        facts=content.facts, has_optimizer=content.optimizer is not None and not recipients,
        ttl_seconds=ttl_seconds, user_metadata=user_metadata, overwrite=overwrite,
    )  # fmt: skip


def save_files(
    store: Store,
    archive: Archive,
    path: CheckpointPath,
    owner: str,
    facts: ModelInfo,
    fill: Callable[[Path], None],
    *,
    ttl_seconds: int | None = None,
    user_metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    recipients: Sequence[str] = (),
) -> Checkpoint:
    """As `save_checkpoint`, for an external export of any files, which `fill` makes in the folder it is given."""
    _check(store, path, owner, ttl_seconds, overwrite, recipients)
    written = archive.write_files(path, facts, fill, recipients=recipients)
    return _commit(
        store, archive, path, owner, written,
        facts=facts, has_optimizer=False, ttl_seconds=ttl_seconds, user_metadata=user_metadata, overwrite=overwrite,
    )  # fmt: skip


def load_checkpoint(
    store: Store, archive: Archive, path: CheckpointPath, reader: str, *, optimizer: bool = True
) -> tuple[Checkpoint, Content]:
    """A checkpoint of the reader's, or a published one. `optimizer` True: with its state, which must be there.

    Raises: NotFound; UserError when it is damaged or has no optimizer state but that was asked for.
    """
    found = store.get_checkpoint(path, reader)
    if optimizer and not found.has_optimizer:
        raise UserError(
            f"checkpoint {path.uri}: has no optimizer state; load it without, or give a path of kind weights"
        )
    return found, archive.read(path, found.version, optimizer=optimizer)


def copy_checkpoint(
    store: Store,
    archive: Archive,
    source: CheckpointPath,
    reader: str,
    target: CheckpointPath,
    *,
    ttl_seconds: int | None = None,
) -> Checkpoint:
    """A copy in another run of the reader's, with the metadata, without expiry or publication of the source."""
    found = store.get_checkpoint(source, reader)
    _check(store, target, reader, ttl_seconds, False, ())
    written = archive.copy(source, found.version, target)
    return _commit(
        store, archive, target, reader, written, facts=found.facts, has_optimizer=found.has_optimizer,
        ttl_seconds=ttl_seconds, user_metadata=found.user_metadata, overwrite=False,
    )  # fmt: skip


def delete_checkpoint(store: Store, archive: Archive, path: CheckpointPath, owner: str) -> None:
    """Deletes a checkpoint. Raises: NotFound. Files that cannot be removed now are removed at the next start."""
    with archive.saving:
        version = store.delete_checkpoint(path, owner)
    _drop(archive, path, version)


def expire_checkpoints(store: Store, archive: Archive) -> list[Checkpoint]:
    """Deletes every checkpoint whose time is over; returns their records. To be called every minute or so."""
    with archive.saving:
        gone = store.forget_expired()
    for checkpoint in gone:
        _drop(archive, checkpoint.path, checkpoint.version)
    return gone


def reconcile(store: Store, archive: Archive) -> Reconciled:
    """At start, before any request: locks the archive for this process and makes rows and folders agree.

    Folders without a row were never acknowledged and are removed. Rows without a whole folder cannot come from a
    crash; they are marked missing (and unmarked if their files are back). Raises: UserError as `Archive.bind`.
    """
    archive.bind(store.store_id)
    rows = store.all_checkpoints()
    problems = {row.path: archive.whole(row.path, row.version) for row in rows}
    for row in rows:
        if row.missing != bool(problems[row.path]):
            store.set_missing(row.path, row.version, bool(problems[row.path]))
    missing = [f"{problem}; marked as missing" for problem in problems.values() if problem]
    cleaned = archive.clean({row.path: row.version for row in rows})
    expired = [f"expired: {row.path.uri}" for row in expire_checkpoints(store, archive)]
    return Reconciled(missing, [*missing, *cleaned, *expired])


def _check(
    store: Store,
    path: CheckpointPath,
    owner: str,
    ttl_seconds: int | None,
    overwrite: bool,
    recipients: Sequence[str],
) -> None:
    """Refuses before anything is written what would be refused after."""
    check_ttl(ttl_seconds)
    check_recipients(recipients)
    store.require_free(path, owner, overwrite=overwrite)


def _commit(
    store: Store, archive: Archive, path: CheckpointPath, owner: str, written: tuple[str, int], **row: Any
) -> Checkpoint:
    """Makes the row, then the name; removes what it replaced. Returns the record."""
    version, size = written
    with archive.saving:
        try:
            saved, earlier = store.add_checkpoint(path, owner, version=version, size_bytes=size, **row)
        except BaseException:
            _withdraw(store, archive, path, version)
            raise
        try:
            archive.point(path, version)
        except UserError as error:  # saved all the same: the service reads versions, and the next start mends the name
            log.warning("checkpoint %s is saved, its link is not: %s", path.uri, error)
    if earlier is not None:
        _drop(archive, path, earlier)
    return saved


def _withdraw(store: Store, archive: Archive, path: CheckpointPath, version: str) -> None:
    """After a commit that failed: it may have reached the disk all the same, and then its folder must stay."""
    try:
        committed = store.version_of(path) == version
    except UserError:
        return  # nobody knows; the next start does
    if not committed:
        _drop(archive, path, version)


def _drop(archive: Archive, path: CheckpointPath, version: str) -> None:
    try:
        archive.drop(path, version)
    except UserError as error:  # costs space only; the next start tries again
        log.warning("%s", error)
