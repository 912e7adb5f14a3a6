"""What one client sends must not end the server, change another's numbers, or take memory without bound: the desk's and
the sampler's bounds, and commands that ranks refuse."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from inprocess import ADAM, draw, drawn, logprobs_of, on_ranks, open_client, prompt, refused_beside, rows, same
from requests_made import create_model, optim_step, sampling_request
from tinker import AdamParams, Datum, ModelInput, RequestFailedError, ServiceClient

from skyrl.config.schema import ServiceConfig
from skyrl.engine import ModelSpec
from skyrl.service import scheduler as schedulers
from skyrl.service.commands import BASE, Leader
from skyrl.service.messages import (
    RequestFailed,
    SampledSequence,
    SampleResult,
    SamplingRequest,
    ServerInfo,
    TooManyRequests,
    TrainRequest,
    WireDatum,
)
from skyrl.service.sampling import round_robin
from skyrl.service.scheduler import RequestScheduler
from skyrl.service.storage.records import ModelInfo
from skyrl.service.validation import (
    ANSWER_BYTES,
    WIDE_TARGETS,
    answer_bytes,
    check_sample,
    check_width,
    sampling_params,
)
from skyrl.types import LoraSpec, RunError, UserError
from skyrl.web.tensors import Tensor

FACTS = ServerInfo({}, "tiny", "", False, "", 4096, 100, (2,), adaptable=True)
TOKENS = np.array([5, 6, 7])


def query(**more: Any) -> SamplingRequest:
    return sampling_request(**{"seq_id": 0, "prompt": TOKENS, "base_model": "tiny", "max_tokens": 4, **more})


# ---- bounds of one request


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-20, 9e-7])
def test_a_temperature_that_logits_do_not_survive_is_refused(temperature):
    with pytest.raises(RequestFailed, match="allowed: 0 .* or 1e-06 to 100"):
        sampling_params(query(temperature=temperature), FACTS, "x")
    assert sampling_params(query(temperature=1e-6), FACTS, "x")[0].temperature == 1e-6


def test_answers_that_would_not_fit_are_refused():
    limits = ServiceConfig(max_tokens_per_request=1 << 22, max_queued_samples=16384)
    check_sample(query(num_samples=1000), 1000, limits)
    for more in (
        {"topk_prompt_logprobs": 1024, "prompt": np.zeros(40000, np.int64)},
        {"topk_sample_logprobs": 1024, "num_samples": 16},
        {"prompt_alt_tokens_k": 1024, "prompt": np.zeros(30000, np.int64)},
        {"target_tokens": Tensor(np.zeros((2, 12_000_000), np.int8))},
    ):
        asked = query(**more)
        assert answer_bytes(asked, 4096) > ANSWER_BYTES
        with pytest.raises(RequestFailed, match="the answer could take .* MiB, at most 256 may be"):
            check_sample(asked, 4096, limits)
    with pytest.raises(RequestFailed, match="num_samples=16385; at most 16384"):
        check_sample(query(num_samples=16385), 1, limits)


def test_stop_strings_are_bounded_together():
    with pytest.raises(RequestFailed, match="stop: 40960 characters in all; at most 4096"):
        sampling_params(query(stop=("a" * 4096,) * 10), FACTS, "x")


def test_a_row_with_very_many_targets_is_refused():
    """A micro-batch is as wide as its widest row: one narrow row with 10^6 targets would make all of it so."""

    def request(length: int, width: int) -> TrainRequest:
        wide = WireDatum(np.zeros(length, np.int64), {"target_tokens": np.zeros((length, width), np.int64)})
        return TrainRequest("m", 1, [wide], "cross_entropy", {}, False)

    check_width(request(4, WIDE_TARGETS // 8192), max_tokens_per_microbatch=8192)
    with pytest.raises(RequestFailed, match="datum 0: target_tokens has 1000000 columns; at most 1024 fit"):
        check_width(request(1, 1_000_000), max_tokens_per_microbatch=8192)
    with pytest.raises(RequestFailed, match="at most 838 fit"):
        check_width(request(10_000, 900), max_tokens_per_microbatch=128)


def test_turns():
    assert round_robin([("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)]) == [1, 4, 5, 2, 6, 3]


# ---- the desk: memory for what waits and for results


def make_model(desk: RequestScheduler, owner: str, number: int = 0) -> str:
    request = create_model(f"s-{owner}", number, "tiny", 4)
    desk.submit(request, owner=owner)
    for pending in desk.take_training(lambda r: r.loss_fn, 1 << 20):
        desk.done(pending, {"model_id": request.model_id})
        desk.opened(request.model_id, ModelInfo("tiny"))
    return request.model_id


def big(model: str, seq: int, size: int = 1 << 17) -> TrainRequest:
    return TrainRequest(model, seq, [WireDatum(np.zeros(size, np.int64), {})], "cross_entropy", {}, False)


def test_requests_that_wait_have_a_budget_which_owners_share(monkeypatch):
    monkeypatch.setattr(schedulers, "WAITING_BYTES", 4 << 20)
    desk = RequestScheduler()
    greedy, modest = make_model(desk, "greedy"), make_model(desk, "modest")
    with pytest.raises(TooManyRequests, match="MiB of requests are waiting, at most 4 may"):
        for seq in range(2, 10):
            desk.submit(big(greedy, seq), owner="greedy")
    desk.submit(big(greedy, 1), owner="greedy")  # all wait for this one
    desk.submit(big(modest, 1), owner="modest")
    for _ in range(10):
        for pending in desk.take_training(lambda r: r.loss_fn, 1 << 30):
            desk.failed(pending, RequestFailed("no"))
            assert pending.request is None  # what it brought is not kept
    assert not any(usage.request_bytes for usage in desk._clients.values())
    desk.submit(big(greedy, 9), owner="greedy")


def test_a_model_has_so_many_requests_waiting(monkeypatch):
    monkeypatch.setattr(schedulers, "WAITING_REQUESTS", 5)
    desk = RequestScheduler()
    model = make_model(desk, "a")
    for seq in range(2, 7):
        desk.submit(optim_step(model, seq), owner="a")
    with pytest.raises(TooManyRequests, match="5 requests of this model are waiting"):
        desk.submit(optim_step(model, 7), owner="a")
    desk.submit(optim_step(model, 1), owner="a")


def answer(size: int) -> SampleResult:
    return SampleResult([SampledSequence(np.zeros(size, np.int64), np.zeros(size, np.float32), "length")])


def test_results_that_nobody_fetches_are_thrown_away_from_who_has_most(monkeypatch):
    monkeypatch.setattr(schedulers, "RESULT_BYTES", 10 << 20)
    desk = RequestScheduler()
    wanted = desk.submit(query(), owner="modest").request_id
    (pending,) = desk.take_samples(9)
    desk.done(pending, answer(1000))
    ids = [desk.submit(query(), owner="greedy").request_id for _ in range(40)]
    for pending in desk.take_samples(99):
        desk.done(pending, answer(100_000))
    states = [desk.outcome(one, owner="greedy").state for one in ids]
    kept = states.count("done")
    assert 5 <= kept <= 8 and states == ["unknown"] * (40 - kept) + ["done"] * kept
    assert desk.outcome(wanted, owner="modest").state == "done"
    assert sum(usage.kept_bytes for usage in desk._clients.values()) <= 10 << 20 and len(desk._requests) == kept + 1


def test_a_result_is_forgotten_some_time_after_it_was_fetched(monkeypatch):
    monkeypatch.setattr(schedulers, "FETCHED_SECONDS", 0.05)
    desk = RequestScheduler()
    ids = [desk.submit(query(sampling_session_id="x", seq_id=i), owner="a").request_id for i in range(3)]
    for pending in desk.take_samples(9):
        desk.done(pending, answer(3))
    assert desk.outcome(ids[1], owner="a").state == "done"  # not the oldest
    time.sleep(0.06)
    desk.submit(query(), owner="a")
    assert [desk.outcome(one, owner="a").state for one in ids] == ["done", "unknown", "done"]
    again = desk.submit(query(sampling_session_id="x", seq_id=1), owner="a")
    assert again.request_id != ids[1]


def test_a_model_that_is_made_again_does_not_replace_the_open_one():
    desk = RequestScheduler()
    model = make_model(desk, "a")
    waiting = desk.submit(optim_step(model, 1), owner="a")
    desk._by_key.clear()  # as if the first future had been thrown away
    again = desk.submit(create_model("s-a", 0, "tiny", 4), owner="a")
    assert "exists already" in desk.outcome(again.request_id, owner="a").error
    assert [pending.request_id for pending in desk.take_training(lambda r: r.loss_fn, 9)] == [waiting.request_id]


def test_another_owner_cannot_take_a_number_first():
    desk = RequestScheduler()
    theirs = desk.submit(query(sampling_session_id="s:sample:0", seq_id=3), owner="mallory")
    mine = desk.submit(query(sampling_session_id="s:sample:0", seq_id=3), owner="alice")
    assert mine.request_id != theirs.request_id
    assert desk.outcome(theirs.request_id, owner="alice").state == "unknown"


def test_closed_models_are_forgotten_at_last(monkeypatch):
    monkeypatch.setattr(schedulers, "CLOSED_MODELS", 3)
    desk = RequestScheduler()
    names = [make_model(desk, "a", number) for number in range(6)]
    for name in names:
        desk.closed(name, "it was unloaded")
    assert not desk._queues and [bool(desk.why_gone(name)) for name in names] == [False] * 3 + [True] * 3


# ---- the whole service


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with open_client(tmp_path_factory.mktemp("service"), "service.gap_seconds=1") as opened:
        yield opened


def ruined(client: ServiceClient, rank: int = 4) -> Any:
    """A model whose log-probabilities are not finite. No update leads there any more, so its weights are set."""
    model = client.create_lora_training_client("tiny", rank=rank, seed=1).result()
    for parameter in client.service.engine.models[model.model_id].strategy.module.parameters():
        parameter.data.fill_(1e30)
    return model


def test_a_ruined_model_fails_its_own_requests_only(client):
    """Drawn and scored in the same commands as a good one."""
    good = client.create_sampling_client(base_model="tiny").result()
    asked = prompt(5, 6, 7)
    alone = drawn(good.sample(asked, 4, draw(20)).result())
    bad = ruined(client).save_weights_and_get_sampling_client().result()
    futures = []
    for _ in range(3):
        futures.append(bad.sample(asked, 2, draw(20)))
        futures.append(good.sample(asked, 4, draw(20)))
        futures.append(bad.compute_logprobs(asked))
        futures.append(good.sample(asked, 4, draw(20), True, topk_prompt_logprobs=3))
    refused_beside(futures, alone)
    sampling = client.service.worker.sampling
    assert sampling._bytes == 0 and not sampling._active and not any(sampling._load)


def test_large_requests_are_drawn_in_turn_with_small_ones(client, monkeypatch):
    """One client's thousands of samples do not stand before another's one; all come, and what was drawn is the same."""
    from skyrl.service import sampling

    monkeypatch.setattr(sampling, "RUNNING_PER_RANK", 128)
    sampler = client.create_sampling_client(base_model="tiny").result()
    alone = drawn(sampler.sample(prompt(5, 6), 1, draw(12)).result())
    many = sampler.sample(prompt(5, 6), 4000, draw(12))
    small = sampler.sample(prompt(5, 6), 1, draw(12))
    assert drawn(small.result()) == alone
    assert not many.future().done()
    found = drawn(many.result())
    assert len(found) == 4000 and found[0] == alone[0]
    ended, service = sampler.sample(prompt(5, 6), 600, draw(40)), client.service
    while not (works := list(service.worker.sampling._active)):
        time.sleep(0.001)
    service.scheduler.cancel(works[0], owner="local")
    with pytest.raises(RequestFailedError, match="cancelled"):
        ended.result()
    assert drawn(sampler.sample(prompt(5, 6), 1, draw(12)).result()) == alone
    assert service.worker.sampling._load == [0] and not service.worker.sampling._unsent


def test_more_questions_than_one_command_takes(client, monkeypatch):
    from skyrl.service import sampling

    sampler = client.create_sampling_client(base_model="tiny").result()
    prompts = [prompt(*range(4, 4 + n)) for n in range(2, 22)]
    scores: list[list[float]] = []

    def found(future: Any) -> list[Any]:
        done = future.result()
        scores.append(done.prompt_logprobs[1:])
        return [drawn(done), [len(x or ()) for x in done.topk_prompt_logprobs]]

    before = [found(sampler.sample(p, 2, draw(5), True, 4)) for p in prompts]
    monkeypatch.setattr(sampling, "SCORE_TOKENS", 30)
    monkeypatch.setattr(sampling, "FLIGHT_BYTES", 2000)
    futures = [sampler.sample(p, 2, draw(5), True, 4) for p in prompts]
    assert [found(future) for future in futures] == before
    for one, other in zip(scores[: len(prompts)], scores[len(prompts) :], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)  # their packs differ


def test_a_step_of_a_request_with_a_problem_tells_it(client):
    """What the wire found wrong is told, and not what follows from it."""
    model = client.create_lora_training_client("tiny", rank=2).result()
    service = client.service
    request = TrainRequest(model.model_id, 1, [], "", {}, False, problem="datum 3: broken")
    done = service.scheduler.submit(request, owner="local")
    while (outcome := service.scheduler.outcome(done.request_id, owner="local")).state == "pending":
        time.sleep(0.01)
    assert outcome.error == "datum 3: broken"


# ---- commands that all ranks refuse, or one


def refusals(client: ServiceClient) -> dict[str, Any]:
    """Commands that raise UserError in the engine, in the place of checks that ought to have caught them."""
    model = client.create_lora_training_client("tiny", rank=4, seed=7).result()
    model.forward_backward(rows(1), "cross_entropy").result()
    norm = model.optim_step(ADAM).result().metrics["grad_norm"]
    worker = client.service.worker
    leader: Leader = worker.leader
    told = {}

    def attempt(name: str, method: str, *args: Any) -> None:
        try:
            leader.call(method, *args)
        except (UserError, RunError) as error:
            told[name] = (type(error).__name__, str(error))

    attempt("taken", "create", model.model_id, ModelSpec(lora=LoraSpec(rank=4), base=BASE))
    attempt("weights", "load_adapter", "x", LoraSpec(rank=4), BASE, {})
    attempt("state", "load_model_state", model.model_id, {"weights": {}}, False)
    attempt("publish", "freeze_adapter", "y", "nobody")
    model.forward_backward(rows(1), "cross_entropy").result()
    told["norms"] = [norm, model.optim_step(ADAM).result().metrics["grad_norm"]]
    return told


def check_refusals(told: dict[str, Any]) -> None:
    assert told["taken"][0] == told["weights"][0] == told["state"][0] == told["publish"][0] == "UserError"
    assert "exists already" in told["taken"][1]
    first, second = told["norms"]
    assert 0 < second != first


def test_a_command_that_is_refused_is_a_refusal(client):
    check_refusals(refusals(client))


@pytest.mark.ranks
def test_a_command_that_every_rank_refuses_is_a_refusal(tmp_path):
    check_refusals(on_ranks(2, refusals, tmp_path))


def test_the_ranks_answers_must_agree(monkeypatch):
    """One refuses what the other did: of what can be taken back nothing is left, of all else the job ends."""
    from skyrl.service import commands as leaders

    class World:
        size = 2

    answers: list[Any] = [leaders.Problem("no memory"), None]
    asked = []
    one = Leader.__new__(Leader)
    one.world, one.context = World(), None

    def ask(method: str, args: Any, parts: Any) -> list[Any]:
        asked.append((method, args))
        return answers if len(asked) % 2 else [None, None]

    monkeypatch.setattr(one, "_broadcast_command", ask)
    with pytest.raises(UserError, match="no memory"):
        one.call("freeze_adapter", "name", "model")
    assert asked == [("freeze_adapter", ("name", "model")), ("undo", ("name",))]
    with pytest.raises(RunError, match="the ranks disagree about 'train'"):
        one.call("train", parts=[None, None])


def test_same_numbers_under_fire(client):
    """A client trains and samples while another sends everything that is refused, and ruins itself."""

    def work() -> list[Any]:
        model = client.create_lora_training_client("tiny", rank=4, seed=7).result()
        found: list[Any] = []
        for step in range(3):
            done = model.forward_backward(rows(step), "cross_entropy").result()
            found += [done.metrics, logprobs_of(done), model.optim_step(ADAM).result().metrics["grad_norm"]]
        sampler = model.save_weights_and_get_sampling_client().result()
        return [*found, drawn(sampler.sample(prompt(5, 6), 3, draw(10)).result())]

    quiet = work()
    base = client.create_sampling_client(base_model="tiny").result()
    other = client.create_lora_training_client("tiny", rank=2, seed=3).result()
    long = Datum(ModelInput.from_ints([5] * 4097), {"target_tokens": np.full(4097, 5)})
    attacks: list[Any] = []
    for seed in range(3):
        attacks.append(base.sample(prompt(5, 10**6), 1, draw(4)))
        attacks.append(base.sample(prompt(5), 3, draw(400, seed=seed)))
        attacks.append(base.sample(prompt(5), 20000, draw(4)))
        attacks.append(other.forward_backward([long], "cross_entropy"))
        attacks.append(other.forward_backward(rows(seed), "cross_entropy"))
        attacks.append(other.optim_step(AdamParams(learning_rate=1e6, eps=0.0)))
    assert same(work(), quiet)
    failed = 0
    for future in attacks:
        try:
            future.result()
        except RequestFailedError:
            failed += 1
    assert failed >= 9
