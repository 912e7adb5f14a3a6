"""Rows and folders together: saving, deleting, expiry, start; two threads at one name."""

import shutil
import sqlite3
import threading
from contextlib import closing

import pytest
import torch

from skyrl.service.storage.checkpoints import DATABASE, CheckpointService
from skyrl.service.storage.content import Content, OptimizerState
from skyrl.service.storage.records import CheckpointPath, ModelInfo, NotFound
from skyrl.service.storage.store import Store
from skyrl.types import UserError

INFO = ModelInfo("base")


class Clock:
    def __init__(self):
        self.time = 1.7e9

    def __call__(self):
        return self.time


class Server:
    """A store and an archive, as a server has them."""

    def __init__(self, folder):
        self.folder, self.clock = folder, Clock()
        self.start()
        self.session = self.store.create_session("a").session_id
        self.run = self.store.create_run(self.session, "a", 0, INFO).run_id
        self.store.close_run(self.run, "a")  # a start tells of open ones

    def start(self):
        self.checkpoints = CheckpointService(self.folder, now=self.clock)
        self.store, self.archive = self.checkpoints.store, self.checkpoints.archive

    def stop(self):
        self.checkpoints.close()

    def path(self, name="x", kind="weights", run=None):
        return CheckpointPath(run or self.run, kind, name)

    def save(self, value, name="x", *, optimizer=True, kind="weights", **options):
        state = OptimizerState(value, {"w": torch.full((3,), float(value))}, {"w": torch.zeros(3)})
        content = Content(INFO, {"w": torch.full((50,), float(value))}, state if optimizer else None)
        return self.checkpoints.save(self.path(name, kind), "a", content, **options)

    def value(self, name="x", reader="a", optimizer=True):
        content = self.checkpoints.load(self.path(name).uri, reader, optimizer=optimizer)
        (value,) = set(content.weights["w"].tolist())
        assert content.optimizer is None or content.optimizer.step == value
        return int(value)

    def versions(self):
        return sorted(p.name for p in self.archive.root.glob("*/*/*/*"))


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.stop()


def test_saved_loaded_overwritten_deleted(server):
    first = server.save(1, user_metadata={"k": "v"}, ttl_seconds=3600)
    assert server.value() == 1 and first.size_bytes > 200 and first.user_metadata == {"k": "v"}
    with pytest.raises(UserError, match="exists"):
        server.save(2)
    assert server.value() == 1 and server.versions() == [first.version]
    second = server.save(2, overwrite=True)
    assert server.value() == 2 and server.versions() == [second.version]
    assert server.store.get_checkpoint(server.path(), "a") == second
    server.checkpoints.delete(server.path(), "a")
    assert server.versions() == []
    with pytest.raises(NotFound):
        server.value()
    server.save(3)  # the name is free again
    assert server.value() == 3


def test_a_refused_save_leaves_nothing(server):
    other = server.path(run="s-other:train:0")
    content = Content(INFO, {"w": torch.zeros(3)})
    with pytest.raises(NotFound):
        server.checkpoints.save(other, "a", content)
    with pytest.raises(NotFound):
        server.checkpoints.save(server.path(), "b", content)
    for options, words in [({"ttl_seconds": 5}, "ttl_seconds=5"), ({"recipients": ("age1x",)}, "recipients")]:
        with pytest.raises(UserError, match=words):
            server.save(1, **options)
    assert server.versions() == [] and server.store.all_checkpoints() == []


def test_a_row_that_cannot_be_committed_takes_its_folder_along(server):
    """A real refusal of SQLite, after the folder was written: the database may not grow."""
    kept = server.save(1)
    with server.store._connection() as db:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages}")
    for name in ("x", "y"):
        with pytest.raises(UserError, match="disk is full"):
            server.save(2, name, overwrite=True, user_metadata={"k": "v" * 100_000})
    assert server.value() == 1 and server.versions() == [kept.version]


def test_expiry_removes_row_and_files(server):
    server.save(1, "short", ttl_seconds=3600)
    server.save(2, "long", ttl_seconds=7200)
    kept = server.save(3, "kept")
    server.clock.time += 3600
    with pytest.raises(NotFound):
        server.value("short")
    assert len(server.versions()) == 3
    assert [c.path.name for c in server.checkpoints.expire()] == ["short"]
    assert len(server.versions()) == 2 and server.value("long") == 2
    server.stop()
    server.clock.time += 3600
    server.start()  # what expires while no server runs goes at the next start
    assert server.versions() == [kept.version] and any("long" in line for line in server.checkpoints.lines)
    assert server.value("kept") == 3


def test_published_checkpoints_load_for_everyone(server):
    server.save(1)
    with pytest.raises(NotFound):
        server.value(reader="b")
    server.store.set_public(server.path(), "a", True)
    assert server.value(reader="b") == 1
    with pytest.raises(NotFound):
        server.checkpoints.delete(server.path(), "b")


def test_optimizer_state_is_there_or_it_is_said(server):
    server.save(1, optimizer=False)
    assert server.value(optimizer=False) == 1
    with pytest.raises(UserError, match="no optimizer state"):
        server.value(optimizer=True)


def test_copies_stand_alone(server):
    server.save(1, user_metadata={"k": "v"}, ttl_seconds=3600)
    server.store.set_public(server.path(), "a", True)
    session = server.store.create_session("b").session_id
    run = server.store.create_run(session, "b", 0, INFO).run_id
    target = server.path("mine", run=run)
    with pytest.raises(NotFound):
        server.checkpoints.copy(server.path(), "b", server.path("mine"))  # not b's run
    copy = server.checkpoints.copy(server.path(), "b", target)
    assert (copy.owner, copy.public, copy.expires_at, copy.user_metadata) == ("b", False, None, {"k": "v"})
    server.checkpoints.delete(server.path(), "a")
    content = server.checkpoints.load(target.uri, "b", optimizer=True)
    assert set(content.weights["w"].tolist()) == {1.0} and content.optimizer.step == 1
    broken = server.archive.folder(target, copy.version) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-4] + b"oops")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        server.checkpoints.copy(target, "b", server.path("again", run=run))
    assert server.store.list_checkpoints("b").total == 1


@pytest.mark.parametrize("damage", ["folder", "file", "cut"])
def test_a_row_without_its_files_is_marked_and_told(server, damage):
    kept, broken = server.save(1, "kept"), server.save(2)
    folder = server.archive.folder(server.path(), broken.version)
    hidden = server.folder / "hidden"
    shutil.copytree(folder, hidden)
    if damage == "folder":
        shutil.rmtree(folder)
    elif damage == "file":
        (folder / "optimizer.safetensors").unlink()
    else:
        (folder / "model.safetensors").write_bytes(b"short")
    server.stop()
    server.start()
    (line,) = server.checkpoints.lines
    assert server.path().uri in line and "marked as missing" in line
    with pytest.raises(UserError, match="lost or damaged"):
        server.value()
    assert server.value("kept") == 1 and server.versions().count(kept.version) == 1
    assert [c.path.name for c in server.store.list_checkpoints("a").items] == ["kept"]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(hidden, folder)  # somebody had a copy
    server.stop()
    server.start()
    assert server.checkpoints.lines == [] and server.value() == 2


def test_a_new_store_does_not_sweep_an_old_archive_away(server):
    server.save(1)
    server.stop()
    for file in server.folder.glob(f"{DATABASE}*"):
        file.rename(server.folder / f"moved-{file.name}")
    with pytest.raises(UserError, match="belong to another store"):
        server.start()
    for file in server.folder.glob(f"{DATABASE}*"):
        file.unlink()
    for file in server.folder.glob("moved-*"):
        file.rename(server.folder / file.name.removeprefix("moved-"))
    server.start()
    assert server.value() == 1


def test_a_second_server_is_refused(server):
    with pytest.raises(UserError, match="another server uses it"):
        CheckpointService(server.folder)


def test_two_threads_at_one_name(server):
    server.save(0)
    errors, refused = [], []

    def overwrite(first):
        try:
            for value in range(first, 20, 2):
                server.save(value, overwrite=True)
        except Exception as error:
            errors.append(error)

    def grab():
        try:
            server.save(99, "new")
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=overwrite, args=(i,)) for i in range(2)]
    threads += [threading.Thread(target=grab) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(refused) == 2  # of three saves under a new name one wins
    assert server.value() in (18, 19)
    row = server.store.get_checkpoint(server.path(), "a")
    assert row.version in server.versions() and len(server.versions()) == 2
    server.stop()
    server.start()
    assert server.checkpoints.lines == []


def test_a_save_is_synced_before_it_returns(server, monkeypatch):
    """What the order is about: the folder's files and names first, then the row, with synchronous = FULL."""
    seen = []
    from skyrl import files
    from skyrl.service.storage import archive

    for module, name in [(files, "sync_tree"), (files, "sync_folder"), (archive, "sync_folder")]:
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda f, p=plain, n=name: (seen.append(f"{n} {f.name}"), p(f)))
    add = Store.add_checkpoint

    def watched(self, *args, **options):
        out = add(self, *args, **options)
        with self._connection() as db:
            seen.append(("committed", db.execute("PRAGMA synchronous").fetchone()[0]))
        return out

    monkeypatch.setattr(Store, "add_checkpoint", watched)
    server.save(1)
    commit = seen.index(("committed", 2))
    before = [entry for entry in seen[:commit] if entry != f"sync_folder {seen[0].split()[1]}"]
    assert before == [seen[0], "sync_folder x", "sync_folder weights", f"sync_folder {server.run}",
                      "sync_folder checkpoints"]  # fmt: skip
    assert seen[0].startswith("sync_tree .") and seen[commit + 1 :] == []
    with closing(sqlite3.connect(server.folder / DATABASE)) as db:
        assert db.execute("SELECT count(*) FROM checkpoints").fetchone() == (1,)
