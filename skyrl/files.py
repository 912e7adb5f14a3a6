"""Files and folders that are whole or absent, whatever kills the process: write under another name, flush, rename.

A file system may reorder what it writes, so a name that is given before the content is on the disk can survive a crash
that the content does not. Hence the order here, always the same: content, fsync, rename, fsync of the folder above.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from skyrl.types import UserError

READ_BYTES = 8 << 20


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replaces the file at `path`: it holds the old or the new content at any time. Raises OSError."""
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(part, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def write_folder_atomic(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the name `folder` when the block ends without an error.

    A folder of that name is replaced; between the two renames neither may be there, but both lie beside it, complete,
    as .<name>.partial and .<name>.old. After an error what was there before is left as it was. Raises OSError.
    """
    part, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        os.umask(mask := os.umask(0))  # some libraries write files that nobody else may read
        for path in part.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        sync_tree(part)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not folder.exists():  # the second renaming failed, now or in a process that was killed
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_tree(folder: Path) -> None:
    """Deletes a folder. It is renamed first, to <name>.trash-<random>: a kill while its files are deleted must leave
    nothing that looks whole. Raises OSError."""
    shutil.rmtree(to_trash(folder))


def to_trash(folder: Path) -> Path:
    """Takes a folder's name away, in one step; returns where it is now. Raises OSError."""
    target = folder.with_name(f"{folder.name}.trash-{secrets.token_hex(4)}")
    folder.rename(target)
    return target


def open_plain(path: Path, root: Path) -> IO[bytes]:
    """A file in the folder `root`, where others may write, to read. Raises OSError, also for a pipe or a device, which
    would keep the reader for ever, and where a link leads to a file of neither its owner nor the reader: who shows the
    folder to its writers would show them files that they may not read."""
    stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    told, parts = os.fstat(stream.fileno()), [path, *path.parents]
    links = [part for part in parts[: parts.index(root) + 1 if root in parts else 1] if part.is_symlink()]
    if stat.S_ISREG(told.st_mode) and all(os.lstat(link).st_uid in (told.st_uid, os.geteuid(), 0) for link in links):
        return stream
    stream.close()
    raise PermissionError(errno.EACCES, "a link to a file of somebody else, or no plain file", str(path))


def user_folder(variable: str, usual: str) -> Path:
    """skyrl's folder in what XDG_CACHE_HOME or XDG_STATE_HOME names, or in the `usual` place of the user's home. Raises
    UserError for a user who has none, as containers make them."""
    home = os.environ.get(variable) or os.path.expanduser(usual)
    if home.startswith("~"):
        raise UserError(f"{variable}: not set, and this user has no home folder; set it to a folder of yours")
    return Path(home) / "skyrl"


def text_of(path: Path) -> str:
    """What a file of the kernel's says, without white space around it; "" where it is not there or not for us."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def disk_reason(problem: BaseException, place: Path | None = None) -> str:
    """An error of a disk in a few words of one line, with the file if it has one, and what a full disk has run out of.
    `place`: where that disk is, if not where the file is."""
    if not isinstance(problem, OSError) or not problem.strerror:
        text = " ".join(str(problem).split())
    else:
        text = problem.strerror + (f": {problem.filename}" if problem.filename else "")
    place = place or Path(getattr(problem, "filename", None) or ".")
    full = getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return text + (f"; {lack}" if full and (lack := disk_lack(place)) else "")


@contextlib.contextmanager
def explain_write(path: Path, remedy: str = "free some space", what: str = "") -> Iterator[None]:
    """Around what writes a file: an OSError becomes a UserError of one line, `what` (a command or option) first."""
    try:
        yield
    except OSError as problem:
        what = f"{what}: {path}" if what else str(path)
        raise UserError(f"{what}: cannot be written ({disk_reason(problem, path)}); {remedy}") from None


def disk_lack(place: Path) -> str:
    """What the disk of `place` has run out of, as a clause; "" where it has room, or does not tell."""
    place = place.absolute()
    try:
        found = os.statvfs(next(path for path in (place, *place.parents) if path.exists()))
    except OSError:
        return ""
    if found.f_files and not found.f_favail:
        return "all inodes of that disk are used, so it takes no further file, however small: delete some"
    return "" if found.f_bavail * found.f_frsize >= found.f_frsize else "no byte of that disk is free"


def sync_folder(folder: Path) -> None:
    """Flushes a folder's own entries (names, renames) to the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flushes every file and folder below `folder`, and itself, to the disk. Raises OSError."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_folder(folder)


def sha256(path: Path) -> str:
    """The hex digest of a file's content. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while data := stream.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def manifest_entry(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file, as manifests hold it. Raises OSError."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def verify_manifest(
    folder: Path, files: Mapping[str, Mapping[str, Any]], *, hashed: Iterable[str] | None = None
) -> list[str]:
    """What is wrong with the files of a manifest (name -> {"bytes", "sha256"}), one phrase each; [] when all are right.

    Sizes are looked at first, of all files; then the content of those in `hashed` (None: all), unless a size was wrong:
    reading terabytes to say more about a broken folder helps nobody. Raises OSError.
    """
    problems = []
    for name, entry in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            problems.append(f"file {name} is missing")
        elif size != entry["bytes"]:
            problems.append(f"file {name} has {size} bytes instead of {entry['bytes']}")
    if not problems:
        for name in files if hashed is None else hashed:
            if sha256(folder / name) != files[name]["sha256"]:
                problems.append(f"file {name} is damaged (its checksum differs)")
    return problems
