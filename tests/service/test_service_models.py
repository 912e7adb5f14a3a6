"""Models of one service: nothing of one depends on another, bit for bit; failures stay where they are."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from inprocess import (
    ADAM,
    draw,
    drawn,
    logprobs_of,
    new,
    on_ranks,
    open_client,
    prompt,
    results,
    rl_rows,
    rows,
    same,
    saved,
    together_and_alone,
    train,
)
from requests_made import optim_step
from small import supervised
from tinker import (
    AdamParams,
    Datum,
    ModelInput,
    PromptProvenanceSpan,
    RequestFailedError,
    SampledProvenanceSpan,
    ServiceClient,
)

from skyrl.envs import clock
from skyrl.service import sampling
from skyrl.service.messages import RecordedSequence, RequestFailed, TrainRequest, WireDatum
from skyrl.service.sampling import Recordings
from skyrl.service.validation import to_rows

PROMPT = prompt(5, 6, 7, 8)


def skip(model: Any, count: int) -> None:
    """The client's next request has a number so much higher."""
    model._request_id_counter += count
    model._turn_counter += count


def supervised_request(model: str, seq: int, *, seed: int, forward_only: bool) -> TrainRequest:
    """rows(seed) for cross_entropy, as they come from the wire."""
    data = [WireDatum(np.array(ids), {"target_tokens": to, "weights": w}) for ids, to, w in supervised(seed)]
    return TrainRequest(model, seq, data, "cross_entropy", {}, forward_only)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    substitutes = "service.loss_substitutes.stable_reinforce=ppo"
    with open_client(tmp_path_factory.mktemp("service"), "service.gap_seconds=1", substitutes) as opened:
        yield opened


def test_two_models_side_by_side_equal_each_alone(client):
    together, alone = together_and_alone(client)
    assert same(together, alone)
    assert not same(together[2], together[3])


@pytest.mark.ranks
def test_two_models_on_two_ranks_equal_each_alone(tmp_path):
    together, alone = on_ranks(2, together_and_alone, tmp_path, "strategy.name=fsdp")
    assert same(together, alone)


def test_a_fresh_adapter_is_the_base(client):
    """Tokens, their log-probabilities, the prompt's, and those of training."""
    base = client.create_sampling_client(base_model="tiny").result()
    for rank in (1, 4):
        model = new(client, seed=rank, rank=rank)
        fresh = model.save_weights_and_get_sampling_client().result()
        for params in (draw(20), draw(20, temperature=0.5), draw(20, temperature=0.0)):
            asked = [one.sample(PROMPT, 3, params, True, topk_prompt_logprobs=3) for one in (base, fresh)]
            ours, theirs = [future.result() for future in asked]
            assert drawn(ours) == drawn(theirs)
            assert ours.prompt_logprobs == theirs.prompt_logprobs
            assert ours.topk_prompt_logprobs == theirs.topk_prompt_logprobs
        data = rows(1)
        found = logprobs_of(model.forward(data, "cross_entropy").result())
        service = client.service  # its worker is idle now
        plain = to_rows(supervised_request("", 1, seed=1, forward_only=True), service.info, max_tokens=1 << 20)
        assert same(found, [x.astype(np.float32) for x in service.engine.score(plain, 1.0, model="base").logprobs])


def test_snapshots_never_change_and_share_a_batch(client):
    """Draws of three sets of weights at once equal each alone, before and after further steps."""
    one, two = new(client, 1), new(client, 2, rank=8)
    results(train(one, 300)), results(train(two, 400))
    samplers = [
        one.save_weights_and_get_sampling_client().result(),
        two.save_weights_and_get_sampling_client("two").result(),
    ]
    samplers.append(client.create_sampling_client(base_model="tiny").result())
    prompts = [PROMPT, prompt(9, 10), prompt(*range(4, 40))]
    alone = [[drawn(s.sample(p, 2, draw(24)).result()) for p in prompts] for s in samplers]
    assert alone[0] != alone[1] != alone[2]
    busy = train(one, 500, steps=4)
    futures = [[s.sample(p, 2, draw(24)) for p in prompts] for s in samplers]
    train(two, 600)
    assert [[drawn(future.result()) for future in some] for some in futures] == alone
    results(busy)
    later = one.save_weights_and_get_sampling_client().result()
    assert [[drawn(s.sample(p, 2, draw(24)).result()) for p in prompts] for s in samplers] == alone
    assert drawn(later.sample(PROMPT, 2, draw(24)).result()) != alone[0][0]


def test_a_snapshot_that_left_the_device_comes_back(client, monkeypatch, tmp_path):
    from skyrl.service.storage import snapshots

    model = new(client, 3)
    results(train(model, 700))
    first = model.save_weights_and_get_sampling_client().result()
    before = drawn(first.sample(PROMPT, 2, draw(24)).result())
    monkeypatch.setattr(snapshots, "RESIDENT", 1)
    monkeypatch.setattr(snapshots, "HOST_BYTES", 1)  # and on to files
    for seed in range(3):
        results(train(model, 710 + seed, steps=1))
        model.save_weights_and_get_sampling_client().result().sample(PROMPT, 1, draw(4)).result()
    engine = client.service.engine
    assert first._sampling_session_id not in engine.adapters
    assert drawn(first.sample(PROMPT, 2, draw(24)).result()) == before


def test_chunks_that_arrive_in_any_order(client):
    """optim_step takes exactly the forward_backwards with lower numbers, whatever came first."""

    def posted(order: list[int]) -> tuple[list[Any], dict[str, Any]]:
        model = new(client, 5)
        desk = client.service.scheduler
        requests: dict[int, Any] = {
            seq: supervised_request(model.model_id, seq, seed=40 + seq, forward_only=False) for seq in (1, 2, 3, 5)
        }
        requests[4] = optim_step(model.model_id, 4, learning_rate=1e-2)
        requests[6] = optim_step(model.model_id, 6, learning_rate=1e-2)
        ids = {}
        for seq in order:
            ids[seq] = desk.submit(requests[seq], owner="local").request_id
            assert desk.submit(requests[seq], owner="local").request_id == ids[seq]  # posted again: the same one
        ended = {}
        for seq, request_id in ids.items():
            event = threading.Event()
            desk.when_done(request_id, event.set)
            assert event.wait(30)
            ended[seq] = desk.outcome(request_id, owner="local")
            assert ended[seq].state == "done", ended[seq].error
        skip(model, 6)
        numbers = [ended[seq].result.metrics["loss:sum"] for seq in (1, 2, 3, 5)]
        numbers += [ended[seq].result["metrics"]["grad_norm"] for seq in (4, 6)]
        return numbers, saved(client, model)

    plain = posted([1, 2, 3, 4, 5, 6])
    assert same(posted([6, 3, 2, 5, 4, 1]), plain)
    assert same(posted([2, 3, 1, 4, 6, 5]), plain)


def test_a_number_that_never_comes_is_given_up(client):
    model = new(client)
    skip(model, 1)
    start = time.monotonic()
    assert model.forward_backward(rows(1), "cross_entropy").result(20).metrics["loss:sum"] > 0
    assert 0.9 < time.monotonic() - start < 15


def broken_rows(kind: str) -> tuple[list[Datum], str, dict[str, float]]:
    """Rows that pass every check and give a loss or gradient that is not finite."""
    logprobs = np.full(4, -1000.0, np.float32)
    ones = np.ones(4, np.float32)
    inputs = {"target_tokens": [5, 6, 7, 8], "logprobs": logprobs, "advantages": ones}
    row = Datum(ModelInput.from_ints([4, 5, 6, 7]), inputs)
    if kind == "ratio":  # exp(1000 - ...) is infinite
        return [row], "importance_sampling", {}
    if kind == "clipped":  # min(inf * -1, ...) too
        negative = {**inputs, "advantages": -ones}
        return [Datum(row.model_input, negative)], "ppo", {}
    return [], "", {}


@pytest.mark.parametrize("kind", ["content", "ratio", "clipped"])
def test_a_failed_forward_backward_refuses_its_step_and_no_other(client, kind):
    one, two, control = new(client, 11), new(client, 12), new(client, 12)
    plain = results(train(control, 800))
    before = saved(client, one)
    good = one.forward_backward(rows(1), "cross_entropy")
    if kind == "content":
        bad = one.forward_backward(rows(2), "cross_entropy", {"beta": 1.0})
    else:
        bad = one.forward_backward(*broken_rows(kind))
    other = train(two, 800)
    more = one.forward_backward(rows(3), "cross_entropy")  # belongs to the same step
    refused = one.optim_step(ADAM)
    assert good.result().metrics["loss:sum"] > 0 and more.result().metrics["loss:sum"] > 0
    with pytest.raises(RequestFailedError, match="does not apply" if kind == "content" else "not finite") as caught:
        bad.result()
    assert caught.value.category == "user"
    with pytest.raises(RequestFailedError, match="a forward_backward before this optim_step failed"):
        refused.result()
    assert same(saved(client, one), before)
    assert same(results(other), plain)
    assert same(saved(client, two), saved(client, control))
    fresh = new(client, 11)
    assert same(results(train(one, 900)), results(train(fresh, 900)))  # nothing of the failed step is left
    assert same(saved(client, one), saved(client, fresh))


def test_a_model_that_went_astray_harms_no_other(client):
    """A learning rate that blows the weights up: every answer is a number or a refusal, and the rest goes on."""
    one, two, control = new(client, 21), new(client, 22), new(client, 22)
    plain = results(train(control, 950, steps=4))
    other = train(two, 950, steps=4)
    wild, said = AdamParams(learning_rate=1e6, weight_decay=1e6), []
    for step in range(4):
        futures = [one.forward_backward(rows(step), "cross_entropy"), one.optim_step(wild)]
        for future in futures:
            try:
                numbers = list(future.result().metrics.values())
                assert np.isfinite(numbers).all()
            except RequestFailedError as error:
                said.append(str(error))
    assert any("not finite" in text for text in said), said
    assert same(results(other), plain)
    sampler = one.save_weights_and_get_sampling_client().result()
    try:
        assert np.isfinite(sampler.sample(PROMPT, 1, draw(4)).result().sequences[0].logprobs).all()
    except RequestFailedError as error:
        said.append(str(error))
    assert (
        len(drawn(client.create_sampling_client(base_model="tiny").result().sample(PROMPT, 1, draw(4)).result())[0][0])
        == 4
    )


def test_custom_losses(client):
    """The same step as cross_entropy when the loss is the same; a function that fails ends its client and no other."""
    import torch

    one, two = new(client, 31), new(client, 31)
    data = rows(5)

    def loss(given: list[Any], logprobs: list[Any]) -> Any:
        parts = [-(x * d.loss_fn_inputs["weights"].to_torch()).sum() for d, x in zip(given, logprobs, strict=True)]
        return torch.stack(parts).sum(), {"rows:sum": len(parts)}

    custom, step = one.forward_backward_custom(data, loss), one.optim_step(ADAM)
    plain = two.forward_backward(data, "cross_entropy")
    two.optim_step(ADAM).result()
    found = custom.result().metrics
    assert found["rows:sum"] == 9 and step.result().metrics["grad_norm"] > 0
    assert found["loss:sum"] == pytest.approx(plain.result().metrics["loss:sum"], rel=1e-5)
    assert same(saved(client, one), saved(client, two))

    def fails(given: list[Any], logprobs: list[Any]) -> Any:
        raise ZeroDivisionError("mine")

    custom, step = one.forward_backward_custom(data, fails), one.optim_step(ADAM)
    with pytest.raises(ZeroDivisionError, match="mine"):
        custom.result()
    with pytest.raises(RuntimeError, match="poisoned"):  # so the SDK has it
        step.result()
    assert same(results(train(new(client, 31), 50)), results(train(new(client, 31), 50)))


def test_a_call_of_many_rows_is_cut_like_the_sdk_cuts_it(client):
    one = new(client)
    row = rows(3, count=1, longest=4)[0]
    done = one.forward([row] * 1100, "cross_entropy").result()
    assert one._request_id_counter == 2 and len(done.loss_fn_outputs) == 1100
    single = one.forward([row], "cross_entropy").result().metrics["loss:sum"]
    assert done.metrics["loss:sum"] == pytest.approx(1100 * single, rel=1e-5)


def test_cancel(client):
    """Withdrawn samples fail and leave the batch; the others finish as if alone."""
    sampler = client.create_sampling_client(base_model="tiny").result()
    alone = drawn(sampler.sample(PROMPT, 2, draw(200)).result())
    long = [sampler.sample(PROMPT, 2, draw(4000, seed=i)) for i in range(4)]
    kept = sampler.sample(PROMPT, 2, draw(200))
    time.sleep(0.2)
    for future in long:
        future.future().cancel()
    for future in long:
        with pytest.raises(CancelledError):
            future.result(20)
    assert drawn(kept.result(20)) == alone
    service = client.service
    deadline = time.monotonic() + 10
    while service.engine.open_sampler("base").sampler.unfinished() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert service.engine.open_sampler("base").sampler.unfinished() == 0


def test_rl_losses_through_joined_commands(client):
    """Requests of several models with one loss run as one command; each has its own numbers."""
    models = [new(client, seed) for seed in (1, 2, 3)]
    scores = [model.forward(rows(1), "cross_entropy") for model in models]
    futures = [
        m.forward_backward(rl_rows(1, logprobs_of(s.result()), rows(1)), "ppo")
        for m, s in zip(models, scores, strict=True)
    ]
    joined = results(futures)
    for model, score, one in zip([new(client, seed) for seed in (1, 2, 3)], scores, joined, strict=True):
        data = rl_rows(1, logprobs_of(score.result()), rows(1))
        assert same(results([model.forward_backward(data, "ppo")]), [one])


# ---- stable_reinforce, which an operator may have computed as another loss


def recorded(model: Any, **more: Any) -> Any:
    """A sample of a snapshot of the model that the server remembers."""
    sampler = model.save_weights_and_get_sampling_client(record_stability_info=True).result()
    return sampler.sample(PROMPT, 1, draw(6, **more)).result().sequences[0]


def provenance(one: Any, **changed: Any) -> Datum:
    """A row for stable_reinforce of PROMPT and a sampled sequence, as the cookbook builds it; the last targets are what
    was drawn. `changed`: in the last span, or (inputs) in what the loss reads."""
    count, before = len(one.tokens), PROMPT.length - 1
    advantages = np.r_[np.zeros(before), np.full(count, 0.5)].astype(np.float32)
    inputs = {"target_tokens": np.array([0] * before + one.tokens), "advantages": advantages}
    inputs |= changed.pop("inputs", {})
    last = {"sequence_id": one.sequence_id, "offset": 0, "length": count, **changed}
    prompted = [PromptProvenanceSpan(sequence_id=one.sequence_id, offset=n, length=PROMPT.length - n) for n in (0, 1)]
    datum = Datum(ModelInput.from_ints(PROMPT.to_ints() + one.tokens[:-1]), inputs)
    object.__setattr__(datum, "model_input_spans", [prompted[0], SampledProvenanceSpan(**last | {"length": count - 1})])
    object.__setattr__(datum, "loss_fn_input_spans", [prompted[1], SampledProvenanceSpan(**last)])
    return datum


def test_stable_reinforce_is_the_loss_that_the_operator_names(client, caplog):
    """Log-probabilities that the client leaves out are those of sampling; every answer names the loss."""
    one = new(client, seed=5)
    seen = recorded(one)
    before = np.zeros(PROMPT.length - 1, np.float32)
    given = {"logprobs": np.r_[before, np.array(seen.logprobs, np.float32)]}
    train_on(client, 3)  # other weights and requests in between change nothing
    with caplog.at_level("WARNING", logger="skyrl.service"):
        found = [
            one.forward_backward([provenance(seen, **more)], loss).result()
            for loss, more in (
                ("stable_reinforce", {}),
                ("stable_reinforce", {"inputs": given}),
                ("ppo", {"inputs": given}),
            )
        ]
    assert same([logprobs_of(one) for one in found[:2]], [logprobs_of(found[2])] * 2)
    metrics = [dict(one.metrics) for one in found]
    assert (
        metrics[0] == metrics[1] == metrics[2] | {"stable_reinforce_computed_as_ppo:max": 1, "sampled_weights:max": 1}
    )
    told = [record.getMessage() for record in caplog.records if "computed as" in record.getMessage()]
    assert told == [f"{one.model_id}: stable_reinforce is computed as ppo (service.loss_substitutes)"]
    later = one.forward_backward([provenance(seen), provenance(recorded(one, seed=6))], "stable_reinforce").result()
    assert later.metrics["sampled_weights:max"] == 2


def train_on(client: Any, seed: int) -> None:
    results(train(new(client, seed), 50, steps=1))


def test_what_stable_reinforce_refuses(client):
    """Sequences of other sessions, that were not recorded, or that are not what the row holds."""
    one, other = new(client, seed=5), skyrl_session(client)
    seen, plain = recorded(one), one.save_weights_and_get_sampling_client().result()
    unrecorded = plain.sample(PROMPT, 1, draw(6)).result().sequences[0]
    wrong = np.array([0] * (PROMPT.length - 1) + seen.tokens[::-1])
    bare = provenance(seen)
    object.__setattr__(bare, "model_input_spans", None), object.__setattr__(bare, "loss_fn_input_spans", None)
    cases = {
        "is not recorded: sample it in this session": provenance(unrecorded),
        "does not say which samples": bare,
        "sampled tokens 3 to 8": provenance(seen, offset=3),
        "prompt tokens 0 to 5": with_prompt(provenance(seen), 5),
        "spans are of 8 tokens, there are 9": provenance(seen, length=5),
        "tokens are not those that were drawn": provenance(seen, inputs={"target_tokens": wrong}),
        "have to be 0": provenance(seen, inputs={"advantages": np.ones(PROMPT.length - 1 + 6, np.float32)}),
    }
    for words, datum in cases.items():
        with pytest.raises(RequestFailedError, match=words):
            one.forward([datum], "stable_reinforce").result()
    with pytest.raises(RequestFailedError, match="does not apply to ppo"):
        one.forward([provenance(seen)], "stable_reinforce", {"kl_coeff": 0.1}).result()
    with pytest.raises(RequestFailedError, match="is not recorded"):
        other.forward([provenance(seen)], "stable_reinforce").result()
    assert np.isfinite(one.forward([provenance(seen)], "stable_reinforce").result().metrics["loss:sum"])


def with_prompt(datum: Datum, length: int) -> Datum:
    """The datum, its first span as long as that."""
    datum.model_input_spans[0] = replace(datum.model_input_spans[0], length=length)
    return datum


def skyrl_session(client: Any) -> Any:
    """A model of a session of its own."""
    return ServiceClient().create_lora_training_client("tiny", rank=4, seed=1).result()


def test_what_is_recorded_is_kept_for_a_day_after_its_last_use(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock, "now", lambda: now[0])
    kept, one = Recordings(), RecordedSequence(2, np.arange(3), np.zeros(3, np.float32), "w")
    for name in "ab":
        kept.add("s", name, one)
    now[0] = 80_000.0
    assert kept.find("s", "a") is one
    now[0] = 90_000.0
    kept.expire()
    assert kept.find("s", "a") is one and kept.sessions() == {"s"}
    for session, name in (("s", "b"), ("other", "a")):
        with pytest.raises(RequestFailed, match="is not recorded"):
            kept.find(session, name)
    monkeypatch.setattr(sampling, "RECORDED_BYTES", 4 * one.size)
    kept.add("few", "x", one)
    for number in range(9):
        kept.add("many", str(number), one)
    assert kept.find("few", "x") and kept.find("many", "8") and kept.sessions() == {"s", "few", "many"}
    with pytest.raises(RequestFailed, match="is not recorded"):
        kept.find("many", "0")
    now[0] += 90_000.0
    kept.expire()
    assert kept.sessions() == set()
