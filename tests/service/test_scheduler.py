"""Order by seq_id, one run per request, gaps, fairness, cancelling, owners."""

import threading
import time

import numpy as np
import pytest
from requests_made import create_model, optim_step, sampling_request

from skyrl.envs import clock
from skyrl.service import scheduler as schedulers
from skyrl.service.messages import (
    RequestFailed,
    TooManyRequests,
    TrainRequest,
    UnloadModel,
    WireDatum,
)
from skyrl.service.scheduler import RequestScheduler
from skyrl.service.storage.records import ModelInfo
from skyrl.service.validation import batch_key
from skyrl.types import UserError


def make_model(scheduler, session="s", number=0, owner="a"):
    request = create_model(session, number, "base", 8)
    scheduler.submit(request, owner=owner)
    (pending,) = scheduler.take_training(batch_key, 10**6)
    scheduler.opened(request.model_id, ModelInfo("base"))
    scheduler.done(pending, {"model_id": request.model_id})
    return request.model_id


def train(model, seq, loss="cross_entropy", tokens=3, **config):
    datum = WireDatum(np.arange(tokens), {"target_tokens": np.arange(tokens)})
    return TrainRequest(model, seq, [datum], loss, config, False)


def sample(seq, session="s:sample:0", count=1):
    return sampling_request(seq, np.arange(3), sampling_session_id=session, num_samples=count, max_tokens=4)


def taken(scheduler):
    """seq_ids in the order in which they are taken."""
    out = []
    while batch := scheduler.take_training(batch_key, 10**6):
        out += [(pending.model_id, pending.request.seq_id) for pending in batch]
    return out


def test_requests_run_by_number_not_by_arrival():
    scheduler = RequestScheduler()
    model = make_model(scheduler)
    for seq in (2, 3, 1, 5):
        scheduler.submit(train(model, seq), owner="a")
    assert scheduler.has_pending_work() and not scheduler.has_pending_work(training=False)
    assert [seq for _, seq in taken(scheduler)] == [1, 2, 3]
    scheduler.submit(optim_step(model, 4), owner="a")
    assert [seq for _, seq in taken(scheduler)] == [4, 5]


def test_a_repeated_post_is_the_same_request():
    scheduler = RequestScheduler()
    model = make_model(scheduler)
    first = scheduler.submit(train(model, 1), owner="a")
    assert scheduler.submit(train(model, 1), owner="a") == first
    (pending,) = scheduler.take_training(batch_key, 10**6)
    scheduler.done(pending, {"metrics": {}})
    assert scheduler.submit(train(model, 1), owner="a") == first
    assert taken(scheduler) == []
    draw = scheduler.submit(sample(0, count=3), owner="a")
    assert len(draw.sequence_ids) == 3 and scheduler.submit(sample(0, count=3), owner="a") == draw


def test_a_missing_number_is_given_up_after_a_while_and_then_refused():
    scheduler = RequestScheduler(gap_seconds=0.2)
    model = make_model(scheduler)
    scheduler.submit(train(model, 2), owner="a")
    assert taken(scheduler) == []
    time.sleep(0.25)
    assert [seq for _, seq in taken(scheduler)] == [2]
    late = scheduler.submit(train(model, 1), owner="a")
    outcome = scheduler.outcome(late.request_id, owner="a")
    assert outcome.state == "failed" and "seq_id 1" in outcome.error and outcome.category == "user"


def test_equal_losses_of_several_models_join_and_others_wait():
    scheduler = RequestScheduler()
    a, b, c = (make_model(scheduler, number=i) for i in range(3))
    scheduler.submit(train(a, 1, "ppo", clip_low_threshold=0.8), owner="a")
    scheduler.submit(train(b, 1, "ppo", clip_low_threshold=0.8), owner="a")
    scheduler.submit(train(c, 1, "ppo", clip_low_threshold=0.7), owner="a")
    scheduler.submit(train(a, 2, "ppo", clip_low_threshold=0.8), owner="a")
    groups = []
    while batch := scheduler.take_training(batch_key, 10**6):
        groups.append([(pending.model_id, pending.request.seq_id) for pending in batch])
    assert groups == [[(a, 1), (b, 1)], [(c, 1)], [(a, 2)]]


def test_clients_take_turns_however_many_models_they_have(monkeypatch):
    scheduler = RequestScheduler(by_session=True)
    many, one = [make_model(scheduler, "s", number) for number in range(3)], make_model(scheduler, "t")
    for model, seq in [(model, seq) for model in (*many, one) for seq in (1, 2)]:
        scheduler.submit(train(model, seq), owner="a")
    groups = []
    for _ in range(3):
        groups.append([(done.model_id, done.request.seq_id) for done in scheduler.take_training(batch_key, 10**6)])
    assert groups == [[(many[0], 1), (one, 1)], [(many[1], 1), (one, 2)], [(many[2], 1)]]
    monkeypatch.setattr(schedulers, "RECENT_SECONDS", 0.0)
    for pending in [*scheduler._requests.values()]:
        if pending.client == "t":
            scheduler.done(pending, {"metrics": {}})
    assert [done.model_id for done in scheduler.take_training(batch_key, 10**6)] == many  # alone now


def test_a_token_budget_bounds_a_joined_call():
    scheduler = RequestScheduler()
    models = [make_model(scheduler, number=i) for i in range(3)]
    for model in models:
        scheduler.submit(train(model, 1, tokens=40), owner="a")
    assert [len(scheduler.take_training(batch_key, 100)) for _ in range(2)] == [2, 1]


def test_models_take_turns():
    scheduler = RequestScheduler()
    a, b = make_model(scheduler, number=0), make_model(scheduler, number=1)
    for seq in (1, 2, 3):
        scheduler.submit(optim_step(a, seq), owner="a")
    scheduler.submit(optim_step(b, 1), owner="a")
    assert taken(scheduler) == [(a, 1), (b, 1), (a, 2), (a, 3)]


def test_owners_take_turns_with_samples_and_there_is_a_limit():
    scheduler = RequestScheduler(max_queued_samples=4)
    for seq in range(4):
        scheduler.submit(sample(seq, "s:sample:0"), owner="greedy")
    with pytest.raises(TooManyRequests, match="4 samples are waiting, at most 4 may"):
        scheduler.submit(sample(4, "s:sample:0"), owner="greedy")
    scheduler.submit(sample(0, "t:sample:0"), owner="modest")  # who has none waiting may have some
    with pytest.raises(TooManyRequests, match="1 samples are waiting, at most 2 may"):
        scheduler.submit(sample(9, "t:sample:0", count=2), owner="modest")
    assert [pending.owner for pending in scheduler.take_samples(100)] == [
        "greedy",
        "modest",
        "greedy",
        "greedy",
        "greedy",
    ]


def test_nobody_sees_another_owners_things():
    scheduler = RequestScheduler()
    model = make_model(scheduler, owner="a")
    mine = scheduler.submit(train(model, 1), owner="a")
    assert scheduler.outcome(mine.request_id, owner="b").state == "unknown"
    with pytest.raises(UserError, match="no such model"):
        scheduler.open_model(model, owner="b")
    with pytest.raises(UserError, match="no such model"):
        scheduler.submit(optim_step(model, 2), owner="b")
    assert scheduler.open_model(model, owner="a") == ModelInfo("base")


def test_unknown_and_closed_models_fail_through_the_future():
    scheduler = RequestScheduler(
        explain_lost=lambda model, owner: "it was lost with a restart" if model == "old:train:0" else ""
    )
    lost = scheduler.submit(train("old:train:0", 5), owner="a")
    outcome = scheduler.outcome(lost.request_id, owner="a")
    assert (outcome.state, outcome.error, outcome.category) == ("failed", "it was lost with a restart", "server")
    never = scheduler.submit(train("x:train:0", 1), owner="a")
    assert scheduler.outcome(never.request_id, owner="a").category == "user"
    model = make_model(scheduler)
    held = scheduler.submit(train(model, 2), owner="a")
    woken = threading.Event()
    scheduler.when_done(held.request_id, woken.set)
    scheduler.submit(UnloadModel(model_id=model), owner="a")
    scheduler.closed(model, "closed: test")
    assert woken.is_set() and scheduler.outcome(held.request_id, owner="a").error == "closed: test"
    assert scheduler.why_gone(model) == "closed: test"


def test_when_done_calls_once_now_or_later():
    scheduler = RequestScheduler()
    model = make_model(scheduler)
    accepted = scheduler.submit(train(model, 1), owner="a")
    calls = []
    scheduler.when_done(accepted.request_id, lambda: calls.append("later"))
    (pending,) = scheduler.take_training(batch_key, 10**6)
    assert calls == []
    scheduler.failed(pending, RequestFailed("no"))
    scheduler.failed(pending, RequestFailed("again"))
    scheduler.when_done(accepted.request_id, lambda: calls.append("now"))
    assert calls == ["later", "now"]
    assert scheduler.outcome(accepted.request_id, owner="a").error == "no"


def test_cancelling():
    scheduler = RequestScheduler()
    waiting = scheduler.submit(sample(0), owner="a")
    scheduler.cancel(waiting.request_id, owner="b")
    assert scheduler.outcome(waiting.request_id, owner="a").state == "pending"
    scheduler.cancel(waiting.request_id, owner="a")
    assert scheduler.outcome(waiting.request_id, owner="a").state == "failed"
    running = scheduler.submit(sample(1), owner="a")
    (pending,) = scheduler.take_samples(10)
    scheduler.cancel(running.request_id, owner="a")
    assert scheduler.take_cancelled() == [pending] and scheduler.take_cancelled() == []


def test_waiting_ends_with_work_and_closing_ends_everything():
    scheduler = RequestScheduler()
    threading.Timer(0.1, lambda: scheduler.submit(sample(0), owner="a")).start()
    started = time.monotonic()
    scheduler.wait(10.0)
    assert time.monotonic() - started < 5 and scheduler.has_pending_work()
    accepted = scheduler.submit(sample(1), owner="a")
    scheduler.close("the server stops")
    assert scheduler.outcome(accepted.request_id, owner="a").error == "the server stops"
    with pytest.raises(TooManyRequests, match="the server stops"):
        scheduler.submit(sample(2), owner="a")


def failing(scheduler, model, seq, rows=1, tokens=3):
    """A forward_backward that has failed."""
    datum = WireDatum(np.arange(tokens), {"target_tokens": np.arange(tokens)})
    accepted = scheduler.submit(TrainRequest(model, seq, [datum] * rows, "cross_entropy", {}, False), owner="a")
    (pending,) = scheduler.take_training(batch_key, 10**9)
    scheduler.failed(pending, RequestFailed("no"))
    return accepted


@pytest.mark.parametrize(
    ("fetched", "rows", "tokens", "knew"),
    [
        (True, 1, 3, True),
        (False, 1, 3, False),
        (True, 1023, 3, True),
        (True, 1024, 3, False),
        (True, 1, 400_000, False),
    ],
)
def test_whoever_fetched_a_failure_knew_of_it_unless_it_may_be_a_part_of_the_same_call(fetched, rows, tokens, knew):
    scheduler = RequestScheduler()
    model = make_model(scheduler)
    accepted = failing(scheduler, model, 1, rows, tokens)
    if fetched:
        scheduler.outcome(accepted.request_id, owner="a")
    scheduler.submit(train(model, 2), owner="a")
    (pending,) = scheduler.take_training(batch_key, 10**6)
    assert scheduler.knew_of_failure(pending) is knew


def test_what_is_known_is_the_last_failure_and_nothing_else():
    scheduler = RequestScheduler()
    model = make_model(scheduler)
    assert scheduler.outcome(failing(scheduler, model, 1).request_id, owner="a").error == "no"
    for seq in (2, 3, 4):
        scheduler.submit(train(model, seq), owner="a")
    pending = [scheduler.take_training(batch_key, 10**6)[0] for _ in range(3)]
    assert all(scheduler.knew_of_failure(one) for one in pending)
    scheduler.failed(pending[0], RequestFailed("again"))  # 3 and 4 were queued behind it
    assert not any(scheduler.knew_of_failure(one) for one in pending[1:])


def test_a_failure_is_told_a_moment_after_its_request_came():
    """So that what the program has posted behind it counts as queued, however fast its library fetches the failure."""
    scheduler = RequestScheduler(hold_seconds=0.2)
    model = make_model(scheduler)
    accepted, told = failing(scheduler, model, 1), threading.Event()
    scheduler.when_done(accepted.request_id, told.set)
    assert scheduler.outcome(accepted.request_id, owner="a").state == "pending"
    scheduler.submit(train(model, 2), owner="a")
    (pending,) = scheduler.take_training(batch_key, 10**6)
    assert not scheduler.knew_of_failure(pending) and not told.is_set()
    while not told.is_set():
        scheduler.wait(1.0)
        scheduler.take_training(batch_key, 10**6)
    assert 0.2 <= clock.now() - accepted.arrived < 2
    last = failing(scheduler, model, 3)
    scheduler.close("the server stops")
    assert scheduler.outcome(last.request_id, owner="a").error == "no"


def test_without_keys_sessions_share():
    scheduler = RequestScheduler(max_queued_samples=4, by_session=True)
    for seq in range(4):
        scheduler.submit(sample(seq, "s:sample:0"), owner="local")
    with pytest.raises(TooManyRequests, match="4 samples are waiting, at most 4 may"):
        scheduler.submit(sample(4, "s:sample:1"), owner="local")
    for name in "tu":
        scheduler.submit(sample(0, f"{name}:sample:0"), owner="local")
    assert [pending.session for pending in scheduler.take_samples(100)] == ["s", "t", "u", "s", "s", "s"]


def test_what_was_done_for_very_many_sessions_is_forgotten_with_them(monkeypatch):
    monkeypatch.setattr(schedulers, "KEEP_SECONDS", 0.0)
    scheduler = RequestScheduler(by_session=True)
    for number in range(50):
        scheduler.submit(sample(0, f"{number}:sample:0"), owner="local")
        (pending,) = scheduler.take_samples(9)
        scheduler.done(pending, {})
    assert len(scheduler._clients) == len(scheduler._requests) == 1 and scheduler._request_bytes == 0


def test_samples_that_wait_are_withdrawn_together():
    scheduler = RequestScheduler()
    kept, gone = (scheduler.submit(sample(0, f"{name}:sample:0"), owner="a") for name in "st")
    assert scheduler.sampling_sessions() == {"s", "t"}
    scheduler.withdraw(lambda one: one.session == "t", "it has ended")
    assert scheduler.outcome(gone.request_id, owner="a").error == "it has ended"
    assert scheduler.outcome(kept.request_id, owner="a").state == "pending"
    assert [one.request_id for one in scheduler.take_samples(9)] == [kept.request_id]
    assert not scheduler.has_pending_work()
