"""Rows of checkpoints: overwriting, expiry, publishing, lists, space."""

import pytest

from skyrl.service.storage.records import CheckpointPath, ModelInfo, NotFound
from skyrl.service.storage.store import Store
from skyrl.types import UserError

INFO = ModelInfo("base")


class Clock:
    def __init__(self):
        self.time = 1.7e9

    def __call__(self):
        return self.time


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    store = Store(tmp_path / "s.db", now=clock)
    yield store
    store.close()


@pytest.fixture
def run(store):
    return store.create_run(store.create_session("a").session_id, "a", 0, INFO).run_id


def add(store, path, version="v1", owner="a", **options):
    fields = dict(version=version, size_bytes=10, info=INFO, has_optimizer=True)
    return store.add_checkpoint(path, owner, **{**fields, **options})


def test_a_name_is_taken_until_overwriting_is_asked_for(store, run):
    path = CheckpointPath(run, "weights", "final")
    first, earlier = add(store, path, user_metadata={"k": "v"}, ttl_seconds=3600)
    store.set_public(path, "a", True)
    assert earlier is None and first.has_optimizer and not first.public
    with pytest.raises(UserError, match="exists; choose another name.*overwrite"):
        add(store, path, "v2")
    with pytest.raises(UserError, match="exists"):
        store.require_free(path, "a", overwrite=False)
    assert store.version_of(path) == "v1"
    add(store, CheckpointPath(run, "sampler_weights", "final"))  # the same name once per kind
    second, earlier = add(store, path, "v2", overwrite=True)
    assert (earlier, second.version) == ("v1", "v2")
    found = store.get_checkpoint(path, "a")
    assert found == second and (found.public, found.expires_at, found.user_metadata) == (False, None, {})
    assert store.delete_checkpoint(path, "a") == "v2" and store.version_of(path) is None
    with pytest.raises(NotFound):
        store.delete_checkpoint(path, "a")


def test_expired_is_gone_at_once_and_its_name_is_free(store, run, clock):
    path = CheckpointPath(run, "weights", "x")
    saved, _ = add(store, path, ttl_seconds=3600)
    assert (saved.expires_at - saved.created_at).total_seconds() == 3600
    add(store, CheckpointPath(run, "weights", "kept"))
    store.set_public(path, "a", True)
    clock.time += 3599
    assert store.get_checkpoint(path, "a") and store.expired_checkpoints() == []
    clock.time += 1
    for reader in ("a", "b"):
        with pytest.raises(NotFound):
            store.get_checkpoint(path, reader)
    assert store.list_checkpoints("a").total == len(store.run_checkpoints(run, "a")) == 1
    assert store.get_run(run, "a").last_checkpoint.path.name == "kept"
    with pytest.raises(NotFound):
        store.set_ttl(path, "a", None)  # no way back
    (gone,) = store.expired_checkpoints()
    assert (gone.path, gone.version) == (path, "v1")
    store.forget([gone])
    assert store.expired_checkpoints() == [] and store.version_of(path) is None
    add(store, path, ttl_seconds=3600)
    clock.time += 3600
    assert add(store, path, "v2")[1] == "v1"  # not yet forgotten, and in nobody's way


def test_ttl_can_be_changed_within_its_limits(store, run, clock):
    path = CheckpointPath(run, "weights", "x")
    add(store, path)
    store.set_ttl(path, "a", 7200)
    assert store.get_checkpoint(path, "a").expires_at.timestamp() == clock.time + 7200
    store.set_ttl(path, "a", None)
    clock.time += 1e9
    assert store.get_checkpoint(path, "a").expires_at is None
    store.set_ttl(path, "a", 10 * 365 * 86400)
    for seconds in (0, -1, 3599, 315_576_001, 10**30):
        with pytest.raises(UserError, match="ttl_seconds"):
            store.set_ttl(path, "a", seconds)
        with pytest.raises(UserError, match="ttl_seconds"):
            add(store, CheckpointPath(run, "weights", "y"), ttl_seconds=seconds)
    assert store.version_of(CheckpointPath(run, "weights", "y")) is None


def test_publishing_twice_is_no_error(store, run):
    path = CheckpointPath(run, "weights", "x")
    add(store, path)
    for public in (True, True, False, False, True):
        store.set_public(path, "a", public)
        assert store.get_checkpoint(path, "a").to_json()["public"] is public
    with pytest.raises(NotFound):
        store.set_public(CheckpointPath(run, "weights", "y"), "a", True)


def test_lists_are_newest_first_in_pages(store, run, clock):
    for number in range(7):
        clock.time += number // 2  # some at the same time: then the later row first
        add(store, CheckpointPath(run, "weights", f"c{number}"))
    pages = [store.list_checkpoints("a", limit=3, offset=offset) for offset in (0, 3, 6, 9)]
    names = [c.path.name for page in pages for c in page.items]
    assert names == [f"c{number}" for number in range(6, -1, -1)]
    assert {page.total for page in pages} == {7}


def test_a_missing_one_is_listed_nowhere_and_can_be_deleted_or_replaced(store, run):
    path = CheckpointPath(run, "weights", "x")
    add(store, path)
    store.set_missing(path, "another version", True)
    assert not store.get_checkpoint(path, "a").missing
    store.set_missing(path, "v1", True)
    with pytest.raises(UserError, match="lost or damaged"):
        store.get_checkpoint(path, "a")
    assert store.list_checkpoints("a").total == 0 and store.get_run(run, "a").last_checkpoint is None
    assert [c.missing for c in store.all_checkpoints()] == [True]
    assert add(store, path, "v2")[1] == "v1"
    assert store.get_checkpoint(path, "a").version == "v2"


def test_space_by_project(store, run):
    other = store.create_run(store.create_session("a", project_id="p").session_id, "a", 0, INFO).run_id
    for where, name in [(run, "x"), (run, "y"), (other, "z")]:
        add(store, CheckpointPath(where, "weights", name), size_bytes=5 * 10**8)
    usage = store.usage("a")
    assert usage == [
        {"org_user_urn": "a", "checkpoint_count": 2, "size_bytes": 10**9, "size_gigabytes": 1.0},
        {"project_id": "p", "org_user_urn": "a", "checkpoint_count": 1, "size_bytes": 5 * 10**8,
         "size_gigabytes": 0.5},
    ]  # fmt: skip
    assert [item["checkpoint_count"] for item in store.usage("a", "p")] == [1]
    assert [item["checkpoint_count"] for item in store.usage("a", "default")] == [2]
    assert store.usage("b") == []
