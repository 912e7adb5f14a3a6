"""The engine on one rank: sums, order, refusals, plain references. Several ranks: tests/strategies, test_layouts.py."""

import copy

import numpy as np
import pytest
import torch
from small import ADAM, SPEC, distance, make_engine, make_rows, weights_of
from transformers import AutoModelForCausalLM

from skyrl.engine import ModelSpec
from skyrl.models.forward import precise
from skyrl.types import AdamParams, Datum, LossSpec, SampleRequest, SamplingParams, UserError

OPTIONAL = ("sampling_logprobs", "advantages", "reference")


@pytest.fixture
def engine():
    return make_engine(dtype="float64")


def step(engine, *parts):
    for part in parts:
        engine.forward_backward(part, SPEC)
    metrics = engine.optim_step("policy", ADAM)
    return weights_of(engine), metrics


# ---- sums


def test_calls_microbatches_and_halves_only_add_up(engine):
    rows = make_rows()
    once, metrics = step(engine, rows)
    for parts in ([rows[:3], rows[3:]], [rows[5:], [], rows[:5]], [[row] for row in rows]):
        other = make_engine(dtype="float64")
        weights, same = step(other, *parts)
        assert distance(weights, once) < 1e-14
        assert same["grad_norm:mean"] == pytest.approx(metrics["grad_norm:mean"], rel=1e-12)
    many = make_engine("auto", "float64", "batch.max_tokens_per_microbatch=40")
    assert distance(step(many, rows)[0], once) < 1e-14


def test_forward_and_score_leave_the_pending_gradient_alone(engine):
    rows, others = make_rows(0), make_rows(1)
    once, _ = step(engine, rows)
    other = make_engine(dtype="float64")
    other.forward_backward(rows, SPEC)
    loss = other.forward(others, SPEC).metrics["loss:sum"]
    scored = other.score(others, SPEC.temperature)
    assert scored.metrics.keys() == {"tokens:sum", "microbatches:max"}
    other.optim_step("policy", ADAM)
    assert distance(weights_of(other), once) == 0.0
    assert other.forward(others, SPEC).metrics["loss:sum"] != loss  # it does see the new weights


def test_metrics_are_sums_and_means_over_trained_tokens(engine):
    rows = make_rows()
    out = engine.forward_backward(rows, SPEC)
    trained = [row.weights != 0 for row in rows]
    gaps = np.concatenate(
        [np.abs(p - row.sampling_logprobs)[t] for p, row, t in zip(out.logprobs, rows, trained, strict=True)]
    )
    assert out.metrics["tokens:sum"] == sum(len(row.tokens) for row in rows)
    assert out.metrics["trained_tokens:sum"] == sum(t.sum() for t in trained) == len(gaps)
    assert out.metrics["logprob_gap:mean"] == pytest.approx(gaps.mean(), rel=1e-12)
    assert out.metrics["logprob_gap:max"] == pytest.approx(gaps.max(), rel=1e-12)
    ratio = np.concatenate(
        [np.exp(p - row.sampling_logprobs)[t] for p, row, t in zip(out.logprobs, rows, trained, strict=True)]
    )
    assert out.metrics["ratio:mean"] == pytest.approx(ratio.mean(), rel=1e-12)


def test_rows_come_back_in_the_order_they_were_given(engine):
    rows = make_rows(count=12)
    together = engine.score(rows, 1.0).logprobs
    for row, logprobs in zip(rows, together, strict=True):
        alone = engine.score([row], 1.0).logprobs[0]
        assert alone.dtype == np.float64 and len(alone) == len(row.tokens)
        np.testing.assert_allclose(logprobs, alone, rtol=1e-12)
    assert engine.score([], 1.0).logprobs == []


def test_poison_in_untrained_positions_changes_nothing(engine):
    rows = make_rows()
    clean = engine.forward_backward(rows, SPEC)
    once = (weights_of(engine), engine.optim_step("policy", ADAM), weights_of(engine))[2]
    for bad in (np.nan, np.inf, -np.inf):
        poisoned = copy.deepcopy(rows)
        for row in poisoned:
            for field in OPTIONAL:
                getattr(row, field)[row.weights == 0] = bad
        other = make_engine(dtype="float64")
        out = other.forward_backward(poisoned, SPEC)
        other.optim_step("policy", ADAM)
        assert out.metrics == clean.metrics
        assert distance(weights_of(other), once) == 0.0


# ---- the optimizer


def test_three_steps_equal_plain_torch(tmp_path, engine):
    """Transformers' forward with whole logits, torch's AdamW and clipping; nothing of ours but the rows."""
    engine.export("policy", tmp_path / "start")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float64, attn_implementation="eager")
    start = weights_of(engine)
    with torch.no_grad():  # the export is float32
        for name, p in net.named_parameters():
            p.copy_(start[f"net.{name}"])
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=ADAM.lr, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps, weight_decay=ADAM.weight_decay
    )
    clipped = []
    for number in range(3):
        rows = make_rows(number)
        engine.forward_backward(rows[:4], SPEC)
        out = engine.forward_backward(rows[4:], SPEC)
        ours = engine.optim_step("policy", ADAM)["grad_norm:mean"]
        with precise(torch.float64):  # transformers rounds norms and rotary embeddings to float32 otherwise
            losses = [plain_loss(net, row) for row in rows]
        optimizer.zero_grad()
        sum(losses).backward()
        norm = float(torch.cat([p.grad.reshape(-1) for p in net.parameters()]).norm())
        if norm > ADAM.grad_clip_norm:  # clip_grad_norm_ would add 1e-6 to the norm
            for p in net.parameters():
                p.grad *= ADAM.grad_clip_norm / norm
        optimizer.step()
        clipped.append(norm > ADAM.grad_clip_norm)
        assert ours == pytest.approx(norm, rel=1e-10)
        assert out.metrics["loss:sum"] == pytest.approx(float(sum(losses[4:]).detach()), rel=1e-10)
        assert 0 < out.metrics["clipped:mean"] < 1
    now = weights_of(engine)
    assert any(clipped), "no step was clipped: the test shows less than it says"
    for name, p in net.named_parameters():
        torch.testing.assert_close(now[f"net.{name}"], p.detach(), rtol=0, atol=1e-10)
    assert distance(now, start) > 1e-3


def plain_loss(net, row):
    logits = net(torch.from_numpy(row.tokens)[None]).logits[0] / SPEC.temperature
    every = torch.log_softmax(logits, -1)
    logprobs = every.gather(1, torch.from_numpy(row.targets)[:, None])[:, 0]
    entropy = -(every.exp() * every).sum(-1)
    behaviour, reference, advantages, weights = (
        torch.from_numpy(x) for x in (row.sampling_logprobs, row.reference, row.advantages, row.weights)
    )
    ratio = (logprobs - behaviour).exp()
    policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    kl = (reference - logprobs).exp() - 1 - (reference - logprobs)
    return ((policy + SPEC.kl_coef * kl - SPEC.entropy_coef * entropy) * weights).sum()


def test_with_nothing_pending_the_gradient_is_zero(engine):
    start = weights_of(engine)
    metrics = engine.optim_step("policy", ADAM)
    assert metrics == {"grad_norm:mean": 0.0, "lr:mean": ADAM.lr}
    after = weights_of(engine)
    for name, p in start.items():  # no moment yet: only the decay
        torch.testing.assert_close(after[name], p * (1 - ADAM.lr * ADAM.weight_decay), rtol=1e-14, atol=0)
    plain = AdamParams(lr=1e-3)
    engine.forward_backward(make_rows(), SPEC)
    engine.optim_step("policy", plain)
    before = weights_of(engine)
    assert engine.optim_step("policy", plain)["grad_norm:mean"] == 0.0  # the gradient was used up
    assert distance(weights_of(engine), before) > 0  # momentum goes on, as in torch


def test_bfloat16_parameters_are_the_rounded_masters_and_are_sampled_from():
    engine = make_engine(dtype="bfloat16")
    context = np.array([5, 6, 7, 8])
    for number in range(3):
        engine.forward_backward(make_rows(number), SPEC)
        engine.optim_step("policy", AdamParams(lr=3e-3))
        masters = engine.models["policy"].strategy.state_dict(optimizer=True)["weights"]
        for name, p in engine.models["policy"].strategy.module.named_parameters():
            assert p.dtype == torch.bfloat16 and masters[name].dtype == torch.float32
            assert torch.equal(p, masters[name].bfloat16())
        with engine.sampling() as sampler:
            sampler.add(SampleRequest("a", context, SamplingParams(12, seed=3)))
            drawn = []
            while sampler.unfinished():
                drawn += sampler.step()
        (sample,) = drawn
        ids = np.concatenate([context, sample.tokens])
        row = Datum(ids[:-1], ids[1:], np.ones(len(ids) - 1))
        trainer = engine.score([row], 1.0).logprobs[0][len(context) - 1 :]
        assert np.abs(trainer - sample.logprobs).max() < 0.02
        assert sample.version == engine.version("policy") == number + 1
    rounded = [torch.equal(m, m.bfloat16().float()) for m in masters.values()]
    assert not all(rounded), "masters carry no more than bfloat16: small updates would be lost"


# ---- refusals and failures


def test_a_frozen_model_refuses():
    engine = make_engine()
    engine.create("reference", ModelSpec(trainable=False, copy_of="policy"))
    rows = make_rows()
    start = weights_of(engine, "reference")
    for call in (
        lambda: engine.forward_backward(rows, SPEC, model="reference"),
        lambda: engine.optim_step("reference", ADAM),
    ):
        with pytest.raises(UserError, match="model 'reference' is frozen"):
            call()
    assert distance(start, weights_of(engine)) == 0.0
    step(engine, rows)
    assert distance(weights_of(engine, "reference"), start) == 0.0
    assert distance(weights_of(engine), start) > 0.0
    assert not any(p.requires_grad for p in engine.models["reference"].strategy.module.parameters())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_names_the_row_and_changes_no_weight(bad):
    engine = make_engine("auto", "float32", "batch.max_tokens_per_microbatch=1")
    rows = make_rows()
    start = weights_of(engine)
    rows[6].advantages[rows[6].weights != 0] = bad
    with pytest.raises(RuntimeError, match=r"not finite in the micro-batch of rows row6; nothing was learned"):
        engine.forward_backward(rows, SPEC)
    with pytest.raises(RuntimeError, match="gradient is not finite .* no weight was changed"):
        engine.optim_step("policy", ADAM)
    assert distance(weights_of(engine), start) == 0.0


def test_names_and_lengths_are_checked(engine):
    with pytest.raises(UserError, match="exists already"):
        engine.create("policy", ModelSpec())
    with pytest.raises(UserError, match="no model called 'critic'; there are: policy"):
        engine.forward(make_rows(), SPEC, model="critic")
    long = Datum(np.zeros(65, np.int64), np.zeros(65, np.int64), np.ones(65), name="gsm8k/train/7")
    with pytest.raises(UserError, match="row gsm8k/train/7 has 65 tokens; at most 64 fit"):
        engine.forward([long], LossSpec("cross_entropy"))
    vocab, whole = engine.chat.vocab_size, np.arange(4)
    for tokens, targets, what in (
        ([1, vocab, 2, 3], whole, f"token {vocab} at position 1"), ([1, 2, 3, -1], whole, "token -1 at position 3"),
        (whole, [1, 2, vocab + 7, 0], f"target {vocab + 7} at position 2"),
    ):  # fmt: skip
        row = Datum(np.array(tokens), np.array(targets), np.ones(4), name="e/train/7")
        with pytest.raises(UserError, match=f"row e/train/7: {what} is outside of the vocabulary of {vocab}"):
            engine.forward_backward([row], LossSpec("cross_entropy"))
    engine.chat.vocab_size = 3  # of another model: a row's ids are held against its own
    engine.forward([Datum(whole, whole, np.ones(4))], LossSpec("cross_entropy"))
    engine.delete("policy")
    with pytest.raises(UserError, match="no model called 'policy'"):
        engine.version("policy")


# ---- state


def test_state_taken_back_continues_bit_for_bit():
    engine = make_engine()
    for number in range(2):
        step(engine, make_rows(number))
    kept = copy.deepcopy(engine.state())
    rest = [step(engine, make_rows(number))[0] for number in range(2, 4)]
    other = make_engine("auto", "float32", "seed=7")
    assert distance(weights_of(other), weights_of(engine)) > 0.1
    other.load_state(kept)
    for number in range(2, 4):
        assert distance(step(other, make_rows(number))[0], rest[number - 2]) == 0.0


def test_buffers_stay_those_of_a_fresh_model(engine):
    fresh = {n: b.clone() for n, b in engine.models["policy"].strategy.module.named_buffers()}
    assert any("inv_freq" in name for name in fresh)
    step(engine, make_rows())
    engine.load_state(copy.deepcopy(engine.state()))
    with engine.sampling():
        pass
    low = make_engine(dtype="bfloat16")
    for one in (engine, low):
        for name, buffer in one.models["policy"].strategy.module.named_buffers():
            assert buffer.dtype == fresh[name].dtype and torch.equal(buffer, fresh[name]), name


def test_a_critic_learns_its_returns():
    engine = make_engine(dtype="float64")
    engine.create("critic", ModelSpec(head="value"))
    rows = make_rows()
    for row in rows:
        row.values, row.returns = np.zeros(len(row.tokens)), np.full(len(row.tokens), 0.5)
    spec = LossSpec("value", {"clip": 0.0})
    policy = weights_of(engine)
    errors = []
    for _ in range(12):
        errors.append(engine.forward_backward(rows, spec, model="critic").metrics["value_error:mean"])
        engine.optim_step("critic", AdamParams(lr=3e-3))
    assert errors[-1] < 0.5 * errors[0]
    values = engine.score(rows, 1.0, model="critic").values
    assert [len(v) for v in values] == [len(row.tokens) for row in rows]
    assert distance(weights_of(engine), policy) == 0.0


def test_thresholds_of_some_rows_stand_beside_the_declared_defaults_of_the_others():
    rows = make_rows(count=4)
    spec = LossSpec("ppo", {}, temperature=0.9)
    engine = make_engine()
    plain = engine.forward_backward(rows, spec)
    rows[1].clip_low, rows[1].clip_high = (np.full(len(rows[1].tokens), 0.2) for _ in range(2))
    assert engine.forward_backward(rows, spec).metrics == plain.metrics
