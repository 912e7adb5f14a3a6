"""What an unfinished request has so far, and a sampler that goes on after a model that was not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from skyrl.sampler.runners.cpu_kernels import library
from skyrl.types import RunError
from tests.sampler.tools import adapter, check_pool, prompts, qwen3, requests, run, sampler

BLOCK_GIB = 3 * 2 * 2 * 16 * 4 * 16 / 2**30  # one block of qwen3()


@pytest.fixture(params=["module", "fused"])
def backend(request):
    if request.param == "fused" and (why := library()[1]):
        pytest.skip(why)
    return request.param


def test_partial_tokens_are_a_growing_beginning_of_the_sample(backend):
    """After every step, with preemptions: no token is missing once a step has drawn it."""
    model, asked = qwen3(), requests(prompts(6), samples=3)
    whole = run(sampler(model, backend=backend), asked)
    engine = sampler(model, backend=backend, kv_cache_gib=10 * BLOCK_GIB, max_running=7)
    known = {request.uid: 0 for request in asked}
    for request in asked:
        engine.add(request)
    looks = 0
    while engine.unfinished():
        done = {sample.uid for sample in engine.step()}
        drawing = 0
        for uid, before in known.items():
            found = engine.partial(uid).tolist()
            if uid in done or uid not in engine._sequences:
                assert found == []
                continue
            assert len(found) >= before and found == whole[uid].tokens.tolist()[: len(found)]
            known[uid], drawing = len(found), drawing + (len(found) > before)
        looks += drawing
    total = sum(len(sample.tokens) for sample in whole.values())
    assert looks == total - len(asked)  # each token but the last of each was seen one step after it was drawn
    assert engine.metrics()["sampler/preemptions:sum"] > 0
    assert engine.partial("never").shape == (0,)


def test_after_a_model_that_is_not_finite_the_next_draws_are_right(backend):
    model, asked = qwen3(), requests(prompts(4), samples=2)
    engine = sampler(model, backend=backend)
    weight = model.state_dict()[next(name for name in model.state_dict() if "v_proj" in name)]
    before = weight.clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    engine.refresh(1)
    for request in asked:
        engine.add(request)
    with pytest.raises(RunError, match="not finite"):
        while engine.unfinished():
            engine.step()
    assert set(engine.abandon()) == {request.uid for request in asked} and engine.unfinished() == 0
    check_pool(engine._scheduler.pool)
    assert engine._scheduler.pool.held() == 0
    with torch.no_grad():
        weight.copy_(before)
    engine.refresh(2)
    fresh = run(sampler(qwen3(), backend=backend), asked)
    for uid, sample in run(engine, asked).items():
        np.testing.assert_array_equal(sample.tokens, fresh[uid].tokens)


def test_abandon_with_adapters_leaves_nothing_behind():
    model = qwen3()
    adapters = {"a": adapter(model, "a")}
    engine = sampler(model, adapters=adapters)
    for request in requests(prompts(3), samples=2, model="a"):
        engine.add(request)
    engine.step()
    assert len(engine.abandon()) == 6
    engine.forget_adapter("a")  # nothing uses it any more
