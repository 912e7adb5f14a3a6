"""The size of the KV cache on a GPU: the smaller of the plan's and what training leaves, the same at every step."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from skyrl.config.load import load_config
from skyrl.config.schema import SamplerConfig
from skyrl.planner.memory import GIB, SPARE, ModelSizes, estimate
from skyrl.sampler.cache_size import gpu_budget, num_blocks
from skyrl.types import UserError

SMALL = ModelSizes("1.5B", 1_540_000_000, 1_540_000_000, 28, 1536, 8960, 12, 2, 128, 151936, 32768)
BLOCK = 256 * SMALL.cache_bytes_per_token("bfloat16")
OURS = int(79.1 * GIB)


@cache
def config_of(*options):
    return load_config(["experiment=gsm8k", "model.path=/x", "data.path=/x", *options])


def plan_of(*options, strategy="single", world_size=1, keep=True):
    memory = estimate(
        config_of(*options), SMALL, world_size=world_size, dtype="bfloat16", strategy=strategy, device="cuda",
        row_tokens=1024,
    )  # fmt: skip
    return replace(memory, keeps_sampling=keep)


class Allocator:
    """What torch.cuda says of memory: segments that a phase took stay reserved until the cache of them is emptied."""

    def __init__(self, monkeypatch, total=OURS):
        self.total, self.reserved, self.allocated = total, 0, 0
        for name in ("memory_reserved", "memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda device, name=name[7:]: getattr(self, name))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.total - self.reserved, self.total))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)  # fragments may keep every segment

    def hold(self, size):
        self.allocated = size
        self.reserved = max(self.reserved, size)


def blocks_of(memory, **options):
    said = []
    blocks = num_blocks(SamplerConfig(**options), BLOCK, 256, 1 << 20, torch.device("cuda", 0), memory, said.append)
    return blocks, said


def test_the_cache_is_the_plans_where_training_leaves_as_much(monkeypatch):
    memory = plan_of()
    Allocator(monkeypatch).hold(memory.resident)
    assert blocks_of(memory) == (memory.cache // BLOCK - 1, [])
    assert memory.cache < 10 * GIB  # half of what is free would be 26 GiB, for a rollout that fills 7


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "zero3"])
@pytest.mark.parametrize("keep", [True, False])
def test_both_phases_fit_beside_each_other_and_the_size_is_that_of_the_first_step(strategy, keep, monkeypatch):
    options = ("batch.max_tokens_per_microbatch=16384", "batch.prompts_per_step=2048", "sampler.max_running=2048")
    memory = plan_of(*options, strategy=strategy, world_size=1 if strategy == "single" else 8, keep=keep)
    device = Allocator(monkeypatch)
    found = []
    for _ in range(2):
        device.hold(memory.resident + memory.gathered)
        found.append(blocks_of(memory)[0])
        kept = (found[-1] + 1) * BLOCK + memory.gathered if memory.keeps_sampling else 0
        device.hold(memory.training + kept)
        assert device.allocated <= OURS
    assert len(set(found)) == 1
    assert (found[0] + 1) * BLOCK > 0.9 * (min(memory.cache, (1 - SPARE) * OURS - memory.beside_cache))


def test_without_a_plan_half_of_what_could_be_had_also_after_training(monkeypatch):
    device, found = Allocator(monkeypatch), []
    for _ in range(2):
        device.hold(12 * GIB)
        found.append(blocks_of(None)[0])
        device.hold(40 * GIB)
    assert found == [(OURS - 12 * GIB) // 2 // BLOCK - 1] * 2


def test_what_is_asked_for_wins(monkeypatch):
    Allocator(monkeypatch)
    assert blocks_of(plan_of(), kv_cache_gib=1.0) == (GIB // BLOCK - 1, [])
    with pytest.raises(UserError, match="one block of 256 tokens takes 0.0068.* allowed: two blocks or more"):
        blocks_of(plan_of(), kv_cache_gib=0.005)


def test_too_little_is_said_or_refused():
    memory, said = plan_of(), []
    short = memory.beside_cache + memory.least_cache  # without anything to spare
    assert gpu_budget(short, short - memory.resident, memory, said.append) == memory.least_cache
    assert said[0].startswith("one row needs 0.03 GiB of KV cache, training leaves 0.00 of ")
    assert said[0].endswith("then try sampler.keep_memory=never, fewer batch.max_tokens_per_microbatch, or "
                            "strategy.name=fsdp over more ranks")  # fmt: skip
    with pytest.raises(UserError, match="^out of memory for sampling: one row needs 0.03 GiB"):
        gpu_budget(short, memory.drawing, memory, said.append)
