"""Steps that fail, and sessions that end: what becomes of gradients, samples and models."""

from __future__ import annotations

import time
from typing import Any

import httpx
import numpy as np
import pytest
from inprocess import ADAM, draw, drawn, new, open_client, prompt, results, rows, same, saved, train
from tinker import AdamParams, Datum, ModelInput, RequestFailedError, ServiceClient

from skyrl.model import Model
from skyrl.sampler.sampler import Sampler
from skyrl.service import commands
from skyrl.service.sampling import FEW

PROMPT = prompt(5, 6, 7, 8)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with open_client(tmp_path_factory.mktemp("service")) as opened:
        yield opened


def refused(future: Any, match: str) -> str:
    """The user error of a future."""
    with pytest.raises(RequestFailedError, match=match) as caught:
        future.result(20)
    assert caught.value.category == "user"
    return str(caught.value)


def bad(model: Any) -> Any:
    """A forward_backward that is refused."""
    return model.forward_backward(rows(2), "cross_entropy", {"beta": 1.0})


def step(model: Any, seed: int, adam: AdamParams = ADAM) -> list[Any]:
    return results([model.forward_backward(rows(seed), "cross_entropy"), model.optim_step(adam)])


def infinite(sign: float) -> Any:
    """Rows that pass every check and give a loss that is not finite: exp(1000 - ...)."""
    ones = np.full(4, sign, np.float32)
    inputs = {"target_tokens": [5, 6, 7, 8], "logprobs": np.full(4, -1000.0, np.float32), "advantages": ones}
    return [Datum(ModelInput.from_ints([4, 5, 6, 7]), inputs)]


@pytest.mark.parametrize("kind", ["refused", "not finite"])
def test_a_failure_that_was_fetched_does_not_end_the_next_step(client, kind):
    one, control = new(client, 11), new(client, 11)
    for seed in (1, 2):
        if kind == "refused":
            refused(bad(one), "does not apply")
        else:
            refused(one.forward_backward(infinite(1.0), "importance_sampling"), "the loss of datum 0 is not finite")
        assert same(step(one, seed), step(control, seed))
    assert same(saved(client, one), saved(client, control))


def test_what_was_pending_goes_with_a_failure_which_says_so(client):
    one, control = new(client, 12), new(client, 12)
    one.forward_backward(rows(1), "cross_entropy").result()
    refused(bad(one), "does not apply .*; the gradient of the forward_backward requests before it is dropped as well")
    assert same(step(one, 2), step(control, 2))
    refused(bad(one), "does not apply to cross_entropy; allowed: none for self")  # nothing was pending
    refused(bad(one), "does not apply")
    assert same(step(one, 3), step(control, 3))
    assert same(saved(client, one), saved(client, control))


def test_a_step_right_after_a_failure_is_refused_and_the_next_is_not(client):
    one, control = new(client, 13), new(client, 13)
    one.forward_backward(rows(1), "cross_entropy").result()
    refused(bad(one), "does not apply")
    refused(one.optim_step(ADAM), "a forward_backward before this optim_step failed: no step was made")
    assert same(step(one, 2), step(control, 2))
    assert same(saved(client, one), saved(client, control))


def test_a_step_refused_for_its_own_numbers_leaves_the_gradient(client):
    one, control = new(client, 14), new(client, 14)
    one.forward_backward(rows(1), "cross_entropy").result()
    refused(one.optim_step(AdamParams(learning_rate=-1.0)), "learning_rate=-1; allowed")
    assert same(results([one.optim_step(ADAM)]), step(control, 1)[1:])
    assert same(saved(client, one), saved(client, control))


def test_an_update_that_is_not_finite_is_refused_and_drops_the_gradient(client):
    """eps=0 at the first step of an adapter, half of which has no gradient."""
    one, two, control = new(client, 15), new(client, 16), new(client, 15)
    before, plain = saved(client, one), step(new(client, 16), 1)
    one.forward_backward(rows(1), "cross_entropy")
    other = train(two, 1, steps=1)
    refused(one.optim_step(AdamParams(learning_rate=1e-3, eps=0.0)), "the update is not finite .*give eps above 0")
    assert same(saved(client, one), before) and same(results(other), plain)
    assert same(step(one, 2), step(control, 2))
    assert same(saved(client, one), saved(client, control))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_log_probabilities_that_are_not_finite_are_an_error_of_their_datum(client, value):
    """Also where no weight is on them, so that the loss is 0."""
    one, good = new(client, 17), new(client, 18)
    adapter = client.service.engine.models[one.model_id].strategy.module
    next(iter(adapter.parameters())).data.fill_(value)
    for name, parameter in adapter.named_parameters():
        if name.endswith(".B"):
            parameter.data.fill_(1.0)
    datum = Datum(ModelInput.from_ints([4, 5, 6]), {"target_tokens": [5, 6, 7], "weights": [0.0, 0.0, 0.0]})
    futures = [one.forward([datum], "cross_entropy"), good.forward([datum], "cross_entropy")]
    refused(futures[0], "datum 0.* is not finite")
    assert futures[1].result().metrics["loss:sum"] == 0
    refused(one.forward_backward(rows(1), "cross_entropy"), "is not finite")


# ---- sessions that end


def wait_until(true: Any, seconds: float = 10.0) -> float:
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds
        time.sleep(0.02)
    return time.monotonic() - start


def post(client: Any, path: str, **body: Any) -> httpx.Response:
    import os

    url, key = os.environ["TINKER_BASE_URL"], os.environ["TINKER_API_KEY"]
    return httpx.post(f"{url}/api/v1/{path}", json=body, headers={"X-API-Key": key})


def outcome(client: Any, answer: httpx.Response) -> dict[str, Any]:
    return post(client, "retrieve_future", request_id=answer.json()["request_id"]).json()


def open_session(client: Any) -> tuple[str, str, str]:
    """A session of its own: (itself, its model, a snapshot of that)."""
    session = post(client, "create_session", tags=[], user_metadata={}, sdk_version="0.38.0").json()["session_id"]
    made = post(client, "create_model", session_id=session, model_seq_id=0, base_model="tiny", lora_config={"rank": 4})
    model = outcome(client, made)["model_id"]
    return session, model, snapshot(client, model, 1)


def snapshot(client: Any, model: str, seq_id: int) -> str:
    saved = post(client, "save_weights_for_sampler", model_id=model, seq_id=seq_id, sampling_session_seq_id=seq_id)
    return outcome(client, saved)["sampling_session_id"]


def sample(client: Any, sampler: str, seq_id: int, tokens: int = 4000) -> httpx.Response:
    return post(
        client, "asample", sampling_session_id=sampler, seq_id=seq_id, num_samples=4,
        prompt={"chunks": [{"tokens": [5, 6], "type": "encoded_text"}]},
        sampling_params={"max_tokens": tokens, "stop": []},
    )  # fmt: skip


@pytest.mark.parametrize("how", ["finished", "unloaded", "dead"])
def test_samples_of_what_has_ended_are_withdrawn(client, how):
    """Drawn ones and waiting ones; nothing new is accepted; the neighbours' draws are what they are alone."""
    neighbour = client.create_sampling_client(base_model="tiny").result()
    alone = drawn(neighbour.sample(PROMPT, 2, draw(200)).result())
    session, model, sampler = open_session(client)
    running = [sample(client, sampler, number) for number in range(10)]
    open_sampler = client.service.engine.open_sampler("base").sampler
    wait_until(open_sampler.unfinished)
    kept = neighbour.sample(PROMPT, 2, draw(200))
    store = client.service.checkpoints.store
    if how == "finished":
        assert post(client, f"sessions/{session}/finish").status_code == 204
    elif how == "unloaded":
        post(client, "unload_model", model_id=model)
    else:
        store.live._heard[session][2] -= 3600
        store.live._heard.move_to_end(session, last=False)
        assert store.end_silent_sessions(1800) == 1
    assert drawn(kept.result(20)) == alone
    assert wait_until(lambda: not open_sampler.unfinished()) < 5
    said = "was unloaded" if how == "unloaded" else "its session has ended"
    for answer in running:
        told = outcome(client, answer)
        assert said in told["error"] and told["category"] == "user"
    new_one = outcome(client, sample(client, sampler, 99, tokens=2))
    assert ("its weights have no name, and ended with their model" if how == "unloaded" else said) in new_one["error"]
    wait_until(lambda: client.service.worker.models.find(model) is None)
    late = outcome(client, post(client, "optim_step", model_id=model, seq_id=9, adam_params={"learning_rate": 0.1}))
    assert "is closed" in late["error"] and "unloaded" in late["error"] or "its session has ended" in late["error"]
    if how != "unloaded":
        made = post(
            client, "create_model", session_id=session, model_seq_id=1, base_model="tiny", lora_config={"rank": 4}
        )
        assert made.status_code == 400 or "has ended" in outcome(client, made)["error"]
        made = post(
            client, "create_sampling_session", session_id=session, sampling_session_seq_id=77, base_model="tiny"
        )
        assert made.status_code == 400 and "has ended" in made.json()["detail"]


def test_a_model_goes_only_when_that_is_on_record(client, monkeypatch):
    from skyrl.service.storage.records import StorageError

    session, model, _ = open_session(client)
    store = client.service.checkpoints.store
    close_run = store.close_run

    def full(*args: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(store, "close_run", full)
    post(client, f"sessions/{session}/finish")
    time.sleep(1.0)
    assert client.service.worker.models.find(model) is not None
    monkeypatch.setattr(store, "close_run", close_run)
    wait_until(lambda: client.service.worker.models.find(model) is None)
    assert store.get_run(model, "local").state == "closed"


def test_requests_keep_a_session_alive_as_heartbeats_do(client):
    session, model, _ = open_session(client)
    live = client.service.checkpoints.store.live
    live._heard[session][2] -= 3600
    assert live.ended([session], 1800)
    told = outcome(client, post(client, "optim_step", model_id=model, seq_id=2, adam_params={"learning_rate": 0.1}))
    assert "metrics" in told and not live.ended([session], 1800)


def test_slices_are_short_while_several_clients_sample(client, monkeypatch):
    """A sample is told when a slice ends; beside others a short one would wait for most of a long slice."""
    sampling, slice_seconds = client.service.worker.sampling, client.service.cfg.service.slice_seconds
    seconds, one = [], client.create_sampling_client(base_model="tiny").result()
    monkeypatch.setattr(sampling, "draw", lambda length, made=sampling.draw: seconds.append(length) or made(length))
    sampling._seen.clear()
    one.sample(PROMPT, 1, draw(5)).result()
    assert set(seconds) == {slice_seconds}
    sampling._seen["another"] = time.monotonic()
    one.sample(PROMPT, 1, draw(5)).result()
    assert seconds[-1] == slice_seconds / 8


def test_a_short_sample_is_told_before_the_stretch_of_a_large_one_ends(client, monkeypatch):
    """The stretch ends when a sequence of a client with few does; those of the large client go on after it."""
    sampling = client.service.worker.sampling
    monkeypatch.setattr(sampling, "slice_seconds", lambda: 600.0)
    monkeypatch.setattr(commands, "SOON", 0)

    def slow(self: Sampler, made: Any = Sampler.step) -> Any:
        time.sleep(0.005)
        return made(self)

    monkeypatch.setattr(Sampler, "step", slow)
    large, small = (one.create_sampling_client(base_model="tiny").result() for one in (client, ServiceClient()))
    futures = [large.sample(PROMPT, 1, draw(800)) for _ in range(FEW + 1)]
    wait_until(lambda: len(sampling._active) == FEW + 1)
    assert len(drawn(small.sample(PROMPT, 1, draw(4)).result(20))[0][0]) == 4
    assert not any(future.future().done() for future in futures)
    assert [len(drawn(future.result(60))[0][0]) for future in futures] == [800] * (FEW + 1)


def test_a_sample_does_not_wait_for_all_training_that_is_there(client, monkeypatch):
    """After a command sampling has as long as that took, however much training waits."""
    worker, batches = client.service.worker, []

    def slow(batch: Any, made: Any = worker._train) -> None:
        batches.append(batch)
        made(batch)
        time.sleep(0.2)

    monkeypatch.setattr(worker, "_train", slow)
    sampler, model = client.create_sampling_client(base_model="tiny").result(), new(client, 19)
    futures = [model.forward_backward(rows(seed), "cross_entropy") for seed in range(8)]
    wait_until(lambda: batches)
    sampler.sample(PROMPT, 1, draw(20)).result()
    assert len(batches) < 8
    results(futures)


def test_a_sample_does_not_wait_for_a_large_training_request(client, monkeypatch):
    """Between two micro-batches others sample, from weights that are loaded then; no bit of the training changes."""
    one, control, other = (new(client, 21) for _ in range(3))
    step(other, 5)
    path = other.save_weights_for_sampler("beside").result().path
    large = rows(1, count=30)
    expected = results([control.forward_backward(large, "cross_entropy"), control.optim_step(ADAM)])
    count: list[int] = []

    def slow(*args: Any, made: Any = Model.run_microbatch, **more: Any) -> None:
        count.append(0)
        time.sleep(0.2)
        made(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "run_microbatch", slow)
        future = one.forward_backward(large, "cross_entropy")
        wait_until(lambda: count)
        client.create_sampling_client(path).result().sample(PROMPT, 1, draw(20)).result()
        seen = len(count)
        told = results([future, one.optim_step(ADAM)])
    assert seen < len(count)
    assert same(told, expected)
    assert same(saved(client, one), saved(client, control))


def test_a_sample_does_not_wait_for_all_questions_that_are_there(client, monkeypatch):
    """Nor for all that one client asks about its prompts, which are answered in parts once their time is known."""
    sampling, commands = client.service.worker.sampling, []

    def slow(made: Any = sampling.score) -> None:
        commands.extend([0] * bool(sampling._questions))
        made()
        if commands and commands[-1] == 0:
            commands[-1] = time.sleep(0.2)
        sampling._token_seconds = 1.0

    sampling._token_seconds = 1.0
    monkeypatch.setattr(sampling, "score", slow)
    one, other = (client.create_sampling_client(base_model="tiny").result() for _ in range(2))
    futures = [one.compute_logprobs(prompt(*range(5, 25))) for _ in range(8)]
    wait_until(lambda: commands)
    other.sample(PROMPT, 1, draw(20)).result()
    assert len(commands) < 8
    assert all(len(future.result(20)) == 20 for future in futures) and len(commands) == 8
