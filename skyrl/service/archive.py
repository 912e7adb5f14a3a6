"""Checkpoints of the service as folders: <root>/<run id>/<kind>/<name>/, whole or not there.

The files lie in a folder of their own, ".v-<version>", that never changes; <name> is a link to it. Saving writes under
a temporary name, syncs and renames; overwriting writes another version and moves the link, in one step. Which version
counts is said by the store (store_sync brings the two together); names that begin with a dot are ours, and no
checkpoint's name does.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import skyrl
from skyrl.service.archive_content import Content, read_content, write_content
from skyrl.service.archive_files import (
    TarStream,
    check_recipients,
    digest,
    encrypt,
    flush,
    flush_folder,
    listing,
    reason,
)
from skyrl.service.records import CheckpointPath, Json, ModelInfo, check_part
from skyrl.types import UserError

FORMAT = 1
META = "meta.json"
MARKER = ".skyrl-store"
OPTIMIZER = "optimizer.safetensors"
_TMP, _VERSION, _LINK = ".tmp-", ".v-", ".link-"


class Archive:
    """The folders below `root`. Thread-safe. Every method that fails for the disk's sake raises a UserError of one
    line and leaves nothing that could be taken for a checkpoint."""

    def __init__(self, root: Path | str) -> None:
        """Makes `root`, and does nothing else; `bind` it to a store before use."""
        self.root = Path(root).absolute()
        with self._explained(self.root, "made"):
            self.root.mkdir(parents=True, exist_ok=True)
        self.saving = threading.RLock()  # order of rows and links of one name: held by store_sync around both
        self._lock = threading.Lock()
        self._readers: Counter[Path] = Counter()
        self._doomed: set[Path] = set()
        self._marker: int | None = None

    def bind(self, store_id: str) -> None:
        """Takes the folder for this process and store, until `close`.

        Raises: UserError when another process has it, or when it belongs to another store: cleaning up after a store
        that does not know these folders would delete them all.
        """
        path = self.root / MARKER
        strangers = any(entry.name != MARKER for entry in self.root.iterdir())
        with self._explained(path, "locked"):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._claim(handle, store_id, strangers)
        except BaseException:
            os.close(handle)
            raise
        self._marker = handle

    def close(self) -> None:
        """Lets another process have the folder."""
        if self._marker is not None:
            os.close(self._marker)
            self._marker = None

    def folder(self, path: CheckpointPath, version: str | None = None) -> Path:
        """Where the files are: of one version, or what the name stands for now. Need not exist."""
        parent = self.root / path.run_id / path.kind
        return parent / (path.name if version is None else f"{_VERSION}{check_part(version, 'version', version)}")

    def write(self, path: CheckpointPath, content: Content, *, recipients: Sequence[str] = ()) -> tuple[str, int]:
        """Writes and syncs one version of a checkpoint; returns its version and size in bytes. The name does not stand
        for it yet: that is `point`, after the row is committed.

        recipients: age1... keys; each file is then encrypted for all of them and named <file>.age.
        """
        extra = {"step": content.optimizer.step} if content.optimizer else {}
        return self.write_files(
            path, content.facts, lambda folder: write_content(content, folder), recipients=recipients, extra=extra
        )

    def write_files(
        self,
        path: CheckpointPath,
        facts: ModelInfo,
        fill: Callable[[Path], None],
        *,
        recipients: Sequence[str] = (),
        extra: Json | None = None,
    ) -> tuple[str, int]:
        """As `write`, for any files: `fill` makes them in the folder that it is given (a Hugging Face export)."""
        check_recipients(recipients)
        version = secrets.token_hex(8)
        final = self.folder(path, version)
        part = final.with_name(f"{_TMP}{version}")
        with self._explained(final.parent / path.name, "written"):
            try:
                part.mkdir(parents=True)
                fill(part)
                if recipients:
                    encrypt(part, recipients)
                files = {name: {"bytes": size, "sha256": digest(part / name)} for name, size in listing(part).items()}
                meta = {
                    "format": FORMAT,
                    "versions": {"skyrl": skyrl.__version__},
                    "facts": facts.dump(),
                    "encrypted": bool(recipients),
                    **(extra or {}),
                    "files": files,
                }
                (part / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
                flush(part)
                part.rename(final)
                # The folders above may be new: their names must be on the disk as well.
                for folder in (final.parent, final.parent.parent, self.root):
                    flush_folder(folder)
            except BaseException:
                for leftover in (part, final):
                    shutil.rmtree(leftover, ignore_errors=True)
                raise
        return version, sum(entry["bytes"] for entry in files.values())

    def copy(self, source: CheckpointPath, version: str, target: CheckpointPath) -> tuple[str, int]:
        """As `write`, with the files of another checkpoint, each checked. Raises: UserError when one is damaged."""
        with self.reading(source, version) as folder:
            meta = self._meta(folder, source)

            def fill(part: Path) -> None:
                for name, entry in meta["files"].items():
                    self._verify(folder / name, entry, source)
                    (part / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(folder / name, part / name)

            kept = {key: meta[key] for key in ("encrypted", "step") if key in meta}
            return self.write_files(target, ModelInfo.parse(meta["facts"]), fill, extra=kept)

    def point(self, path: CheckpointPath, version: str) -> None:
        """Lets the name stand for this version, in one step: a reader finds the earlier one or this one."""
        link = self.folder(path)
        with self._explained(link, "named"):
            temporary = link.with_name(f"{_LINK}{secrets.token_hex(8)}")
            temporary.symlink_to(f"{_VERSION}{version}")
            os.replace(temporary, link)
            flush_folder(link.parent)

    def read(self, path: CheckpointPath, version: str | None = None, *, optimizer: bool = True) -> Content:
        """The tensors of a checkpoint, every byte checked; with `optimizer` False its state is left out (None).

        Raises: UserError naming the file that is damaged, or when there is no such checkpoint.
        """
        with self.reading(path, version) as folder:
            meta = self._meta(folder, path)
            if meta["encrypted"]:
                raise UserError(f"checkpoint {path.uri}: encrypted for its recipients; load another checkpoint")
            names = [name for name in meta["files"] if optimizer or name != OPTIMIZER]
            with self._explained(folder, "read"):
                for name in names:
                    self._verify(folder / name, meta["files"][name], path)
                content = read_content(folder, ModelInfo.parse(meta["facts"]), optimizer and OPTIMIZER in names)
            if content.optimizer is not None:
                content.optimizer.step = meta["step"]
            return content

    def files(self, path: CheckpointPath, version: str | None = None, *, private: bool = False) -> dict[str, Path]:
        """What a client may download: name -> file. private: with the optimizer's state and our meta.json."""
        folder = self.folder(path, version)
        names = [*self._meta(folder, path)["files"], META]
        return {name: folder / name for name in names if private or name not in (OPTIMIZER, META)}

    def tar(self, path: CheckpointPath, version: str | None = None) -> TarStream:
        """The files for download as one plain tar, made as it is sent. Close it if it is not read to its end."""
        with self.reading(path, version):
            files = self.files(path, version)
            with self._explained(self.folder(path, version), "read"):
                return TarStream(files)

    def whole(self, path: CheckpointPath, version: str) -> str:
        """Why this version is not whole, or "". Looks at names and sizes; `read` checks every byte."""
        folder = self.folder(path, version)
        try:
            files = self._meta(folder, path)["files"]
        except UserError as error:
            return str(error)
        sizes = listing(folder)
        wrong = [name for name, entry in files.items() if sizes.get(name) != entry["bytes"]]
        return f"checkpoint {path.uri}: {', '.join(wrong)} missing or cut short in {folder}" if wrong else ""

    def drop(self, path: CheckpointPath, version: str) -> None:
        """Deletes one version, and the name if it stands for it; waits for readers, at latest until the next start."""
        folder, link = self.folder(path, version), self.folder(path)
        with self._explained(folder, "deleted"):
            with self.saving:
                if link.is_symlink() and os.readlink(link) == folder.name:
                    link.unlink()
                    flush_folder(link.parent)
            with self._lock:
                self._doomed.add(folder)
                if self._readers[folder]:
                    return
            self._remove(folder)

    @contextmanager
    def reading(self, path: CheckpointPath, version: str | None = None) -> Iterator[Path]:
        """The folder of a version, which stays while this is open even if the checkpoint is deleted meanwhile."""
        folder = self.folder(path, version)
        with self._lock:
            if version is None and folder.is_symlink():
                folder = folder.with_name(os.readlink(folder))
            self._readers[folder] += 1
        try:
            yield folder
        finally:
            with self._lock:
                self._readers[folder] -= 1
                over = not self._readers[folder]
                if over:
                    del self._readers[folder]
                over = over and folder in self._doomed
            if over:
                self._remove(folder)

    def clean(self, known: dict[CheckpointPath, str]) -> list[str]:
        """At start, once bound: removes everything that the store does not know and puts every name right.

        known: path -> version. Returns one line for each thing done. Never removes a version that is known.
        """
        if self._marker is None:
            raise RuntimeError(f"archive {self.root}: clean before bind")
        keep = {self.folder(path, version): self.folder(path) for path, version in known.items()}
        links = {link: folder for folder, link in keep.items()}
        lines = []
        with self._explained(self.root, "cleaned"):
            for kind in sorted(self.root.glob("*/*")):
                for entry in sorted(kind.iterdir()) if kind.is_dir() else []:
                    if entry not in keep and entry not in links:
                        _delete(entry)
                        lines.append(f"archive: removed {entry.relative_to(self.root)}, which was never acknowledged")
            for path, version in known.items():
                link, folder = self.folder(path), self.folder(path, version)
                if folder.is_dir() and not (link.is_symlink() and os.readlink(link) == folder.name):
                    if link.is_dir() and not link.is_symlink():
                        raise UserError(f"archive {link}: a folder in the place of a link; move it away")
                    self.point(path, version)
                    lines.append(f"archive: {path.uri} stands for version {version} again")
            for folder in (*self.root.glob("*/*"), *self.root.glob("*")):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        return lines

    def _remove(self, folder: Path) -> None:
        # Renamed first: what is half deleted must not look like a version.
        trash = folder.with_name(f"{_TMP}{secrets.token_hex(8)}")
        try:
            folder.rename(trash)
        except FileNotFoundError:
            return
        finally:
            with self._lock:
                self._doomed.discard(folder)
        shutil.rmtree(trash)

    def _meta(self, folder: Path, path: CheckpointPath) -> dict[str, Any]:
        try:
            meta = json.loads((folder / META).read_bytes())
            meta["files"], meta["facts"], meta["encrypted"]
        except OSError as error:
            raise UserError(f"checkpoint {path.uri}: not on the disk ({folder}: {reason(error)})") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"checkpoint {path.uri}: {folder / META} is damaged; load another checkpoint") from None
        if meta["format"] != FORMAT:
            raise UserError(
                f"checkpoint {path.uri}: format {meta['format']}, this skyrl {skyrl.__version__} reads {FORMAT}; "
                f"use skyrl {meta['versions']['skyrl']}"
            )
        return meta

    def _verify(self, file: Path, entry: Json, path: CheckpointPath) -> None:
        """Raises: UserError naming the file unless it is as it was written."""
        problem = ""
        try:
            if file.stat().st_size != entry["bytes"]:
                problem = f"it has {file.stat().st_size} bytes instead of {entry['bytes']}"
            elif digest(file) != entry["sha256"]:
                problem = "its checksum differs"
        except OSError as error:
            problem = reason(error)
        if problem:
            raise UserError(f"checkpoint {path.uri}: {file} is damaged ({problem}); load another checkpoint")

    def _claim(self, handle: int, store_id: str, strangers: bool) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise UserError(f"archive {self.root}: cannot be locked ({reason(error)})") from None
            raise UserError(
                f"archive {self.root}: another server uses it; end that one, or give another folder"
            ) from None
        owner = os.pread(handle, 100, 0).decode("ascii", "replace")
        if owner == store_id:
            return
        if owner or strangers:
            raise UserError(
                f"archive {self.root}: its checkpoints belong to another store ({owner or 'unknown'}, this one is "
                f"{store_id}); give the store they were saved with, or an empty folder"
            )
        with self._explained(self.root, "written"):
            os.pwrite(handle, store_id.encode("ascii"), 0)
            os.fsync(handle)
            flush_folder(self.root)

    @contextmanager
    def _explained(self, what: Path, verb: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"archive {what}: cannot be {verb} ({reason(error)}); free space there, or check the folder's rights"
            ) from error


def _delete(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()
