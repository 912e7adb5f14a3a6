"""The proof of weights passes on every layout, and names what was changed behind the engine's back."""

import pytest
import torch
from gloo import run_ranks
from small import ADAM, SPEC, dealt, make_engine, make_rows

from skyrl.evaluation import weight_check
from skyrl.types import RunError


def proved(engine, step=0):
    with engine.sampling() as sampler:
        probe = weight_check.sample_probe(engine, sampler, step)
    weight_check.check_copies(engine)
    return weight_check.check_probe(engine, probe), probe


def learn(engine):
    engine.forward_backward(dealt(make_rows(), engine), SPEC)
    engine.optim_step("policy", ADAM)


def refused(action):
    try:
        action()
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_sound_engine_passes_after_every_update(dtype):
    engine = make_engine(dtype=dtype)
    first, probe = proved(engine)
    learn(engine)
    second, again = proved(engine)
    limit = weight_check.LIMITS[engine.dtype]
    assert max(first, second) < limit / 3
    assert [list(a) for a in probe.prompts] == [list(b) for b in again.prompts]  # fixed
    assert len({tuple(p) for p in probe.prompts}) == weight_check.PROBES


def test_a_sampler_with_other_weights_is_found():
    engine = make_engine()
    with engine.sampling() as sampler:
        probe = weight_check.sample_probe(engine, sampler, 0)
    with torch.no_grad():
        next(engine.models["policy"].strategy.module.parameters()).mul_(1.5)
    text = refused(lambda: weight_check.check_probe(engine, probe))
    assert "the sampler does not draw from the trained weights: on rank 0" in text and "worst: sequence" in text


def _one_rank_differs(strategy):
    engine = make_engine(strategy)
    gap, _ = proved(engine)
    learn(engine)
    assert max(gap, proved(engine)[0]) < 1e-4
    module = engine.models["policy"].strategy.module
    name, parameter = list(module.named_parameters())[3]
    if engine.world.rank == 1:
        with torch.no_grad():
            if strategy == "ddp":
                parameter.view(-1)[5] += 1e-3
            else:  # what is handed over is not what the shards hold
                whole = engine.models["policy"].strategy.gathered()
                dict(whole.named_parameters())[name].view(-1)[5] += 1e-3
    return name, refused(lambda: weight_check.check_copies(engine))


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_differs_is_named_with_its_tensor(strategy):
    for name, text in run_ranks(2, _one_rank_differs, strategy):
        assert text.startswith("rank 1 would draw from other weights than") and f"first in {name};" in text
