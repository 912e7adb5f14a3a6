"""The engine on several ranks, under ddp and fsdp: sums, failures, sampling. Layouts: tests/test_layouts.py.

What all tests look at is computed by the same two and three ranks, started once each: a start costs more than a test.
"""

import copy
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo import run_ranks
from safetensors.torch import load_file, save_file
from small import ADAM, SPEC, dealt, distance, make_engine, make_rows, weights_of

from skyrl.config.load import load_config
from skyrl.distributed.init import init_distributed
from skyrl.engine import Engine, ModelSpec
from skyrl.types import AdamParams, Datum, SampleRequest, SamplingParams, UserError

pytestmark = pytest.mark.ranks
STRATEGIES = ["ddp", "fsdp"]
DTYPES = ["float32", "bfloat16"]
# Who computes row i of 10, on 3 ranks.
DEALS = {
    "even": [i % 3 for i in range(10)],
    "unequal": [0] * 7 + [1] * 2 + [2],
    "idle rank": [2] * 8 + [0] * 2,
    "one rank": [1] * 10,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """found(body, *args): what each rank of that call returned."""
    folder = tmp_path_factory.mktemp("ranks")
    calls = {
        3: [(deals_body, s) for s in STRATEGIES]
        + [(silent_body, s, str(folder)) for s in STRATEGIES]
        + [(replicas_body,)],
        2: [(body, s) for body in (accumulation_body, failure_body, frozen_body) for s in STRATEGIES]
        + [(sampled_body, s, dtype) for s in STRATEGIES for dtype in DTYPES]
        + [(stale_body, "true"), (stale_body, "false"), (buffers_body,), (broken_body, broken_model(folder / "model"))],
    }
    results = {}

    def look_up(body, *args):
        for size, some in calls.items():
            for place, call in enumerate(some):
                if call[: 1 + len(args)] == (body, *args):
                    if size not in results:
                        results[size] = run_ranks(size, call_all, some, timeout=280)
                    return [rank[place] for rank in results[size]]
        raise LookupError(body, args)

    return look_up


def call_all(calls):
    return [body(*args) for body, *args in calls]


def share(rows, deal, engine):
    return [row for row, rank in zip(rows, deal, strict=True) if rank == engine.world.rank]


def drain(sampler):
    out = []
    while sampler.unfinished():
        out += sampler.step()
    return out


def refused(call):
    """The error of `call` on this rank, as text."""
    try:
        call()
    except (RuntimeError, UserError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def one_rank(*overrides):
    """Weights and metrics after two steps on one rank, float64."""
    engine = make_engine("auto", "float64", *overrides)
    metrics = [(engine.forward_backward(make_rows(n), SPEC).metrics, engine.optim_step("policy", ADAM)) for n in (0, 1)]
    return weights_of(engine), metrics


# ---- sums


def deals_body(strategy):
    found = {}
    for name, deal in DEALS.items():
        engine = make_engine(strategy, "float64", "batch.max_tokens_per_microbatch=60")
        metrics = []
        for n in (0, 1):
            rows = share(make_rows(n), deal, engine)
            out = engine.forward_backward(rows, SPEC)
            assert [len(x) for x in out.logprobs] == [len(row.tokens) for row in rows]
            metrics.append((out.metrics, engine.optim_step("policy", ADAM)))
        found[name] = (weights_of(engine), metrics)
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whoever_computes_a_row_the_sums_are_the_same(found, strategy):
    want, want_metrics = one_rank()
    ranks = found(deals_body, strategy)
    for name in DEALS:
        weights, metrics = ranks[0][name]
        assert distance(weights, want) < 1e-14, name
        for (out, step), (want_out, want_step) in zip(metrics, want_metrics, strict=True):
            assert step == pytest.approx(want_step, rel=1e-12)
            assert out.keys() == want_out.keys()
            for key in out.keys() - {"microbatches:max"}:
                assert out[key] == pytest.approx(want_out[key], rel=1e-11), (name, key)
        assert ranks[1][name][1] == ranks[2][name][1] == metrics, "metrics are the same on every rank"


def accumulation_body(strategy):
    rows, others = make_rows(), make_rows(5)

    def run(*parts, look=False):
        engine = make_engine(strategy, "float64")
        for part in parts:
            engine.forward_backward(dealt(part, engine), SPEC)
            if look:
                engine.forward(dealt(others, engine), SPEC)
                engine.score(dealt(others, engine), 1.0)
        engine.optim_step("policy", ADAM)
        seen = engine.forward(dealt(rows, engine), SPEC).metrics["loss:sum"]
        before = weights_of(engine)
        zero = engine.optim_step("policy", AdamParams(lr=0.0))  # after a forward alone: nothing is pending
        assert zero["grad_norm:mean"] == 0.0
        after = weights_of(engine)  # collective
        assert not before or distance(after, before) == 0.0
        return after, seen

    return run(rows), run(rows[:3], rows[3:]), run(rows[:3], [], rows[3:]), run(rows, look=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_calls_add_up_and_a_forward_leaves_no_trace(found, strategy):
    (want, loss), *others = found(accumulation_body, strategy)[0]
    for weights, seen in others:
        assert distance(weights, want) < 1e-14
        assert seen == pytest.approx(loss, rel=1e-12)


def stale_body(reshard):
    """score, optim_step without a backward between, score: the second one must see the new weights."""
    engine = make_engine("fsdp", "float64", f"strategy.reshard_after_forward={reshard}")
    rows = dealt(make_rows(), engine)
    engine.forward_backward(rows, SPEC)
    before = engine.score(rows, 1.0).logprobs
    engine.optim_step("policy", AdamParams(lr=0.01))
    after = engine.score(rows, 1.0).logprobs
    kept = copy.deepcopy(engine.state())
    engine.optim_step("policy", AdamParams(lr=0.01))
    moved = engine.score(rows, 1.0).logprobs
    engine.load_state(kept)
    back = engine.score(rows, 1.0).logprobs
    with engine.sampling() as sampler:
        sampler.add(SampleRequest("a", np.array([5, 6, 7]), SamplingParams(8, seed=1)))
        (sample,) = drain(sampler)
    ids = np.concatenate([[5, 6, 7], sample.tokens])
    again = engine.score([Datum(ids[:-1], ids[1:], np.ones(len(ids) - 1))], 1.0).logprobs[0][2:]
    assert np.abs(again - sample.logprobs).max() < 1e-5
    names = {n: type(t).__name__ for n, t in engine.state()["policy"]["weights"].items()}
    assert set(names.values()) == {"DTensor"}, names
    gap = [max(np.abs(a - b).max() for a, b in zip(x, y, strict=True)) for x, y in ((before, after), (after, moved))]
    return (*gap, max(np.abs(a - b).max() for a, b in zip(after, back, strict=True)))


@pytest.mark.parametrize("reshard", ["true", "false"])
def test_a_forward_under_fsdp_never_uses_gathered_weights_of_before(found, reshard):
    for first, second, back in found(stale_body, reshard):
        assert first > 1e-3 and second > 1e-3 and back == 0.0


# ---- failures


def failure_body(strategy):
    engine = make_engine(strategy, "float32", "batch.max_tokens_per_microbatch=1")
    start = weights_of(engine)
    rows = make_rows()
    rows[7].advantages[rows[7].weights != 0] = np.nan  # dealt to rank 1 of 2 only
    errors = [refused(lambda: engine.forward_backward(dealt(rows, engine), SPEC))]
    errors.append(refused(lambda: engine.optim_step("policy", ADAM)))
    engine.clear_gradient("policy")
    before = engine.model_state("policy")
    errors.append(refused(lambda: engine.optim_step("policy", replace(ADAM, eps=0.0))))  # 0 / 0 everywhere
    moments = [kind for kind in before if kind != "step"]
    state = engine.model_state("policy")
    same = all(torch.equal(state[kind][name], before[kind][name]) for kind in moments for name in before[kind])
    errors.append("" if same and state["step"] == before["step"] == 0 else "something has changed")
    after = weights_of(engine)
    return errors, distance(after, start) if start else 0.0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(found, strategy):
    for errors, moved in found(failure_body, strategy):
        assert errors[0].startswith(
            "RunError: the loss is not finite in the micro-batch of rows row7; nothing was learned"
        )
        assert "gradient is not finite" in errors[1] and moved == 0.0
        assert errors[2].startswith("RunError: the update is not finite (lr=0.001, eps=0") and errors[3] == ""


def replicas_body():
    engine = make_engine("ddp")
    engine.check_replicas()
    if engine.world.rank == 1:
        engine.models["policy"].strategy.module.net.model.norm.weight.data[3] += 1e-3
    return refused(engine.check_replicas)


def test_a_replica_that_differs_is_named_on_every_rank(found):
    texts = found(replicas_body)
    assert set(texts) == {"RunError: rank 1 holds other weights than rank 0, first in net.model.norm.weight"}


def broken_model(folder):
    """A model folder with one NaN, in rows of the embedding that rank 1 of 2 reads alone."""
    make_engine().export("policy", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][-1, 0] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def broken_body(folder):
    """What creating the policy says under fsdp, and that the ranks go on together."""
    cfg = load_config([f"model.path={folder}", "strategy.name=fsdp", "run.threads=1"])
    engine = Engine(cfg, init_distributed(cfg), dtype="float32", strategy="fsdp", max_row_tokens=64)
    text = refused(lambda: engine.create("policy", ModelSpec()))
    make_engine("fsdp")
    return text


def test_a_weight_that_is_not_finite_in_one_shard_is_refused_on_every_rank(found):
    first, second = found(broken_body)
    assert first == second
    assert re.match(r"UserError: rank 1 on \S+: model.path: model.embed_tokens.weight in .* is not finite", first)


def frozen_body(strategy):
    engine = make_engine(strategy)
    engine.forward_backward(dealt(make_rows(), engine), SPEC)
    engine.optim_step("policy", AdamParams(lr=0.01))
    engine.create("reference", ModelSpec(trainable=False, copy_of="policy"))
    rows = dealt(make_rows(3), engine)
    same = [np.abs(a - b).max() for a, b in zip(
        engine.score(rows, 1.0).logprobs, engine.score(rows, 1.0, model="reference").logprobs, strict=True
    )]  # fmt: skip
    before = weights_of(engine, "reference")
    engine.forward_backward(rows, SPEC)
    engine.optim_step("policy", AdamParams(lr=0.01))
    after = weights_of(engine, "reference")
    return (
        max(same),
        distance(after, before) if before else 0.0,
        refused(lambda: engine.forward_backward(rows, SPEC, model="reference")),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_reference_is_the_policy_as_it_was(found, strategy):
    for same, moved, text in found(frozen_body, strategy):
        assert same == 0.0 and moved == 0.0
        assert text == "UserError: model 'reference' is frozen"


# ---- sampling from what is trained


def sampled_body(strategy, dtype):
    engine = make_engine(strategy, dtype)
    gaps = []
    for number in range(3):
        prompts = np.random.default_rng(number).integers(4, 90, (4, 6))
        with engine.sampling() as sampler:
            for i, prompt in enumerate(prompts):
                for g in range(2):
                    sampler.add(SampleRequest(f"{i}/{g}", prompt, SamplingParams(20, temperature=0.8, seed=2 * i + g)))
            samples = {s.uid: s for s in drain(sampler)}
        assert {s.version for s in samples.values()} == {number}
        rows = []
        for uid, sample in samples.items():
            ids = np.concatenate([prompts[int(uid[0])], sample.tokens])
            rows.append(Datum(ids[:-1], ids[1:], np.ones(len(ids) - 1), name=uid))
        scored = engine.score(rows, 0.8).logprobs
        gaps.append(max(np.abs(p[5:] - samples[r.name].logprobs).max() for p, r in zip(scored, rows, strict=True)))
        engine.forward_backward(dealt(make_rows(number), engine), SPEC)
        engine.optim_step("policy", AdamParams(lr=0.01))
    module = engine.models["policy"].strategy.gathered()
    whole = {n: p.detach().clone() for n, p in module.named_parameters()}
    return gaps, whole, weights_of(engine)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sampler_draws_from_the_trained_weights_after_every_update(found, size, dtype):
    limit = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    ends = {}
    for strategy in ("single" if size == 1 else "ddp", "fsdp"):
        for gaps, whole, weights in (
            [sampled_body(strategy, dtype)] if size == 1 else found(sampled_body, strategy, dtype)
        ):
            assert len(gaps) == 3 and max(gaps) < limit, (strategy, gaps)
            if weights:
                ends[strategy] = weights
                rounded = {n: w.to(getattr(torch, dtype)) for n, w in weights.items()}
                assert whole.keys() == weights.keys() and all(torch.equal(whole[n], rounded[n]) for n in whole)
    first, second = ends.values()
    if dtype == "float32":
        assert distance(first, second) < 1e-6


def silent_body(strategy, folder):
    """Each rank starts to draw only when the one before it has finished: a collective in between would never end."""
    engine, folder = make_engine(strategy), Path(folder) / strategy
    folder.mkdir(exist_ok=True)
    rank, size = engine.world.rank, engine.world.size
    with engine.sampling() as sampler:
        while rank > 0 and not (folder / str(rank - 1)).exists():
            time.sleep(0.01)
        for i in range(5 * rank):  # rank 0 draws nothing at all
            sampler.add(SampleRequest(str(i), np.arange(4, 8 + i), SamplingParams(4 + 3 * i, seed=i)))
        count = len(drain(sampler))
        (folder / str(rank)).touch()
    dist.barrier(group=engine.world.control)
    engine.forward_backward(dealt(make_rows(), engine), SPEC)
    return count, engine.optim_step("policy", ADAM), size


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_sample_at_their_own_pace(found, strategy):
    results = found(silent_body, strategy)
    assert [count for count, _, _ in results] == [0, 5, 10]
    assert len({tuple(metrics.items()) for _, metrics, _ in results}) == 1


def buffers_body():
    engine = make_engine("fsdp", "bfloat16")
    module = engine.models["policy"].strategy.module
    fresh = {n: b.clone() for n, b in module.named_buffers()}
    engine.forward_backward(dealt(make_rows(), engine), SPEC)
    engine.optim_step("policy", ADAM)
    engine.load_state(copy.deepcopy(engine.state()))
    gathered = {n: b.clone() for n, b in engine.models["policy"].strategy.gathered().named_buffers()}
    return fresh, {n: b.clone() for n, b in module.named_buffers()}, gathered


def test_buffers_survive_sharding_and_gathering(found):
    want = {n: b.clone() for n, b in make_engine().models["policy"].strategy.module.named_buffers()}
    for buffers in found(buffers_body)[0]:
        assert buffers.keys() == want.keys()
        for name, buffer in want.items():
            assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer), name
