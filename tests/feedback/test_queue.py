"""The queue of live feedback: who may say what, each row learned from once, and what is too old."""

import sqlite3
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from skyrl.config.schema import FeedbackConfig
from skyrl.feedback.queue import FILE, FeedbackQueue, FeedbackRefused, KeptAnswer, Verdict
from skyrl.types import UserError

LIKED = {"reward": 1.0}
OPTIONS = FeedbackConfig(enabled=True, max_versions=2, max_seconds=10_000.0)


@pytest.fixture
def queue(tmp_path):
    opened = FeedbackQueue(tmp_path / "new" / "queue", OPTIONS)
    yield opened
    opened.close()


def answer(name, owner="ann", **more):
    values = {"weights": "run", "version": 5, "stop": "stop", **more}
    ids = np.arange(3, dtype=np.int64)
    return KeptAnswer(name, values.pop("choice", 0), owner, prompt=ids, tokens=ids + 7,
                  logprobs=np.float32([-1, -2, -0.5]), **values)  # fmt: skip


def rate(queue, count, owner="ann", first=0, **more):
    queue.add([answer(f"{owner}{number}", owner, **more) for number in range(first, first + count)])
    for number in range(first, first + count):
        assert queue.give(owner, Verdict(f"{owner}{number}", 0, {"reward": 1.0 + number})) == (True, "")


def names(rows):
    return [row.episode for row in rows]


def refusal(queue, owner, said):
    with pytest.raises(FeedbackRefused) as caught:
        queue.give(owner, said)
    return caught.value.reason, caught.value.status


def test_a_row_is_what_was_drawn_joined_with_what_was_said(queue):
    queue.add([answer("a", choice=1), answer("a")])
    time.sleep(0.01)
    assert queue.give("ann", Verdict("a", 1, {"help": 1.0, "safe": 0.0}, "ok\n", "key")) == (True, "")
    (row,) = queue.take("run", 1, 1, version=5)
    assert (row.episode, row.choice, row.version, row.stop) == ("a", 1, 5, "stop")
    assert row.tokens.tolist() == [7, 8, 9] and row.prompt.tolist() == [0, 1, 2]
    assert row.logprobs.dtype == np.float32 and row.logprobs.tolist() == [-1.0, -2.0, -0.5]
    assert row.objectives == {"help": 1.0, "safe": 0.0} and 0 < row.seconds < 50


def test_replayed_forged_and_unknown_feedback_is_shut_out(queue):
    queue.add([answer("a"), answer("b"), answer("c", "bob")])
    said = Verdict("a", 0, LIKED, key="k1")
    assert queue.give("ann", said) == (True, "")
    assert queue.give("ann", said) == (False, "")  # the same post again
    assert queue.give("ann", replace(said, key="")) == (False, "")  # or from a client that gives no key
    assert refusal(queue, "ann", replace(said, objectives={"reward": -1.0})) == ("duplicate", 409)
    assert refusal(queue, "ann", replace(said, objectives={"reward": -1.0}, key="k2")) == ("duplicate", 409)
    assert refusal(queue, "ann", Verdict("b", 0, LIKED, key="k1")) == ("duplicate", 409)  # the key of another answer
    assert refusal(queue, "ann", Verdict("c", 0, LIKED)) == ("forged", 404)
    assert refusal(queue, "ann", Verdict("d", 0, LIKED)) == ("unknown", 404)
    assert refusal(queue, "ann", Verdict("a", 1, LIKED)) == ("unknown", 404)
    assert queue.give("bob", Verdict("c", 0, LIKED, key="k1")) == (True, "")  # keys are each owner's own
    assert queue.counts() == {"waiting": 2, "taken": 0, "dropped": 0}
    assert queue.counts("bob")["waiting"] == 1


def test_a_step_takes_what_was_rated_first_and_takes_it_once(queue):
    rate(queue, 5)
    assert queue.take("run", 1, 6, version=5) == []  # not enough: nothing is marked
    first, second = (queue.take("run", step, 2, version=5) for step in (1, 2))
    assert (names(first), names(second)) == (["ann0", "ann1"], ["ann2", "ann3"])
    assert queue.take("run", 3, 2, version=5) == [] and queue.counts()["waiting"] == 1


def test_a_trainer_that_went_back_takes_the_same_rows_again_and_no_others(queue, tmp_path):
    rate(queue, 4)
    taken = [names(queue.take("run", step, 2, version=5)) for step in (1, 2)]
    rate(queue, 2, first=4)
    queue.close()
    again = FeedbackQueue(tmp_path / "new" / "queue", OPTIONS)  # killed, and begun at the checkpoint of step 0
    assert [names(again.take("run", step, 2, version=0)) for step in (1, 2, 3)] == [*taken, []]
    assert names(again.take("run", 3, 2, version=6)) == ["ann4", "ann5"]
    again.close()


def test_rows_of_another_model_are_not_taken(queue):
    rate(queue, 2, weights="other")
    assert queue.take("run", 1, 1, version=5) == []
    assert names(queue.take("other", 1, 1, version=5)) == ["ann0"]


@pytest.mark.parametrize("more", [{"version": 2}, {"version": 8}, {"at": 9_000}])
def test_what_is_too_old_is_dropped_and_counted(queue, monkeypatch, more):
    now = time.time()
    queue.add([answer("old", **{key: now - value if key == "at" else value for key, value in more.items()})])
    assert queue.give("ann", Verdict("old", 0, LIKED)) == (True, "")
    rate(queue, 2)
    monkeypatch.setattr(time, "time", lambda: now + 2_000)
    assert names(queue.take("run", 1, 2, version=5)) == ["ann0", "ann1"]
    assert queue.counts() == {"waiting": 0, "taken": 2, "dropped": 1}


def test_an_answer_is_rated_within_its_time_and_forgotten_after_it(queue, monkeypatch):
    rate(queue, 1)
    queue.add([answer("a")])
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10_001)
    assert refusal(queue, "ann", Verdict("a", 0, LIKED)) == ("expired", 410)
    queue._next_tidy = 0.0
    queue.add([answer("b", at=now + 10_001)])
    assert refusal(queue, "ann", Verdict("a", 0, LIKED)) == ("unknown", 404)
    assert queue.give("ann", Verdict("ann0", 0, LIKED)) == (False, "")  # what was rated stays on record


def test_answers_that_teach_nothing_are_rated_and_never_taken(queue):
    queue.add([answer("a", problem="greedy")])
    assert queue.give("ann", Verdict("a", 0, LIKED)) == (True, "greedy")
    assert queue.take("run", 1, 1, version=5) == [] and queue.counts()["dropped"] == 1


def test_no_key_has_more_than_its_share_of_a_step(queue):
    rate(queue, 20, "spam")
    assert queue.take("run", 1, 4, version=5, shared=True) == []
    rate(queue, 2)
    assert names(queue.take("run", 1, 4, version=5, shared=True)) == ["spam0", "spam1", "ann0", "ann1"]
    assert len(queue.take("run", 2, 4, version=5)) == 4  # one key alone is nobody's rival


def test_several_writers_at_once(queue):
    queue.add([answer(str(number)) for number in range(8)])
    other = FeedbackQueue(queue.folder, OPTIONS)  # as another process has it
    told = []

    def give(number):
        told.append((queue, other)[number % 2].give("ann", Verdict(str(number // 2), 0, LIKED))[0])

    threads = [threading.Thread(target=give, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert sorted(told) == [False] * 8 + [True] * 8 and queue.counts()["waiting"] == 8


def test_a_file_that_is_not_ours_and_a_folder_that_cannot_be(tmp_path):
    other = sqlite3.connect(tmp_path / FILE)
    other.execute("CREATE TABLE x (y)")
    other.close()
    with pytest.raises(UserError, match="another program's"):
        FeedbackQueue(tmp_path, OPTIONS)
    with pytest.raises(UserError, match=r"feedback.folder=.*: .*; give a folder"):
        FeedbackQueue(tmp_path / FILE, OPTIONS)


def test_a_disk_that_refuses_is_the_servers_fault(queue):
    queue.add([answer("a")])
    queue._db.execute("PRAGMA query_only = 1")
    assert refusal(queue, "ann", Verdict("a", 0, LIKED)) == ("disk", 503)
