"""How many blocks the KV cache has: what the options say, or the smaller of the plan's and what training leaves."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from skyrl.config.load import TYPICAL_ROW
from skyrl.config.schema import SamplerConfig
from skyrl.planner.memory import GIB, SPARE, MemoryEstimate
from skyrl.types import UserError

REMEDIES = "sampler.keep_memory=never, fewer batch.max_tokens_per_microbatch, or strategy.name=fsdp over more ranks"
SERVER_REMEDIES = "a GPU that nothing else uses, a smaller model, or strategy.name=fsdp over more ranks"


def num_blocks(
    cfg: SamplerConfig,
    each: int,
    tokens: int,
    max_running: int,
    max_length: int,
    device: torch.device,
    memory: MemoryEstimate | None,
    warn: Callable[[str], None],
) -> int:
    """Blocks, of `each` bytes for so many tokens, besides the one that takes the writes of padding.

    Automatic: at most twice what all running sequences can fill, for cached beginnings. UserError where none fits.
    """
    most = 2 * max_running * -(-max_length // tokens)
    if not each:  # no layer keeps anything of a token
        return most
    if cfg.kv_cache_gib > 0:
        blocks = int(cfg.kv_cache_gib * GIB) // each - 1
        if blocks < 1:
            raise UserError(
                f"sampler.kv_cache_gib={cfg.kv_cache_gib}: one block of {tokens} tokens takes "
                f"{each / GIB:.3g} GiB; allowed: two blocks or more"
            )
        return blocks
    if device.type == "cpu":
        return max(1, min(GIB // each - 1, most))
    return min(gpu_blocks(*gpu_memory(device), each, tokens, max_length, memory, warn), most)


def gpu_memory(device: torch.device) -> tuple[int, int]:
    """(bytes that this process can have, those of them that nothing lives in). What the allocator holds and could use
    again counts as free: the driver calls it used, so that by its word alone a GPU is full after the first step."""
    gc.collect()
    torch.cuda.empty_cache()
    ours = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return ours, ours - torch.cuda.memory_allocated(device)


def gpu_blocks(
    ours: int,
    free: int,
    each: int,
    tokens: int,
    max_length: int,
    memory: MemoryEstimate | None,
    warn: Callable[[str], None],
) -> int:
    """Blocks besides the padding's, from what `gpu_memory` says with the weights in place. The same whenever it is
    asked: what training will need at its peak is left to it from the start. Without a plan half of what is free.

    One row of the plan fits always, without a plan one of TYPICAL_ROW tokens. Raises UserError when there is no memory
    for it; warns when it takes what training may miss, and when a row of `max_length` does not fit."""
    if memory is None:
        row, rows, left, room, remedies = TYPICAL_ROW, free // each, free // 2, free, SERVER_REMEDIES
    else:
        row, rows = -(-memory.least_cache * tokens // each), memory.cache // memory.least_cache
        room, remedies = free - memory.drawing, REMEDIES
        left = min(memory.left_for_cache(ours), room - int(SPARE * ours))
    longest = -(-max_length // tokens)
    least = min(-(-row // tokens), longest)  # a sequence fills whole blocks
    blocks = min(left // each - 1, max(rows * least, longest))
    if blocks < least:
        needs = (
            f"one row of {min(row, max_length)} tokens needs {(least + 1) * each / GIB:.2f} GiB of KV cache, "
            f"there are {max(0, left) / GIB:.2f} of {ours / GIB:.1f} for it"
        )
        if room < (least + 1) * each:
            raise UserError(f"out of memory for sampling: {needs}; try {remedies}")
        warn(f"{needs}: it takes them all the same, and training may run out of memory; then try {remedies}")
        blocks = least
    if blocks < longest:
        warn(f"a KV cache of {blocks * tokens} tokens takes no longer rows; lower batch.max_row_tokens ({max_length})")
    return blocks
