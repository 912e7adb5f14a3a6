"""Checkpoints of the service as folders: <root>/<run id>/<kind>/<name>/<version>/, whole or not there.

A version's folder gets its name when all of it is on the disk, and never changes after. Saving under a name that is
taken writes another version beside the earlier one. Which version a name stands for is said by the database alone
(checkpoints.py brings the two together), so nothing here has to be switched over in step with it.

In a folder: the tensors (an adapter as the peft package loads it, or whole weights), the optimizer's state where it
was saved, and meta.json with the size and the checksum of each of these files.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import logging
import os
import secrets
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError

import skyrl
from skyrl.files import disk_reason, manifest_entry, remove_tree, sync_folder, verify_manifest, write_folder_atomic
from skyrl.service.storage.records import OPTIMIZER, CheckpointPath, Json, ModelInfo, StorageError, check_part
from skyrl.types import UserError

if TYPE_CHECKING:  # it needs torch; only writing and reading tensors does
    from skyrl.service.storage.content import Content

log = logging.getLogger("skyrl.service")

FORMAT = 1
META = "meta.json"
MARKER = ".skyrl-store"
CHUNK = 1 << 20  # bytes


class Archive:
    """The folders below `root`. Thread-safe. Every method that fails for the disk's sake raises a UserError of one
    line and leaves nothing that could be taken for a checkpoint."""

    def __init__(self, root: Path | str) -> None:
        """Makes `root`, and does nothing else; `bind` it to a store before use."""
        self.root = Path(root).absolute()
        with self._explained(self.root, "made"):
            self.root.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._holders: Counter[Path] = Counter()
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

    def folder(self, path: CheckpointPath, version: str) -> Path:
        """Where the files of a version are. Need not exist."""
        return self.root / path.run_id / path.kind / path.name / check_part(version, "version", version)

    def write(self, path: CheckpointPath, content: Content, *, recipients: Sequence[str] = ()) -> tuple[str, int]:
        """Writes and syncs one version of a checkpoint; returns its version and size in bytes. Nobody finds it before
        its row is in the store.

        recipients: age1... keys; each file is then encrypted for all of them and named <file>.age.
        """
        from skyrl.service.storage.content import write_content

        step = content.optimizer.step if content.optimizer else None
        return self._write_files(
            path, content.info, step, lambda folder: write_content(content, folder), recipients=recipients
        )

    def _write_files(
        self,
        path: CheckpointPath,
        info: ModelInfo,
        step: int | None,
        fill: Callable[[Path], None],
        *,
        recipients: Sequence[str] = (),
        encrypted: bool = False,
    ) -> tuple[str, int]:
        """As `write`, for any files: `fill` makes them in the folder that it is given. step: of the optimizer's state,
        None without one. encrypted: they are already."""
        check_recipients(recipients)
        version = secrets.token_hex(8)
        final = self.folder(path, version)
        with self._explained(final.parent, "written"):
            try:
                with self._held(final.parent), write_folder_atomic(final) as part:
                    fill(part)
                    if recipients:
                        _encrypt(part, recipients)
                    files = {name: manifest_entry(part / name) for name in _listing(part)}
                    meta = {
                        "format": FORMAT,
                        "versions": {"skyrl": skyrl.__version__},
                        "facts": info.dump(),
                        "encrypted": encrypted or bool(recipients),
                        **({} if step is None else {"step": step}),
                        "files": files,
                    }
                    (part / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
                # The folders above may be new: their names must be on the disk as well.
                for folder in (final.parents[1], final.parents[2], self.root):
                    sync_folder(folder)
            except BaseException:
                shutil.rmtree(final, ignore_errors=True)
                self._remove_empty(final.parent)
                raise
        return version, sum(entry["bytes"] for entry in files.values())

    def copy(self, source: CheckpointPath, version: str, target: CheckpointPath) -> tuple[str, int]:
        """As `write`, with the files of another checkpoint, each checked. Raises: UserError when one is damaged."""
        with self.reading(source, version) as folder:
            meta = self._meta(folder, source)
            self._verify(folder, meta["files"], source)

            def fill(part: Path) -> None:
                for name in meta["files"]:
                    (part / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(folder / name, part / name)

            info = ModelInfo.parse(meta["facts"])
            return self._write_files(target, info, meta.get("step"), fill, encrypted=meta["encrypted"])

    def read(self, path: CheckpointPath, version: str, *, optimizer: bool = True) -> Content:
        """The tensors of a checkpoint, every byte checked; with `optimizer` False its state is left out (None).

        Raises: UserError naming the file that is damaged, or when there is no such checkpoint.
        """
        from skyrl.service.storage.content import read_content

        with self.reading(path, version) as folder:
            meta = self._meta(folder, path)
            if meta["encrypted"]:
                raise UserError(f"checkpoint {path.uri}: encrypted for its recipients; load another checkpoint")
            files = {name: entry for name, entry in meta["files"].items() if optimizer or name != OPTIMIZER}
            with self._explained(folder, "read"):
                self._verify(folder, files, path)
                step = meta["step"] if OPTIMIZER in files else None
                return read_content(folder, ModelInfo.parse(meta["facts"]), step)

    def files(self, path: CheckpointPath, version: str) -> dict[str, Path]:
        """What a client may download: name -> file. The optimizer's state and meta.json stay here."""
        folder = self.folder(path, version)
        return {name: folder / name for name in self._meta(folder, path)["files"] if name != OPTIMIZER}

    def tar(self, path: CheckpointPath, version: str) -> TarStream:
        """The files for download as one plain tar, made as it is sent. Close it if it is not read to its end."""
        with self.reading(path, version):
            files = self.files(path, version)
            with self._explained(self.folder(path, version), "read"):
                return TarStream(files)

    def whole(self, path: CheckpointPath, version: str) -> str:
        """Why this version is not whole, or "". Looks at names and sizes; `read` checks every byte."""
        folder = self.folder(path, version)
        try:
            self._verify(folder, self._meta(folder, path)["files"], path, hashed=())
        except UserError as error:
            return str(error)
        return ""

    def drop(self, path: CheckpointPath, version: str) -> None:
        """Deletes one version; waits for readers, at latest until the next start."""
        folder = self.folder(path, version)
        with self._lock:
            self._doomed.add(folder)
            if self._holders[folder]:
                return
        self._remove(folder)

    @contextmanager
    def reading(self, path: CheckpointPath, version: str) -> Iterator[Path]:
        """The folder of a version, which stays while this is open even if the checkpoint is deleted meanwhile."""
        folder = self.folder(path, version)
        try:
            with self._held(folder):
                yield folder
        finally:
            if folder in self._doomed and not self._holders[folder]:
                try:
                    self._remove(folder)
                except UserError as error:  # who has read it has no part in this; the next start tries again
                    log.warning("%s", error)

    @contextmanager
    def _held(self, folder: Path) -> Iterator[None]:
        """Nobody of this process removes the folder while this is open."""
        with self._lock:
            self._holders[folder] += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders[folder] -= 1
                if not self._holders[folder]:
                    del self._holders[folder]

    def clean(self, known: Mapping[CheckpointPath, str]) -> list[str]:
        """At start, once bound: removes everything that the store does not know.

        known: path -> version. Returns one line for each thing done. Never removes a version that is known.
        """
        assert self._marker is not None, "clean before bind"
        keep = {self.folder(path, version) for path, version in known.items()}
        names = {folder.parent for folder in keep}
        lines = []
        with self._explained(self.root, "cleaned"):
            entries = [entry for entry in self.root.glob("*/*/*") if entry not in names]
            entries += [entry for name in names if name.is_dir() for entry in name.iterdir() if entry not in keep]
            for entry in sorted(entries):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
                lines.append(f"archive: removed {entry.relative_to(self.root)}, which was never acknowledged")
            for folder in (*self.root.glob("*/*"), *self.root.glob("*")):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        return lines

    def adopt_links(self, known: Mapping[CheckpointPath, str]) -> None:
        """At start, before `clean`: brings folders of earlier servers to their place of now. Those had a version in
        <kind>/.v-<version>, and a link to it in the place of <name>/."""
        with self._explained(self.root, "cleaned"):
            for path, version in known.items():
                folder = self.folder(path, version)
                name, old = folder.parent, folder.parents[1] / f".v-{version}"
                if name.is_symlink():
                    name.unlink()
                if old.is_dir():
                    name.mkdir(exist_ok=True)
                    old.rename(folder)
                    sync_folder(name)
                    sync_folder(old.parent)

    def _remove(self, folder: Path) -> None:
        with self._explained(folder, "deleted"):
            try:
                try:
                    remove_tree(folder)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    (folder / META).unlink(missing_ok=True)  # a new name needs space; without this file it is not whole
                    shutil.rmtree(folder)
            except FileNotFoundError:
                return
            finally:
                with self._lock:
                    self._doomed.discard(folder)
            self._remove_empty(folder.parent)

    def _remove_empty(self, name: Path) -> None:
        with self._lock:
            if not self._holders[name]:  # a version that is being written needs it
                with suppress(OSError):  # it is not empty
                    name.rmdir()

    def _meta(self, folder: Path, path: CheckpointPath) -> dict[str, Any]:
        try:
            meta = json.loads((folder / META).read_bytes())
            meta["files"], meta["facts"], meta["encrypted"]
        except OSError as error:
            kind = UserError if isinstance(error, FileNotFoundError) else StorageError
            raise kind(f"checkpoint {path.uri}: not on the disk ({folder}: {disk_reason(error)})") from None
        except (ValueError, KeyError, TypeError):
            raise StorageError(f"checkpoint {path.uri}: {folder / META} is damaged; load another checkpoint") from None
        if meta["format"] != FORMAT:
            raise UserError(
                f"checkpoint {path.uri}: format {meta['format']}, this skyrl {skyrl.__version__} reads {FORMAT}; "
                f"use skyrl {meta['versions']['skyrl']}"
            )
        return meta

    def _verify(self, folder: Path, files: Json, path: CheckpointPath, hashed: Sequence[str] | None = None) -> None:
        """Raises: UserError naming the files unless they are as they were written."""
        try:
            problems = verify_manifest(folder, files, hashed=hashed)
        except OSError as error:
            problems = [disk_reason(error)]
        if problems:
            raise StorageError(f"checkpoint {path.uri}: {'; '.join(problems)} in {folder}; load another checkpoint")

    def _claim(self, handle: int, store_id: str, strangers: bool) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise StorageError(f"archive {self.root}: cannot be locked ({disk_reason(error)})") from None
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
            sync_folder(self.root)

    @contextmanager
    def _explained(self, what: Path, verb: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"archive {what}: cannot be {verb} ({disk_reason(error, what)}); free space there, or check the "
                "folder's rights"
            ) from error


class TarStream:
    """A plain tar of some files, as chunks of bytes; nothing is copied to the disk. `size` is its length in bytes.

    The files are opened at once, so that they may be deleted while they are sent. Can be read once.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._open: list[tuple[tarfile.TarInfo, BinaryIO]] = []
        try:
            for name, path in files.items():
                stream = path.open("rb")
                status = os.fstat(stream.fileno())
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime, entry.mode = status.st_size, int(status.st_mtime), 0o644
                self._open.append((entry, stream))
        except BaseException:
            self.close()
            raise
        # The end of a tar is two empty blocks, then zeros up to a whole record.
        used = sum(len(self._head(entry)) + _padded(entry.size) for entry, _ in self._open) + 2 * tarfile.BLOCKSIZE
        self.size = -(-used // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def __iter__(self) -> Iterator[bytes]:
        sent = 0
        try:
            for entry, stream in self._open:
                yield (head := self._head(entry))
                left = entry.size
                while left:
                    chunk = stream.read(min(CHUNK, left))
                    if not chunk:
                        raise RuntimeError(f"{entry.name}: became shorter while it was sent")
                    left -= len(chunk)
                    yield chunk
                yield bytes(_padded(entry.size) - entry.size)
                sent += len(head) + _padded(entry.size)
            yield bytes(self.size - sent)
        finally:
            self.close()

    def close(self) -> None:
        """Gives the files back."""
        for _, stream in self._open:
            stream.close()

    @staticmethod
    def _head(entry: tarfile.TarInfo) -> bytes:
        return entry.tobuf(tarfile.PAX_FORMAT)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _listing(folder: Path) -> list[str]:
    """Names ("a/b") of the files below `folder`, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _encrypt(folder: Path, recipients: Sequence[str]) -> None:
    """Every file becomes <file>.age, which any one of the recipients can decrypt; the plain ones are removed."""
    keys, pyrage = check_recipients(recipients), _pyrage()
    for name in _listing(folder):
        plain = folder / name
        try:
            pyrage.encrypt_file(str(plain), str(plain.with_name(plain.name + ".age")), keys)
        except pyrage.EncryptError as error:  # how it tells what the system said
            raise OSError(str(error)) from error
        plain.unlink()


def _pyrage() -> ModuleType:
    try:
        return importlib.import_module("pyrage")
    except ImportError:
        raise UserError(
            "age_encryption_recipients: this server cannot encrypt, pyrage is not installed; pip install "
            "'skyrl-spmd[age]' there, or ask for no encryption"
        ) from None


def check_recipients(recipients: Sequence[str]) -> list[object]:
    """Their keys. Raises: UserError unless each is an X25519 key of age ("age1...") and the package that encrypts is
    there."""
    keys = []
    for text in recipients:
        pyrage = _pyrage()
        try:
            keys.append(pyrage.x25519.Recipient.from_str(text))
        except pyrage.RecipientError:
            raise UserError(
                f"age_encryption_recipients: {ascii(text[:80])} is not an X25519 public key of age; give the "
                "age1... line that age-keygen prints"
            ) from None
    return keys
