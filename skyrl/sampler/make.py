"""From a model and `sampler.*` options to a sampler: cache size, and which runner computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from skyrl.config.schema import SamplerConfig
from skyrl.models.attention_calls import LayerCall, layer_calls, signature
from skyrl.models.decode_plan import make_decode_plan
from skyrl.models.experts import routing_of
from skyrl.planner.memory import MemoryEstimate, running_limit
from skyrl.sampler.blocks import BlockPool
from skyrl.sampler.cache_size import num_blocks
from skyrl.sampler.runners.base import DecodeInputs, KVCache, PrefillChunk, Runner, Sequence
from skyrl.sampler.runners.cpu_kernels import CpuKernelRunner, unsupported_reason
from skyrl.sampler.runners.cuda import CudaRunner, PagedKernel, paged_kernel
from skyrl.sampler.runners.fused import FusedRunner
from skyrl.sampler.runners.paged import ModuleRunner, PagedRunner
from skyrl.sampler.sampler import Sampler
from skyrl.sampler.scheduler import Scheduler
from skyrl.sampler.stop import Decode
from skyrl.tracking.advisories import warn_fallback
from skyrl.types import SamplingParams, UserError

if TYPE_CHECKING:
    from skyrl.models.forward import CausalLM
    from skyrl.models.lora import Adapter


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
    record_experts: bool = False,
) -> Sampler:
    """A sampler over the parameters of `model`, which it reads live: call refresh(version) after they change.

    `adapters` is looked up at every request (a live mapping): SampleRequest.model is a name in it, or "" or `base_name`
    for none. An adapter that was published must not change; call forget_adapter when one is taken out of the mapping.
    Given a mapping, compiled kernels do everything themselves, so that no request's bits depend on what runs beside it.

    `decode` turns token ids into text, for stop strings. `max_length` bounds context and drawn tokens together (stop
    reason "length"). `memory` is the run's plan, by which the cache is sized on a GPU. No token ends a sequence by
    itself: put the end-of-sequence ids into SamplingParams.stop_token_ids. Raises UserError for cfg.backend "fused"
    where there is no fused plan, or one that disagrees with the module, which "auto" uses then.
    """
    if max_length > model.max_positions:
        raise UserError(f"batch.max_row_tokens={max_length}: the model has {model.max_positions} positions; lower it")
    if model.rope is not None and not model.rope.limit:
        model.rope.limit = max_length
    calls = layer_calls(model)
    shapes = [call.shape for call in calls]
    parameter = next(model.parameters())
    on_gpu = parameter.device.type == "cuda"
    state = sum(call.state.nbytes(parameter.dtype, parameter.device) for call in calls if call.state)
    max_running = running_limit(cfg.max_running, parameter.device.type, state)
    if not cfg.max_running and max_running < running_limit(0, parameter.device.type, 0):
        warn_fallback(
            f"at most {max_running} sequences are drawn at once, since linear attention keeps {state / 2**20:.3g} MiB "
            "of each; sampler.max_running sets another number"
        )
    kernel = paged_kernel(cfg.block_tokens, calls, parameter.dtype, parameter.device)
    size, paging = (kernel.page, True) if isinstance(kernel, PagedKernel) else (cfg.block_tokens, False)
    if on_gpu and not paging:
        warn_fallback(f"decoding with gathered attention and without CUDA graphs; paged attention: {kernel}")
    states = [  # before the blocks, which take a part of what is left
        None if call.state is None else call.state.empty(max_running + 1, parameter.dtype, parameter.device)
        for call in calls
    ]
    routing = routing_of(model) if record_experts else None
    choices = None if routing is None else (routing.layers, routing.k)
    each = KVCache.block_bytes(shapes, size, parameter.dtype) + (2 * size * math.prod(choices) if choices else 0)
    blocks = num_blocks(
        cfg, each, size, max_running, max_length, parameter.device, memory, partial(warn_fallback, every_rank=True)
    )
    given: Any = {"tokens_first": paging, "states": states, "choices": choices}
    cache = KVCache(shapes, blocks, size, parameter.dtype, parameter.device, **given)
    scheduler = Scheduler(
        BlockPool(blocks, size),
        max_running=max_running,
        max_prefill_tokens=8192 if on_gpu else 2048,
        share=cfg.prefix_cache,
        recurrent=any(call.state for call in calls),
    )

    def paged(runner: PagedRunner, graphs: bool = cfg.cuda_graphs and on_gpu) -> Runner:
        if isinstance(kernel, str):
            return runner
        return CudaRunner(runner, kernel, cache, max_length=max_length, max_running=max_running, graphs=graphs)

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
    paged: Callable[..., Runner],
    exact: bool,
) -> Runner:
    """The fused plan where there is one that agrees with the module, as far as cfg.backend allows it."""
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
            warn_fallback(f"sampling without compiled kernels: {absent}")
        name = f"{fused.name} {signature(model)}"
        if name not in _DISAGREEMENTS:
            allowed = rounding(cache.dtype, len(calls), plan.embedding.embedding_dim)
            _DISAGREEMENTS[name] = disagreement(fused, paged(module, graphs=False), cache, max_length, allowed)
        reason = _DISAGREEMENTS[name]
        if not reason:
            return fused
    if cfg.backend == "fused":
        raise UserError(f"sampler.backend=fused: {reason}; use auto or module")
    warn_fallback(f"sampling with the model's own forward: {reason}")
    return paged(module)


@torch.no_grad()
def disagreement(runner: Runner, module: Runner, cache: KVCache, max_length: int, allowed: float) -> str:
    """How the log-probabilities of `runner` differ from those of the module path, or "" when by no more than the part
    `allowed` of their spread (see `rounding`).

    Two sequences over shuffled blocks are prefilled together, the longer one in two parts, and decoded by one step.
    Writes the first blocks of the cache, so only before use.
    """
    size = cache.block_tokens
    table_BW = np.array([[2, 1], [3, 0]] if len(cache.keys[0]) > 3 else [[1]], dtype=np.int32)
    lengths = [min(n, table_BW.shape[1] * size - 1, max_length - 1) for n in (size + 3, 5)][: len(table_BW)]
    results = []
    for each in (runner, module):
        sequences = []
        for order, (length, table) in enumerate(zip(lengths, table_BW.tolist(), strict=True)):
            tokens = np.arange(1, length + 2, dtype=np.int64) * (order + 1) % 50
            params = SamplingParams(max_tokens=1)
            sequences.append(Sequence(order, "", params, tokens, length, length, np.zeros(1), blocks=table))
        first, *others = sequences
        half = max(1, first.length // 2)
        steps = [[PrefillChunk(first, 0, half), *(PrefillChunk(s, 0, s.length) for s in others)]]
        if half < first.length:
            steps.append([PrefillChunk(first, half, first.length)])
        logits = [each.prefill(chunks) for chunks in steps]
        newest = np.array([s.tokens[s.length] for s in sequences])
        logits.append(each.decode(DecodeInputs(newest, np.array(lengths, dtype=np.int64), table_BW)).clone())
        results.append(torch.log_softmax(torch.cat([x for x in logits if x is not None]), -1))
    ours, theirs = results
    spread = (theirs - theirs.mean(-1, keepdim=True)).square().mean().sqrt()
    gap = ((ours - theirs).square().mean().sqrt() / spread.clamp(min=1e-3)).item()
    if gap <= allowed:
        return ""
    return f"its log-probabilities differ by {gap:.3g} of their spread from the module's; rounding gives {allowed:.2g}"


def rounding(dtype: torch.dtype, num_layers: int, hidden_size: int) -> float:
    """What rounding may change of log-probabilities, as a part of their spread, twice over: each layer rounds to
    `dtype` and sums over the hidden size in float32 or wider. Measured: 0.3 (float32) to 0.6 (float16) of it at most,
    while a wrong rotation, window or order of heads gives several times as much."""
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * math.sqrt(hidden_size)
    return 5 * math.sqrt(num_layers) * (torch.finfo(dtype).eps + sums)
