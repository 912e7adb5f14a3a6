"""What of a request is written to the database: the answers that outlive the process, and nothing else."""

import sqlite3
from contextlib import closing

import numpy as np
import pytest
from requests_made import create_model, load_weights, optim_step, sampling_request, save_weights

from skyrl.service.messages import (
    SampleResult,
    SamplingRequest,
    TrainRequest,
    TrainResult,
    UnloadModel,
)
from skyrl.service.scheduler import RequestScheduler
from skyrl.service.storage.database import LOST, FutureLog
from skyrl.service.storage.records import ModelInfo
from skyrl.service.storage.store import Store

MODEL = "s-1:train:0"
SNAPSHOT = save_weights("s-1:train:0", 3, "sampler_weights", sampling_session_seq_id=0)
LOAD = load_weights("tinker://x/weights/y", True, model_id="s-1:train:0", seq_id=4)
CREATE = create_model("s-1", 0, "tiny", 4)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "s.db")
    store.live.add([("s-1", "o", store.micros())])
    yield store
    store.close()


def scheduler(store):
    return RequestScheduler(futures=FutureLog(store))


def run(desk, request, result):
    """Submits a request as its only work, and answers it; its request id."""
    accepted = desk.submit(request, owner="o")
    take = desk.take_samples(100) if isinstance(request, SamplingRequest) else desk.take_training(lambda r: 0, 1 << 20)
    (job,) = take
    desk.done(job, result)
    return accepted.request_id


def test_only_lasting_effects_are_written(store):
    desk = scheduler(store)
    created = run(desk, CREATE, {"model_id": MODEL})
    with closing(sqlite3.connect(store.path)) as watcher:

        def writes():
            return watcher.execute("PRAGMA data_version").fetchone()[0]

        before = writes()
        short = [
            run(desk, sampling_request(0, np.array([1]), base_model="tiny", max_tokens=4), SampleResult([])),
            run(desk, TrainRequest(MODEL, 1, [], "cross_entropy", {}, False), TrainResult([], {})),
            run(desk, optim_step(MODEL, 2), {"metrics": {}}),
            run(desk, SNAPSHOT, {"sampling_session_id": "x"}),
            run(
                desk,
                load_weights("tinker://x/weights/y", True, model_id=MODEL, seq_id=4),
                {"path": "tinker://x/weights/y"},
            ),
        ]
        assert writes() == before
        saved = run(desk, save_weights(MODEL, 5, "weights", "one"), {"path": "tinker://one"})
        assert writes() != before
    closed = run(desk, UnloadModel(model_id=MODEL), {"type": "unload_model"})
    again = scheduler(store)  # the next process
    for request_id, answer in [(created, {"model_id": MODEL}), (saved, {"path": "tinker://one"}),
                               (closed, {"type": "unload_model"})]:  # fmt: skip
        found = again.outcome(request_id, owner="o")
        assert (found.state, found.result) == ("done", answer)
    for request_id in short:
        found = again.outcome(request_id, owner="o")
        assert (found.state, found.error, found.category) == ("failed", LOST, "server")
    assert again.outcome("never heard of", owner="o").state == "unknown"
    other = again.outcome(saved, owner="another")
    assert other.result is None and other.error == LOST


def test_a_failed_request_has_no_effect_and_no_record(store):
    desk = scheduler(store)
    request_id = desk.submit(save_weights("s-1:train:9", 1, "weights", "one"), owner="o").request_id
    assert desk.outcome(request_id, owner="o").state == "failed"
    assert scheduler(store).outcome(request_id, owner="o").error == LOST


def test_a_full_disk_does_not_end_the_service(store, caplog):
    desk = scheduler(store)
    with store._connection() as db:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages}")
    request_id = run(desk, CREATE, {"model_id": MODEL, "text": "x" * 100_000})
    assert desk.outcome(request_id, owner="o").state == "done"
    assert "not on record" in caplog.text


def test_answers_are_thrown_away_after_a_day(tmp_path):
    time = 1.7e9
    store = Store(tmp_path / "s.db", now=lambda: time)
    first = FutureLog(store)
    old, fresh = first.new_id(), first.new_id()
    first.record(old, "o", CREATE, {"n": 1})
    first.record(old, "o", CREATE, {"n": 2})  # the first answer stays
    time += 86000
    first.record(fresh, "o", CREATE, {"n": 3})
    first.tidy()
    later = FutureLog(store)
    assert [later.recall(one, "o").result for one in (old, fresh)] == [{"n": 1}, {"n": 3}]
    time += 500
    first.tidy()
    assert [later.recall(one, "o").result for one in (old, fresh)] == [None, {"n": 3}]
    assert first.recall(old, "o").state == "unknown"
    store.close()


def test_the_time_of_a_last_request_is_known_at_once_and_written_later(tmp_path):
    time = 1.7e9
    store = Store(tmp_path / "s.db", now=lambda: time)
    run = store.create_run(store.create_session("o").session_id, "o", 0, ModelInfo("tiny"))
    futures, before = FutureLog(store), store.get_run(run.run_id, "o").last_request_at
    time += 7
    futures.touch(run.run_id, run.owner)
    told = store.get_run(run.run_id, "o").last_request_at
    assert (told - before).total_seconds() == 7 and store.list_runs("o").items[0].last_request_at == told
    futures.tidy()
    assert store.get_run(run.run_id, "o").last_request_at == told
    store.close()
    again = Store(tmp_path / "s.db")
    assert again.get_run(run.run_id, "o").last_request_at == told
    again.close()
