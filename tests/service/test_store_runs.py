"""Runs: what a restart loses, who sees what."""

import pytest

from skyrl.service.storage.records import CheckpointPath, ModelInfo, NotFound
from skyrl.service.storage.store import Store
from skyrl.types import LoraSpec, UserError

INFO = ModelInfo("base", LoraSpec(4, seed=7, mlp=False))


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
        path, owner, version=f"v-{name}", size_bytes=10, info=INFO, has_optimizer=kind == "weights", **options
    )[0]


def test_a_run_knows_its_newest_checkpoints(store):
    session = store.create_session("a").session_id
    run = store.create_run(session, "a", 0, INFO, {"renderer_name": "qwen3"})
    assert (run.run_id, run.state, run.info) == (f"{session}:train:0", "open", INFO)
    assert run.last_checkpoint is None and "last_checkpoint" not in run.to_json()
    with pytest.raises(UserError, match="exists"):
        store.create_run(session, "a", 0, INFO)
    for name in ("one", "two"):
        save(store, run.run_id, name)
    sampler = save(store, run.run_id, "s", kind="sampler_weights")
    found = store.get_run(run.run_id, "a")
    assert found.last_checkpoint.path.name == "two" and found.last_sampler_checkpoint == sampler
    assert found.to_json()["user_metadata"] == {"renderer_name": "qwen3"}
    assert [c.path.name for c in store.run_checkpoints(run.run_id, "a")] == ["s", "two", "one"]
    store.delete_checkpoint(CheckpointPath(run.run_id, "weights", "two"), "a")
    assert store.get_run(run.run_id, "a").last_checkpoint.path.name == "one"


def test_runs_are_listed_newest_first_in_pages(store):
    session = store.create_session("a").session_id
    other = store.create_session("a", project_id="p").session_id
    runs = [store.create_run(session, "a", i, INFO).run_id for i in range(5)]
    runs.append(store.create_run(other, "a", 0, INFO).run_id)
    page = store.list_runs("a", limit=4, offset=1)
    assert [r.run_id for r in page.items] == runs[::-1][1:5]
    assert page.cursor() == {"offset": 1, "limit": 4, "total_count": 6}
    assert [r.run_id for r in store.list_runs("a", project_id="p").items] == runs[-1:]
    assert store.list_runs("a", project_id="default").total == 5
    with pytest.raises(UserError, match="access_scope='all'"):
        store.list_runs("a", scope="all")


def test_another_owner_sees_what_is_published_and_nothing_else(store):
    session = store.create_session("a").session_id
    run = store.create_run(session, "a", 0, INFO).run_id
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


def test_what_a_restart_loses(tmp_path):
    store = Store(tmp_path / "s.db")
    session = store.create_session("a").session_id
    runs = [store.create_run(session, "a", i, INFO).run_id for i in range(2)]
    store.close_run(runs[1], "a")
    store.close()
    again = Store(tmp_path / "s.db")
    assert again.recover() == 1
    assert again.recover() == 0
    assert [again.get_run(r, "a").state for r in runs] == ["lost", "closed"]
    assert again.get_run(runs[0], "a").to_json()["corrupted"] is True
    assert again.get_session(session, "a").status == {"type": "active"}  # clients go on with their sessions
    again.close()
