"""Muon and AdamW in 8 bits: against plain references, over ranks, and through checkpoints."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from gloo import run_ranks
from kinds import checkpointer, engine_of, needs_hsdp
from small import ADAM, SPEC, dealt, distance, make_engine, make_rows, weights_of

from skyrl.strategies.optimizers import matrix_names, orthogonal

MUON, EIGHT = "optim.name=muon", "optim.name=adamw8bit"
STEP = replace(ADAM, lr=3e-3, grad_clip_norm=0.5, momentum=0.9)


def newton_schulz(matrix):
    """The published iteration, in float64."""
    x = matrix.double().numpy()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (np.sqrt((x * x).sum()) + 1e-7)  # as the published code; torch.optim.Muon holds the norm above 1e-7
    for _ in range(5):
        y = x @ x.T
        x = 3.4445 * x + (-4.7750 * y + 2.0315 * (y @ y)) @ x
    return torch.from_numpy(x.T if tall else x)


def learn(kind, dtype="float32", *options, steps=4, save="", load="", first=0):
    """Weights after some steps, with a checkpoint after them or before them."""
    engine = engine_of(kind, dtype, *options)
    if load:
        state = engine.state()
        checkpointer(engine, load).load(next(iter(sorted(checkpointer(engine, load).folder.iterdir()))), state)
        engine.load_state(state)
    for number in range(first, first + steps):
        engine.forward_backward(dealt(make_rows(number), engine), SPEC)
        engine.optim_step("policy", STEP)
    if save:
        checkpointer(engine, save).save("000001", engine.state(), {"step": 1}, score=None, block=True)
    return weights_of(engine)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (5, 5), (3, 6, 4)])
def test_the_iteration_makes_a_matrix_nearly_orthogonal(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3
    found = orthogonal(matrix)
    for one, made in zip(matrix.view(-1, *shape[-2:]), found.view(-1, *shape[-2:]), strict=True):
        assert (made - newton_schulz(one)).abs().max() < 1e-12
        values = torch.linalg.svdvals(made)
        assert 0.6 < values.min() and values.max() < 1.3
    assert not orthogonal(torch.zeros(shape)).any()
    if hasattr(torch.optim, "Muon") and len(shape) == 2:  # the peer computes in bfloat16
        theirs = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        theirs.grad = matrix
        torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
        assert (theirs.detach() / (-0.2 * max(shape) ** 0.5) - found).abs().max() < 0.05


def test_muon_steps_matrices_and_adamw_the_rest():
    """Against a float64 reference of both, from the gradients as they are summed."""
    engine = make_engine("auto", "float64", MUON)
    module = engine.models["policy"].strategy.module
    names = matrix_names(module)
    kinds = {name.rsplit(".", 2)[-2] for name in names}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    weights = {n: t.clone() for n, t in weights_of(engine).items()}
    means = {n: torch.zeros_like(t) for n, t in weights.items()}
    squares = {n: torch.zeros_like(t) for n, t in weights.items()}
    for number in range(3):
        engine.forward_backward(make_rows(number), SPEC)
        grads = {n: p.grad.clone() for n, p in module.named_parameters()}
        norm = sum(float(g.square().sum()) for g in grads.values()) ** 0.5
        assert engine.optim_step("policy", STEP)["grad_norm:mean"] == pytest.approx(norm, rel=1e-12)
        for name, g in grads.items():
            g = g * min(1.0, 0.5 / norm)
            w = weights[name] * (1 - STEP.lr * STEP.weight_decay)
            if name in names:
                means[name] = 0.9 * means[name] + 0.1 * g
                ahead = 0.1 * g + 0.9 * means[name]
                weights[name] = w - STEP.lr * 0.2 * max(w.shape) ** 0.5 * newton_schulz(ahead)
                continue
            means[name] = STEP.beta1 * means[name] + (1 - STEP.beta1) * g
            squares[name] = STEP.beta2 * squares[name] + (1 - STEP.beta2) * g * g
            first, second = 1 - STEP.beta1 ** (number + 1), 1 - STEP.beta2 ** (number + 1)
            weights[name] = w - STEP.lr * (means[name] / first) / ((squares[name] / second).sqrt() + STEP.eps)
    assert distance(weights_of(engine), weights) < 1e-12
    state = engine.state()["policy"]
    assert names == state["exp_avg"].keys() - state["exp_avg_sq"].keys()


def on_kinds(kinds, dtype):
    """kind -> weights after some steps by Muon, one engine after the other in one world."""
    return {kind: learn(kind, dtype, MUON) for kind in kinds}


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_and_copies_learn_what_one_process_does(dtype):
    alone = learn("single", dtype, MUON)
    assert distance(alone, learn("single", dtype)) > 1e-3, "the optimizers do the same: the test shows nothing"
    for found in run_ranks(2, on_kinds, ["ddp", "fsdp", "fsdp+all"], dtype):
        for kind, weights in found.items():
            assert not weights or distance(weights, alone) < (1e-5 if dtype == "float32" else 2e-3), kind


@pytest.mark.ranks
@pytest.mark.slow
@needs_hsdp
def test_four_ranks_in_two_copies_learn_the_same():
    (found, *_) = run_ranks(4, on_kinds, ["hsdp/2"], "float32")
    assert distance(found["hsdp/2"], learn("single", "float32", MUON)) < 1e-5


@pytest.mark.parametrize("options", [[MUON], pytest.param([EIGHT], marks=pytest.mark.slow)], ids=["muon", "adamw8bit"])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_resumed_run_is_the_same_bit_for_bit(options, dtype, tmp_path):
    if EIGHT in options:
        pytest.importorskip("bitsandbytes")
    whole = learn("single", dtype, *options, steps=4)
    learn("single", dtype, *options, steps=2, save=str(tmp_path))
    parts = learn("single", dtype, *options, steps=2, load=str(tmp_path), first=2)
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


@pytest.mark.ranks
@pytest.mark.slow
def test_a_checkpoint_of_muon_goes_from_copies_to_shards(tmp_path):
    run_ranks(2, save_body, str(tmp_path))
    whole = learn("single", "float32", MUON, steps=4)
    found = run_ranks(2, load_body, str(tmp_path))[0]
    assert distance(found, whole) < 1e-5


def save_body(folder):
    learn("ddp", "float32", MUON, steps=2, save=folder)


def load_body(folder):
    return learn("fsdp", "float32", MUON, steps=2, load=folder, first=2)


@pytest.mark.slow
def test_eight_bits_are_near_to_adamw():
    pytest.importorskip("bitsandbytes")
    start = weights_of(make_engine("auto", "float32"))
    exact, found = learn("single", "float32"), learn("single", "float32", EIGHT)
    moved, apart = distance(exact, start), distance(found, exact)
    assert 0 < apart < 0.2 * moved
    engine = engine_of("single", "float32", EIGHT)
    kept = engine.state()["policy"]["quantised"]
    assert kept["state1"].dtype == torch.uint8 and len(kept["absmax1"]) == -(-len(kept["state1"]) // 256)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[MUON], [EIGHT]], ids=["muon", "adamw8bit"])
def test_an_update_that_is_not_finite_is_taken_back(options):
    if EIGHT in options:
        pytest.importorskip("bitsandbytes")
    engine = make_engine("auto", "float32", *options)
    engine.forward_backward(make_rows(0), SPEC)
    engine.optim_step("policy", STEP)
    before = {k: t.clone() for k, t in flat(engine.state())}
    engine.forward_backward(make_rows(1), SPEC)
    with pytest.raises(Exception, match="the update is not finite"):
        engine.optim_step("policy", replace(STEP, lr=3e38))
    for key, tensor in flat(engine.state()):
        assert torch.equal(tensor, before[key]), key


def flat(state):
    """(path, tensor) of a nested state."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{path}", tensor) for path, tensor in flat(value))
        elif isinstance(value, torch.Tensor):
            yield key, value


def test_every_order_of_the_weights_has_each_once():
    strategy = make_engine("auto", "float32", MUON).models["policy"].strategy
    spans = sorted(strategy._spans.values())
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))
    assert {n for n, _ in strategy._named} == {n for n, _ in strategy.module.named_parameters()}
