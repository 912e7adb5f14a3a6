"""Sessions, their status and search, sampling sessions, owners."""

import re
import sqlite3
import time
from contextlib import closing

import pytest

from skyrl.envs import clock as clock_of_deadlines
from skyrl.service.storage.database import FutureLog, LiveSessions
from skyrl.service.storage.records import (
    CheckpointPath,
    ModelInfo,
    NotFound,
    SearchOwner,
    SessionQuery,
    SessionStatus,
    present,
)
from skyrl.service.storage.store import ACTIVE_SECONDS, Store
from skyrl.types import UserError


class Clock:
    """A second passes with each look, so that no two things have one time."""

    def __init__(self):
        self.time = time.time()

    def __call__(self):
        self.time += 1.0
        return self.time


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    store = Store(tmp_path / "s.db", now=clock)
    yield store
    store.close()


def found(store, asker="a", **query):
    return [s.session_id for s in store.search_sessions(asker, SessionQuery.model_construct(**query)).items]


def having(kind, reasons=None):
    return SessionStatus.model_construct(type=kind, reasons=reasons)


def test_life_of_a_session(store, clock):
    session = store.create_session(
        "a", tags=["x", "y"], user_metadata={"k": "v"}, project_id="p", display_name="My run"
    )
    assert re.fullmatch(r"s-[0-9a-f]{12}", session.session_id) and session.tags == ("x", "y")
    assert session.status == {"type": "active"}
    store.heartbeat(session.session_id, "a")
    assert store.get_session(session.session_id, "a").last_heartbeat > session.last_heartbeat
    assert session.to_json() == {
        "training_run_ids": [],
        "sampler_ids": [],
        "user_metadata": {"k": "v"},
        "display_name": "My run",
    }
    clock.time += ACTIVE_SECONDS + 10
    silent = store.get_session(session.session_id, "a")
    assert silent.status is None and "status" not in silent.summary_json()
    asked = [session.session_id]
    assert store.live.ended(asked, ACTIVE_SECONDS) == set(asked) and store.live.ended(asked) == set()
    store.finish_session(session.session_id, "a", "errored", "why")
    ended = {"type": "client_finished", "reason": {"type": "errored"}, "detail": "why"}
    store.finish_session(session.session_id, "a", "success")
    assert store.get_session(session.session_id, "a").summary_json()["status"] == ended  # the first word stays
    assert store.live.ended(asked) == store.live.ended(asked, 10**9) == set(asked)
    with pytest.raises(UserError, match="finish reason 'bored'"):
        store.finish_session(session.session_id, "a", "bored")


def test_another_owner_s_session_does_not_exist(store):
    session = store.create_session("a").session_id
    sampler = store.create_sampler(session, "a", 0, "base").sampler_id
    for attempt in (
        lambda owner: store.get_session(session, owner),
        lambda owner: store.heartbeat(session, owner),
        lambda owner: store.finish_session(session, owner, "success"),
        lambda owner: store.set_project(session, owner, "p"),
        lambda owner: store.create_sampler(session, owner, 1, "base"),
        lambda owner: store.create_run(session, owner, 0, ModelInfo("base")),
        lambda owner: store.get_sampler(sampler, owner),
        lambda owner: store.join_sampler(sampler, owner),
    ):
        with pytest.raises(NotFound, match="not found") as theirs:
            attempt("b")
        assert session in str(theirs.value)
    assert store.list_sessions("b").items == [] and found(store, "b") == []
    assert found(store, "b", session_id=session, owners=("a", "b")) == []
    after = store.get_session(session, "a")
    assert (after.status, after.project_id, after.sampler_ids, after.run_ids) == (
        {"type": "active"}, None, (sampler,), ()
    )  # fmt: skip
    store.create_run(session, "a", 0, ModelInfo("base"))  # the owner may
    store.finish_session(session, "a", "success")
    for late in (
        lambda: store.create_run(session, "a", 1, ModelInfo("base")),
        lambda: store.create_sampler(session, "a", 1, "base"),
    ):
        with pytest.raises(UserError, match="has ended"):
            late()
    with pytest.raises(NotFound, match="has ended"):
        store.heartbeat(session, "a")


def test_summary_counts_what_the_session_s_runs_saved(store):
    session = store.create_session("a").session_id
    other = store.create_session("a").session_id
    for number in range(2):
        run = store.create_run(session, "a", number, ModelInfo("base")).run_id
        for name in ("one", "two"):
            store.add_checkpoint(
                CheckpointPath(run, "weights", name), "a", version="v", size_bytes=100, info=ModelInfo("base"),
                has_optimizer=False, ttl_seconds=3600 if name == "two" else None,
            )  # fmt: skip
    summary = store.get_session(session, "a").summary_json()
    assert (summary["checkpoints_count"], summary["checkpoint_storage_bytes"]) == (4, 400)
    assert summary["project_id"] == "default" and summary["owner"] == "a"
    assert store.get_session(other, "a").checkpoints_count == 0
    store._now.time += 4000
    assert store.get_session(session, "a").checkpoints_count == 2  # two have expired
    assert [s.checkpoints_count for s in store.search_sessions("a", SessionQuery()).items] == [0, 2]


def test_search_by_name_project_and_metadata(store):
    one = store.create_session(
        "a", display_name="Gro\u00dfe MATH run", user_metadata={"k": "v", "q'\"": "1"}
    ).session_id
    two = store.create_session("a", display_name="math eval", project_id="p", user_metadata={"k": "w"}).session_id
    three = store.create_session("a").session_id
    store.create_session("b", display_name="math of another owner", user_metadata={"k": "v"})
    assert found(store) == [three, two, one]
    assert found(store, display_name="math") == [two, one]
    assert found(store, display_name="RUN math") == [one]
    assert found(store, display_name="grosse") == [one]
    assert found(store, display_name="100%") == found(store, display_name="_") == found(store, display_name=" ") == []
    assert found(store, display_name="eval", session_id=three) == [three, two]
    assert found(store, session_id=one) == [one] and found(store, session_id="s-0") == []
    assert found(store, user_metadata={"k": "v"}) == [one]
    assert found(store, user_metadata={"k": "v", "q'\"": "1"}) == [one]
    assert found(store, user_metadata={"k": "v", "x": "1"}) == []
    assert found(store, project_ids=("p",)) == [two]
    assert found(store, project_ids=("p", "default")) == [three, two, one]
    assert found(store, project_ids=()) == []
    assert [len(found(store, owner=SearchOwner(type="user", owner_urns=[who]))) for who in "ab"] == [3, 0]
    store.set_project(three, "a", "p")
    assert found(store, project_ids=("p",)) == [three, two]


def test_search_by_status(store, clock):
    silent = store.create_session("a").session_id
    clock.time += ACTIVE_SECONDS + 10
    good, bad, active = (store.create_session("a").session_id for _ in range(3))
    store.finish_session(good, "a", "success")
    store.finish_session(bad, "a", "errored")
    assert found(store, statuses=(having("active"),)) == [active]
    assert found(store, statuses=(having("failed"), having("active"))) == [active]
    assert found(store, statuses=(having("client_finished"),)) == [bad, good]
    assert found(store, statuses=(having("client_finished", ("errored", "interrupted")),)) == [bad]
    assert found(store, statuses=(having("cancelled"),)) == []
    assert silent in found(store)
    for wrong in [{"type": "odd"}, {"type": "active", "reasons": ["success"]},
                  {"type": "client_finished", "reasons": ["bored"]}]:  # fmt: skip
        with pytest.raises(UserError, match="sessions/search: statuses"):
            SessionQuery.parse({"statuses": [wrong]})


def test_search_pages_lose_and_repeat_nothing(store, monkeypatch):
    monkeypatch.setattr(store, "_now", lambda: 1.7e9)  # all at one time: the id decides
    every = sorted((store.create_session("a").session_id for _ in range(7)), reverse=True)
    seen, cursor = [], {}
    for size in (3, 3, 1):
        page = store.search_sessions("a", SessionQuery.parse({"limit": 3, **cursor}))
        assert len(page.items) == size
        seen += [s.session_id for s in page.items]
        cursor = present(cursor=page.next_cursor)
    assert seen == every and page.next_cursor is None
    assert store.list_sessions("a", limit=2, offset=1).items == every[1:3]
    assert store.list_sessions("a", limit=2, offset=1).cursor()["total_count"] == 7
    for limit in (0, 201):
        with pytest.raises(UserError, match="limit"):
            SessionQuery.parse({"limit": limit})


def test_samplers(store):
    session = store.create_session("a").session_id
    path = f"tinker://{session}:train:0/sampler_weights/x"
    base = store.create_sampler(session, "a", 0, "base")
    named = store.create_sampler(session, "a", 2, "base", model_path=path, version="v1")
    gone = store.create_sampler(session, "a", 3, "base", ephemeral_run=f"{session}:train:0")
    assert base.sampler_id == f"{session}:sample:0"
    assert base.to_json() == {"sampler_id": base.sampler_id, "base_model": "base"}
    assert named.to_json() == {"sampler_id": named.sampler_id, "base_model": "base", "model_path": path}
    with pytest.raises(UserError, match="exists"):
        store.create_sampler(session, "a", 0, "base")
    assert [store.join_sampler(base.sampler_id, "a") for _ in range(3)] == [1, 2, 3]
    store.recover()
    after = [store.get_sampler(s.sampler_id, "a") for s in (base, named, gone)]
    assert after == [base, named, gone] and after[1].version == "v1"
    assert store.get_session(session, "a").sampler_ids == tuple(s.sampler_id for s in (base, named, gone))


def test_a_search_for_any_number_of_things_is_one_statement(store):
    """SQLite takes 32,766 values, expressions 1,000 deep and compounds of 500 parts. What has a small bound is a
    condition each, for most rows fail the first; of the rest a search has lists of its own."""
    name, many = " ".join(f"w{n}" for n in range(32)), {f"k{n}": "v" for n in range(64)}
    wanted = store.create_session("a", display_name=name, user_metadata=many, project_id="p7").session_id
    store.create_session("a", display_name="w1", user_metadata={"k1": "v"})
    assert found(store, display_name=name) == found(store, user_metadata=many) == [wanted]
    assert found(store, display_name=name + " w2000") == found(store, user_metadata=many | {"k1": "w"}) == []
    assert found(store, project_ids=tuple(f"p{n}" for n in range(100_000))) == [wanted]
    statuses = tuple(having("client_finished", ("errored",) * 50) for _ in range(2000))
    assert found(store, statuses=(*statuses, having("active")), project_ids=("p7",)) == [wanted]
    assert found(store, statuses=statuses) == found(store, statuses=()) == []
    assert found(store, user_metadata={"k1\x00\"']": "x"}) == found(store, user_metadata={"": "v"}) == []


def test_a_heartbeat_is_in_memory_first(store, clock):
    """Nothing is written, and a server that starts again forgives the time in which it could not hear."""
    session = store.create_session("a").session_id
    with closing(sqlite3.connect(store.path)) as watcher:
        before = watcher.execute("PRAGMA data_version").fetchone()
        for _ in range(3):
            store.heartbeat(session, "a")
        futures = FutureLog(store)
        assert futures.touch(f"{session}:sample:1", "a") and not futures.touch(f"{session}:sample:1", "b")
        assert not futures.touch("s-none:train:0", "a")
        assert watcher.execute("PRAGMA data_version").fetchone() == before
    assert found(store, statuses=(having("active"),)) == [session]
    clock.time += 10_000
    assert found(store, statuses=(having("active"),)) == []
    again = Store(store.path, now=clock)
    assert again.get_session(session, "a").status is None
    assert again.live.ended([session], 600) == set() and again.end_silent_sessions(600) == 0
    again.heartbeat(session, "a")
    assert again.get_session(session, "a").status == {"type": "active"}
    again.close()


def test_a_silent_session_is_ended_on_record(store, clock):
    silent, loud, told = (store.create_session("a").session_id for _ in range(3))
    store.finish_session(told, "a", "success")
    clock.time += 700
    store.heartbeat(loud, "a")
    assert store.live.silent(600, 9) == [silent] and store.end_silent_sessions(600) == 1
    assert store.live.ended([silent, loud, told]) == {silent, told}
    status = store.get_session(silent, "a").summary_json()["status"]
    assert status == {"type": "cancelled", "detail": "its client was silent for 600 s"}
    assert found(store, statuses=(having("cancelled"),)) == [silent]
    assert store.get_session(told, "a").status["type"] == "client_finished"
    with pytest.raises(NotFound, match="silent for 600 s"):
        store.heartbeat(silent, "a")
    assert store.end_silent_sessions(600) == 0


def test_a_clock_that_is_set_forward_and_a_stopped_process_end_nobody(monkeypatch):
    wall, running = [1e9], [50.0]
    monkeypatch.setattr(time, "time", lambda: wall[0])
    monkeypatch.setattr(clock_of_deadlines, "now", lambda: running[0])  # in which pauses of the process are none
    live = LiveSessions(time.time)
    live.add([("s-1", "a", 10**15)])
    wall[0] += 1e6
    running[0] += 20
    assert live.silent(100, 9) == [] and live.ended(["s-1", "s-2"], 100) == {"s-2"}
    running[0] += 100
    assert live.silent(100, 9) == ["s-1"]
