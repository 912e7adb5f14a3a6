"""The in-process sampler: continuous batching over the policy's own parameters, on one rank, without a collective."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from skyrl.config.schema import SamplerConfig
from skyrl.sampler.adapters import AdapterRegistry, root_of, segments
from skyrl.sampler.blocks import BlockPool
from skyrl.sampler.runners import sampling
from skyrl.sampler.runners.attention_calls import LayerCall, disagreement, layer_calls, signature
from skyrl.sampler.runners.cpu_kernels import CpuKernelRunner, unsupported_reason
from skyrl.sampler.runners.cuda import CudaRunner, page_size
from skyrl.sampler.runners.fused import FusedRunner
from skyrl.sampler.runners.paged import DecodeInputs, KVCache, LayerShape, ModuleRunner
from skyrl.sampler.runners.plan import make_decode_plan
from skyrl.sampler.scheduler import Counts, Fork, PrefillChunk, Scheduler, Sequence
from skyrl.sampler.stop import Decode, StringStop
from skyrl.types import Metrics, RunError, Sample, SampleRequest, StopReason, UserError

if TYPE_CHECKING:
    from skyrl.models.forward import CausalLM
    from skyrl.models.lora import Adapter

log = logging.getLogger(__name__)

GIB = 1 << 30


class Runner(Protocol):
    """Computes logits over the cache and draws from them. Decides nothing."""

    name: str

    def prefill(self, chunks: list[PrefillChunk]) -> Tensor | None:
        """Fills the cache; logits [complete chunks, V] float32 of the last token of each complete chunk, if any."""

    def decode(self, batch: DecodeInputs) -> Tensor:
        """Logits [B, V] float32 of the newest token of each sequence; adds it to the cache."""

    def sample(
        self, logits_BV: Tensor, params: sampling.BatchSamplingParams, uniforms_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See sampling.sample; may overwrite the logits."""

    def refresh(self) -> None:
        """The parameters changed in place."""

    def forget(self, adapter: Adapter) -> None:
        """Drops what is kept of an adapter."""


class Sampler:
    """Draws sequences in continuous batches (see base.Sampler). Built by make_sampler."""

    def __init__(
        self,
        runner: Runner,
        cache: KVCache,
        scheduler: Scheduler,
        *,
        decode: Decode,
        max_length: int,
        vocab_size: int,
        version: int,
        adapters: Mapping[str, Adapter],
        base_name: str,
    ) -> None:
        self._runner, self._cache, self._scheduler, self._decode = runner, cache, scheduler, decode
        self._max_length, self._vocab_size, self._version = max_length, vocab_size, version
        self._book = AdapterRegistry(adapters, base_name, scheduler.pool.root)
        self._sequences: dict[str, Sequence] = {}  # unfinished ones by uid
        self._arrived = 0
        self._drawn = 0
        self._running: DecodeBatch | None = None  # arrays of the running set; None when it changed

    @property
    def backend(self) -> str:
        """Which path computes: module, fused or kernels."""
        return self._runner.name

    @property
    def version(self) -> int:
        """The version of the weights that is drawn from."""
        return self._version

    def add(self, request: SampleRequest) -> None:
        """Queues a request; `model` names one of the adapters, "" or the base's name none.

        Raises: UserError when it can never fit, a parameter is out of range or the adapter is not known."""
        where = f"request {request.uid}"
        sampling.check(request.params, where)
        context = np.ascontiguousarray(request.tokens, dtype=np.int64)
        limit = min(len(context) + request.params.max_tokens, self._max_length)
        pool = self._scheduler.pool
        if request.uid in self._sequences:
            raise UserError(f"{where}: the same uid is already queued; give each request its own")
        if request.version not in (None, self._version):
            raise UserError(f"{where}: version {request.version} is gone; this sampler draws from {self._version}")
        if len(context) == 0 or context.min() < 0 or context.max() >= self._vocab_size:
            raise UserError(f"{where}: needs 1 or more tokens, each in 0 .. {self._vocab_size - 1}")
        if len(context) >= self._max_length:
            raise UserError(
                f"{where}: {len(context)} tokens leave no room to draw within max_length={self._max_length}; "
                "shorten the prompt or raise batch.max_row_tokens"
            )
        if pool.blocks_for(limit) > pool.num_blocks:
            raise UserError(
                f"{where}: {limit} tokens need {pool.blocks_for(limit)} cache blocks, there are {pool.num_blocks}; "
                "raise sampler.kv_cache_gib or lower sampler.max_new_tokens"
            )
        known = self._book.find(request.model, where)
        adapter = None if known is None else known.adapter
        tokens = np.zeros(limit, dtype=np.int64)
        tokens[: len(context)] = context
        strings = StringStop(request.params.stop, self._decode) if request.params.stop else None
        room = np.zeros(limit - len(context), dtype=np.float32)
        sequence = Sequence(
            self._arrived, request.uid, request.params, tokens, len(context), len(context), room, strings,
            adapter=adapter, root=root_of(known),
        )  # fmt: skip
        self._scheduler.add(sequence)
        self._book.count(adapter, 1)
        self._arrived += 1
        self._sequences[request.uid] = sequence

    def cancel(self, uid: str) -> bool:
        """Takes a request out, queued or running, and frees its blocks; nothing of it is returned. False when no such
        request is unfinished."""
        sequence = self._sequences.get(uid)
        if sequence is None:
            return False
        if self._running is not None:
            self._running.flush()
            self._running = None
        blocks = list(sequence.blocks)
        self._scheduler.cancel(sequence)
        self._take_out(sequence, sequence.length, "aborted")
        if sequence.adapter is not None:  # part of a prefill may not be finite, and nobody has looked yet
            self._cache.clear(self._scheduler.pool.loose(blocks))
        return True

    def partial(self, uid: str) -> np.ndarray:
        """The tokens [n] int64 that an unfinished request has so far, as a copy; none where no such request is."""
        sequence = self._sequences.get(uid)
        if sequence is None:
            return np.zeros(0, dtype=np.int64)
        tokens = sequence.tokens[sequence.start : sequence.length]
        pending = [] if self._running is None else self._running.pending(sequence)
        return np.concatenate([tokens, *pending])

    def abandon(self) -> list[str]:
        """Takes everything out, also after `step` has raised RunError, and empties the cache: what is not finite must
        not reach later requests. Returns the uids, in the order of the requests."""
        uids = list(self._sequences)
        for uid in uids:
            self.cancel(uid)
        self._scheduler.pool.forget()
        self._cache.clear(list(range(self._scheduler.pool.num_blocks + 1)))
        return uids

    def forget_adapter(self, name: str) -> None:
        """Drops what is kept for the adapters that requests named `name`: cached beginnings, packed weights. To be
        called when an adapter is dropped, or changed in place. Raises RuntimeError while requests of it run."""
        for known in self._book.drop(name):
            self._scheduler.pool.forget(known.root)
            self._runner.forget(known.adapter)

    @torch.no_grad()
    def step(self) -> list[Sample]:
        """One iteration: a prefill step while one is due, else one token of every running sequence. Returns what
        finished, in the order of the requests."""
        chunks = self._scheduler.prefill()
        if chunks:
            return self._prefill(chunks)
        if not self._scheduler.running:
            return []
        return self._decode_step()

    def unfinished(self) -> int:
        """Requests queued or running."""
        return self._scheduler.unfinished()

    @torch.no_grad()
    def refresh(self, version: int) -> None:
        """The weights changed to `version`: forgets cached prefixes. Only while nothing is unfinished."""
        if self.unfinished():
            raise RuntimeError(f"refresh({version}) with {self.unfinished()} unfinished requests")
        self._scheduler.pool.forget()
        self._runner.refresh()
        self._version = version

    def metrics(self) -> Metrics:
        """Since the last call: tokens drawn, prefill tokens, tokens reused, preemptions, peak use of the cache."""
        pool, counts = self._scheduler.pool, self._scheduler.counts
        values = {
            "sampler/tokens:sum": float(self._drawn),
            "sampler/prefill_tokens:sum": float(counts.prefill_tokens),
            "sampler/reused_tokens:sum": float(counts.reused_tokens),
            "sampler/preemptions:sum": float(counts.preemptions),
            "sampler/cache_peak:max": pool.peak / pool.num_blocks,
        }
        self._drawn, self._scheduler.counts, pool.peak = 0, Counts(), pool.held()
        return values

    def _prefill(self, chunks: list[PrefillChunk]) -> list[Sample]:
        chunks = sorted(chunks, key=lambda chunk: chunk.sequence.root)  # rows of one adapter lie together
        if self._running is not None:
            self._running.flush()
            self._running = None
        logits = self._runner.prefill(chunks)
        groups = self._scheduler.prefilled(chunks)
        if logits is None:
            return []
        forks: list[Fork] = [fork for group in groups for fork in group]
        self._cache.copy([fork.copy for fork in forks if fork.copy])
        sequences = [fork.sequence for fork in forks]
        if len(sequences) > len(groups):
            rows = [row for row, group in enumerate(groups) for _ in group]
            logits = logits.index_select(0, torch.tensor(rows, device=logits.device))
        drawing = DecodeBatch(sequences, self._cache, self._vocab_size)
        return self._accept(drawing, *drawing.sample(self._runner, logits))

    def _decode_step(self) -> list[Sample]:
        running = self._running
        if running is None or running.crowded():
            if self._scheduler.grow() or running is None:
                together = sorted(self._scheduler.running, key=lambda sequence: sequence.root)
                running = DecodeBatch(together, self._cache, self._vocab_size)
            running.extend_tables()
            self._running = running
        logits = self._runner.decode(running.batch)
        finished = self._accept(running, *running.sample(self._runner, logits))
        if finished:
            self._running = None
        return finished

    def _accept(self, running: DecodeBatch, tokens_B: np.ndarray, logprobs_B: np.ndarray) -> list[Sample]:
        """Appends what was drawn to the sequences and takes out those that end.

        Logits that are not finite end the run, unless an adapter gave them: then all its requests end as "aborted".
        """
        bad = [running.sequences[row] for row in np.flatnonzero(~np.isfinite(logprobs_B))]
        if any(sequence.adapter is None for sequence in bad):
            raise RunError(
                f"the model gives logits that are not finite, first for request {bad[0].uid}; go on from a checkpoint "
                "before, with a lower learning rate"
            )
        broken = {sequence.root for sequence in bad}
        self._drawn += len(tokens_B)
        samples = []
        for index, reason in running.append(tokens_B, logprobs_B):
            sequence = running.sequences[index]
            if sequence.root not in broken:
                self._scheduler.finish(sequence)
                samples.append(self._take_out(sequence, sequence.length, reason))
        if broken:
            running.flush()
            self._running = None
            samples += [sample for root in sorted(broken) for sample in self._abort(root)]
        return [sample for _, sample in sorted(samples, key=lambda pair: pair[0])]

    def _abort(self, root: int) -> list[tuple[int, Sample]]:
        """Ends all requests of an adapter, with the tokens before the first that is not finite, and empties their
        blocks."""
        samples, blocks = [], []
        for sequence in [s for s in self._sequences.values() if s.root == root]:
            blocks += sequence.blocks
            drawn = np.isfinite(sequence.logprobs[: sequence.length - sequence.start])
            end = sequence.start + (len(drawn) if drawn.all() else int(drawn.argmin()))
            self._scheduler.cancel(sequence)
            samples.append(self._take_out(sequence, end, "aborted"))
        self._cache.clear(blocks + self._scheduler.pool.forget(root))
        return samples

    def _take_out(self, sequence: Sequence, end: int, reason: StopReason) -> tuple[int, Sample]:
        """Order and result of a sequence that the scheduler no longer has."""
        del self._sequences[sequence.uid]
        self._book.count(sequence.adapter, -1)
        logprobs = sequence.logprobs[: end - sequence.start].copy()
        tokens = sequence.tokens[sequence.start : end].copy()
        return sequence.order, Sample(sequence.uid, tokens, logprobs, reason, self._version)


class DecodeBatch:
    """Sequences that draw together, as arrays that are built once and then advanced."""

    def __init__(self, sequences: list[Sequence], cache: KVCache, vocab_size: int) -> None:
        self.sequences = list(sequences)
        device, params = cache.device, [s.params for s in self.sequences]
        self._device = device
        self.lengths_B = np.array([s.length for s in self.sequences], dtype=np.int64)
        self._starts_B = np.array([s.start for s in self.sequences], dtype=np.int64)
        self._limits_B = np.array([len(s.tokens) for s in self.sequences], dtype=np.int64)
        self._streams_B = sampling.stream([p.seed for p in params])
        self._rules = sampling.BatchSamplingParams.of(params, vocab_size, device)
        width = max((len(p.stop_token_ids) for p in params), default=0)
        self._stops_BN = np.full((len(params), width), -1, dtype=np.int64)
        for row, p in zip(self._stops_BN, params, strict=True):
            row[: len(p.stop_token_ids)] = p.stop_token_ids
        self._strings = [index for index, s in enumerate(self.sequences) if s.strings is not None]
        self._size = cache.block_tokens
        blocks = -(-int(self._limits_B.max(initial=1)) // self._size)
        table_BW = np.zeros((len(params), blocks), dtype=np.int32)
        self._known_B = np.zeros(len(params), dtype=np.int64)
        tokens_B = np.array([s.tokens[s.length - 1] for s in self.sequences], dtype=np.int64)
        parts = segments([s.adapter for s in self.sequences])
        self.batch = DecodeInputs(tokens_B, self.lengths_B - 1, table_BW, parts)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []  # drawn but not yet in the sequences
        self._index: dict[int, int] | None = None  # rows of the sequences, by id; made when asked for

    def extend_tables(self) -> None:
        """Takes over the blocks that the scheduler added since the last call."""
        for index in np.flatnonzero(self.lengths_B > self._known_B * self._size):
            blocks = self.sequences[index].blocks
            self.batch.table_BW[index, : len(blocks)] = blocks
            self._known_B[index] = len(blocks)

    def sample(self, runner: Runner, logits_BV: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Draws one token of each sequence from its row: tokens, log-probabilities."""
        uniforms_B = torch.from_numpy(sampling.uniforms(self._streams_B, self.lengths_B - self._starts_B))
        tokens_B, logprobs_B = runner.sample(logits_BV, self._rules, uniforms_B.to(self._device))
        return tokens_B.cpu().numpy(), logprobs_B.cpu().numpy()

    def append(self, tokens_B: np.ndarray, logprobs_B: np.ndarray) -> list[tuple[int, StopReason]]:
        """Adds a token to each sequence; returns (index, stop reason) of those that end."""
        self._pending.append((tokens_B, logprobs_B))
        self.lengths_B += 1
        self.batch.tokens_B[:] = tokens_B
        self.batch.positions_B += 1
        stopped_B = (self._stops_BN == tokens_B[:, None]).any(1)
        for index in self._strings:
            stopped_B[index] |= self.sequences[index].strings.push(int(tokens_B[index]))
        ended = np.flatnonzero(stopped_B | (self.lengths_B >= self._limits_B))
        if len(ended) or self.crowded():
            self.flush()
        return [(int(i), "stop" if stopped_B[i] else "length") for i in ended]

    def pending(self, sequence: Sequence) -> list[np.ndarray]:
        """What was drawn for a sequence and is not in it yet, one token in each array."""
        if not self._pending:
            return []
        if self._index is None:
            self._index = {id(one): row for row, one in enumerate(self.sequences)}
        row = self._index.get(id(sequence))
        return [] if row is None else [tokens[row : row + 1] for tokens, _ in self._pending]

    def crowded(self) -> bool:
        """Whether some sequence needs a block that it does not have yet."""
        return bool((self.lengths_B > self._known_B * self._size).any())

    def flush(self) -> None:
        """Writes what was drawn since the last call into the sequences; the scheduler looks at them only then."""
        if not self._pending:
            return
        tokens_BN = np.stack([tokens for tokens, _ in self._pending], 1)
        logprobs_BN = np.stack([logprobs for _, logprobs in self._pending], 1)
        for sequence, tokens, logprobs in zip(self.sequences, tokens_BN, logprobs_BN, strict=True):
            start = sequence.length
            sequence.length = end = start + len(tokens)
            sequence.tokens[start:end] = tokens
            sequence.logprobs[start - sequence.start : end - sequence.start] = logprobs
        self._pending = []


def make_sampler(
    model: CausalLM,
    cfg: SamplerConfig,
    *,
    decode: Decode,
    max_length: int,
    version: int = 0,
    adapters: Mapping[str, Adapter] | None = None,
    base_name: str = "policy",
) -> Sampler:
    """A sampler over the parameters of `model`, which it reads live: call refresh(version) after they change.

    `adapters` is looked up at every request (a live mapping): SampleRequest.model is a name in it, or "" or `base_name`
    for none. An adapter that was published must not change; call forget_adapter when one is taken out of the mapping.
    Given a mapping, compiled kernels do everything themselves, so that no request's bits depend on what runs beside it.

    `decode` turns token ids into text, for stop strings. `max_length` bounds context and drawn tokens together (stop
    reason "length"). No token ends a sequence by itself: put the end-of-sequence ids into
    SamplingParams.stop_token_ids. cfg.backend "fused" raises UserError where the architecture has no fused plan or the
    plan disagrees with the module; "auto" then uses the module and logs one line.
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
    num_blocks = _num_blocks(cfg, shapes, parameter, size, max_running * -(-max_length // size))
    cache = KVCache(shapes, num_blocks, size, parameter.dtype, parameter.device, tokens_first=bool(page))
    scheduler = Scheduler(
        BlockPool(num_blocks, size),
        max_running=max_running,
        max_prefill_tokens=8192 if on_gpu else 2048,
        share=cfg.prefix_cache,
    )

    def paged(runner: Any) -> Runner:
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


_VERDICTS: dict[str, str] = {}  # signature -> why the fused plan is not used; "" = it agrees with the module


def _make_runner(
    model: CausalLM,
    cfg: SamplerConfig,
    calls: list[LayerCall],
    cache: KVCache,
    max_length: int,
    paged: Callable[[Any], Runner],
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
        if name not in _VERDICTS:
            _VERDICTS[name] = disagreement(fused, paged(module), cache)
        reason = _VERDICTS[name]
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


def _num_blocks(cfg: SamplerConfig, shapes: list[LayerShape], parameter: Tensor, size: int, most: int) -> int:
    """Blocks within the memory budget. Automatic: no more than `most`, what all running sequences can fill."""
    each = KVCache.block_bytes(shapes, size, parameter.dtype)
    if cfg.kv_cache_gib > 0:
        blocks = int(cfg.kv_cache_gib * GIB) // each - 1  # one is for padding
        if blocks < 1:
            raise UserError(
                f"sampler.kv_cache_gib={cfg.kv_cache_gib}: one block of {size} tokens takes "
                f"{each / GIB:.3g} GiB; allowed: two blocks or more"
            )
        return blocks
    budget = GIB
    if parameter.device.type == "cuda":
        budget = torch.cuda.mem_get_info(parameter.device)[0] // 2
    return max(1, min(budget // each - 1, 2 * most))  # twice: room for cached beginnings
