"""Files of a checkpoint's folder: synced, checked, encrypted, streamed as a tar."""

from __future__ import annotations

import hashlib
import importlib
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from skyrl.types import UserError

CHUNK = 1 << 20  # bytes


def listing(folder: Path) -> dict[str, int]:
    """Files below `folder` by name ("a/b"), with their sizes, sorted; {} when there is no such folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def digest(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    state = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            state.update(chunk)
    return state.hexdigest()


def flush(folder: Path) -> None:
    """Returns when every file below `folder`, and every name, is on the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            flush_folder(path)
        else:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Returns when the names in `folder` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: BaseException) -> str:
    """An error of the system in a few words, one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


def check_recipients(recipients: Sequence[str]) -> None:
    """Raises: UserError unless each is an X25519 key of age ("age1...") and the package that encrypts is there."""
    if recipients:
        _parse(recipients)


def encrypt(folder: Path, recipients: Sequence[str]) -> None:
    """Every file becomes <file>.age, which any one of the recipients can decrypt; the plain ones are removed."""
    keys, pyrage = _parse(recipients), _pyrage()
    for name in listing(folder):
        plain = folder / name
        try:
            pyrage.encrypt_file(str(plain), str(plain.with_name(plain.name + ".age")), keys)
        except pyrage.EncryptError as error:  # how it tells what the system said
            raise OSError(str(error)) from error
        plain.unlink()


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


def _pyrage() -> ModuleType:
    try:
        return importlib.import_module("pyrage")
    except ImportError:
        raise UserError(
            "age_encryption_recipients: this server cannot encrypt, pyrage is not installed; pip install 'skyrl[age]' "
            "there, or ask for no encryption"
        ) from None


def _parse(recipients: Sequence[str]) -> list[object]:
    pyrage = _pyrage()
    keys = []
    for text in recipients:
        try:
            keys.append(pyrage.x25519.Recipient.from_str(text))
        except pyrage.RecipientError:
            raise UserError(
                f"age_encryption_recipients: {ascii(text[:80])} is not an X25519 public key of age; give the "
                "age1... line that age-keygen prints"
            ) from None
    return keys
