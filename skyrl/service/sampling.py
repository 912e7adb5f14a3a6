"""Sampling requests of all clients: which weights, which rank, what is asked besides the draws, and the answer.

A request becomes draws (SampleRequest, one per sample) and questions about its prompt (PromptQuery). All draws of all
tenants run in one continuous batch per rank, each with its own adapter.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from skyrl.config.serve import ServeConfig
from skyrl.sampler.prompts import PromptQuery, PromptStats
from skyrl.service.books import Books
from skyrl.service.commands import BASE, Slice
from skyrl.service.convert import check_prompt, draw_seed, sampling_params
from skyrl.service.desk import Job, RequestDesk
from skyrl.service.leader import Leader
from skyrl.service.snapshots import Snapshots
from skyrl.service.types import Refused, SampledSequence, SampleQuery, SampleResult, ServerFacts, TopK
from skyrl.types import Sample, SampleRequest, UserError

RUNNING_PER_RANK = 512  # sequences handed to one rank's sampler; the rest waits at the desk, where turns are fair


@dataclass(eq=False)
class Work:
    """One sampling request on its way."""

    job: Job
    query: SampleQuery
    adapter: str  # "" = the base
    sequences: list[SampledSequence | None]
    ranks: dict[str, int] = field(default_factory=dict)  # draw -> rank
    prompt: PromptStats | None = None
    waits_for_prompt: bool = False
    missing: int = 0


class Sampling:
    """All sampling requests that were taken from the desk. Only the worker's thread calls it."""

    def __init__(
        self,
        cfg: ServeConfig,
        leader: Leader,
        desk: RequestDesk,
        books: Books,
        facts: ServerFacts,
        snapshots: Snapshots,
    ) -> None:
        self.cfg, self.leader, self.desk, self.books, self.facts = cfg, leader, desk, books, facts
        self.snapshots = snapshots
        size = leader.world.size
        self._works: dict[str, Work] = {}
        self._queued: list[list[SampleRequest]] = [[] for _ in range(size)]
        self._cancelled: list[list[str]] = [[] for _ in range(size)]
        self._load = [0] * size
        self._questions: list[tuple[Work, PromptQuery]] = []
        self._waiting: deque[Job] = deque()  # taken from the desk, not begun
        self._filled = ""  # whose whole weights are sampled, where all parameters are trained
        self._leaving: list[str] = []  # adapters of cancelled requests, which the ranks still draw from

    @property
    def active(self) -> bool:
        """Whether there is anything to draw or to score."""
        return bool(self._works or self._leaving or self._waiting)

    def admit(self) -> None:
        """Takes requests from the desk as far as there is room, and answers questions about their prompts."""
        for job in self.desk.take_cancelled():
            self._cancel(job)
        if not self._waiting:
            self._waiting += self.desk.take_samples(RUNNING_PER_RANK * len(self._load) - sum(self._load))
        while self._waiting:
            job = self._waiting[0]
            try:
                if not self._begin(job):
                    break
            except Refused as refused:
                self.desk.failed(job, refused)
            except UserError as error:
                self.desk.failed(job, Refused(str(error)))
            self._waiting.popleft()
        self._score()

    def _begin(self, job: Job) -> bool:
        """Starts a request; False when it has to wait for those under way, which draw from other whole weights."""
        query = job.request
        assert isinstance(query, SampleQuery)
        if query.problem:
            raise Refused(query.problem)
        if job.cancelled:
            raise Refused("cancelled by the client")
        adapter = self._adapter(query, job.owner)
        if self.facts.full_parameters:
            if adapter != self._filled and (self._works or self._leaving):
                return False
            self.snapshots.fill_base(adapter)
            self._filled, adapter = adapter, ""
        # A prompt that fills the context can be scored, and nothing can be drawn after it.
        full = len(query.prompt) == self.facts.max_context and query.max_tokens == 1 and _asks(query)
        work = Work(job, query, adapter, [None] * query.num_samples)
        if full:
            check_prompt(query, self.facts)
            empty = np.zeros(0)
            work.sequences = [SampledSequence(empty.astype(np.int64), empty.astype(np.float32), "length")] * len(
                work.sequences
            )
            requests = []
        else:
            params = sampling_params(query, self.facts, job.request_id)
            tokens = query.num_samples * (len(query.prompt) + params[0].max_tokens)
            if tokens > self.cfg.service.max_tokens_per_request:
                raise Refused(
                    f"{query.num_samples} samples of up to {tokens // query.num_samples} tokens are more than "
                    f"service.max_tokens_per_request={self.cfg.service.max_tokens_per_request}"
                )
            requests = [
                SampleRequest(f"{job.request_id}/{i}", query.prompt, one, model=adapter or BASE)
                for i, one in enumerate(params)
            ]
        if adapter:
            self.snapshots.acquire(adapter)
        self._works[job.request_id] = work
        work.missing = len(requests)
        self._place(work, requests)
        if _asks(query):
            work.waits_for_prompt = True
            self._questions.append((work, self._question(work)))
        return True

    def _adapter(self, query: SampleQuery, owner: str) -> str:
        """The name of the weights to draw from, "" for the base. Raises Refused when there are none."""
        path, base, sampler_id = query.model_path, query.base_model, query.sampling_session_id
        if sampler_id is not None:
            sampler = self.books.sampler(sampler_id, owner)
            if sampler.ephemeral_run is not None:
                return sampler_id
            if sampler.model_path and sampler.version:
                return f"{sampler.model_path}#{sampler.version}"
            path, base = sampler.model_path, sampler.base_model
        if path:
            return f"{path}#{self.books.version(path, owner)}"
        if base not in self.facts.aliases:
            raise Refused(f"base_model {base!r} is not served here; there are: {', '.join(self.facts.aliases)}")
        return ""

    def _place(self, work: Work, requests: list[SampleRequest]) -> None:
        """The samples of one prompt share its prefill, so they stay together unless they would fill a rank."""
        size = len(self._load)
        each = len(requests) if len(requests) < 8 * size else -(-len(requests) // size)
        for start in range(0, len(requests), max(1, each)):
            rank = min(range(size), key=lambda r: (self._load[r], r))
            for request in requests[start : start + each]:
                work.ranks[request.uid] = rank
                self._queued[rank].append(request)
                self._load[rank] += 1

    # ---- questions about tokens that are there already -------------------------------------------------------------

    def _question(self, work: Work) -> PromptQuery:
        query, length = work.query, len(work.query.prompt)
        last = query.prompt_logprobs_last_n
        return PromptQuery(
            uid=work.job.request_id,
            tokens=query.prompt,
            model=work.adapter,
            start=0 if last is None else max(0, length - last),
            logprobs=query.prompt_logprobs,
            topk=query.topk_prompt_logprobs,
            targets=query.targets,
            alternatives=query.prompt_alt_tokens_k,
            seed=draw_seed("alternatives", query.seed if query.seed is not None else work.job.request_id),
        )

    def _score(self) -> None:
        """Answers all questions in one command, spread over the ranks by their tokens."""
        if not self._questions:
            return
        asked, self._questions = self._questions, []
        size = len(self._load)
        parts: list[list[PromptQuery]] = [[] for _ in range(size)]
        owners: list[list[tuple[Work, PromptQuery]]] = [[] for _ in range(size)]
        loads = [0] * size
        for work, question in sorted(asked, key=lambda pair: -len(pair[1].tokens)):
            rank = min(range(size), key=lambda r: (loads[r], r))
            loads[rank] += len(question.tokens)
            parts[rank].append(question)
            owners[rank].append((work, question))
        answers = self.leader.call("score", None, parts)
        for pairs, stats in zip(owners, answers, strict=True):
            for (work, question), one in zip(pairs, stats, strict=True):
                self._answered(work, question, one)

    def _answered(self, work: Work, question: PromptQuery, stats: PromptStats) -> None:
        if question.uid == work.job.request_id:
            work.prompt, work.waits_for_prompt = stats, False
        else:
            index = int(question.uid.rsplit("/", 1)[1])
            start, sequence = len(work.query.prompt), work.sequences[index]
            assert sequence is not None
            sequence.topk = TopK(stats.topk_ids[start:], stats.topk_logprobs[start:])
            work.missing -= 1
        self._finish(work)

    # ---- draws -----------------------------------------------------------------------------------------------------

    def draw(self, seconds: float) -> None:
        """A stretch of sampling on all ranks; settles what is complete."""
        if not any(self._load) and not any(self._cancelled) and not self._leaving:
            return  # what was begun is complete, and what waits begins at the next turn
        parts = [Slice(a, b) for a, b in zip(self._queued, self._cancelled, strict=True)]
        self._queued = [[] for _ in self._load]
        self._cancelled = [[] for _ in self._load]
        answers = self.leader.call("sample", seconds, parts)
        for adapter in self._leaving:
            if adapter:
                self.snapshots.release(adapter)
        self._leaving = []
        for drawn in answers:
            for sample in drawn.samples:
                self._drawn(sample)
            for uid, why in drawn.refused:
                self._refused(uid, why)
        self._score()

    def _drawn(self, sample: Sample) -> None:
        request_id, _, number = sample.uid.rpartition("/")
        work = self._works.get(request_id)
        if work is None:
            return
        index = int(number)
        self._load[work.ranks.pop(sample.uid)] -= 1
        if sample.stop == "aborted":
            self._take_out(work, Refused("the model of this request gives log-probabilities that are not finite"))
            return
        reason = "stop" if sample.stop == "stop" else "length"
        work.sequences[index] = SampledSequence(sample.tokens, np.asarray(sample.logprobs, np.float32), reason)
        if work.query.topk_sample_logprobs and len(sample.tokens):
            question = PromptQuery(
                uid=sample.uid,
                tokens=np.concatenate([work.query.prompt, sample.tokens]),
                model=work.adapter,
                start=len(work.query.prompt),
                topk=work.query.topk_sample_logprobs,
                temperature=work.query.temperature or 1.0,
            )
            self._questions.append((work, question))
            return
        work.missing -= 1
        self._finish(work)

    def _finish(self, work: Work) -> None:
        if work.missing or work.waits_for_prompt:
            return
        del self._works[work.job.request_id]
        if work.adapter:
            self.snapshots.release(work.adapter)
        self.desk.done(work.job, _result(work))

    def _refused(self, uid: str, why: str) -> None:
        work = self._works.get(uid.rpartition("/")[0])
        if work is not None:
            self._load[work.ranks.pop(uid)] -= 1
            self._take_out(work, Refused(why.partition(": ")[2] or why))

    def _cancel(self, job: Job) -> None:
        work = self._works.get(job.request_id)
        if work is not None:
            self._take_out(work, Refused("cancelled by the client"))

    def _take_out(self, work: Work, why: Refused) -> None:
        for uid, rank in work.ranks.items():
            waiting = [request for request in self._queued[rank] if request.uid != uid]
            if len(waiting) == len(self._queued[rank]):
                self._cancelled[rank].append(uid)
            self._queued[rank] = waiting
            self._load[rank] -= 1
        self._questions = [pair for pair in self._questions if pair[0] is not work]
        del self._works[work.job.request_id]
        self._leaving.append(work.adapter)
        self.desk.failed(work.job, why)

    def abandon(self, why: str) -> None:
        """Fails everything under way: the server stops."""
        for job in [work.job for work in self._works.values()] + list(self._waiting):
            self.desk.failed(job, Refused(why, "server"))
        self._works.clear()


def _asks(query: SampleQuery) -> bool:
    """Whether something about the prompt is asked."""
    return bool(
        query.prompt_logprobs or query.topk_prompt_logprobs or query.prompt_alt_tokens_k or query.targets is not None
    )


def _result(work: Work) -> SampleResult:
    query, stats = work.query, work.prompt
    sequences = [sequence for sequence in work.sequences if sequence is not None]
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
