"""Sampling requests of all clients: which weights, which rank, what is asked besides the draws, and the answer.

A request becomes draws (SampleRequest, one per sample) and questions about its prompt (PromptLogprobsRequest). All
draws of all tenants run in one continuous batch per rank, each with its own adapter. Large requests are handed to the
ranks in parts, in turn with the others'.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np

from skyrl.config.serve import ServeConfig
from skyrl.sampler.prompts import PromptLogprobsRequest, PromptLogprobsResult
from skyrl.service.checkpoints import CheckpointService
from skyrl.service.commands import BASE, NOT_FINITE, Leader, Problem, Question, SamplingBatch
from skyrl.service.limits import CELL, FLIGHT_BYTES, SCORE_BYTES, SCORE_TOKENS, answer_bytes, check_sample, round_robin
from skyrl.service.messages import RequestFailed, SampledSequence, SampleResult, SamplingRequest, ServerInfo, TopK
from skyrl.service.scheduler import LARGE_SAMPLE, PendingRequest, RequestScheduler
from skyrl.service.snapshots import Snapshots
from skyrl.service.validation import check_prompt, draw_seed, sampling_params
from skyrl.types import Sample, SampleRequest, UserError

RUNNING_PER_RANK = 512  # sequences handed to one rank's sampler; the rest waits, where turns are fair
TOGETHER = LARGE_SAMPLE  # samples of one prompt that are handed over at once, to share its prefill


@dataclass(eq=False)
class ActiveSample:
    """One sampling request on its way."""

    pending: PendingRequest
    query: SamplingRequest
    adapter: str  # "" = the base
    sequences: list[SampledSequence | None]
    ranks: dict[str, int] = field(default_factory=dict)  # draw -> rank
    prompt: PromptLogprobsResult | None = None
    waits_for_prompt: bool = False
    missing: int = 0
    todo: deque[SampleRequest] = field(default_factory=deque)  # not handed to a rank yet
    size: int = 0  # of the answer, at most, in bytes
    known: dict[str, int] = field(default_factory=dict)  # draw -> tokens that its reader has


class Sampling:
    """All sampling requests that were taken from the scheduler. Only the worker's thread calls it."""

    def __init__(
        self,
        cfg: ServeConfig,
        leader: Leader,
        scheduler: RequestScheduler,
        checkpoints: CheckpointService,
        facts: ServerInfo,
        snapshots: Snapshots,
    ) -> None:
        self.cfg, self.leader, self.scheduler, self.checkpoints, self.facts = cfg, leader, scheduler, checkpoints, facts
        self.snapshots = snapshots
        size = leader.world.size
        self._active: dict[str, ActiveSample] = {}
        self._queued: list[list[SampleRequest]] = [[] for _ in range(size)]
        self._cancelled: list[list[str]] = [[] for _ in range(size)]
        self._load = [0] * size
        self._todo: OrderedDict[str, deque[ActiveSample]] = (
            OrderedDict()
        )  # by owner: works with draws that no rank has yet
        self._bytes = 0  # of the answers to all works, at most
        self._questions: list[tuple[ActiveSample, PromptLogprobsRequest]] = []
        self._waiting: deque[PendingRequest] = deque()  # taken from the scheduler, not begun
        self._filled = ""  # whose whole weights are sampled, where all parameters are trained
        self._leaving: list[str] = []  # adapters of cancelled requests, which the ranks still draw from

    @property
    def active(self) -> bool:
        """Whether there is anything to draw or to score."""
        return bool(self._active or self._leaving or self._waiting)

    def admit(self) -> None:
        """Takes requests from the scheduler as far as there is room, and answers questions about their prompts."""
        for pending in self.scheduler.take_cancelled():
            self._cancel(pending)
        if not (self._waiting and self.facts.full_parameters):
            ahead = len(self._questions) + sum(min(len(w.todo), TOGETHER) for some in self._todo.values() for w in some)
            without = frozenset(pending.owner for pending in self._waiting)
            self._waiting += self.scheduler.take_samples(RUNNING_PER_RANK * len(self._load) - ahead, without=without)
        later: deque[PendingRequest] = deque()
        while self._waiting:
            pending = self._waiting.popleft()
            try:
                if not self._begin(pending):
                    later.append(pending)
                    if self.facts.full_parameters:
                        break  # others would go on with the weights of now for ever
            except RequestFailed as refused:
                self.scheduler.failed(pending, refused)
            except UserError as error:
                self.scheduler.failed(pending, RequestFailed(str(error)))
        self._waiting.extendleft(reversed(later))
        self._score()

    def _begin(self, pending: PendingRequest) -> bool:
        """Starts a request; False when it has to wait: for those under way, which draw from other whole weights, or
        for memory."""
        query = pending.request
        assert isinstance(query, SamplingRequest)
        if query.problem:
            raise RequestFailed(query.problem)
        if pending.cancelled:
            raise RequestFailed("cancelled by the client")
        # A prompt that fills the context can be scored, and nothing can be drawn after it.
        full = len(query.prompt) == self.facts.max_context and query.max_tokens == 1 and _asks(query)
        check_prompt(query, self.facts)
        longest = 0 if full else self.facts.max_context - len(query.prompt)
        longest = longest if query.max_tokens is None else min(longest, query.max_tokens)
        service = self.cfg.service
        check_sample(
            query,
            longest,
            max_request_tokens=service.max_tokens_per_request,
            max_samples=service.max_queued_samples,
        )
        params = [] if full else sampling_params(query, self.facts, pending.request_id)
        size = answer_bytes(query, longest)
        if self._active and self._bytes + size > FLIGHT_BYTES:
            return False
        adapter = self._adapter(query, pending.owner)
        if self.facts.full_parameters:
            if adapter != self._filled and (self._active or self._leaving):
                return False
            self.snapshots.fill_base(adapter)
            self._filled, adapter = adapter, ""
        if adapter:
            if self.snapshots.crowded(adapter):
                return False
            self.snapshots.acquire(adapter)
        active = ActiveSample(pending, query, adapter, [None] * query.num_samples, size=size)
        if full:
            nothing = SampledSequence(np.zeros(0, np.int64), np.zeros(0, np.float32), "length")
            active.sequences = [nothing] * query.num_samples
        active.todo.extend(
            SampleRequest(f"{pending.request_id}/{i}", query.prompt, one, model=adapter or BASE)
            for i, one in enumerate(params)
        )
        self._active[pending.request_id] = active
        self._bytes += size
        active.missing = len(params)
        if params:
            self._todo.setdefault(pending.owner, deque()).append(active)
        if _asks(query):
            active.waits_for_prompt = True
            self._questions.append((active, self._question(active)))
        return True

    def _adapter(self, query: SamplingRequest, owner: str) -> str:
        """The name of the weights to draw from, "" for the base. Raises RequestFailed when there are none."""
        path, base, sampler_id = query.model_path, query.base_model, query.sampling_session_id
        if sampler_id is not None:
            sampler = self.checkpoints.sampler(sampler_id, owner)
            if sampler.ephemeral_run is not None:
                return sampler_id
            if sampler.model_path and sampler.version:
                return f"{sampler.model_path}#{sampler.version}"
            path, base = sampler.model_path, sampler.base_model
        if path:
            return f"{path}#{self.checkpoints.version(path, owner)}"
        if base not in self.facts.aliases:
            raise RequestFailed(f"base_model {base!r} is not served here; there are: {', '.join(self.facts.aliases)}")
        return ""

    def _hand_over(self) -> None:
        """Draws to the ranks while they have room: one owner after the other, and each one's requests in turn. The
        samples of one prompt share its prefill, so they stay together unless they would fill a rank."""
        size = len(self._load)
        while self._todo and min(self._load) < RUNNING_PER_RANK:
            owner, actives = self._todo.popitem(last=False)
            active = actives.popleft()
            total = len(active.sequences)
            each = total if total < 8 * size else min(TOGETHER, -(-total // size))
            rank = min(range(size), key=lambda r: (self._load[r], r))
            for _ in range(min(each, len(active.todo))):
                request = active.todo.popleft()
                active.ranks[request.uid] = rank
                self._queued[rank].append(request)
                self._load[rank] += 1
            if active.todo:
                actives.append(active)
            if actives:
                self._todo[owner] = actives

    # ---- questions about tokens that are there already -------------------------------------------------------------

    def _question(self, active: ActiveSample) -> PromptLogprobsRequest:
        query, length = active.query, len(active.query.prompt)
        last = query.prompt_logprobs_last_n
        return PromptLogprobsRequest(
            uid=active.pending.request_id,
            tokens=query.prompt,
            model=active.adapter,
            start=0 if last is None else max(0, length - last),
            logprobs=query.prompt_logprobs,
            topk=query.topk_prompt_logprobs,
            targets=query.targets,
            alternatives=query.prompt_alt_tokens_k,
            seed=draw_seed("alternatives", query.seed if query.seed is not None else active.pending.request_id),
        )

    def _score(self) -> None:
        """Answers questions in one command, spread over the ranks by their tokens: as many as fit into its budgets,
        one owner's after the other's. The rest comes with the next turn."""
        if not self._questions:
            return
        size = len(self._load)
        ordered = round_robin((active.pending.owner, (active, question)) for active, question in self._questions)
        asked, tokens, cells = [], 0, 0
        for active, question in ordered:
            tokens += len(question.tokens)
            cells += _table_bytes(question)
            if asked and (tokens > SCORE_TOKENS * size or cells > SCORE_BYTES):
                break
            asked.append((active, question))
        self._questions = ordered[len(asked) :]
        parts: list[list[Question]] = [[] for _ in range(size)]
        owners: list[list[tuple[ActiveSample, PromptLogprobsRequest]]] = [[] for _ in range(size)]
        loads = [0] * size
        for active, question in sorted(asked, key=lambda pair: -len(pair[1].tokens)):
            rank = min(range(size), key=lambda r: (loads[r], r))
            loads[rank] += len(question.tokens)
            parts[rank].append(Question(question, tail=question.uid != active.pending.request_id))
            owners[rank].append((active, question))
        answers = self.leader.call("score", None, parts)
        for pairs, stats in zip(owners, answers, strict=True):
            for (active, question), one in zip(pairs, stats, strict=True):
                if self._active.get(active.pending.request_id) is active:  # no earlier answer has ended it
                    self._answered(active, question, one)

    def _answered(
        self, active: ActiveSample, question: PromptLogprobsRequest, stats: PromptLogprobsResult | Problem
    ) -> None:
        if isinstance(stats, Problem):
            self._take_out(active, RequestFailed(stats.text))
            return
        if not _is_finite(question, stats):
            self._take_out(active, RequestFailed(NOT_FINITE))
            return
        if question.uid == active.pending.request_id:
            active.prompt, active.waits_for_prompt = stats, False
        else:
            sequence = active.sequences[int(question.uid.rsplit("/", 1)[1])]
            assert sequence is not None and stats.topk_ids is not None and stats.topk_logprobs is not None
            sequence.topk = TopK(stats.topk_ids, stats.topk_logprobs)
            active.missing -= 1
        self._finish(active)

    # ---- draws -----------------------------------------------------------------------------------------------------

    def draw(self, seconds: float) -> None:
        """A stretch of sampling on all ranks; settles what is complete."""
        self._hand_over()
        if not any(self._load) and not any(self._cancelled) and not self._leaving:
            return  # what was begun is complete, and what waits begins at the next turn
        parts = [SamplingBatch(a, b) for a, b in zip(self._queued, self._cancelled, strict=True)]
        self._queued = [[] for _ in self._load]
        self._cancelled = [[] for _ in self._load]
        for active in self._active.values():
            if active.query.stream:
                for uid, rank in active.ranks.items():
                    parts[rank].watched[uid] = active.known.get(uid, 0)
        answers = self.leader.call("sample", seconds, parts)
        for adapter in self._leaving:
            if adapter:
                self.snapshots.release(adapter)
        self._leaving = []
        for drawn in answers:
            for sample in drawn.samples:
                self._sampled(sample)
            for uid, why in drawn.refused:
                self._refused(uid, why)
            for uid, tokens in drawn.new_tokens.items():
                self._streamed(uid, tokens)
        self._score()

    def _streamed(self, uid: str, tokens: np.ndarray) -> None:
        """More tokens of a sequence that is read while it grows."""
        request_id, _, number = uid.rpartition("/")
        active = self._active.get(request_id)
        if active is not None:
            active.known[uid] = active.known.get(uid, 0) + len(tokens)
            self.scheduler.progress(active.pending, int(number), tokens)

    def _sampled(self, sample: Sample) -> None:
        request_id, _, number = sample.uid.rpartition("/")
        active = self._active.get(request_id)
        if active is None:
            return
        index = int(number)
        self._load[active.ranks.pop(sample.uid)] -= 1
        if sample.stop == "aborted":
            self._take_out(active, RequestFailed(NOT_FINITE))
            return
        reason = "stop" if sample.stop == "stop" else "length"
        active.sequences[index] = SampledSequence(sample.tokens, np.asarray(sample.logprobs, np.float32), reason)
        if active.query.topk_sample_logprobs and len(sample.tokens):
            question = PromptLogprobsRequest(
                uid=sample.uid,
                tokens=np.concatenate([active.query.prompt, sample.tokens]),
                model=active.adapter,
                start=len(active.query.prompt),
                topk=active.query.topk_sample_logprobs,
                temperature=active.query.temperature or 1.0,
            )
            self._questions.append((active, question))
            return
        active.missing -= 1
        self._finish(active)

    def _finish(self, active: ActiveSample) -> None:
        if active.missing or active.waits_for_prompt:
            return
        self._forget(active)
        if active.adapter:
            self.snapshots.release(active.adapter)
        self.scheduler.done(active.pending, _result(active))

    def _forget(self, active: ActiveSample) -> None:
        del self._active[active.pending.request_id]
        self._bytes -= active.size

    def _refused(self, uid: str, why: str) -> None:
        active = self._active.get(uid.rpartition("/")[0])
        if active is not None:
            self._load[active.ranks.pop(uid)] -= 1
            self._take_out(active, RequestFailed(why.partition(": ")[2] or why))

    def _cancel(self, pending: PendingRequest) -> None:
        active = self._active.get(pending.request_id)
        if active is not None:
            self._take_out(active, RequestFailed("cancelled by the client"))

    def _take_out(self, active: ActiveSample, why: RequestFailed) -> None:
        for rank in set(active.ranks.values()):
            waiting = [request for request in self._queued[rank] if request.uid not in active.ranks]
            queued = {request.uid for request in self._queued[rank]}
            mine = [uid for uid, at in active.ranks.items() if at == rank]
            self._queued[rank] = waiting
            self._cancelled[rank] += [uid for uid in mine if uid not in queued]
            self._load[rank] -= len(mine)
        active.ranks.clear()
        if active.todo:
            active.todo.clear()
            actives = self._todo[active.pending.owner]
            actives.remove(active)
            if not actives:
                del self._todo[active.pending.owner]
        self._questions = [pair for pair in self._questions if pair[0] is not active]
        self._forget(active)
        self._leaving.append(active.adapter)
        self.scheduler.failed(active.pending, why)

    def abandon(self, why: str) -> None:
        """Fails everything under way: the server stops."""
        for pending in [active.pending for active in self._active.values()] + list(self._waiting):
            self.scheduler.failed(pending, RequestFailed(why, "server"))
        self._active.clear()


def _table_bytes(question: PromptLogprobsRequest) -> int:
    """What the tables of an answer take on the rank that makes them."""
    targets = 0 if question.targets is None else question.targets.size
    return CELL * (len(question.tokens) * (1 + question.topk + 2 * question.alternatives) + 2 * targets)


def _is_finite(question: PromptLogprobsRequest, stats: PromptLogprobsResult) -> bool:
    """Whether there is a number everywhere where one was asked for."""
    tables = (stats.topk_logprobs, stats.targets, stats.alt_logprobs)
    if any(table is not None and np.isnan(table).any() for table in tables):
        return False
    return stats.logprobs is None or not np.isnan(stats.logprobs[max(question.start, 1) :]).any()


def _asks(query: SamplingRequest) -> bool:
    """Whether something about the prompt is asked."""
    return bool(
        query.prompt_logprobs or query.topk_prompt_logprobs or query.prompt_alt_tokens_k or query.targets is not None
    )


def _result(active: ActiveSample) -> SampleResult:
    query, stats = active.query, active.prompt
    sequences = [sequence for sequence in active.sequences if sequence is not None]
    result = SampleResult(sequences)
    if stats is None:
        return result
    if query.prompt_logprobs:
        result.prompt_logprobs = stats.logprobs
    if query.topk_prompt_logprobs:
        result.topk_prompt = TopK(stats.topk_ids, stats.topk_logprobs)
    if query.targets is not None:
        result.targets, result.targets_csr = stats.targets, query.targets_csr
    if query.prompt_alt_tokens_k:
        result.alt_tokens, result.alt_logprobs = stats.alt_tokens, stats.alt_logprobs
    return result
