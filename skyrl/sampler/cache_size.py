"""How many blocks the KV cache has: what the options say, or the smaller of the plan's and what training leaves."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from skyrl.config.schema import SamplerConfig
from skyrl.planner.memory import GIB, SPARE, MemoryEstimate
from skyrl.types import UserError

REMEDIES = "sampler.keep_memory=never, fewer batch.max_tokens_per_microbatch, or strategy.name=fsdp over more ranks"


def num_blocks(
    cfg: SamplerConfig,
    each: int,
    tokens: int,
    most: int,
    device: torch.device,
    memory: MemoryEstimate | None,
    warn: Callable[[str], None],
) -> int:
    """Blocks, of `each` bytes for so many tokens, besides the one that takes the writes of padding.

    Automatic: no more than twice `most`, what all running sequences can fill: room for cached beginnings. Raises
    UserError where not even the smallest cache fits.
    """
    if cfg.kv_cache_gib > 0:
        blocks = int(cfg.kv_cache_gib * GIB) // each - 1
        if blocks < 1:
            raise UserError(
                f"sampler.kv_cache_gib={cfg.kv_cache_gib}: one block of {tokens} tokens takes "
                f"{each / GIB:.3g} GiB; allowed: two blocks or more"
            )
        return blocks
    budget = GIB if device.type == "cpu" else gpu_budget(*gpu_memory(device), memory, warn)
    return max(1, min(budget // each - 1, 2 * most))


def gpu_memory(device: torch.device) -> tuple[int, int]:
    """(bytes that this process can have, those of them that nothing lives in). What the allocator holds and could use
    again counts as free: the driver calls it used, so that by its word alone a GPU is full after the first step."""
    gc.collect()
    torch.cuda.empty_cache()
    ours = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return ours, ours - torch.cuda.memory_allocated(device)


def gpu_budget(ours: int, free: int, memory: MemoryEstimate | None, warn: Callable[[str], None]) -> int:
    """Bytes of the cache, from what `gpu_memory` says with the weights in place. The same whenever it is asked: what
    training will need at its peak is left to it from the start. Without a plan half of what is free.

    Raises UserError when one row does not fit; warns when it takes what training may miss."""
    if memory is None:
        return free // 2
    left = min(ours - memory.beside_cache, free - memory.drawing) - int(SPARE * ours)
    if left >= memory.least_cache:
        return min(left, memory.cache)
    needs = f"one row needs {memory.least_cache / GIB:.2f} GiB of KV cache, training leaves {max(0, left) / GIB:.2f}"
    if free - memory.drawing < memory.least_cache:
        raise UserError(f"out of memory for sampling: {needs} of {ours / GIB:.1f}; try {REMEDIES}")
    warn(f"{needs} of {ours / GIB:.1f}: training may run out of memory; then try {REMEDIES}")
    return memory.least_cache
