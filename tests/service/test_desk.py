"""Order by seq_id, one run per request, gaps, fairness, cancelling, owners."""

import threading
import time

import numpy as np
import pytest

from skyrl.service.messages import (
    CreateModel,
    OptimStep,
    RequestFailed,
    SamplingRequest,
    TooManyRequests,
    TrainRequest,
    UnloadModel,
    WireDatum,
)
from skyrl.service.scheduler import RequestDesk
from skyrl.service.validation import alike
from skyrl.types import UserError


def make_model(desk, session="s", number=0, owner="a"):
    request = CreateModel(session, number, "base", 8, None, True, True, True, "adamw", {})
    desk.submit(request, owner=owner)
    (job,) = desk.take_training(alike, 10**6)
    desk.opened(request.model_id, {"base_model": "base"})
    desk.done(job, {"model_id": request.model_id})
    return request.model_id


def train(model, seq, loss="cross_entropy", tokens=3, **config):
    datum = WireDatum(np.arange(tokens), {"target_tokens": np.arange(tokens)})
    return TrainRequest(model, seq, [datum], loss, config, False)


def sample(seq, session="s:sample:0", count=1):
    return SamplingRequest(seq, np.arange(3), sampling_session_id=session, num_samples=count, max_tokens=4)


def taken(desk):
    """seq_ids in the order in which they are taken."""
    out = []
    while jobs := desk.take_training(alike, 10**6):
        out += [(job.lane, job.request.seq_id) for job in jobs]
    return out


def test_requests_run_by_number_not_by_arrival():
    desk = RequestDesk()
    model = make_model(desk)
    for seq in (2, 3, 1, 5):
        desk.submit(train(model, seq), owner="a")
    assert [seq for _, seq in taken(desk)] == [1, 2, 3]
    desk.submit(OptimStep(model, 4), owner="a")
    assert [seq for _, seq in taken(desk)] == [4, 5]


def test_a_repeated_post_is_the_same_request():
    desk = RequestDesk()
    model = make_model(desk)
    first = desk.submit(train(model, 1), owner="a")
    assert desk.submit(train(model, 1), owner="a") == first
    (job,) = desk.take_training(alike, 10**6)
    desk.done(job, {"metrics": {}})
    assert desk.submit(train(model, 1), owner="a") == first
    assert taken(desk) == []
    draw = desk.submit(sample(0, count=3), owner="a")
    assert len(draw.sequence_ids) == 3 and desk.submit(sample(0, count=3), owner="a") == draw


def test_a_missing_number_is_given_up_after_a_while_and_then_refused():
    desk = RequestDesk(gap_seconds=0.2)
    model = make_model(desk)
    desk.submit(train(model, 2), owner="a")
    assert taken(desk) == []
    time.sleep(0.25)
    assert [seq for _, seq in taken(desk)] == [2]
    late = desk.submit(train(model, 1), owner="a")
    outcome = desk.outcome(late.request_id, owner="a")
    assert outcome.state == "failed" and "seq_id 1" in outcome.error and outcome.category == "user"


def test_equal_losses_of_several_models_join_and_others_wait():
    desk = RequestDesk()
    a, b, c = (make_model(desk, number=i) for i in range(3))
    desk.submit(train(a, 1, "ppo", clip_low_threshold=0.8), owner="a")
    desk.submit(train(b, 1, "ppo", clip_low_threshold=0.8), owner="a")
    desk.submit(train(c, 1, "ppo", clip_low_threshold=0.7), owner="a")
    desk.submit(train(a, 2, "ppo", clip_low_threshold=0.8), owner="a")
    groups = []
    while jobs := desk.take_training(alike, 10**6):
        groups.append([(job.lane, job.request.seq_id) for job in jobs])
    assert groups == [[(a, 1), (b, 1)], [(c, 1)], [(a, 2)]]


def test_a_token_budget_bounds_a_joined_call():
    desk = RequestDesk()
    models = [make_model(desk, number=i) for i in range(3)]
    for model in models:
        desk.submit(train(model, 1, tokens=40), owner="a")
    assert [len(desk.take_training(alike, 100)) for _ in range(2)] == [2, 1]


def test_models_take_turns():
    desk = RequestDesk()
    a, b = make_model(desk, number=0), make_model(desk, number=1)
    for seq in (1, 2, 3):
        desk.submit(OptimStep(a, seq), owner="a")
    desk.submit(OptimStep(b, 1), owner="a")
    assert taken(desk) == [(a, 1), (b, 1), (a, 2), (a, 3)]


def test_owners_take_turns_with_samples_and_there_is_a_limit():
    desk = RequestDesk(max_queued_samples=4)
    for seq in range(4):
        desk.submit(sample(seq, "s:sample:0"), owner="greedy")
    with pytest.raises(TooManyRequests, match="4 samples are waiting, at most 4 may"):
        desk.submit(sample(4, "s:sample:0"), owner="greedy")
    desk.submit(sample(0, "t:sample:0"), owner="modest")  # who has none waiting may have some
    with pytest.raises(TooManyRequests, match="1 samples are waiting, at most 2 may"):
        desk.submit(sample(9, "t:sample:0", count=2), owner="modest")
    assert [job.owner for job in desk.take_samples(100)] == ["greedy", "modest", "greedy", "greedy", "greedy"]


def test_nobody_sees_another_owners_things():
    desk = RequestDesk()
    model = make_model(desk, owner="a")
    mine = desk.submit(train(model, 1), owner="a")
    assert desk.outcome(mine.request_id, owner="b").state == "unknown"
    with pytest.raises(UserError, match="no such model"):
        desk.open_model(model, owner="b")
    with pytest.raises(UserError, match="no such model"):
        desk.submit(OptimStep(model, 2), owner="b")
    assert desk.open_model(model, owner="a") == {"base_model": "base"}


def test_unknown_and_closed_models_fail_through_the_future():
    desk = RequestDesk()
    desk.explain_lost(lambda model, owner: "it was lost with a restart" if model == "old:train:0" else "")
    lost = desk.submit(train("old:train:0", 5), owner="a")
    outcome = desk.outcome(lost.request_id, owner="a")
    assert (outcome.state, outcome.error, outcome.category) == ("failed", "it was lost with a restart", "server")
    never = desk.submit(train("x:train:0", 1), owner="a")
    assert desk.outcome(never.request_id, owner="a").category == "user"
    model = make_model(desk)
    held = desk.submit(train(model, 2), owner="a")
    woken = threading.Event()
    desk.when_done(held.request_id, woken.set)
    desk.submit(UnloadModel(model), owner="a")
    desk.closed(model, "closed: test")
    assert woken.is_set() and desk.outcome(held.request_id, owner="a").error == "closed: test"
    assert desk.models() == []


def test_when_done_calls_once_now_or_later():
    desk = RequestDesk()
    model = make_model(desk)
    accepted = desk.submit(train(model, 1), owner="a")
    calls = []
    desk.when_done(accepted.request_id, lambda: calls.append("later"))
    (job,) = desk.take_training(alike, 10**6)
    assert calls == []
    desk.failed(job, RequestFailed("no"))
    desk.failed(job, RequestFailed("again"))
    desk.when_done(accepted.request_id, lambda: calls.append("now"))
    assert calls == ["later", "now"]
    assert desk.outcome(accepted.request_id, owner="a").error == "no"


def test_cancelling():
    desk = RequestDesk()
    waiting = desk.submit(sample(0), owner="a")
    desk.cancel(waiting.request_id, owner="b")
    assert desk.outcome(waiting.request_id, owner="a").state == "pending"
    desk.cancel(waiting.request_id, owner="a")
    assert desk.outcome(waiting.request_id, owner="a").state == "failed"
    running = desk.submit(sample(1), owner="a")
    (job,) = desk.take_samples(10)
    desk.cancel(running.request_id, owner="a")
    assert desk.take_cancelled() == [job] and desk.take_cancelled() == []


def test_waiting_ends_with_work_and_closing_ends_everything():
    desk = RequestDesk()
    threading.Timer(0.1, lambda: desk.submit(sample(0), owner="a")).start()
    started = time.monotonic()
    desk.wait(10.0)
    assert time.monotonic() - started < 5 and desk.has_news()
    accepted = desk.submit(sample(1), owner="a")
    desk.close("the server stops")
    assert desk.outcome(accepted.request_id, owner="a").error == "the server stops"
    with pytest.raises(TooManyRequests, match="the server stops"):
        desk.submit(sample(2), owner="a")
