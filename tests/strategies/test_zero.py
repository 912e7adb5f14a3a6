"""DeepSpeed under the engine's meaning of a step: sums, pending gradients, refusals, copies, several models."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from gloo import run_ranks
from kinds import draw, engine_of, needs_deepspeed, train
from small import ADAM, SPEC, dealt, distance, make_rows, weights_of
from torch.distributed.tensor import DTensor

from skyrl.engine import ModelSpec
from skyrl.types import AdamParams, Datum, LossSpec, RunError, UserError

pytestmark = [pytest.mark.ranks, needs_deepspeed]
STAGES = ["zero1", "zero2", "zero3"]


def refused(call):
    try:
        call()
    except (RunError, UserError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Fresh:
    """One engine of a kind, and a way back to its first weights and moments: making one takes most of a test's time."""

    def __init__(self, kind):
        self.kind, self.engine = kind, engine_of(kind)
        self.start = copy.deepcopy(self.engine.state())

    def __call__(self):
        self.engine.load_state(copy.deepcopy(self.start))
        return self.engine


def sums(fresh):
    """Weights after two steps however rows are dealt and calls are cut; the pattern differs from step to step."""
    rank_of = {"unequal": [0] * 7 + [1] * 3, "idle rank": [1] * 10}
    found = {}
    for name, deal in rank_of.items():
        engine = fresh()
        for n in (0, 1):
            rows = [
                r for r, rank in zip(make_rows(n), deal, strict=True) if rank % engine.world.size == engine.world.rank
            ]
            engine.forward_backward(rows, SPEC)
            engine.optim_step("policy", ADAM)
        found[name] = weights_of(engine)
    for name, parts in {"one call": [10], "three calls": [3, 0, 7], "looks between": [5, 5]}.items():
        engine = fresh()
        for n in (0, 1):
            rows, first = make_rows(n), 0
            for count in parts:
                engine.forward_backward(dealt(rows[first : first + count], engine), SPEC)
                first += count
                if name == "looks between":
                    engine.score(dealt(make_rows(7), engine), 1.0)
                    with engine.sampling():
                        pass
            engine.optim_step("policy", ADAM)
        found[name] = weights_of(engine)
    return found


def nothing_pending(fresh):
    """Norms and weights of: a step, a step without a gradient (momentum and decay act), a step of size zero."""
    engine = fresh()
    train(engine, 0, 2)
    norms = [engine.optim_step("policy", ADAM)["grad_norm:mean"]]
    moved = weights_of(engine)
    engine.score(dealt(make_rows(), engine), 1.0)
    norms.append(engine.optim_step("policy", AdamParams(lr=0.0))["grad_norm:mean"])
    return norms, moved, weights_of(engine)


def dropped(fresh):
    """A gradient that was dropped leaves no trace, a finite one or not."""
    engine = fresh()
    strategy = engine.models["policy"].strategy
    train(engine, 0, 1)
    for spoil in (False, True):
        rows = make_rows(5)
        if spoil:
            for row in rows:
                row.advantages[:] = np.nan
            refused(lambda rows=rows: engine.forward_backward(dealt(rows, engine), SPEC))
        else:
            engine.forward_backward(dealt(rows, engine), SPEC)
        strategy.clear_gradient()
    train(engine, 1, 2)
    return weights_of(engine)


def not_finite(fresh):
    engine = fresh()
    train(engine, 0, 1)
    before = weights_of(engine)
    rows = make_rows()
    rows[7].advantages[rows[7].weights != 0] = np.nan
    texts = [refused(lambda: engine.forward_backward(dealt(rows, engine), SPEC))]
    texts.append(refused(lambda: engine.optim_step("policy", ADAM)))
    after = weights_of(engine)
    moved = distance(after, before) if before else 0.0
    engine = fresh()
    before, rows = weights_of(engine), dealt(make_rows(), engine)
    scores = engine.score(rows, 1.0).logprobs
    texts.append(refused(lambda: engine.optim_step("policy", replace(ADAM, eps=0.0))))  # 0 / 0 everywhere
    same = all(map(np.array_equal, engine.score(rows, 1.0).logprobs, scores))
    after = weights_of(engine)
    moved += distance(after, before) if before else 0.0
    train(engine, 0, 1)  # it goes on
    return texts, moved if same else 1.0


def own(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def state(fresh):
    """What a checkpoint sees, and that taking it back undoes two steps to the last bit."""
    engine = engine_of(fresh.kind, "bfloat16")
    begun = copy.deepcopy(engine.state()["policy"])
    train(engine, 0, 2)
    kept = copy.deepcopy(engine.state())
    before = engine.score(dealt(make_rows(), engine), 1.0).logprobs
    norms = train(engine, 2, 4)
    moved = engine.score(dealt(make_rows(), engine), 1.0).logprobs
    engine.load_state(kept)
    after = engine.score(dealt(make_rows(), engine), 1.0).logprobs
    again = train(engine, 2, 4)
    policy = kept["policy"]
    gap = [max(np.abs(a - b).max() for a, b in zip(x, y, strict=True)) for x, y in ((before, moved), (before, after))]
    return {
        "steps": (float(begun["step"]), float(policy["step"]), policy["step"].dtype, tuple(policy["step"].shape)),
        "kinds": {
            (key, name): (type(t), tuple(t.shape), t.dtype)
            for key in ("weights", "exp_avg", "exp_avg_sq")
            for name, t in policy[key].items()
        },
        "moments": max(float(own(t).abs().max()) for t in begun["exp_avg"].values()),
        "gaps": gap,
        "norms": (norms, again),
        "rows": {n: tuple(own(t).shape) for n, t in policy["weights"].items()},
    }


def zeros(row):
    return np.zeros(len(row.tokens))


def copies(fresh):
    """A reference is the policy as it was; a critic learns beside the policy."""
    engine = fresh()
    train(engine, 0, 1)
    engine.create("reference", ModelSpec(trainable=False, copy_of="policy"))
    rows = dealt(make_rows(3), engine)
    policy, reference = engine.score(rows, 1.0).logprobs, engine.score(rows, 1.0, model="reference").logprobs
    same = max((np.abs(a - b).max() for a, b in zip(policy, reference, strict=True)), default=0.0)
    engine.create("critic", ModelSpec(head="value"))
    losses = []
    for n in (1, 1, 1):
        some = make_rows(n)
        engine.forward_backward(dealt(some, engine), SPEC)
        values = [
            Datum(r.tokens, r.targets, r.weights, values=zeros(r), returns=zeros(r) + 1, name=r.name) for r in some
        ]
        out = engine.forward_backward(dealt(values, engine), LossSpec("value", {"clip": 10.0}), model="critic")
        losses.append(out.metrics["loss:sum"])
        engine.optim_step("policy", ADAM)
        engine.optim_step("critic", AdamParams(lr=0.01))
    later = engine.score(rows, 1.0, model="reference").logprobs
    stayed = max((np.abs(a - b).max() for a, b in zip(reference, later, strict=True)), default=0.0)
    return same, stayed, losses, weights_of(engine), weights_of(engine, "critic")


def whole_copy(fresh):
    """What is sampled from is what was trained, and how much of the model each rank holds otherwise."""
    engine = fresh()
    train(engine, 0, 2)
    strategy = engine.models["policy"].strategy
    module = strategy.gathered()
    whole = {n: p.detach().clone() for n, p in module.named_parameters()}
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    held = sum(p.numel() for p in strategy.module.parameters())
    return whole, weights_of(engine), buffers, held, draw(engine)


CHECKS = (sums, nothing_pending, dropped, not_finite, state, whole_copy, copies)


def facts_body(kinds):
    found = {}
    for kind in kinds:
        fresh = Fresh(kind)
        checks = [check for check in CHECKS if kind != "single" or check is not not_finite]
        found[kind] = {check.__name__: check(fresh) for check in checks}
    return found


@pytest.fixture(scope="module")
def facts():
    """All measurements: of one process, and of two ranks per strategy."""
    return facts_body(["single"])["single"], run_ranks(2, facts_body, STAGES, timeout=280)


@pytest.mark.parametrize("kind", STAGES)
def test_whoever_computes_a_row_and_in_how_many_calls_the_sums_are_the_same(facts, kind):
    want = facts[0]["sums"]
    found = facts[1][0][kind]["sums"]
    assert distance(want["unequal"], want["idle rank"]) < 1e-6
    for name, weights in found.items():
        assert distance(weights, want[name]) < 1e-6, name


@pytest.mark.parametrize("kind", STAGES)
def test_without_a_gradient_momentum_and_decay_act(facts, kind):
    _, want, _ = facts[0]["nothing_pending"]
    for rank, ranks in enumerate(facts[1]):
        norms, moved, after = ranks[kind]["nothing_pending"]
        assert norms == [0.0, 0.0]
        if rank == 0:
            assert distance(moved, want) < 1e-6 and distance(after, moved) == 0.0


def old_body():
    import deepspeed

    del deepspeed.DeepSpeedEngine.managed_gradient_accumulation
    return refused(lambda: engine_of("zero2"))


def test_a_deepspeed_that_would_average_is_refused():
    (text,) = run_ranks(1, old_body)
    assert text.startswith("UserError: strategy.name=zero2: DeepSpeed ") and "install deepspeed>=0.19.8" in text


@pytest.mark.parametrize("kind", STAGES)
def test_a_gradient_that_was_dropped_leaves_no_trace(facts, kind):
    assert distance(facts[1][0][kind]["dropped"], facts[0]["dropped"]) < 1e-6


@pytest.mark.parametrize("kind", STAGES)
def test_a_gradient_that_is_not_finite_stops_every_rank_before_any_weight_changes(facts, kind):
    for ranks in facts[1]:
        texts, moved = ranks[kind]["not_finite"]
        assert (
            texts[0].startswith("RunError: the loss is not finite in the micro-batch of rows ") and "row7" in texts[0]
        )
        assert texts[1].startswith("RunError: the gradient is not finite") and moved == 0.0
        assert texts[2].startswith("RunError: the update is not finite (lr=0.001, eps=0") and "eps above 0" in texts[2]


@pytest.mark.parametrize("kind", STAGES)
def test_state_is_named_and_cut_like_that_of_fsdp_and_undoes_steps(facts, kind):
    names = facts[0]["whole_copy"][1]
    for rank, ranks in enumerate(facts[1]):
        found = ranks[kind]["state"]
        assert found["steps"] == (0.0, 2.0, torch.float32, ())
        assert found["moments"] == 0.0
        keys = [(key, name) for key in ("weights", "exp_avg", "exp_avg_sq") for name in names]
        assert sorted(found["kinds"]) == sorted(keys)
        for (_, name), entry in found["kinds"].items():
            assert entry == (DTensor, tuple(names[name].shape), torch.float32)
        for name, rows in found["rows"].items():
            assert rows == tuple(names[name].chunk(2)[rank].shape)
        moved, back = found["gaps"]
        assert moved > 1e-3 and back == 0.0
        assert found["norms"][0] == found["norms"][1]


@pytest.mark.parametrize("kind", STAGES)
def test_a_reference_stays_and_a_critic_learns_beside_the_policy(facts, kind):
    _, _, want_losses, want, want_critic = facts[0]["copies"]
    same, stayed, losses, policy, critic = facts[1][0][kind]["copies"]
    assert same < 1e-6 and stayed == 0.0
    assert losses == pytest.approx(want_losses, rel=1e-5) and losses[2] < losses[0]
    assert distance(policy, want) < 1e-6 and distance(critic, want_critic) < 1e-5


@pytest.mark.parametrize("kind", STAGES)
def test_the_sampler_has_the_trained_weights(facts, kind):
    want_whole, _, want_buffers, _, want_tokens = facts[0]["whole_copy"]
    total = sum(w.numel() for w in want_whole.values())
    for rank, ranks in enumerate(facts[1]):
        whole, masters, buffers, held, tokens = ranks[kind]["whole_copy"]
        assert whole.keys() == want_whole.keys() and tokens == want_tokens
        if rank == 0:
            assert all(torch.equal(whole[n], masters[n]) for n in whole)
        assert all(torch.equal(b, want_buffers[n]) and b.dtype == want_buffers[n].dtype for n, b in buffers.items())
        assert held < 0.05 * total if kind == "zero3" else held == total  # norms alone stay whole
