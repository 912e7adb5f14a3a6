"""The in-process sampler: continuous batching over the policy's own parameters, on one rank, without a collective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from skyrl.algorithms.truncation import join_support
from skyrl.models.lora import Adapter
from skyrl.models.packed import to_device
from skyrl.sampler.adapters import AdapterRegistry
from skyrl.sampler.blocks import BASE_KEY
from skyrl.sampler.decode_batch import DecodeBatch
from skyrl.sampler.runners import sampling
from skyrl.sampler.runners.base import KVCache, PrefillChunk, Runner, Sequence
from skyrl.sampler.scheduler import Counts, Fork, Scheduler
from skyrl.sampler.stop import Decode, StringStop
from skyrl.types import Metrics, RunError, Sample, SampleRequest, StopReason, UserError


class Sampler:
    """Draws sequences in continuous batches from the weights it was built over. Made by make.make_sampler.

    It runs on one rank and calls no collective: ranks may finish at different times.
    """

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
        self._max_length, self._vocab_size = max_length, vocab_size
        self.version = version  # of the weights that are drawn from
        self.backend = runner.name  # which path computes: module, fused or kernels
        self._adapters = AdapterRegistry(adapters, base_name, scheduler.pool.new_cache_key)
        self._sequences: dict[str, Sequence] = {}  # unfinished ones by uid
        self._arrived = 0
        self._drawn = 0
        self._running: DecodeBatch | None = None  # arrays of the running set; None when it changed

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
        if request.version not in (None, self.version):
            raise UserError(f"{where}: version {request.version} is gone; this sampler draws from {self.version}")
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
        known = self._adapters.find(request.model, where)
        adapter = None if known is None else known.adapter
        tokens = np.zeros(limit, dtype=np.int64)
        tokens[: len(context)] = context
        stop = request.params.stop
        stops_at = StringStop(stop, self._decode, int(context[-1])).push if stop else None
        room = np.zeros(limit - len(context), dtype=np.float32)
        sequence = Sequence(
            self._arrived, request.uid, request.params, tokens, len(context), len(context), room, stops_at,
            adapter=adapter, cache_key=BASE_KEY if known is None else known.cache_key,
        )  # fmt: skip
        self._scheduler.add(sequence)
        self._adapters.count(adapter, 1)
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
            self._cache.clear(self._scheduler.pool.unused(blocks))
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
        self._scheduler.pool.reset_prefix_cache()
        self._cache.clear(list(range(self._scheduler.pool.num_blocks + 1)))
        return uids

    def forget_adapter(self, name: str) -> None:
        """Drops what is kept for the adapters that requests named `name`: cached beginnings, packed weights. To be
        called when an adapter is dropped, or changed in place. Raises RuntimeError while requests of it run."""
        for known in self._adapters.drop(name):
            self._scheduler.pool.reset_prefix_cache(known.cache_key)
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
        self._scheduler.pool.reset_prefix_cache()
        self._runner.refresh()
        self.version = version

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
        chunks = sorted(chunks, key=lambda chunk: chunk.sequence.cache_key)  # rows of one adapter lie together
        if self._running is not None:
            self._running.flush()
            self._running = None
        logits = self._runner.prefill(chunks)
        groups = self._scheduler.prefill_done(chunks)
        if logits is None:
            return []
        forks: list[Fork] = [fork for group in groups for fork in group]
        self._cache.copy([fork.copy for fork in forks if fork.copy])
        self._cache.copy_states([fork.states for fork in forks if fork.states])
        sequences = [fork.sequence for fork in forks]
        if len(sequences) > len(groups):
            rows = [row for row, group in enumerate(groups) for _ in group]
            logits = logits.index_select(0, to_device(rows, logits.device))
        drawing = DecodeBatch(sequences, self._cache, self._vocab_size)
        return self._accept(drawing, *drawing.sample(self._runner, logits))

    def _decode_step(self) -> list[Sample]:
        running = self._running
        if running is None or running.crowded():
            if self._scheduler.allocate_slots(self._cache.keep_experts) or running is None:
                together = sorted(self._scheduler.running, key=lambda sequence: sequence.cache_key)
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
        broken = {sequence.cache_key for sequence in bad}
        self._drawn += len(tokens_B)
        samples = []
        for index, reason in running.append(tokens_B, logprobs_B):
            sequence = running.sequences[index]
            if sequence.cache_key not in broken:
                experts = self._cache.experts_of(sequence)  # before its blocks are another's
                self._scheduler.finish(sequence)
                order, sample = self._take_out(sequence, sequence.length, reason)
                samples.append((order, replace(sample, experts=experts)))
        if broken:
            running.flush()
            self._running = None
            samples += [sample for cache_key in sorted(broken) for sample in self._abort(cache_key)]
        return [sample for _, sample in sorted(samples, key=lambda pair: pair[0])]

    def _abort(self, cache_key: int) -> list[tuple[int, Sample]]:
        """Ends all requests of an adapter, with the tokens before the first that is not finite, and empties their
        blocks."""
        samples, blocks = [], []
        for sequence in [s for s in self._sequences.values() if s.cache_key == cache_key]:
            blocks += sequence.blocks
            drawn = np.isfinite(sequence.logprobs[: sequence.length - sequence.start])
            end = sequence.start + (len(drawn) if drawn.all() else int(drawn.argmin()))
            self._scheduler.cancel(sequence)
            samples.append(self._take_out(sequence, end, "aborted"))
        self._cache.clear(blocks + self._scheduler.pool.reset_prefix_cache(cache_key))
        return samples

    def _take_out(self, sequence: Sequence, end: int, reason: StopReason) -> tuple[int, Sample]:
        """Order and result of a sequence that the scheduler no longer has."""
        del self._sequences[sequence.uid]
        self._adapters.count(sequence.adapter, -1)
        logprobs = sequence.logprobs[: end - sequence.start].copy()
        tokens = sequence.tokens[sequence.start : end].copy()
        support = join_support(len(tokens), [(0, sequence.supports)]) if sequence.supports else None
        return sequence.order, Sample(sequence.uid, tokens, logprobs, reason, self.version, support)
