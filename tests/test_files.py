"""Files and folders are whole or absent, and a manifest finds what is damaged."""

import errno
import os
import types
from pathlib import Path

import pytest

from skyrl.files import (
    disk_reason,
    manifest_entry,
    remove_tree,
    sha256,
    user_folder,
    verify_manifest,
    write_atomic,
    write_folder_atomic,
)
from skyrl.launch.rank import cache_folders
from skyrl.types import UserError


def test_a_file_is_replaced_as_a_whole_and_a_failure_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "note"
    write_atomic(path, "old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"

    def refuse(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError):
        write_atomic(path, "newer")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole_and_an_error_leaves_the_old_one(tmp_path):
    folder = tmp_path / "export"
    for text in ("one", "two"):
        with write_folder_atomic(folder) as part:
            (part / "deep").mkdir()
            (part / "deep" / "file").write_text(text)
    assert (folder / "deep" / "file").read_text() == "two"
    with pytest.raises(RuntimeError, match="half"), write_folder_atomic(folder) as part:
        (part / "file").write_text("three")
        raise RuntimeError("half way")
    assert (folder / "deep" / "file").read_text() == "two" and list(tmp_path.iterdir()) == [folder]
    remove_tree(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_names_each_fault(tmp_path):
    for name in ("kept", "short", "gone", "changed"):
        (tmp_path / name).write_text(name)
    files = {path.name: manifest_entry(path) for path in tmp_path.iterdir()}
    assert verify_manifest(tmp_path, files) == []
    (tmp_path / "changed").write_text("CHANGED")
    assert verify_manifest(tmp_path, files, hashed=["kept"]) == []
    assert verify_manifest(tmp_path, files) == ["file changed is damaged (its checksum differs)"]
    (tmp_path / "short").write_text("")
    (tmp_path / "gone").unlink()
    assert sorted(verify_manifest(tmp_path, files)) == ["file gone is missing", "file short has 0 bytes instead of 5"]
    assert sha256(tmp_path / "kept") == files["kept"]["sha256"]


def test_a_full_disk_is_told_as_what_it_is(tmp_path, monkeypatch):
    """Bytes or inodes, of the folder that is there for one that could not be made; nothing more for other errors."""
    full, other = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only", "x")
    assert disk_reason(full, tmp_path / "a" / "b") == "No space left on device"
    for inodes, free, told in ((0, 9, "all inodes of that disk are used"), (9, 0, "no byte of that disk is free")):
        found = types.SimpleNamespace(f_files=99, f_favail=inodes, f_bavail=free, f_frsize=4096)
        monkeypatch.setattr(os, "statvfs", lambda path, found=found: found)
        assert told in disk_reason(full, tmp_path / "a" / "b") and "None" not in disk_reason(full)
        assert disk_reason(other) == "Read-only: x"


def test_a_folder_whose_new_name_is_refused_keeps_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "export"
    with write_folder_atomic(folder) as part:
        (part / "a").write_text("old")
    rename = Path.rename

    def refuse(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="No space"), write_folder_atomic(folder) as part:
        (part / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["export"] and (folder / "a").read_text() == "old"


def test_the_folder_of_a_user_without_a_home_has_to_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_folder("XDG_CACHE_HOME", "~/.cache") == tmp_path / ".cache" / "skyrl"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 987_654)  # whom the machine does not know
    with pytest.raises(UserError, match="XDG_CACHE_HOME: not set, and this user has no home folder"):
        user_folder("XDG_CACHE_HOME", "~/.cache")
    assert cache_folders({})["TRITON_CACHE_DIR"].name == "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert user_folder("XDG_CACHE_HOME", "~/.cache") == tmp_path / "other" / "skyrl"
