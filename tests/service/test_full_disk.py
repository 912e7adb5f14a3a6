"""A service folder on a disk that is really full: a small tmpfs, or a limit of the system on the size of files.

What needs no disk goes on, deleting works when nothing else does, what was refused is caught up, a server starts."""

import os
import resource
import subprocess
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from requests_made import save_weights
from starlette.requests import Request

from skyrl.service.app import http_error
from skyrl.service.models import OpenModels, TrainableModel
from skyrl.service.routes_checkpoints import CopyWeights, _copy
from skyrl.service.storage import database, snapshots
from skyrl.service.storage.checkpoints import CheckpointService
from skyrl.service.storage.content import Content
from skyrl.service.storage.records import CheckpointPath, ModelInfo, StorageError

CONTENT = Content(ModelInfo("base"), {"w": torch.zeros(100_000)})
KEPT = {"path": "tinker://kept", "size_bytes": 1}


class Disk:
    """A file system of 4 MiB with a service folder, and a file that takes all its space."""

    def __init__(self, root):
        self.root, self.filler = root, root / "filler"
        self.service = self.open()
        self.session = self.service.store.create_session("o").session_id
        self.run = self.service.store.create_run(self.session, "o", 0, ModelInfo("base")).run_id

    def open(self, **options):
        self.service = CheckpointService(self.root / "service", **options)
        return self.service

    def fill(self, leave=0):
        with open(self.filler, "ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        os.truncate(self.filler, max(0, self.filler.stat().st_size - leave))

    def path(self, name):
        return CheckpointPath(self.run, "weights", name)

    def save(self, name, **options):
        return self.service.save(self.path(name), "o", CONTENT, **options)

    def names(self):
        return sorted(row.path.name for row in self.service.store.all_checkpoints())


@pytest.fixture
def disk(tmp_path):
    root = tmp_path / "disk"
    root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", root], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    try:
        disk = Disk(root)
        yield disk
        disk.service.close()
    finally:
        subprocess.run(["umount", "-l", root], check=True)


def test_what_needs_no_disk_goes_on_and_failures_are_the_server_s(disk):
    disk.save("a")
    disk.fill()
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": []})
    refused = [
        lambda: disk.save("b"),
        lambda: disk.service.store.create_session("o", user_metadata={"k": "v" * 100_000}),
        lambda: disk.service.copy(disk.path("a"), "o", disk.path("c")),
    ]
    for attempt in refused:
        with pytest.raises(StorageError, match="free space") as caught:
            attempt()
        assert (caught.value.category, http_error(request, caught.value).status) == ("server", 503)
    assert "\n" not in str(caught.value)
    disk.service.store.heartbeat(disk.session, "o")
    assert disk.service.load(disk.path("a").uri, "o", optimizer=False).weights.keys() == {"w"}
    disk.filler.unlink()
    disk.save("b")
    assert disk.names() == ["a", "b"]  # and of what was refused, nothing is left
    assert len(list((disk.service.archive.root / disk.run / "weights").iterdir())) == 2


def test_answers_are_recorded_when_there_is_space_again(disk):
    disk.fill()
    disk.service.futures.record("a" * 32, "o", save_weights(disk.run, 1, "weights", "x"), KEPT)
    assert disk.service.futures.recall("a" * 32, "o").result == KEPT
    disk.service.tidy_now()  # fails, and ends nothing
    disk.filler.unlink()
    disk.service.tidy_now()
    disk.service.close()
    assert disk.open().futures.recall("a" * 32, "o").result == KEPT


def test_the_housekeeping_survives_any_error(disk, monkeypatch):
    def fail(*args):
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(disk.service.futures, "_write_answers", fail)
    disk.service.futures.record("a" * 32, "o", save_weights(disk.run, 1, "weights", "x"), KEPT)
    disk.service.tidy()
    disk.service._tidying.result()
    monkeypatch.undo()
    disk.service.tidy()
    disk.service._tidying.result()
    with disk.service.store.read() as db:
        assert db.execute("SELECT count(*) FROM answers").fetchone()[0] == 1


@pytest.mark.parametrize("reserve", [True, False])
def test_deleting_and_expiry_work_on_a_full_disk(disk, reserve):
    for name in "abc":
        disk.save(name)
    disk.save("old", ttl_seconds=3600)
    if not reserve:
        disk.service.store._reserve.unlink()
        disk.fill()
        with pytest.raises(StorageError):  # also the space that the database has for itself is used up
            disk.service.store.create_session("o", user_metadata={"k": "v" * 1_000_000})
    disk.fill()
    disk.service.delete(disk.path("a"), "o")
    assert disk.names() == ["b", "c", "old"]
    disk.fill()
    with disk.service.archive.reading(disk.path("b"), disk.service.store.version_of(disk.path("b"))):
        disk.service.delete(disk.path("c"), "o")  # whoever reads another one is not disturbed
    disk.fill()
    disk.service.store._now = lambda: time.time() + 4000
    assert [gone.path.name for gone in disk.service.expire()] == ["old"] and disk.names() == ["b"]
    assert disk.service.archive.whole(disk.path("b"), disk.service.store.version_of(disk.path("b"))) == ""
    disk.filler.unlink()
    disk.service.tidy_now()
    assert disk.service.store._reserve.stat().st_size == database.RESERVE_BYTES


@pytest.mark.parametrize("leave", [0, 8192, 65536])
def test_a_server_starts_on_a_full_disk_and_says_so(disk, leave, caplog):
    disk.save("a")
    disk.service.close()
    disk.fill(leave)
    lines = disk.open().lines
    assert any("MiB are free on this disk" in line for line in lines) and lines[-1] in caplog.text
    assert disk.names() == ["a"] and "was lost" in disk.service.explain_lost(disk.run, "o")
    disk.service.delete(disk.path("a"), "o")
    disk.save("b")


def test_a_server_says_that_its_disk_takes_no_further_file(disk):
    disk.service.close()
    found = os.statvfs(disk.root)
    used = f"remount,nr_inodes={found.f_files - found.f_ffree + 2}"  # for the files that SQLite has open
    subprocess.run(["mount", "-o", used, disk.root], check=True)
    assert any("all inodes of that disk are used" in line for line in disk.open().lines)


def test_a_copy_that_the_disk_refuses_may_be_asked_for_again(disk):
    """There is room for a row, and none for the files: the row is taken back."""
    large = Content(ModelInfo("base"), {"w": torch.zeros(300_000)})
    disk.service.save(disk.path("a"), "o", large)
    disk.fill(65536)
    state = SimpleNamespace(store=disk.service.store, checkpoints=disk.service)
    body = CopyWeights(source_path=disk.path("a").uri, session_id=disk.session, model_seq_id=7)
    for _ in range(2):
        with pytest.raises(StorageError, match="cannot be written"):
            _copy(SimpleNamespace(state=state, owner="o"), disk.path("a"), body)
    disk.filler.unlink()
    copied = _copy(SimpleNamespace(state=state, owner="o"), disk.path("a"), body)
    assert copied.path.run_id == f"{disk.session}:train:7"


def test_a_fresh_folder_on_a_full_disk_is_one_line(disk):
    disk.fill()
    with pytest.raises(StorageError, match="full|No space|I/O") as caught:
        CheckpointService(disk.root / "another")
    assert "\n" not in str(caught.value)


@contextmanager
def largest_file(size):
    """As a quota of the system would have it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_files_is_the_server_s_failure_too(tmp_path):
    service = CheckpointService(tmp_path / "service")
    session = service.store.create_session("o").session_id
    run = service.store.create_run(session, "o", 0, ModelInfo("base")).run_id
    path = CheckpointPath(run, "weights", "a")
    service.save(path, "o", CONTENT)
    with largest_file(4096):
        for attempt in (
            lambda: service.save(CheckpointPath(run, "weights", "b"), "o", CONTENT),
            lambda: service.store.create_session("o", user_metadata={"k": "v" * 100_000}),
        ):
            with pytest.raises(StorageError):
                attempt()
        service.futures.record("a" * 32, "o", save_weights(run, 1, "weights", "x"), KEPT)
        service.store.heartbeat(session, "o")
        service.tidy_now()
    service.tidy_now()
    assert service.load(path.uri, "o", optimizer=False).info == CONTENT.info
    service.close()


def test_a_snapshot_that_was_promised_stays(disk, monkeypatch):
    """Ephemeral ones move to files when host memory is full: a full disk refuses the new one and costs no other."""
    monkeypatch.setattr(snapshots, "HOST_BYTES", 500_000)
    leader = SimpleNamespace(call=lambda *args: None)  # no ranks: what they would hold is not looked at
    kept = snapshots.Snapshots(leader, disk.service, lambda: CONTENT)
    one, two = f"{disk.session}:sample:1", f"{disk.session}:sample:2"
    kept.publish(one, CONTENT, disk.run)
    disk.fill()
    with pytest.raises(StorageError, match="no room for one more snapshot") as caught:
        kept.publish(two, CONTENT, disk.run)
    assert "\n" not in str(caught.value)
    assert kept._find(one) is CONTENT and two not in kept._host and not kept._spilled
    disk.filler.unlink()
    kept.publish(two, CONTENT, disk.run)
    assert kept._spilled == {one} and kept._find(one).weights["w"].equal(CONTENT.weights["w"])
    kept._file(one).write_bytes(b"damaged")
    with pytest.raises(StorageError, match="damaged"):
        kept._find(one)


def test_a_model_is_dropped_only_once_that_is_on_record(disk):
    calls = []
    leader = SimpleNamespace(call=lambda *args: calls.append(args))
    models = OpenModels(None, leader, disk.service, None)
    models._open[disk.run] = TrainableModel(disk.run, "o", disk.session, "base", None)
    disk.service.store._reserve.unlink()
    disk.fill()
    with pytest.raises(StorageError):
        disk.service.store.create_session("o", user_metadata={"k": "v" * 1_000_000})  # uses up the log's own space
    with pytest.raises(StorageError):
        for _ in range(1000):  # the log may have a few pages left
            models.drop(disk.run)
            models._open[disk.run] = TrainableModel(disk.run, "o", disk.session, "base", None)
            calls.clear()
    assert models.find(disk.run) is not None and calls == []
    disk.filler.unlink()
    models.drop(disk.run)
    assert models.find(disk.run) is None and calls == [("delete", disk.run)]
    assert disk.service.store.get_run(disk.run, "o").state == "closed"
