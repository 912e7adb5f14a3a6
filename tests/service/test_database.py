"""The file below the store: opened again, shared by threads, refused when it is not ours, full."""

import sqlite3
import threading
from contextlib import closing, contextmanager

import pytest

from skyrl.service.storage.database import FutureLog
from skyrl.service.storage.records import ModelInfo
from skyrl.service.storage.store import Store
from skyrl.types import UserError


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "s.db")
    yield store
    store.close()


@contextmanager
def plain(path):
    """The file as SQLite itself sees it."""
    with closing(sqlite3.connect(path)) as db, db:
        yield db


def test_what_was_stored_is_there_when_opened_again(tmp_path):
    store = Store(tmp_path / "s.db")
    session = store.create_session("a", tags=["t"], user_metadata={"k": "v"}, sdk_version="0.38.0", display_name="x")
    run = store.create_run(session.session_id, "a", 0, ModelInfo("base"))
    store.close()
    again = Store(tmp_path / "s.db")
    assert again.store_id == store.store_id
    assert again.get_run(run.run_id, "a") == run
    found = again.get_session(session.session_id, "a")
    assert (found.tags, found.user_metadata, found.sdk_version) == (("t",), {"k": "v"}, "0.38.0")
    assert found.run_ids == (run.run_id,)
    with plain(tmp_path / "s.db") as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    again.close()
    with pytest.raises(RuntimeError, match="closed"):
        store.get_session(session.session_id, "a")


def test_two_threads_write_and_two_read(store):
    session = store.create_session("a").session_id
    run = store.create_run(session, "a", 0, ModelInfo("base")).run_id
    errors = []

    def write(kind):
        try:
            for number in range(100):
                store.create_sampler(session, "a", 2 * number + kind, "base")
                store.heartbeat(session, "a")
        except Exception as error:
            errors.append(error)

    def read():
        try:
            for _ in range(100):
                assert store.get_run(run, "a").run_id == run
                assert store.list_runs("a").total == 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(store.get_session(session, "a").sampler_ids) == 200


def test_a_transaction_that_fails_leaves_nothing(store):
    with pytest.raises(ZeroDivisionError), store.write() as db:
        db.execute("DELETE FROM facts")
        1 / 0  # noqa: B018
    with store.read() as db:
        assert db.execute("SELECT count(*) FROM facts").fetchone()[0] == 1


def test_a_file_of_the_first_version_keeps_its_answers(tmp_path):
    Store(tmp_path / "s.db").close()
    with plain(tmp_path / "s.db") as db:  # as it was then: every future, most without an answer that was kept
        db.execute("DROP TABLE answers")
        db.execute(
            "CREATE TABLE futures (request_id TEXT PRIMARY KEY, owner TEXT NOT NULL, kind TEXT NOT NULL, model_id TEXT,"
            " dedup TEXT, state TEXT NOT NULL, result TEXT, error TEXT NOT NULL DEFAULT '', category TEXT NOT NULL"
            " DEFAULT 'unknown', created_at INTEGER NOT NULL, finished_at INTEGER, UNIQUE (owner, dedup))"
        )
        for name, result in (("kept", '{"n": 1}'), ("pending", None)):
            values = (name, "a", "k", "done", result, 1)
            db.execute(
                "INSERT INTO futures (request_id, owner, kind, state, result, created_at) VALUES (?, ?, ?, ?, ?, ?)",
                values,
            )
        db.execute("PRAGMA user_version = 1")
    for _ in range(2):
        store = Store(tmp_path / "s.db")
        assert FutureLog(store).recall("kept", "a").result == {"n": 1}
        assert FutureLog(store).recall("pending", "a").state == "unknown"
        store.close()
    with plain(tmp_path / "s.db") as db:
        assert db.execute("SELECT name FROM sqlite_master WHERE name LIKE 'futures%'").fetchall() == []


def test_files_that_are_not_ours(tmp_path):
    (tmp_path / "text.db").write_text("no database, but long enough to be looked at" * 100)
    with plain(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE sessions (x)")
    Store(tmp_path / "new.db").close()
    with plain(tmp_path / "new.db") as db:
        db.execute("PRAGMA user_version = 99")
    (tmp_path / "folder.db").mkdir()
    for name, words in [("text", "not a database"), ("other", "another program"), ("new", "schema 99"),
                        ("folder", "unable to open"), ("absent/x", "unable to open")]:  # fmt: skip
        with pytest.raises(UserError, match=words) as caught:
            Store(tmp_path / f"{name}.db")
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with plain(tmp_path / "other.db") as db:
        assert [row[0] for row in db.execute("SELECT name FROM sqlite_master")] == ["sessions"]


def test_a_full_disk_is_one_line_and_changes_nothing(store):
    session = store.create_session("a").session_id
    with store.read() as db:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
    # The limit belongs to a connection; a single thread always borrows the same one.
    with store._connection() as db:
        db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(UserError, match="disk is full; free space") as caught:
        for _ in range(1000):
            store.create_session("a", user_metadata={"k": "v" * 5000})
    assert "\n" not in str(caught.value)
    store.heartbeat(session, "a")
    total = store.list_sessions("a").total
    with store._connection() as db:
        db.execute("PRAGMA max_page_count = 1000000")
    store.create_session("a")
    assert store.list_sessions("a").total == total + 1


def test_texts_and_numbers_that_cannot_be_stored(store):
    with pytest.raises(UserError, match="surrogate"):
        store.create_session("a", display_name="x\ud800")
    assert store.create_session("a", user_metadata={"\ud800": "\x00'; DROP TABLE sessions; --"}).user_metadata == {
        "\ud800": "\x00'; DROP TABLE sessions; --"
    }
    for limit, offset in [(-1, 0), (1001, 0), (1, -1), (1, 2**63)]:
        with pytest.raises(UserError, match="give 0"):
            store.list_sessions("a", limit=limit, offset=offset)
    assert store.list_sessions("a", offset=2**63 - 1).items == []
