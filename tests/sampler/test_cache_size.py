"""The size of the KV cache on a GPU: the smaller of the plan's and what training leaves, the same at every step."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from skyrl.config.load import load_config
from skyrl.config.schema import SamplerConfig
from skyrl.planner.memory import GIB, SPARE, ModelSizes, estimate
from skyrl.sampler import make
from skyrl.sampler.cache_size import gpu_blocks, num_blocks
from skyrl.types import UserError
from tests.sampler.tools import prompts, qwen3, requests, run, sampler

SMALL = ModelSizes("1.5B", 1_540_000_000, 1_540_000_000, 28, 1536, 8960, 12, 2, 128, 151936, 32768)
BLOCK = 256 * SMALL.cache_bytes_per_token("bfloat16")
OURS = int(79.1 * GIB)


@cache
def config_of(*options):
    return load_config(["experiment=gsm8k", "model.path=/x", "data.path=/x", *options])


def plan_of(*options, strategy="single", world_size=1, keep=True, row_tokens=1024):
    memory = estimate(
        config_of(*options), SMALL, world_size=world_size, dtype="bfloat16", strategy=strategy, device="cuda",
        row_tokens=row_tokens,
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


def blocks_of(memory, max_length=1024, **options):
    said, device = [], torch.device("cuda", 0)
    blocks = num_blocks(SamplerConfig(**options), BLOCK, 256, 1 << 18, max_length, device, memory, said.append)
    return blocks, said


def test_the_cache_is_the_plans_where_training_leaves_as_much(monkeypatch):
    memory = plan_of()
    Allocator(monkeypatch).hold(memory.resident)
    assert blocks_of(memory) == (memory.cache // BLOCK, [])
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


@pytest.mark.parametrize("tokens", [16, 256, 1024])
@pytest.mark.parametrize("row", [100, 257, 300, 2048])
def test_the_smallest_cache_holds_one_row_and_the_whole_one_all_rows(tokens, row):
    memory, each = plan_of(row_tokens=row), tokens * SMALL.cache_bytes_per_token("bfloat16")
    pages, said = -(-row // tokens), []
    whole = gpu_blocks(OURS, OURS - memory.resident, each, tokens, row, memory, said.append)
    assert whole == 256 * pages and said == []
    short = memory.beside_cache + memory.least_cache  # without anything to spare
    assert gpu_blocks(short, short - memory.resident, each, tokens, row, memory, said.append) == pages
    assert said[0].startswith(f"one row of {row} tokens needs {(pages + 1) * each / GIB:.2f} GiB of KV cache, there ")
    assert said[0].endswith("then try sampler.keep_memory=never, fewer batch.max_tokens_per_microbatch, or "
                            "strategy.name=fsdp over more ranks") and len(said) == 1  # fmt: skip
    room = memory.drawing + (pages + 1) * each
    assert gpu_blocks(short, room, each, tokens, row, memory, said.append) == pages
    with pytest.raises(UserError, match="^out of memory for sampling: one row of "):
        gpu_blocks(short, room - 1, each, tokens, row, memory, said.append)


def test_a_request_of_the_longest_row_is_admitted_after_the_warning(monkeypatch):
    memory, said = plan_of(row_tokens=64), []
    short = memory.beside_cache

    def on_a_full_gpu(cfg, each, tokens, max_running, max_length, device, plan, warn):
        need = replace(memory, cache=each * 32, least_cache=each * 64 // tokens)
        return gpu_blocks(short, short - memory.resident, each, tokens, max_length, need, said.append)

    monkeypatch.setattr(make, "num_blocks", on_a_full_gpu)
    run(sampler(qwen3(), max_length=64, block_tokens=16), requests(prompts(1, low=20), max_tokens=64))
    assert len(said) == 1 and said[0].startswith("one row of 64 tokens")


def test_a_cache_without_room_for_the_longest_row_is_said(monkeypatch):
    memory = plan_of()
    Allocator(monkeypatch, total=int((memory.beside_cache + 0.1 * GIB) / (1 - SPARE))).hold(memory.resident)
    blocks, (line,) = blocks_of(memory, max_length=32768)
    assert 4 <= blocks < 15
    assert line == (f"a KV cache of {blocks * 256} tokens takes no longer rows; lower batch.max_row_tokens (32768)")


def test_a_server_without_room_is_said_or_refused(monkeypatch):
    row = 5 * BLOCK  # one of 1024 tokens, and the padding's block
    for free, blocks, begins in ((2 * row, 4, []), (2 * row - 2, 4, ["one row of 1024 tokens"]), (row, 4, ["one row"])):
        device = Allocator(monkeypatch)
        device.hold(OURS - free)
        found, said = blocks_of(None)
        assert found == blocks and [line.startswith(*begins) for line in said] == [True] * len(begins)
    for free in (row - 1, 0, -GIB):
        device.hold(OURS - free)
        with pytest.raises(UserError, match="^out of memory for sampling: one row of 1024 tokens needs 0.03 GiB"):
            blocks_of(None)
