"""Checkpoints of trained models: saved, found, read, copied, deleted, expired. Imports without torch.

A checkpoint is a row in the store and a folder in the archive. The order is always the same. Saving: the folder is on
the disk, then the row is committed, then the caller may acknowledge. Deleting: the row goes first. So a crash leaves
folders without rows, which the next start removes, and never rows without folders.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl.files import disk_lack
from skyrl.service.messages import SaveWeights
from skyrl.service.storage.archive import Archive
from skyrl.service.storage.database import FutureLog
from skyrl.service.storage.records import CheckpointPath, CheckpointRecord, NotFound, StorageError
from skyrl.service.storage.store import Store, check_ttl
from skyrl.types import UserError

if TYPE_CHECKING:  # it needs torch, and records are served before that is there
    from skyrl.service.storage.content import Content

log = logging.getLogger("skyrl.service")

DATABASE, CHECKPOINTS = "service.sqlite", "checkpoints"
NEARLY_FULL = 256 << 20  # bytes free on the disk, below which the start says so
Settle = Callable[[int, Exception | None], None]


class CheckpointService:
    """The service's folder: the store, the archive, and what concerns both. Made on rank 0, by one process at a time;
    what a dead server left is put right.

    `lines`: what was found at start and is worth telling. Raises UserError when the folder cannot be used.
    """

    def __init__(self, folder: Path, *, now: Callable[[], float] = time.time, session_timeout: float = 0.0) -> None:
        """session_timeout: seconds of silence after which a session has ended, 0 = never."""
        self.session_timeout = session_timeout
        self.folder = folder
        self.archive = Archive(folder / CHECKPOINTS)
        self.store = Store(folder / DATABASE, now=now)
        try:
            self.lines = self._reconcile()
            self.lines += self._check_space()
            for line in self.lines:
                log.warning(line)
        except BaseException:
            self.archive.close()
            self.store.close()
            raise
        self.futures = FutureLog(self.store)
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="skyrl-save")
        self._housekeeper = ThreadPoolExecutor(1, thread_name_prefix="skyrl-tidy")
        self._tidying: Future[None] | None = None
        self._problem = ""  # that the last round of tidying had

    def close(self) -> None:
        """Waits for saves, then lets go of the folder."""
        self._saver.shutdown()
        self._housekeeper.shutdown()
        try:
            self.futures.tidy()
        except UserError as error:
            log.warning("at the end of the server: %s", error)
        self.archive.close()
        self.store.close()

    def _reconcile(self) -> list[str]:
        """Locks the archive for this process and makes rows and folders agree; returns what is worth telling.

        Folders without a row were never acknowledged and are removed. Rows without a whole folder cannot come from a
        crash; they are marked missing (and unmarked if their files are back).
        """
        self.archive.bind(self.store.store_id)
        rows = self.store.all_checkpoints()
        known = {row.path: row.version for row in rows}
        self.archive.adopt_links(known)
        lines = []
        for row in rows:
            problem = self.archive.whole(row.path, row.version)
            if row.missing != bool(problem):
                with suppress(StorageError):  # a full disk: who loads it is told all the same
                    self.store.set_missing(row.path, row.version, bool(problem))
            if problem:
                lines.append(f"{problem}; marked as missing")
        lines += self.archive.clean(known)
        try:
            lines += [f"expired: {gone.path.uri}" for gone in self.expire()]
            if lost := self.store.recover():
                lines.append(f"models open when the last server ended: {lost}; clients resume from checkpoints")
        except StorageError as error:
            lines.append(f"{error}; the server starts, and tries this again every few seconds")
        return lines

    def _check_space(self) -> list[str]:
        """Sets aside what deleting needs, and tells of a disk that is nearly full. Raises: StorageError."""
        self.store.keep_reserve()
        lack = disk_lack(self.folder)
        if (free := self.store.free_bytes()) >= NEARLY_FULL and not lack:
            return []
        return [
            f"{self.folder}: {lack or f'{free / 2**20:.1f} MiB are free on this disk'}; saves will be refused when it "
            "is full, training and sampling go on: free space there, or delete checkpoints, which works in any case"
        ]

    # ---- saving ----------------------------------------------------------------------------------------------------

    def check_save(self, request: SaveWeights, owner: str) -> CheckpointPath:
        """Where a save will be. Raises UserError for a name that cannot be or is taken."""
        name = request.name if request.name is not None else f"{request.seq_id:06d}"
        path = CheckpointPath(request.model_id, request.kind, name)
        self.store.require_free(path, owner, overwrite=request.overwrite)
        return path

    def save_later(
        self, request: SaveWeights, path: CheckpointPath, owner: str, content: Content, settle: Settle
    ) -> None:
        """Saves beside the work, in a thread of its own, one save after the other; `settle(size, error)` when it is
        acknowledged or has failed."""

        def write() -> None:
            try:
                saved = self.save(
                    path,
                    owner,
                    content,
                    ttl_seconds=request.ttl_seconds,
                    user_metadata=request.user_metadata,
                    overwrite=request.overwrite,
                    recipients=request.age_recipients,
                )
            except Exception as error:  # every failure belongs to the one who asked for the save
                settle(0, error)
            else:
                settle(saved.size_bytes, None)

        self._saver.submit(write)

    def wait(self) -> None:
        """Returns when all saves are settled."""
        self._saver.submit(lambda: None).result()  # one thread: this comes after them

    def save(
        self, path: CheckpointPath, owner: str, content: Content, *, recipients: Sequence[str] = (), **options: Any
    ) -> CheckpointRecord:
        """Saves a checkpoint; when this returns, it is on the disk and known, and may be acknowledged.

        options: ttl_seconds, user_metadata, overwrite. Raises: UserError (a name that is taken, ttl, recipients,
        disk), NotFound for the run; then nothing was changed.
        """
        return self._commit(
            path,
            owner,
            lambda: self.archive.write(path, content, recipients=recipients),
            info=content.info,
            has_optimizer=content.optimizer is not None and not recipients,
            **options,
        )

    def copy(
        self, source: CheckpointPath, reader: str, target: CheckpointPath, *, ttl_seconds: int | None = None
    ) -> CheckpointRecord:
        """A copy in another run of the reader's, with the metadata, without expiry or publication of the source."""
        found = self.store.get_checkpoint(source, reader)
        return self._commit(
            target,
            reader,
            lambda: self.archive.copy(source, found.version, target),
            info=found.info,
            has_optimizer=found.has_optimizer,
            user_metadata=found.user_metadata,
            ttl_seconds=ttl_seconds,
        )

    def _commit(
        self, path: CheckpointPath, owner: str, write: Callable[[], tuple[str, int]], **options: Any
    ) -> CheckpointRecord:
        """Refuses what can be refused, writes the folder, then the row; removes what that replaced. options: as
        `Store.add_checkpoint` has them."""
        check_ttl(options.get("ttl_seconds"))
        self.store.require_free(path, owner, overwrite=options.get("overwrite", False))
        version, size = write()
        try:
            saved, earlier = self.store.add_checkpoint(path, owner, version=version, size_bytes=size, **options)
        except BaseException:
            self._withdraw(path, version)
            raise
        if earlier is not None:
            self._drop(path, earlier)
        return saved

    def _withdraw(self, path: CheckpointPath, version: str) -> None:
        """After a commit that failed: it may have reached the disk all the same, and then its folder must stay."""
        try:
            committed = self.store.version_of(path) == version
        except UserError:
            return  # nobody knows; the next start does
        if not committed:
            self._drop(path, version)

    # ---- reading ---------------------------------------------------------------------------------------------------

    def version(self, path: str, reader: str) -> str:
        """Which version a path stands for now. Raises UserError when the reader cannot have it."""
        return self.store.get_checkpoint(CheckpointPath.parse(path), reader).version

    def load(self, path: str, reader: str, *, optimizer: bool) -> Content:
        """A checkpoint of the reader's, or a published one. Raises: NotFound; UserError when it is damaged, or has no
        optimizer state but that was asked for."""
        parsed = CheckpointPath.parse(path)
        found = self.store.get_checkpoint(parsed, reader)
        if optimizer and not found.has_optimizer:
            raise UserError(
                f"checkpoint {path}: has no optimizer state; load it without, or give a path of kind weights"
            )
        return self.archive.read(parsed, found.version, optimizer=optimizer)

    # ---- deleting --------------------------------------------------------------------------------------------------

    def delete(self, path: CheckpointPath, owner: str) -> None:
        """Deletes a checkpoint. Raises: NotFound. Files that cannot be removed now are removed at the next start. When
        the disk has no room even for this change of a row, the files go first, and the row after them."""
        try:
            version = self.store.delete_checkpoint(path, owner)
        except StorageError:
            if (found := self.store.version_of(path, owner)) is None:
                raise
            self._drop(path, found)
            version = self.store.delete_checkpoint(path, owner)
        self._drop(path, version)

    def expire(self) -> list[CheckpointRecord]:
        """Deletes every checkpoint whose time is over; returns their records. As `delete` when the disk is full."""
        if due := self.store.expired_checkpoints():
            try:
                self.store.forget(due)
            except StorageError:
                self._drop_all(due)
                self.store.forget(due)
            self._drop_all(due)
        return due

    def _drop_all(self, checkpoints: Sequence[CheckpointRecord]) -> None:
        for one in checkpoints:
            self._drop(one.path, one.version)

    def _drop(self, path: CheckpointPath, version: str) -> None:
        try:
            self.archive.drop(path, version)
        except UserError as error:  # costs space only; the next start tries again
            log.warning("%s", error)

    # ---- sessions and their models ---------------------------------------------------------------------------------

    def tidy(self) -> None:
        """To be called every few seconds. In a thread of its own, so that no step waits for it: what the disk refused
        is written; checkpoints, answers and sessions whose time is over go."""
        if self._tidying is None or self._tidying.done():
            self._tidying = self._housekeeper.submit(self.tidy_now)

    def tidy_now(self) -> None:
        """One round of `tidy`. Each part is tried whatever becomes of the others, and again in the next round; a
        problem is told once."""
        problems = []
        end_sessions = partial(self.store.end_silent_sessions, self.session_timeout)
        for part in (self.futures.tidy, self.expire, end_sessions, self.store.recover, self.store.keep_reserve):
            try:
                part()
            except Exception as error:
                problems.append(str(error))
        problem = "; ".join(dict.fromkeys(problems))
        if problem and problem != self._problem:
            log.warning("tidying up failed, and is tried again every few seconds: %s", problem)
        elif self._problem and not problem:
            log.warning("tidying up works again: everything is on record")
        self._problem = problem

    def explain_lost(self, model_id: str, owner: str) -> str:
        """Why a model that is not open is gone, or "" when it never was this owner's."""
        try:
            run = self.store.get_run(model_id, owner)
        except NotFound:
            return ""
        last = f"; its last checkpoint is {run.last_checkpoint.path.uri}" if run.last_checkpoint else ""
        why = "is closed" if run.state == "closed" else "was lost when the server restarted"
        return f"{model_id} {why}; create a model from a saved state{last}"
