"""A reference that moves: what it holds, in every layout, and after a resume."""

import pytest
import torch
from gloo import run_ranks
from loop import run_loop
from small import ADAM, SPEC, dealt, distance, make_engine, make_rows, weights_of

from skyrl.engine import ModelSpec
from skyrl.tracking.base import without_wall_clock
from skyrl.types import UserError

MOVES = [
    "algorithm.kl.coef=0.1",
    "algorithm.kl.estimator=k2",
    "algorithm.reference.sync_every=2",
    "algorithm.reference.ema=0.2",
    "debug.deterministic=true",
]


def learned(record):
    """What a step computed, but for an evaluation that a run makes at its end."""
    return {k: v for k, v in without_wall_clock(record).items() if not k.startswith("eval/")}


def averages(kind, dtype, ema, steps=6):
    """Weights of the reference after every step, by the engine and by hand in float64, and as it computes."""
    engine = make_engine(kind, dtype)
    engine.create("reference", ModelSpec(trainable=False, copy_of="policy", averaged=True))
    mean = {n: t.double() for n, t in weights_of(engine).items()}
    for number in range(steps):
        engine.forward_backward(dealt(make_rows(number), engine), SPEC)
        engine.optim_step("policy", ADAM)
        engine.sync("reference", "policy", ema)
        now = weights_of(engine)
        mean = {n: ema * t + (1 - ema) * now[n].double() for n, t in mean.items()}
    computes = {
        n: t.detach().float().cpu() for n, t in engine.models["reference"].strategy.gathered().named_parameters()
    }
    return weights_of(engine, "reference"), mean, computes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_of_the_policies_is_kept_precisely(dtype):
    found, mean, computes = averages("auto", dtype, 0.9)
    assert distance(found, mean) < 3e-7  # rounding of float32; bfloat16 alone would be 1e-3 off
    for name, tensor in computes.items():
        assert torch.equal(tensor, found[name].to(getattr(torch, dtype)).float())
    start = weights_of(make_engine("auto", dtype))
    assert 1e-5 < distance(found, start)
    copied, _, _ = averages("auto", dtype, 0.0, steps=1)
    assert distance(copied, found) > 1e-5


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero2"])
def test_every_layout_has_the_same_mean(kind):
    if kind == "zero2":
        pytest.importorskip("deepspeed")
    want, _, _ = averages("auto", "float32", 0.9)
    found, _, _ = run_ranks(2, averages, "auto" if kind == "ddp" else kind, "float32", 0.9)[0]
    assert distance(found, want) < 1e-6


@pytest.mark.slow
def test_a_resumed_run_has_the_same_reference(tmp_path):
    whole = run_loop(tmp_path / "whole", *MOVES, "batch.num_steps=5")
    synced = [record.get("kl/reference_synced:sum", 0.0) for record in whole.rl]
    assert synced == [0.0, 1.0, 0.0, 1.0, 0.0]
    kl = [record["kl_reference:mean"] for record in whole.rl]
    assert kl[0] < 1e-9 and kl[2] < kl[1] and kl[4] < kl[3], "the reference came nearer"
    run_loop(tmp_path / "parts", *MOVES, "batch.num_steps=3")
    parts = run_loop(tmp_path / "parts", *MOVES, "batch.num_steps=5")
    for a, b in zip(whole.rl, parts.rl, strict=True):
        assert learned(a) == learned(b)


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_move_it_alike(tmp_path):
    one, two = (run_loop(tmp_path / str(n), *MOVES, "batch.num_steps=4", size=n) for n in (1, 2))
    for a, b in zip(one.rl, two.rl, strict=True):
        assert a["kl/behaviour_reference:mean"] == pytest.approx(b["kl/behaviour_reference:mean"], rel=1e-3, abs=1e-6)


def test_a_reference_that_is_not_there_ends_the_run_before_any_work(tmp_path):
    given = ["algorithm.kl.coef=0.1", "algorithm.kl.estimator=k2", "warmup.num_steps=3"]
    with pytest.raises(UserError, match=r"^algorithm.reference.models: no/such: .*no/such"):
        run_loop(tmp_path / "run", *given, "algorithm.reference.models={no/such: 0.5}")
    assert "warmup" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_several_references_count_by_their_weights(tmp_path):
    """In one step on the same rows: the log-probabilities that the loss sees are the weighted means."""
    other = tmp_path / "other"
    make_engine("auto", "float32", "seed=5").export("policy", other)
    more = ["algorithm.kl.coef=0.1", "algorithm.kl.estimator=k2", "batch.num_steps=1"]
    seen = {}
    for weight in (0.0, 0.3, 1.0):
        models = [f"algorithm.reference.models={{{other}: {weight}}}"] if weight else []
        run = run_loop(tmp_path / str(weight), *more, *models)
        seen[weight] = run.updates()[0]
    for name, row in seen[0.3].items():
        trained = row.weights != 0
        own, theirs = seen[0.0][name].reference[trained], seen[1.0][name].reference[trained]
        assert abs(own - theirs).max() > 0.01
        assert abs(row.reference[trained] - (0.7 * own + 0.3 * theirs)).max() < 1e-6
