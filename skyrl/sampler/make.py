"""From a model and `sampler.*` options to a sampler: cache size, and which runner computes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from skyrl.config.schema import SamplerConfig
from skyrl.planner.memory import MemoryEstimate
from skyrl.sampler.blocks import BlockPool
from skyrl.sampler.cache_size import num_blocks
from skyrl.sampler.runners.attention_calls import LayerCall, layer_calls, signature
from skyrl.sampler.runners.base import DecodeInputs, KVCache, PrefillChunk, Runner, Sequence
from skyrl.sampler.runners.cpu_kernels import CpuKernelRunner, unsupported_reason
from skyrl.sampler.runners.cuda import CudaRunner, page_size
from skyrl.sampler.runners.fused import FusedRunner
from skyrl.sampler.runners.paged import ModuleRunner, PagedRunner
from skyrl.sampler.runners.plan import make_decode_plan
from skyrl.sampler.sampler import Sampler
from skyrl.sampler.scheduler import Scheduler
from skyrl.sampler.stop import Decode
from skyrl.types import SamplingParams, UserError

if TYPE_CHECKING:
    from skyrl.models.forward import CausalLM
    from skyrl.models.lora import Adapter

log = logging.getLogger(__name__)


def make_sampler(
    model: CausalLM,
    cfg: SamplerConfig,
    *,
    decode: Decode,
    max_length: int,
    version: int = 0,
    adapters: Mapping[str, Adapter] | None = None,
    base_name: str = "policy",
    memory: MemoryEstimate | None = None,
) -> Sampler:
    """A sampler over the parameters of `model`, which it reads live: call refresh(version) after they change.

    `adapters` is looked up at every request (a live mapping): SampleRequest.model is a name in it, or "" or `base_name`
    for none. An adapter that was published must not change; call forget_adapter when one is taken out of the mapping.
    Given a mapping, compiled kernels do everything themselves, so that no request's bits depend on what runs beside it.

    `decode` turns token ids into text, for stop strings. `max_length` bounds context and drawn tokens together (stop
    reason "length"). `memory` is the run's plan, by which the cache is sized on a GPU. No token ends a sequence by
    itself: put the end-of-sequence ids into SamplingParams.stop_token_ids. cfg.backend "fused" raises UserError where
    the architecture has no fused plan or the plan disagrees with the module; "auto" then uses the module and logs one
    line.
    """
    if max_length > model.max_positions:
        raise UserError(f"batch.max_row_tokens={max_length}: the model has {model.max_positions} positions; lower it")
    calls = layer_calls(model)
    shapes = [call.shape for call in calls]
    parameter = next(model.parameters())
    on_gpu = parameter.device.type == "cuda"
    max_running = cfg.max_running or (256 if on_gpu else 128)
    page = page_size(cfg.block_tokens, calls, parameter.dtype, parameter.device)
    size = page or cfg.block_tokens
    if page and page != cfg.block_tokens:
        _say_once(f"KV cache in blocks of {page} tokens, as this device's paged attention needs")
    each, most = KVCache.block_bytes(shapes, size, parameter.dtype), max_running * -(-max_length // size)
    blocks = num_blocks(cfg, each, size, most, parameter.device, memory, _say_once)
    cache = KVCache(shapes, blocks, size, parameter.dtype, parameter.device, tokens_first=bool(page))
    scheduler = Scheduler(
        BlockPool(blocks, size),
        max_running=max_running,
        max_prefill_tokens=8192 if on_gpu else 2048,
        share=cfg.prefix_cache,
    )

    def paged(runner: PagedRunner) -> Runner:
        if not page:
            return runner
        return CudaRunner(runner, cache, max_length=max_length, max_running=max_running, graphs=cfg.cuda_graphs)

    return Sampler(
        _make_runner(model, cfg, calls, cache, max_length, paged, exact=adapters is not None),
        cache,
        scheduler,
        decode=decode,
        max_length=max_length,
        vocab_size=model.vocab_size,
        version=version,
        adapters={} if adapters is None else adapters,
        base_name=base_name,
    )


_DISAGREEMENTS: dict[str, str] = {}  # signature -> why the fused plan is not used; "" = it agrees with the module


def _make_runner(
    model: CausalLM,
    cfg: SamplerConfig,
    calls: list[LayerCall],
    cache: KVCache,
    max_length: int,
    paged: Callable[[PagedRunner], Runner],
    exact: bool,
) -> Runner:
    """The fused plan where there is one that agrees with the module, as far as cfg.backend allows it."""
    if cfg.backend not in ("auto", "fused", "module"):
        raise UserError(f"sampler.backend={cfg.backend}; choose one of: auto, fused, module")
    module = ModuleRunner(model, cache)
    if cfg.backend == "module":
        return paged(module)
    plan = make_decode_plan(model, calls, max_length)
    if isinstance(plan, str):
        reason = plan
    else:
        absent = unsupported_reason(plan, cache)
        fused = paged(FusedRunner(plan, cache)) if absent else CpuKernelRunner(plan, cache, module, exact=exact)
        if absent and cache.device.type == "cpu":
            _say_once(f"sampling without compiled kernels: {absent}")
        name = f"{fused.name} {signature(model)}"
        if name not in _DISAGREEMENTS:
            _DISAGREEMENTS[name] = disagreement(fused, paged(module), cache)
        reason = _DISAGREEMENTS[name]
        if not reason:
            return fused
    if cfg.backend == "fused":
        raise UserError(f"sampler.backend=fused: {reason}; use auto or module")
    _say_once(f"sampling with the model's own forward: {reason}")
    return paged(module)


@lru_cache(maxsize=100)
def _say_once(line: str) -> None:
    """To standard error, from rank 0 only: a slower sampler than expected should not be a secret."""
    log.log(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.DEBUG, line)


@torch.no_grad()
def disagreement(runner: Runner, module: Runner, cache: KVCache) -> str:
    """How the log-probabilities of `runner` differ from those of the module path, or "" when only by rounding.

    Two short sequences are prefilled and decoded by one step. Writes blocks 0 to 2 of the cache, so only before use.
    """
    size = cache.block_tokens
    lengths = [min(7, size), min(3, size)]
    results = []
    for each in (runner, module):
        sequences = []
        for order, length in enumerate(lengths):
            tokens = np.arange(1, length + 1, dtype=np.int64) * (order + 1) % 50
            params = SamplingParams(max_tokens=1)
            block = [min(order + 1, cache.keys[0].shape[0] - 1)]
            sequences.append(Sequence(order, "", params, tokens, length, length, np.zeros(0), blocks=block))
        logits = []
        for sequence in sequences:  # one after the other: they may have to share a block
            end = sequence.length - 1
            if end:
                each.prefill([PrefillChunk(sequence, 0, end)])
            batch = DecodeInputs(
                sequence.tokens[end:], np.array([end], dtype=np.int64), np.array([sequence.blocks], dtype=np.int32)
            )
            logits.append(each.decode(batch).clone())
        results.append(torch.log_softmax(torch.cat(logits), -1))
    gap = (results[0] - results[1]).abs().max().item()
    allowed = {torch.float64: 1e-8, torch.float32: 1e-4}.get(cache.dtype, 0.25)
    return "" if gap <= allowed else f"its log-probabilities differ by {gap:.3g} from the module's"
