"""Sampling requests of all clients: which weights, which rank, what is asked besides the draws, and the answer.

A request becomes draws (SampleRequest, one per sample) and questions about its prompt (PromptLogprobsRequest). All
draws of all models run in one continuous batch per rank, each with its own adapter. Large requests are handed to the
ranks in parts, in turn with the others'.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Literal, TypeVar

import numpy as np

from skyrl.config.schema import RunConfig
from skyrl.distributed.balance import RUNNING_PER_RANK, Pace, deal_by_length
from skyrl.envs import clock
from skyrl.rollout import draw_seed
from skyrl.sampler.prompts import PromptLogprobsRequest, PromptLogprobsResult
from skyrl.service.commands import NOT_FINITE, SOON, Leader, Problem, SamplingBatch
from skyrl.service.messages import (
    RecordedSequence,
    RequestFailed,
    SampledSequence,
    SampleResult,
    SamplingRequest,
    ServerInfo,
    TopK,
)
from skyrl.service.pending import PendingSample
from skyrl.service.scheduler import ENDED, LARGE_SAMPLE, RECENT_SECONDS, RequestScheduler
from skyrl.service.storage.checkpoints import CheckpointService
from skyrl.service.storage.snapshots import Snapshots
from skyrl.service.validation import (
    CELL,
    FLIGHT_BYTES,
    SCORE_BYTES,
    SCORE_TOKENS,
    answer_bytes,
    check_prompt,
    check_sample,
    sampling_params,
)
from skyrl.types import Sample, SampleRequest, UserError

T = TypeVar("T")
SHARED_SLICES = 8  # a sample is told when a slice ends: beside others a short one would wait for most of a long slice
LONGEST_STRETCH = 2.0  # of work that nothing interrupts, and of sampling after it
RECORDED_SECONDS, RECORDED_BYTES = 86400.0, 1 << 30  # of the sequences that are recorded
FEW = 8  # sequences of a client that are told as soon as they are drawn, beside others
TOGETHER = LARGE_SAMPLE  # samples of one prompt that are handed over at once, to share its prefill
NOTHING = SampledSequence(np.zeros(0, np.int64), np.zeros(0, np.float32), "length")


class Recordings:
    """The sequences that clients asked to be recorded (record_stability_info), in memory: each belongs to its session,
    for a day after it was drawn or last used. Only the worker's thread calls it."""

    def __init__(self) -> None:
        # session -> sequence id -> (when last used, the sequence), in the order of last use
        self._of: dict[str, OrderedDict[str, tuple[float, RecordedSequence]]] = {}
        self._bytes: Counter[str] = Counter()

    def add(self, session: str, sequence_id: str, sequence: RecordedSequence) -> None:
        """Keeps a sequence; beyond RECORDED_BYTES the oldest of the session that has most are thrown away."""
        self._of.setdefault(session, OrderedDict())[sequence_id] = (clock.now(), sequence)
        self._bytes[session] += sequence.size
        while self._bytes.total() > RECORDED_BYTES:
            self._drop(max(self._bytes, key=self._bytes.__getitem__))

    def find(self, session: str, sequence_id: str) -> RecordedSequence:
        """A sequence of this session, which is kept for another day. Raises RequestFailed."""
        self.expire(session)
        kept = self._of.get(session, OrderedDict())
        if sequence_id not in kept:
            raise RequestFailed(
                f"sequence {sequence_id[:100]!r} is not recorded: sample it in this session with "
                "record_stability_info=True, and train on it within a day; a restart of the server forgets it"
            )
        kept[sequence_id] = (clock.now(), kept[sequence_id][1])
        kept.move_to_end(sequence_id)
        return kept[sequence_id][1]

    def expire(self, *sessions: str) -> None:
        """Forgets what was not used for a day, of all sessions or some."""
        before = clock.now() - RECORDED_SECONDS
        for session in sessions or list(self._of):
            while session in self._of and next(iter(self._of[session].values()))[0] < before:
                self._drop(session)

    def _drop(self, session: str) -> None:
        _, (_, oldest) = self._of[session].popitem(last=False)
        self._bytes[session] -= oldest.size
        if not self._of[session]:
            self.forget_session(session)

    def sessions(self) -> set[str]:
        """Sessions that have some."""
        return set(self._of)

    def forget_session(self, session: str) -> None:
        """A session has ended: nobody can name its sequences any more."""
        self._of.pop(session, None)
        self._bytes.pop(session, None)


class Sampling:
    """All sampling requests that were taken from the scheduler. Only the worker's thread calls it."""

    def __init__(
        self,
        cfg: RunConfig,
        leader: Leader,
        scheduler: RequestScheduler,
        checkpoints: CheckpointService,
        facts: ServerInfo,
        snapshots: Snapshots,
    ) -> None:
        self.cfg, self.leader, self.scheduler = cfg, leader, scheduler
        self.checkpoints, self.facts, self.snapshots = checkpoints, facts, snapshots
        self.recordings = Recordings()
        self._active: dict[str, PendingSample] = {}
        self._batches = self._empty_batches()  # what each rank is told next
        self._load = [0] * len(self._batches)  # sequences of each rank
        self._unsent: OrderedDict[str, deque[PendingSample]] = OrderedDict()  # by client: with draws that no rank has
        self._bytes = 0  # of the answers to all active requests, at most
        self._questions: list[tuple[PendingSample, PromptLogprobsRequest]] = []
        self._waiting: deque[PendingSample] = deque()  # taken from the scheduler, not begun
        self._filled = ""  # whose whole weights are sampled, where all parameters are trained
        self._pace, self._seen = Pace(), dict[str, float]()  # when each client last asked for samples
        self._token_seconds = 0.0  # that a token of a question took last
        self._leaving: list[str] = []  # adapters of cancelled requests, which the ranks still draw from
        self.held = False  # nothing more is handed to the ranks

    def _empty_batches(self) -> list[SamplingBatch]:
        return [SamplingBatch() for _ in range(self.leader.world.dp_size)]

    @property
    def active(self) -> bool:
        """Whether there is anything to draw or to score."""
        return bool(self._active or self._leaving or self._waiting)

    @property
    def drawing(self) -> bool:
        """Whether ranks have something to draw, or something about drawn tokens is to be scored."""
        return bool(any(self._load) or self._questions)

    def slice_seconds(self) -> float:
        """The longest stretch of sampling, or of answering questions, after which others have their turn."""
        return self.cfg.service.slice_seconds / (SHARED_SLICES if len(self._sharing()) > 1 else 1)

    def _sharing(self) -> set[str]:
        """The clients that have samples under way, or asked for some lately."""
        oldest = time.monotonic() - RECENT_SECONDS
        self._seen = {client: at for client, at in self._seen.items() if at >= oldest}
        return self._seen.keys() | {pending.client for pending in self._active.values()}

    def sessions(self) -> set[str]:
        """Sessions that have samples, recorded sequences, or snapshots without a name."""
        begun = {one.session for one in (*self._active.values(), *self._waiting)} - {""}
        return begun | self.scheduler.sampling_sessions() | self.snapshots.sessions() | self.recordings.sessions()

    def withdraw(self, which: Callable[[PendingSample], bool], why: str) -> None:
        """Withdraws all samples of that kind, wherever they are; what the ranks draw leaves them with the next turn."""
        self.scheduler.withdraw(which, why)
        for pending in [one for one in self._active.values() if which(one)]:
            self._take_out(pending, RequestFailed(why))
        for pending in [one for one in self._waiting if which(one)]:
            self._waiting.remove(pending)
            self.scheduler.failed(pending, RequestFailed(why))

    def admit(self) -> None:
        """Takes requests from the scheduler as far as there is room."""
        for pending in self.scheduler.take_cancelled():
            if pending.request_id in self._active:
                self._take_out(pending, RequestFailed(pending.cancelled))
        if not (self._waiting and self.facts.full_parameters):
            unsent = sum(min(len(one.unsent), TOGETHER) for some in self._unsent.values() for one in some)
            room = RUNNING_PER_RANK * len(self._load) - len(self._questions) - unsent
            self._waiting += self.scheduler.take_samples(room, without=frozenset(one.client for one in self._waiting))
        later: deque[PendingSample] = deque()
        while self._waiting:
            pending = self._waiting.popleft()
            try:
                if not self._begin(pending, pending.request):
                    later.append(pending)
                    if self.facts.full_parameters:
                        break  # others would go on with the weights of now for ever
            except (RequestFailed, UserError) as error:
                self.scheduler.failed(pending, error)
        self._waiting.extendleft(reversed(later))

    def _begin(self, pending: PendingSample, request: SamplingRequest) -> bool:
        """Starts a request; False when it has to wait: for those under way, which draw from other whole weights, or
        for memory."""
        if request.problem:
            raise RequestFailed(request.problem)
        if pending.cancelled:
            raise RequestFailed(pending.cancelled)
        # A prompt that fills the context can be scored, and nothing can be drawn after it.
        wanted = request.sampling_params.max_tokens
        full = len(request.prompt) == self.facts.max_context and wanted == 1 and _asks(request)
        check_prompt(request, self.facts)
        longest = 0 if full else self.facts.max_context - len(request.prompt)
        longest = longest if wanted is None else min(longest, wanted)
        check_sample(request, longest, self.cfg.service)
        params = [] if full else sampling_params(request, self.facts, pending.request_id)
        size = answer_bytes(request, longest)
        if self._active and self._bytes + size > FLIGHT_BYTES:
            return False
        adapter = self._adapter(request, pending)
        if self.facts.full_parameters:
            if adapter != self._filled and (self._active or self._leaving):
                return False
            self.snapshots.fill_base(adapter)
            self._filled, adapter = adapter, ""
        if adapter:
            if self.snapshots.crowded(adapter):
                return False
            self.snapshots.acquire(adapter)
        self._active[pending.request_id] = pending
        self._seen[pending.client] = time.monotonic()
        self._bytes += size
        pending.adapter, pending.answer_bytes = adapter, size
        pending.answer = SampleResult([NOTHING] * request.num_samples)
        pending.unanswered = len(params) + _asks(request)
        pending.unsent.extend(
            SampleRequest(name, request.prompt, one, model=adapter)
            for name, one in zip(pending.sequence_ids, params, strict=False)
        )
        if params:
            self._unsent.setdefault(pending.client, deque()).append(pending)
        if _asks(request):
            self._questions.append((pending, _prompt_question(pending, request)))
        return True

    def _adapter(self, request: SamplingRequest, pending: PendingSample) -> str:
        """The name of the weights to draw from, "" for the base. Raises RequestFailed when there are none, or its
        session or model has ended."""
        path, base, sampler_id = request.model_path, request.base_model, request.sampling_session_id
        store, owner = self.checkpoints.store, pending.owner
        if sampler_id is not None:
            sampler = store.get_sampler(sampler_id, owner)
            if store.live.ended([pending.session]):
                raise RequestFailed(f"{sampler_id}: {ENDED}")
            if sampler.ephemeral_run is not None:
                if why := self.scheduler.why_gone(sampler.ephemeral_run):
                    raise RequestFailed(f"{sampler_id}: its weights have no name, and ended with their model: {why}")
                pending.drawn_from = sampler.ephemeral_run
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
        """Draws to the ranks while they have room: one client after the other, and each one's requests in turn. The
        samples of one prompt share its prefill, so they stay together unless they would fill a rank."""
        ranks = range(len(self._load))
        allowed = self._allowances()
        while not self.held and self._unsent and min(self._load) < RUNNING_PER_RANK:
            client = next((one for one in self._unsent if allowed.get(one, TOGETHER) > 0), None)
            if client is None:
                break
            waiting = self._unsent.pop(client)
            pending = waiting.popleft()
            total = pending.num_samples
            each = total if total < 8 * len(ranks) else min(TOGETHER, -(-total // len(ranks)))
            each = min(each, len(pending.unsent), allowed.get(client, each))
            if client in allowed:
                allowed[client] -= each
            rank = min(ranks, key=lambda r: (self._load[r], r))
            for _ in range(each):
                request = pending.unsent.popleft()
                pending.ranks[request.uid] = rank
                self._batches[rank].requests.append(request)
                self._load[rank] += 1
            if pending.unsent:
                waiting.append(pending)
            if waiting:
                self._unsent[client] = waiting

    def _allowances(self) -> dict[str, int]:
        """How many more sequences each client may draw now; {} while one is alone, who may have all the room."""
        if (sharing := len(self._sharing())) < 2:
            return {}
        own = Counter({client: 0 for client in self._unsent})
        for pending in self._active.values():
            own[pending.client] += len(pending.ranks)
        most = self._pace.room() * len(self._load)
        return {client: most // sharing + 1 - count for client, count in own.items()}

    # ---- questions about tokens that are there already -------------------------------------------------------------

    def score(self) -> None:
        """Answers questions in one command, spread over the ranks by their tokens: what fits its budgets and takes
        LONGEST_STRETCH (with several clients a slice), one client's after the other's. The rest comes next turn."""
        if not self._questions:
            return
        world = self.leader.world
        ordered = round_robin((pair[0].client, pair) for pair in self._questions)
        asked: list[tuple[PendingSample, PromptLogprobsRequest]] = []
        tokens, cells, most = 0, 0, float(SCORE_TOKENS * world.dp_size)
        if self._token_seconds:
            seconds = self.slice_seconds() if len(self._sharing()) > 1 else LONGEST_STRETCH
            most = min(most, seconds / self._token_seconds)
        for pending, question in ordered:
            tokens += len(question.tokens)
            targets = 0 if question.targets is None else question.targets.size
            columns = 1 + question.topk + 2 * question.alternatives
            cells += CELL * (len(question.tokens) * columns + 2 * targets)  # the tables of an answer, on its rank
            if asked and (tokens > most or cells > SCORE_BYTES):
                break
            asked.append((pending, question))
        self._questions = ordered[len(asked) :]
        dealt = deal_by_length(world, [len(question.tokens) for _, question in asked])
        parts = [[asked[index][1] for index in part] for part in dealt]
        begun = time.monotonic()
        answers = self.leader.call("score", parts=parts)
        self._token_seconds = (time.monotonic() - begun) / sum(len(question.tokens) for _, question in asked)
        for part, results in zip(dealt, answers, strict=True):
            for index, result in zip(part, results, strict=True):
                pending, question = asked[index]
                if pending.request_id in self._active:  # no earlier answer has ended it
                    self._answered(pending, question, result)

    def _answered(
        self, pending: PendingSample, question: PromptLogprobsRequest, result: PromptLogprobsResult | Problem
    ) -> None:
        answer = pending.answer
        assert answer is not None
        if isinstance(result, Problem) or not _is_finite(question, result):
            self._take_out(pending, RequestFailed(result.text if isinstance(result, Problem) else NOT_FINITE))
            return
        topk = None
        if result.topk_ids is not None and result.topk_logprobs is not None:
            topk = TopK(result.topk_ids, result.topk_logprobs)
        if question.uid != pending.request_id:
            answer.sequences[_place(question.uid)[1]].topk = topk
        else:
            answer.topk_prompt, answer.prompt_logprobs = topk, result.logprobs
            answer.targets, answer.targets_csr = result.targets, pending.request.targets_csr
            answer.alt_tokens, answer.alt_logprobs = result.alt_tokens, result.alt_logprobs
        self._complete_one(pending)

    # ---- draws -----------------------------------------------------------------------------------------------------

    def draw(self, seconds: float) -> bool:
        """A stretch of sampling on all ranks; settles what is complete. False when there was nothing to draw."""
        self._hand_over()
        if not any(self._load) and not any(batch.cancelled for batch in self._batches) and not self._leaving:
            return False  # what was begun is complete, and what waits begins at the next turn
        batches, self._batches = self._batches, self._empty_batches()
        shared = len(self._sharing()) > 1
        own, awaited = Counter[str](), set[str]()
        for pending in self._active.values():
            own[pending.client] += len(pending.ranks) + len(pending.unsent)
        for pending in self._active.values():
            if shared and own[pending.client] <= FEW:
                awaited.update(pending.ranks)
            if pending.request.stream:
                for uid, rank in pending.ranks.items():
                    batches[rank].watched[uid] = pending.known.get(uid, 0)
        if len(batches) > 1 and 0 < len(awaited) < sum(self._load):
            seconds *= SOON  # all ranks end together: one that ended alone would be idle, and tell nobody
        else:
            for batch in batches:
                batch.awaited = awaited
        outputs = self.leader.call("sample", seconds, parts=batches)
        for adapter in self._leaving:
            if adapter:
                self.snapshots.release(adapter)
        self._leaving = []
        for load, output in zip(tuple(self._load), outputs, strict=False):
            if load and output.step_seconds:
                self._pace.note(load, output.step_seconds)
            for sample in output.samples:
                self._sampled(sample)
            for uid, why in output.refused:
                if (refused := self._ended(uid)) is not None:
                    self._take_out(refused, RequestFailed(why.partition(": ")[2] or why))
            for uid, tokens in output.new_tokens.items():
                if (growing := self._active.get(_place(uid)[0])) is not None:
                    growing.known[uid] = growing.known.get(uid, 0) + len(tokens)
                    self.scheduler.progress(growing, _place(uid)[1], tokens)
        return True

    def _ended(self, uid: str) -> PendingSample | None:
        """The request of a draw that no rank has any more; None when it was taken out."""
        if (pending := self._active.get(_place(uid)[0])) is not None:
            self._load[pending.ranks.pop(uid)] -= 1
        return pending

    def _sampled(self, sample: Sample) -> None:
        if (pending := self._ended(sample.uid)) is None:
            return
        if sample.stop == "aborted":
            self._take_out(pending, RequestFailed(NOT_FINITE))
            return
        reason: Literal["stop", "length"] = "stop" if sample.stop == "stop" else "length"
        assert pending.answer is not None
        sequence = SampledSequence(
            sample.tokens, np.asarray(sample.logprobs, np.float32), reason, version=sample.version
        )
        pending.answer.sequences[_place(sample.uid)[1]] = sequence
        request: SamplingRequest = pending.request
        if request.topk_sample_logprobs and len(sample.tokens):
            question = PromptLogprobsRequest(
                uid=sample.uid,
                tokens=np.concatenate([request.prompt, sample.tokens]),
                model=pending.adapter,
                start=len(request.prompt),
                topk=request.topk_sample_logprobs,
                temperature=request.sampling_params.temperature or 1.0,
                tail=True,
            )
            self._questions.append((pending, question))
        else:
            self._complete_one(pending)

    def _complete_one(self, pending: PendingSample) -> None:
        """One sample, or what was asked about the prompt, is complete."""
        pending.unanswered -= 1
        if pending.unanswered:
            return
        self._forget(pending)
        if pending.adapter:
            self.snapshots.release(pending.adapter)
        assert pending.answer is not None
        if pending.request.record_stability_info:
            length, weights = len(pending.request.prompt), pending.adapter or self._filled
            for name, drawn in zip(pending.sequence_ids, pending.answer.sequences, strict=True):
                recorded = RecordedSequence(length, drawn.tokens, drawn.logprobs, weights)
                self.recordings.add(pending.session, name, recorded)
        self.scheduler.done(pending, pending.answer)

    def _forget(self, pending: PendingSample) -> None:
        del self._active[pending.request_id]
        self._bytes -= pending.answer_bytes

    def _take_out(self, pending: PendingSample, why: RequestFailed) -> None:
        for rank, batch in enumerate(self._batches):
            if mine := [uid for uid, at in pending.ranks.items() if at == rank]:
                unseen = {request.uid for request in batch.requests}
                batch.requests = [request for request in batch.requests if request.uid not in pending.ranks]
                batch.cancelled += [uid for uid in mine if uid not in unseen]
                self._load[rank] -= len(mine)
        pending.ranks.clear()
        if pending.unsent:
            pending.unsent.clear()
            self._unsent[pending.client].remove(pending)
            if not self._unsent[pending.client]:
                del self._unsent[pending.client]
        self._questions = [pair for pair in self._questions if pair[0] is not pending]
        self._forget(pending)
        self._leaving.append(pending.adapter)
        self.scheduler.failed(pending, why)

    def abandon(self, why: str) -> None:
        """Fails everything under way: the server stops."""
        for pending in [*self._active.values(), *self._waiting]:
            self.scheduler.failed(pending, RequestFailed(why, "server"))
        self._active.clear()


def _place(uid: str) -> tuple[str, int]:
    """The request of a draw, and the number of its sample."""
    request_id, _, number = uid.rpartition(":")
    return request_id, int(number)


def _prompt_question(pending: PendingSample, request: SamplingRequest) -> PromptLogprobsRequest:
    length, last, seed = len(request.prompt), request.prompt_logprobs_last_n, request.sampling_params.seed
    return PromptLogprobsRequest(
        uid=pending.request_id,
        tokens=request.prompt,
        model=pending.adapter,
        start=0 if last is None else max(0, length - last),
        logprobs=request.prompt_logprobs,
        topk=request.topk_prompt_logprobs,
        targets=request.targets,
        alternatives=request.prompt_alt_tokens_k,
        seed=draw_seed("alternatives", pending.request_id if seed is None else seed),
    )


def _is_finite(question: PromptLogprobsRequest, result: PromptLogprobsResult) -> bool:
    """Whether there is a number everywhere where one was asked for."""
    tables = (result.topk_logprobs, result.targets, result.alt_logprobs)
    if any(table is not None and np.isnan(table).any() for table in tables):
        return False
    return result.logprobs is None or not np.isnan(result.logprobs[max(question.start, 1) :]).any()


def _asks(request: SamplingRequest) -> bool:
    """Whether something about the prompt is asked."""
    return bool(
        request.prompt_logprobs
        or request.topk_prompt_logprobs
        or request.prompt_alt_tokens_k
        or request.targets is not None
    )


def round_robin(items: Iterable[tuple[Hashable, T]]) -> list[T]:
    """The items of (whose, item) in an order in which everybody has a turn after the other; each one's own order
    stays."""
    seen: dict[Hashable, int] = {}
    found = []
    for whose, item in items:
        seen[whose] = seen.get(whose, -1) + 1
        found.append((seen[whose], item))
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]
