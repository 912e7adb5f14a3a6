"""The whole sampler against plain transformers: tokens, log-probabilities, sharing, preemption, refresh, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from skyrl.sampler.runners.cpu_kernels import library
from skyrl.types import SampleRequest, SamplingParams, UserError
from tests.sampler.tools import VOCAB, check_pool, prompts, qwen3, reference_logprobs, requests, run, sampler, text

BLOCK_GIB = 3 * 2 * 2 * 16 * 4 * 16 / 2**30  # one block of qwen3(): layers, K and V, heads, channels, bytes, tokens


@pytest.fixture(scope="module", params=["module", "fused", "kernels"])
def backend(request):
    """Name of the backend to ask for; each of the three paths runs."""
    if request.param == "kernels" and (why := library()[1]):
        pytest.skip(why)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "fused":
            patch.setattr("skyrl.sampler.make.unsupported_reason", lambda plan, cache: "off in this test")
        name = "module" if request.param == "module" else "fused"
        assert sampler(qwen3(), backend=name).backend == request.param
        yield name


@pytest.fixture(scope="module")
def model():
    return qwen3()


@pytest.fixture(scope="module")
def asked():
    return requests(prompts(6), samples=4)


@pytest.fixture(scope="module")
def drawn(model, asked, backend):
    return run(sampler(model, backend=backend), asked)


def same(one, two, tolerance=2e-5):
    """Equal tokens and stop reasons; log-probabilities equal up to rounding."""
    assert set(one) == set(two)
    for uid in one:
        assert one[uid].tokens.tolist() == two[uid].tokens.tolist(), uid
        assert one[uid].stop == two[uid].stop
        np.testing.assert_allclose(one[uid].logprobs, two[uid].logprobs, atol=tolerance, rtol=0)


def test_logprobs_are_those_of_a_plain_forward(model, asked, drawn):
    for request in asked:
        sample = drawn[request.uid]
        expected = reference_logprobs(model, request.tokens, sample.tokens)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5, rtol=0)
        assert sample.stop == "length" and len(sample.tokens) == request.params.max_tokens


def test_samples_of_one_prompt_differ(drawn):
    for prompt in range(6):
        assert len({tuple(drawn[f"{prompt}/{g}"].tokens) for g in range(4)}) == 4


def test_temperature_is_in_the_logprobs(model, backend):
    asked = requests(prompts(3), samples=2, temperature=0.6)
    drawn = run(sampler(model, backend=backend), asked)
    for request in asked:
        expected = reference_logprobs(model, request.tokens, drawn[request.uid].tokens, 0.6)
        np.testing.assert_allclose(drawn[request.uid].logprobs, expected, atol=1e-5, rtol=0)


def test_nothing_else_changes_what_is_drawn(model, asked, drawn, backend):
    """Neither sharing, nor the batch, nor the order of arrival, nor the size of prefill chunks."""
    same(drawn, run(sampler(model, backend=backend, prefix_cache=False), asked))
    same(drawn, run(sampler(model, backend=backend, max_running=1), asked))
    same(drawn, run(sampler(model, backend=backend), asked[::-1]))
    small = sampler(model, backend=backend, max_running=5)
    small._scheduler.max_prefill_tokens = 7
    same(drawn, run(small, asked))


def test_preemption_changes_nothing(model, asked, drawn, backend):
    tight = sampler(model, backend=backend, kv_cache_gib=9 * BLOCK_GIB)
    same(drawn, run(tight, asked))
    assert tight.metrics()["sampler/preemptions:sum"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_requests_that_arrive_while_others_run(model, asked, drawn, backend, seed):
    """Random arrivals, several turns, a tight cache: the samples are those of one quiet batch."""
    rng = np.random.default_rng(seed)
    engine = sampler(
        model, backend=backend, kv_cache_gib=int(rng.integers(8, 30)) * BLOCK_GIB, max_running=int(rng.integers(2, 9))
    )
    waiting = [asked[i] for i in rng.permutation(len(asked))]
    done, turns = {}, {}
    while waiting or engine.unfinished():
        for _ in range(int(rng.integers(0, 3))):
            if waiting:
                engine.add(waiting.pop())
        for sample in engine.step():
            done[sample.uid] = sample
            if sample.uid.endswith("/0"):  # a second turn: what was drawn becomes context
                context = np.concatenate([next(r.tokens for r in asked if r.uid == sample.uid), sample.tokens, [3]])
                turns[sample.uid + "/turn"] = context
                waiting.append(SampleRequest(sample.uid + "/turn", context, SamplingParams(max_tokens=9, seed=seed)))
    second = {uid: done.pop(uid) for uid in turns}
    same(done, drawn)
    for uid, context in turns.items():
        expected = reference_logprobs(model, context, second[uid].tokens)
        np.testing.assert_allclose(second[uid].logprobs, expected, atol=1e-5, rtol=0)
    check_pool(engine._scheduler.pool)
    assert engine._scheduler.pool.held() == 0
    assert engine.metrics()["sampler/tokens:sum"] == sum(len(s.tokens) for s in [*done.values(), *second.values()])


@pytest.mark.parametrize("seed", range(3))
def test_cancelled_requests_leave_the_others_alone(model, asked, drawn, backend, seed):
    """Withdrawn while queued, prefilling, waiting as a sibling, running or preempted: no sample, no block, no trace."""
    rng = np.random.default_rng(seed)
    engine = sampler(
        model, backend=backend, kv_cache_gib=int(rng.integers(8, 30)) * BLOCK_GIB, max_running=int(rng.integers(2, 9))
    )
    engine._scheduler.max_prefill_tokens = int(rng.integers(5, 60))
    waiting, live, done, withdrawn = list(asked), [], {}, set()
    while waiting or engine.unfinished():
        for _ in range(int(rng.integers(0, 4))):
            if waiting:
                live.append(waiting.pop(0).uid)
                engine.add(next(r for r in asked if r.uid == live[-1]))
        if live and rng.random() < 0.25:
            uid = live.pop(int(rng.integers(len(live))))
            assert engine.cancel(uid) and not engine.cancel(uid)
            withdrawn.add(uid)
        assert engine.unfinished() == len(live)
        for sample in engine.step():
            done[sample.uid] = sample
            live.remove(sample.uid)
        check_pool(engine._scheduler.pool)
    assert engine._scheduler.pool.held() == 0 and len(withdrawn) > 4 and not engine.cancel("never")
    same(done, {uid: sample for uid, sample in drawn.items() if uid not in withdrawn})
    again = run(engine, [r for r in asked if r.uid in withdrawn])  # the names are free again
    same(again, {uid: drawn[uid] for uid in withdrawn})


def test_stop_strings_across_tokens(model, backend):
    """Letters drawn one by one; the sequence ends with the token that completes a string."""
    asked = requests(prompts(8), samples=4, max_tokens=60, stop=("..a", "b.", ".ab"))
    drawn = run(sampler(model, backend=backend), asked)
    free = run(sampler(model, backend=backend), requests(prompts(8), samples=4, max_tokens=60))
    reasons = set()
    for uid, sample in drawn.items():
        whole, cut = text(sample.tokens), text(sample.tokens[:-1])
        hit = any(s in whole for s in ("..a", "b.", ".ab"))
        assert hit == (sample.stop == "stop") and not any(s in cut for s in ("..a", "b.", ".ab"))
        assert sample.tokens.tolist() == free[uid].tokens.tolist()[: len(sample.tokens)]
        reasons.add(sample.stop)
    assert reasons == {"stop", "length"}


def test_same_requests_give_the_same_bits(model, asked, backend):
    one, two = (run(sampler(model, backend=backend), asked) for _ in range(2))
    assert all(one[uid].logprobs.tobytes() == two[uid].logprobs.tobytes() for uid in one)


def test_equal_prompts_are_prefilled_once(model, backend):
    engine = sampler(model, backend=backend)
    run(engine, requests([np.arange(1, 38)], samples=8, max_tokens=4))
    metrics = engine.metrics()
    assert metrics["sampler/prefill_tokens:sum"] == 37
    assert metrics["sampler/reused_tokens:sum"] == 7 * 37
    assert metrics["sampler/tokens:sum"] == 32


def test_next_turn_reuses_context_and_own_tokens(model, backend):
    engine = sampler(model, backend=backend)
    context = prompts(1, low=30, high=31)[0]
    first = run(engine, requests([context], max_tokens=25))["0/0"]
    engine.metrics()
    longer = np.concatenate([context, first.tokens, [5, 6, 7]])
    second = run(engine, requests([longer]))["0/0"]
    # 54 of the 58 tokens were computed; whole blocks of 16 come back
    assert engine.metrics()["sampler/reused_tokens:sum"] == 48
    np.testing.assert_allclose(second.logprobs, reference_logprobs(model, longer, second.tokens), atol=1e-5, rtol=0)


def test_refresh_gives_the_new_weights_twice(backend):
    model = qwen3(seed=3)
    engine = sampler(model, backend=backend)
    asked = requests(prompts(2, low=20), samples=2)
    for version in range(3):
        drawn = run(engine, asked)
        for request in asked:
            sample = drawn[request.uid]
            assert sample.version == version
            expected = reference_logprobs(model, request.tokens, sample.tokens)
            np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5, rtol=0)
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        engine.refresh(version + 1)


def test_refresh_while_running_is_an_error(model):
    engine = sampler(model)
    engine.add(requests(prompts(1))[0])
    with pytest.raises(RuntimeError, match="unfinished"):
        engine.refresh(1)


def test_finished_come_in_the_order_of_the_requests(model):
    engine = sampler(model)
    for request in requests(prompts(7), samples=2, max_tokens=3):
        engine.add(request)
    done = []
    while engine.unfinished():
        done += [sample.uid for sample in engine.step()]
    assert done == [f"{p}/{g}" for p in range(7) for g in range(2)]


def test_stop_reasons(model, backend):
    context = prompts(1)[0]
    free = run(sampler(model, backend=backend), requests([context]))["0/0"]
    token = int(free.tokens[4])
    first = free.tokens.tolist().index(token)
    engine = sampler(model, backend=backend)
    stopped = run(engine, requests([context], stop_token_ids=(token, 3)))["0/0"]
    assert (
        stopped.stop == "stop" and stopped.tokens.tolist() == free.tokens[: first + 1].tolist()[: len(stopped.tokens)]
    )
    short = run(sampler(model, backend=backend, max_length=len(context) + 5), requests([context]))["0/0"]
    assert short.stop == "length" and short.tokens.tolist() == free.tokens[:5].tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tokens=np.full(128, 3)), "max_length=128"),
        (dict(tokens=np.array([], dtype=np.int64)), "needs 1 or more tokens"),
        (dict(tokens=np.array([VOCAB])), "0 .. 96"),
        (dict(version=7), "version 7 is gone"),
        (dict(params=SamplingParams(max_tokens=0)), "max_tokens=0"),
        (dict(params=SamplingParams(max_tokens=1, top_p=0.0)), "top_p=0.0"),
        (dict(params=SamplingParams(max_tokens=100)), "cache blocks"),
    ],
)
def test_what_can_never_run_is_refused(model, change, message):
    engine = sampler(model, kv_cache_gib=5 * BLOCK_GIB, max_length=128 if "tokens" in change else 120)
    given = {"tokens": np.array([1, 2]), "params": SamplingParams(max_tokens=4), **change}
    with pytest.raises(UserError, match=message):
        engine.add(SampleRequest("x", **given))
    assert engine.unfinished() == 0


def test_the_same_uid_twice_is_refused(model):
    engine = sampler(model)
    request = requests(prompts(1))[0]
    engine.add(request)
    with pytest.raises(UserError, match="already queued"):
        engine.add(request)


def test_a_model_that_is_not_finite_stops():
    model = qwen3()
    with torch.no_grad():
        model.output_weight()[0].fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        run(sampler(model), requests(prompts(1)))
