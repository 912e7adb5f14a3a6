"""Rows and folders together: saving, deleting, expiry, start; two threads at one name."""

import shutil
import sqlite3
import threading
from contextlib import closing

import pytest
import torch

from skyrl.service.archive import Archive
from skyrl.service.archive_content import Content, OptimizerState
from skyrl.service.records import CheckpointPath, ModelInfo, NotFound
from skyrl.service.store import Store
from skyrl.service.store_sync import (
    copy_checkpoint,
    delete_checkpoint,
    expire_checkpoints,
    load_checkpoint,
    reconcile,
    save_checkpoint,
    save_files,
)
from skyrl.types import UserError

FACTS = ModelInfo("base")


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
        self.run = self.store.create_run(self.session, "a", 0, FACTS).run_id

    def start(self):
        self.store = Store(self.folder / "s.db", now=self.clock)
        self.archive = Archive(self.folder / "root")
        self.report = reconcile(self.store, self.archive)

    def stop(self):
        self.store.close()
        self.archive.close()

    def path(self, name="x", kind="weights", run=None):
        return CheckpointPath(run or self.run, kind, name)

    def save(self, value, name="x", *, optimizer=True, kind="weights", **options):
        state = OptimizerState(value, {"w": torch.full((3,), float(value))}, {"w": torch.zeros(3)})
        content = Content(FACTS, weights={"w": torch.full((50,), float(value))}, optimizer=state if optimizer else None)
        return save_checkpoint(self.store, self.archive, self.path(name, kind), "a", content, **options)

    def value(self, name="x", reader="a", **options):
        checkpoint, content = load_checkpoint(self.store, self.archive, self.path(name), reader, **options)
        (value,) = set(content.weights["w"].tolist())
        assert content.optimizer is None or content.optimizer.step == value
        return int(value)

    def versions(self):
        return sorted(p.name for p in self.archive.root.glob("*/*/.*"))


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
    assert server.value() == 1 and server.versions() == [f".v-{first.version}"]
    second = server.save(2, overwrite=True)
    assert server.value() == 2 and server.versions() == [f".v-{second.version}"]
    assert server.store.get_checkpoint(server.path(), "a") == second
    delete_checkpoint(server.store, server.archive, server.path(), "a")
    assert server.versions() == [] and not server.archive.folder(server.path()).is_symlink()
    with pytest.raises(NotFound):
        server.value()
    server.save(3)  # the name is free again
    assert server.value() == 3


def test_a_refused_save_leaves_nothing(server):
    other = server.path(run="s-other:train:0")
    content = Content(FACTS, weights={"w": torch.zeros(3)})
    with pytest.raises(NotFound):
        save_checkpoint(server.store, server.archive, other, "a", content)
    with pytest.raises(NotFound):
        save_checkpoint(server.store, server.archive, server.path(), "b", content)
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
    assert server.value() == 1 and server.versions() == [f".v-{kept.version}"]
    assert not server.archive.folder(server.path("y")).is_symlink()


def test_expiry_removes_row_and_files(server):
    server.save(1, "short", ttl_seconds=3600)
    server.save(2, "long", ttl_seconds=7200)
    kept = server.save(3, "kept")
    server.clock.time += 3600
    with pytest.raises(NotFound):
        server.value("short")
    assert len(server.versions()) == 3
    assert [c.path.name for c in expire_checkpoints(server.store, server.archive)] == ["short"]
    assert len(server.versions()) == 2 and server.value("long") == 2
    server.stop()
    server.clock.time += 3600
    server.start()  # what expires while no server runs goes at the next start
    assert server.versions() == [f".v-{kept.version}"] and any("long" in line for line in server.report.lines)
    assert server.value("kept") == 3


def test_published_checkpoints_load_for_everyone(server):
    server.save(1)
    with pytest.raises(NotFound):
        server.value(reader="b")
    server.store.set_public(server.path(), "a", True)
    assert server.value(reader="b") == 1
    with pytest.raises(NotFound):
        delete_checkpoint(server.store, server.archive, server.path(), "b")


def test_optimizer_state_is_there_or_it_is_said(server):
    server.save(1, optimizer=False)
    assert server.value(optimizer=False) == 1
    with pytest.raises(UserError, match="no optimizer state"):
        server.value(optimizer=True)


def test_copies_stand_alone(server):
    server.save(1, user_metadata={"k": "v"}, ttl_seconds=3600)
    server.store.set_public(server.path(), "a", True)
    session = server.store.create_session("b").session_id
    run = server.store.create_run(session, "b", 0, FACTS).run_id
    target = server.path("mine", run=run)
    with pytest.raises(NotFound):
        copy_checkpoint(server.store, server.archive, server.path(), "b", server.path("mine"))  # not b's run
    copy = copy_checkpoint(server.store, server.archive, server.path(), "b", target)
    assert (copy.owner, copy.public, copy.expires_at, copy.user_metadata) == ("b", False, None, {"k": "v"})
    delete_checkpoint(server.store, server.archive, server.path(), "a")
    _, content = load_checkpoint(server.store, server.archive, target, "b")
    assert set(content.weights["w"].tolist()) == {1.0} and content.optimizer.step == 1
    broken = server.archive.folder(target) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-4] + b"oops")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        copy_checkpoint(server.store, server.archive, target, "b", server.path("again", run=run))
    assert server.store.list_checkpoints("b").total == 1


def test_any_files_can_be_exported(server):
    def fill(folder):
        (folder / "config.json").write_text("{}")
        (folder / "sub").mkdir()
        (folder / "sub" / "tokenizer.json").write_text("[]")

    path = server.path("e", "external_weights")
    saved = save_files(server.store, server.archive, path, "a", FACTS, fill)
    files = server.archive.files(path, saved.version)
    assert {name: file.read_text() for name, file in files.items()} == {"config.json": "{}", "sub/tokenizer.json": "[]"}
    assert saved.size_bytes == 4
    with pytest.raises(ZeroDivisionError):
        save_files(server.store, server.archive, server.path("f"), "a", FACTS, lambda folder: 1 / 0)
    server.stop()
    server.start()
    assert server.report.lines == [] and server.archive.whole(path, saved.version) == ""


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
    (line,) = server.report.missing
    assert server.path().uri in line and "marked as missing" in line
    with pytest.raises(UserError, match="lost or damaged"):
        server.value()
    assert server.value("kept") == 1 and server.versions().count(f".v-{kept.version}") == 1
    assert [c.path.name for c in server.store.list_checkpoints("a").items] == ["kept"]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(hidden, folder)  # somebody had a copy
    server.stop()
    server.start()
    assert server.report.missing == [] and server.value() == 2


def test_a_new_store_does_not_sweep_an_old_archive_away(server):
    server.save(1)
    server.stop()
    for file in server.folder.glob("s.db*"):
        file.rename(server.folder / f"moved-{file.name}")
    with pytest.raises(UserError, match="belong to another store"):
        server.start()
    server.store.close()
    for file in server.folder.glob("s.db*"):
        file.unlink()
    for file in server.folder.glob("moved-*"):
        file.rename(server.folder / file.name.removeprefix("moved-"))
    server.start()
    assert server.value() == 1


def test_a_second_server_is_refused(server):
    second = Archive(server.folder / "root")
    with pytest.raises(UserError, match="another server uses it"):
        reconcile(server.store, second)


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
    assert server.archive.folder(server.path()).readlink().name == f".v-{row.version}"
    assert len(server.versions()) == 2
    server.stop()
    server.start()
    assert server.report.lines == []


def test_a_save_is_synced_before_it_returns(server, monkeypatch):
    """What the order is about: the folder's files and names first, then the row, with synchronous = FULL."""
    seen = []
    from skyrl.service import archive, archive_files

    for module, name in [(archive, "flush"), (archive, "flush_folder"), (archive_files, "flush_folder")]:
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
    before = [str(entry).split()[0] + " " + str(entry).split()[1][:5] for entry in seen[:commit]]
    assert before == ["flush .tmp-", "flush_folder .tmp-", "flush_folder weigh", f"flush_folder {server.run[:5]}",
                      "flush_folder root"]  # fmt: skip
    assert seen[commit + 1 :] == ["flush_folder weights"]
    with closing(sqlite3.connect(server.folder / "s.db")) as db:
        assert db.execute("SELECT count(*) FROM checkpoints").fetchone() == (1,)
