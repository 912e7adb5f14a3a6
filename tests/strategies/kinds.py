"""Strategies by a short name for tests, engines over them, and what all of them have to agree on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import ADAM, SPEC, dealt, make_engine, make_rows, weights_of
from torch.distributed.fsdp import FSDPModule

from skyrl.checkpoint.checkpointer import Checkpointer
from skyrl.engine import Engine
from skyrl.types import SampleRequest, SamplingParams

# "+": strategy.offload; "/": strategy.shard_size.
KINDS = (
    "ddp fsdp fsdp+all hsdp/2 hsdp/2+all zero1 zero1+optimizer zero2 zero2+optimizer zero3 zero3+optimizer zero3+all"
).split()
if not hasattr(FSDPModule, "set_gradient_divide_factor"):  # torch 2.7, which cannot sum over copies on a CPU
    KINDS = [kind for kind in KINDS if not kind.startswith("hsdp")]
needs_hsdp = pytest.mark.skipif("hsdp/2" not in KINDS, reason="this torch cannot sum over copies on a CPU")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


def options_of(kind: str) -> list[str]:
    """strategy.* options of `kind`; "single" and "ddp" are what the world says."""
    name, _, offload = kind.partition("+")
    name, _, shards = name.partition("/")
    options = [f"strategy.name={'auto' if name in ('single', 'ddp') else name}"]
    options += [f"strategy.offload={offload}"] if offload else []
    return options + ([f"strategy.shard_size={shards}"] if shards else [])


def engine_of(kind: str, dtype: str = "float32", *overrides: str) -> Engine:
    """An engine with a policy under `kind`."""
    name, *options = options_of(kind)
    return make_engine(name.partition("=")[2], dtype, "batch.max_tokens_per_microbatch=60", *options, *overrides)


def train(engine: Engine, first: int, last: int, *, lr: float = ADAM.lr) -> list[float]:
    """Steps first to last - 1, each in two calls over this rank's share; gradient norms."""
    norms = []
    for number in range(first, last):
        rows = make_rows(number)
        for part in (rows[:4], rows[4:]):
            engine.forward_backward(dealt(part, engine), SPEC)
        norms.append(engine.optim_step("policy", ADAM)["grad_norm:mean"])
    return norms


def draw(engine: Engine, count: int = 4) -> list[list[int]]:
    """Tokens that every rank draws for the same requests."""
    with engine.sampling() as sampler:
        for i in range(count):
            sampler.add(SampleRequest(str(i), np.arange(4, 9 + i), SamplingParams(16, temperature=0.9, seed=i)))
        done = {}
        while sampler.unfinished():
            done.update({sample.uid: sample.tokens.tolist() for sample in sampler.step()})
    return [done[str(i)] for i in range(count)]


def checkpointer(engine: Engine, folder: str) -> Checkpointer:
    """A blocking one over the engine's ranks."""
    world = engine.world
    return Checkpointer(
        Path(folder),
        keep_last=0,
        keep_best=False,
        async_save=False,
        rank=world.rank,
        world_size=world.size,
        group=world.saving if world.size > 1 else None,
    )


def equal_body(kinds: list[str], steps: int) -> dict[str, Any]:
    """kind -> (weights after some steps, norms, tokens drawn), one engine after the other in one world."""
    found = {}
    for kind in kinds:
        engine = engine_of(kind)
        norms = train(engine, 0, steps)
        found[kind] = (weights_of(engine), norms, draw(engine))
    return found


def link_body(kind: str, folder: str, number: int) -> tuple[Any, list[float]]:
    """Goes on from checkpoint `number` - 1, if there is one, makes step `number` and saves it under that number."""
    engine = engine_of(kind)
    saver = checkpointer(engine, folder)
    if number > 0:
        state = engine.state()
        assert saver.load(Path(folder) / f"{number - 1:06d}", state) == {"step": number - 1}
        engine.load_state(state)
    norms = train(engine, number, number + 1)
    saver.save(f"{number:06d}", engine.state(), {"step": number}, score=None, block=True)
    return weights_of(engine), norms
