"""The whole copy that is sampled from under sharding: never stale, in place, gathered only where weights have changed,
gone when it is freed. One rank of fsdp, where shards and copy are already two things; zero3: test_zero.py."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from small import make_engine, make_rows, small_config, weights_of

from skyrl.distributed.init import init_distributed
from skyrl.engine import Engine, ModelSpec
from skyrl.strategies.fsdp import FSDPStrategy
from skyrl.types import AdamParams, LoraSpec, LossSpec, SampleRequest, SamplingParams

LORA = LoraSpec(rank=4)
CHANGES = {
    "a step": lambda engine, kept: engine.optim_step("policy", AdamParams(lr=0.01)),
    "a checkpoint": lambda engine, kept: engine.load_state(kept),
    "a saved model": lambda engine, kept: engine.load_model_state("policy", kept["whole"], optimizer=False),
    "a copy": lambda engine, kept: engine.models["policy"].copy_weights(engine.models["reference"]),
}


def draw(engine, model="policy"):
    """One sample of `model`; and the sampler."""
    with engine.sampling(model) as sampler:
        sampler.add(SampleRequest("a", np.arange(4, 9), SamplingParams(12, temperature=0.9, seed=1)))
        (sample,) = [done for _ in range(20) for done in sampler.step()]
    return sample, sampler


def handed(engine, model="policy"):
    """Every weight of the copy, by name."""
    return dict(engine.models[model].strategy.gathered().named_parameters())


def lora_engine(*overrides):
    """A frozen base under fsdp, and an adapter over it."""
    cfg = small_config("strategy.name=fsdp", *overrides)
    engine = Engine(cfg, init_distributed(cfg), dtype="float32", strategy="fsdp", max_row_tokens=64)
    engine.create("base", ModelSpec(trainable=False))
    engine.create("policy", ModelSpec(lora=LORA, base="base"))
    return engine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_after_every_change_of_the_weights_the_copy_and_the_sampler_have_the_new_ones(dtype):
    engine = make_engine("fsdp", dtype)
    engine.create("reference", ModelSpec(trainable=False, copy_of="policy"))
    kept = copy.deepcopy(engine.state())
    kept["whole"] = engine.model_state("policy", optimizer=False)
    places = {name: p.data_ptr() for name, p in handed(engine).items()}
    first, sampler = draw(engine)
    for what, change in CHANGES.items():
        engine.forward_backward(make_rows(count=2), LossSpec("cross_entropy"))
        engine.optim_step("policy", AdamParams(lr=0.01))
        assert draw(engine)[0].logprobs[0] != first.logprobs[0], what
        change(engine, kept)
        masters = weights_of(engine)
        for name, p in handed(engine).items():
            assert torch.equal(p, masters[name].to(p.dtype)), (what, name)
            assert p.data_ptr() == places[name], "graphs hold addresses"
        again, same = draw(engine)
        assert same is sampler
        if what != "a step":  # the weights of the start
            assert np.array_equal(again.logprobs, first.logprobs), what


def test_a_copy_is_gathered_only_when_weights_have_changed_and_a_frozen_one_once(monkeypatch):
    count, gather = [], FSDPStrategy._gather
    monkeypatch.setattr(FSDPStrategy, "_gather", lambda self, targets: (count.append(0), gather(self, targets))[1])
    engine = make_engine("fsdp")
    draw(engine), draw(engine), handed(engine)
    assert len(count) == 1  # when it was checked
    engine.optim_step("policy", AdamParams(lr=0.01))
    draw(engine), draw(engine)
    assert len(count) == 2
    count.clear()
    engine = lora_engine()
    one, sampler = draw(engine)
    for _ in range(2):
        engine.forward_backward(make_rows(), LossSpec("cross_entropy"))
        engine.optim_step("policy", AdamParams(lr=0.1))
        other, same = draw(engine)
        assert same is sampler and other.logprobs[0] != one.logprobs[0]
        one = other
    assert len(count) == 1


def test_an_open_base_goes_on_with_other_weights_in_place():
    engine = lora_engine()
    opened = engine.open_sampler("base")
    weights = engine.model_state("base", optimizer=False)["weights"]
    engine.replace_base("base", {name: 2 * t for name, t in weights.items()})
    assert engine.open_sampler("base") is opened and opened.sampler.version == 1
    for name, p in opened.module.named_parameters():
        assert torch.equal(p, 2 * weights[name])


def make_sharded(*overrides):
    """A policy under fsdp."""
    return make_engine("fsdp", "bfloat16", *overrides)


MODULE, CHECKPOINTED = "sampler.backend=module", "model.activation_checkpointing=true"


@pytest.mark.parametrize("options", [[], [MODULE, CHECKPOINTED]], ids=["fused", "module, checkpointed"])
@pytest.mark.parametrize("make", [make_sharded, lora_engine], ids=["whole", "adapter"])
def test_what_sampling_held_is_gone_without_the_cyclic_collector(make, options):
    engine = make(*options)
    engine.keeps_sampling = False
    base = "base" if "base" in engine.models else "policy"
    gc.collect()
    gc.disable()
    try:
        with engine.sampling() as sampler:
            sampler.add(SampleRequest("a", np.arange(5), SamplingParams(3)))
            while sampler.unfinished():
                sampler.step()
            held = {name: weakref.ref(p) for name, p in handed(engine, base).items()}
            held["the cache"] = weakref.ref(sampler._cache.keys[0])
        del sampler
        assert [name for name, one in held.items() if one() is not None] == []
        held = {name: weakref.ref(p) for name, p in handed(engine, base).items()}  # as a check of the weights does
        engine.forward_backward(make_rows(count=2), LossSpec("cross_entropy"))
        assert [name for name, one in held.items() if one() is not None] == []
    finally:
        gc.enable()


def test_a_model_that_is_deleted_is_gone_without_the_cyclic_collector():
    engine = make_engine("single", "bfloat16", CHECKPOINTED)
    draw(engine)
    engine.forward_backward(make_rows(count=2), LossSpec("cross_entropy"))
    gc.collect()
    gc.disable()
    try:
        held = {name: weakref.ref(p) for name, p in engine.models["policy"].strategy.module.named_parameters()}
        engine.delete("policy")
        assert [name for name, one in held.items() if one() is not None] == []
    finally:
        gc.enable()
