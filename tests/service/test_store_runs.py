"""Runs and recorded answers: what a restart loses, who sees what."""

import pytest

from skyrl.service.records import CheckpointPath, ModelInfo, NotFound
from skyrl.service.store import Store
from skyrl.types import LoraSpec, UserError

FACTS = ModelInfo("base", LoraSpec(4, seed=7, mlp=False))


class Clock:
    def __init__(self):
        self.time = 1.7e9

    def __call__(self):
        self.time += 1.0
        return self.time


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "s.db", now=Clock())
    yield store
    store.close()


def save(store, run, name, kind="weights", owner="a", **options):
    path = CheckpointPath(run, kind, name)
    return store.add_checkpoint(
        path, owner, version=f"v-{name}", size_bytes=10, facts=FACTS, has_optimizer=kind == "weights", **options
    )[0]


def test_a_run_knows_its_newest_checkpoints(store):
    session = store.create_session("a").session_id
    run = store.create_run(session, "a", 0, FACTS, {"renderer_name": "qwen3"})
    assert (run.run_id, run.state, run.facts) == (f"{session}:train:0", "open", FACTS)
    assert run.last_checkpoint is None and "last_checkpoint" not in run.to_json()
    with pytest.raises(UserError, match="exists"):
        store.create_run(session, "a", 0, FACTS)
    for name in ("one", "two"):
        save(store, run.run_id, name)
    sampler = save(store, run.run_id, "s", kind="sampler_weights")
    found = store.get_run(run.run_id, "a")
    assert found.last_checkpoint.path.name == "two" and found.last_sampler_checkpoint == sampler
    assert found.to_json()["user_metadata"] == {"renderer_name": "qwen3"}
    assert [c.path.name for c in store.run_checkpoints(run.run_id, "a")] == ["s", "two", "one"]
    store.delete_checkpoint(CheckpointPath(run.run_id, "weights", "two"), "a")
    assert store.get_run(run.run_id, "a").last_checkpoint.path.name == "one"


def test_last_request_moves_with_requests(store):
    session = store.create_session("a").session_id
    run = store.create_run(session, "a", 0, FACTS)
    store.touch_run(run.run_id)
    touched = store.get_run(run.run_id, "a").last_request_at
    assert run.last_request_at < touched
    store.touch_run(run.run_id)
    latest = store.get_run(run.run_id, "a").last_request_at
    assert touched < latest
    store.flush_touched()
    assert store.get_run(run.run_id, "a").last_request_at == latest == store.list_runs("a").items[0].last_request_at
    store.close_run(run.run_id, "a")
    store.close()
    again = Store(store.path)
    assert again.get_run(run.run_id, "a").state == "closed"
    assert again.get_run(run.run_id, "a").last_request_at == latest
    again.close()


def test_runs_are_listed_newest_first_in_pages(store):
    session = store.create_session("a").session_id
    other = store.create_session("a", project_id="p").session_id
    runs = [store.create_run(session, "a", i, FACTS).run_id for i in range(5)]
    runs.append(store.create_run(other, "a", 0, FACTS).run_id)
    page = store.list_runs("a", limit=4, offset=1)
    assert [r.run_id for r in page.items] == runs[::-1][1:5]
    assert page.cursor() == {"offset": 1, "limit": 4, "total_count": 6}
    assert [r.run_id for r in store.list_runs("a", project_id="p").items] == runs[-1:]
    assert store.list_runs("a", project_id="default").total == 5
    with pytest.raises(UserError, match="access_scope='all'"):
        store.list_runs("a", scope="all")


def test_another_owner_sees_what_is_published_and_nothing_else(store):
    session = store.create_session("a").session_id
    run = store.create_run(session, "a", 0, FACTS).run_id
    hidden, shown = save(store, run, "hidden"), save(store, run, "shown")
    save(store, run, "newest")
    for scope in ("owned", "accessible"):
        with pytest.raises(NotFound):
            store.get_run(run, "b", scope=scope)
        assert store.list_runs("b", scope=scope).total == 0
    for attempt in (
        lambda: store.run_checkpoints(run, "b"),
        lambda: store.close_run(run, "b"),
    ):
        with pytest.raises(NotFound):
            attempt()
    store.set_public(shown.path, "a", True)
    with pytest.raises(NotFound):
        store.get_run(run, "b")
    seen = store.get_run(run, "b", scope="accessible")
    assert seen.last_checkpoint.path.name == "shown" and seen.owner == "a"
    assert [c.path.name for c in store.run_checkpoints(run, "b")] == ["shown"]
    assert [r.run_id for r in store.list_runs("b", scope="accessible").items] == [run]
    assert store.get_checkpoint(shown.path, "b").public
    with pytest.raises(NotFound):
        store.get_checkpoint(hidden.path, "b")
    for attempt in (
        lambda: store.delete_checkpoint(shown.path, "b"),
        lambda: store.set_ttl(shown.path, "b", 3600),
        lambda: store.set_public(shown.path, "b", False),
        lambda: store.require_free(CheckpointPath(run, "weights", "mine"), "b", overwrite=True),
        lambda: save(store, run, "mine", owner="b"),
    ):
        with pytest.raises(NotFound):
            attempt()
    assert store.list_checkpoints("b").items == [] and store.list_checkpoints("a").total == 3
    store.set_public(shown.path, "a", False)
    with pytest.raises(NotFound):
        store.get_checkpoint(shown.path, "b")


def test_an_answer_is_found_by_its_owner_only(store):
    answer = {"path": "tinker://m/weights/x"}
    store.record_future("one", "a", "SaveWeights", "m", answer)
    store.record_future("one", "a", "SaveWeights", "m", {"path": "another"})  # the first answer stays
    assert store.find_future("one", "a") == answer
    assert store.find_future("one", "b") is None and store.find_future("two", "a") is None


def test_what_a_restart_loses(tmp_path):
    store = Store(tmp_path / "s.db")
    session = store.create_session("a").session_id
    runs = [store.create_run(session, "a", i, FACTS).run_id for i in range(2)]
    store.close_run(runs[1], "a")
    store.record_future("kept", "a", "CreateModel", runs[0], {})
    with store.write() as db:  # as servers before this one recorded them: without an answer, or with an error
        db.execute("INSERT INTO futures (request_id, owner, kind, state, created_at) VALUES ('x', 'a', 'k', 'done', 1)")
    store.close()
    again = Store(tmp_path / "s.db")
    assert again.recover() == [runs[0]]
    assert again.recover() == []
    assert [again.get_run(r, "a").state for r in runs] == ["lost", "closed"]
    assert again.get_run(runs[0], "a").to_json()["corrupted"] is True
    assert again.find_future("kept", "a") == {} and again.find_future("x", "a") is None
    assert again.get_session(session, "a").status == {"type": "active"}  # clients go on with their sessions
    again.close()


def test_old_answers_are_thrown_away(store):
    store.record_future("old", "a", "SaveWeights", None, {})
    store._now.time += 86000
    store.record_future("fresh", "a", "SaveWeights", None, {})
    assert store.prune_futures() == 0
    store._now.time += 500
    assert store.prune_futures() == 1
    assert store.find_future("old", "a") is None and store.find_future("fresh", "a") == {}
